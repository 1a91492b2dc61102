"""How a new version goes from group to group: one step of a run, at the hub. Pure; time is an argument.

In: the rules (a Rollout's spec in numbers), its status, its targets and nodes as they are now. Out: the status that
follows, and when to look again. A node that is let on has to prove the version: to be well on the new digest for the
whole health window. So many nodes at once as the group's batch says; a new one is let on when one has proven itself.
When more fail than may, nothing more is let on and everything that was touched goes back. What a node does with the
status it decides itself (``release.py``), so a node that hears nothing stays where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import msgspec

from edgeward.workloads.outcome import Node, Target, has_all, is_back, verdict
from edgeward.workloads.release import GroupStatus, Handled, Status, Trying, Version

#: The group of all that no declared group takes.
REST = "rest"


class Amount(msgspec.Struct, frozen=True):
    """A number of nodes, or a share of some (``percent``)."""

    value: float
    percent: bool = False

    def of(self, total: int, least: int = 0) -> int:
        """Of ``total`` nodes: rounded down, at least ``least``."""
        return max(least, int(self.value * total / 100) if self.percent else int(self.value))


class GroupRules(msgspec.Struct, frozen=True):
    """One group. ``takes``: whether a node (name, site, labels) is one of it; ``size``: how many it has at most;
    ``batch``: how many of them are at it at once; ``opens``: whether it may let nodes on, and until when (0: ever)."""

    name: str
    takes: Callable[[Node], bool] = lambda _: True
    size: Amount | None = None
    batch: Amount | None = None
    success: Amount = Amount(1)
    window: float = 30.0
    approval: bool = False
    opens: Callable[[float], tuple[bool, float]] = lambda _: (True, 0.0)


class Rules(msgspec.Struct, frozen=True):
    """A Rollout's spec in seconds and numbers."""

    groups: tuple[GroupRules, ...] = ()
    failures: Amount = Amount(0)
    silent_after: float = 600.0
    timeout: float = 600.0
    paused: bool = False
    #: ``run/group``: a group that may begin; ``run``: one that was cancelled and begins again.
    approved: frozenset[str] = frozenset()
    cancelled: str = ""
    #: How what no group takes is moved.
    rest: GroupRules = GroupRules(REST)


class Step(msgspec.Struct):
    """``look``: seconds until something may follow without news; None: nothing will."""

    status: Status
    look: float | None = None
    #: What happened, as events: (Normal or Warning, reason, message).
    events: list[tuple[str, str, str]] = []

    def soon(self, seconds: float) -> None:
        self.look = max(0.0, seconds) if self.look is None else max(0.0, min(self.look, seconds))


# -- targets -------------------------------------------------------------------------------------------------------


def follow(old: list[Handled], targets: list[Target], made: str) -> list[Handled]:
    """The targets as the next run knows them. What was there before the Rollout (``made``) is its own baseline."""
    known = {(t.kind, t.name, t.uid): t for t in old}
    found: list[Handled] = []
    for t in targets:
        now = Version(t.generation, t.digest, t.parts)
        was = known.get((t.kind, t.name, t.uid))
        baseline = was.baseline if was is not None else now if t.created <= made else None
        if baseline is not None and baseline.digest == t.digest:
            baseline = now  # the same version under a later number
        found.append(Handled(t.kind, t.name, t.uid, t.generation, t.digest, baseline))
    return found


def run_of(targets: list[Handled]) -> str:
    """The name of the run that moves these; empty when there is nothing to move."""
    moving = sorted(f"{t.kind}/{t.name}/{t.uid}/{t.digest}" for t in targets if t.moves)
    return hashlib.sha256("\n".join(moving).encode()).hexdigest()[:10] if moving else ""


# -- the step ------------------------------------------------------------------------------------------------------


def step(rules: Rules, old: Status, targets: list[Target], nodes: list[Node], now: float, made: str) -> Step:
    """What follows from ``old``. ``made``: when the Rollout was created (RFC 3339)."""
    status = msgspec.convert(msgspec.to_builtins(old), Status)
    s = Step(status)
    status.targets = follow(old.targets, targets, made)
    run = run_of(status.targets)
    if not run:
        _rest(rules, s, old, targets)
        return s
    expected = frozenset[str]().union(*(t.expected for t in targets))
    status.ungoverned = sorted(n.name for n in nodes if n.name in expected and not n.governed)
    fleet = {n.name: n for n in nodes if n.name in expected and n.governed}
    resumed = status.cancelled and old.phase == "RolledBack" and rules.cancelled != run and run in rules.approved
    if run != status.run or resumed:
        _begin(s, run, now)
    status.prefetched = sum(has_all(n, targets) for n in fleet)
    _regroup(rules, status)
    if status.phase in ("Succeeded", "RolledBack"):
        return s
    if status.phase != "Failed":
        if rules.cancelled == run:
            status.cancelled = True
            _fail(s, "was cancelled")
        else:
            _watch(rules, s, targets, fleet, {n.name: n for n in nodes}, now)
    if status.phase == "Failed":
        _go_back(s, targets, fleet)
        return s
    if rules.paused:
        status.phase, status.message = "Paused", "paused"
        return s
    _let_on(rules, s, targets, fleet, now)
    if status.phase == "Failed":
        _go_back(s, targets, fleet)
    return s


def _rest(rules: Rules, s: Step, old: Status, targets: list[Target]) -> None:
    """Nothing to move."""
    status = s.status
    if not targets:
        s.status = Status(message="no target is there yet")
    elif old.phase != "Succeeded":
        # they are where they are, or whoever declared something new took it back
        groups = [GroupStatus(g.name, "Succeeded") for g in rules.groups]
        s.status = Status("Succeeded", groups=groups, targets=status.targets)
    else:
        status.message = ""


def _begin(s: Step, run: str, now: float) -> None:
    status = s.status
    over = status.run and status.phase not in ("Succeeded", "RolledBack")
    if over:
        s.events.append(("Normal", "RolloutSuperseded", f"run {status.run} ends: something newer was declared"))
    status.run, status.phase, status.message, status.started = run, "Pending", "", now
    status.groups, status.updating, status.cancelled = [], {}, False
    moving = ", ".join(f"{t.kind}/{t.name}" for t in status.targets if t.moves)
    s.events.append(("Normal", "RolloutStarted", f"run {run} moves {moving}"))


def _regroup(rules: Rules, status: Status) -> None:
    """The groups in the declared order. One that was taken out of the declaration and has let nodes on stays first."""
    known = {g.name: g for g in status.groups}
    names = [*(g.name for g in rules.groups), REST]
    gone = [g for g in status.groups if g.name not in names and g.nodes]
    status.groups = [*gone, *(known.get(n) or GroupStatus(n) for n in names)]


def _touched(status: Status) -> set[str]:
    return {n for g in status.groups for n in g.nodes}


def _fail(s: Step, why: str) -> None:
    status = s.status
    status.phase, status.message = "Failed", f"{why}; what was touched goes back"
    status.updating = {}
    for g in status.groups:
        if g.phase == "Running":
            g.phase = "Failed"
    s.events.append(("Warning", "RolloutFailed", f"run {status.run} {why}"))


def _go_back(s: Step, targets: list[Target], fleet: Mapping[str, Node]) -> None:
    """Until all that were touched and are heard say that they are back; who is silent goes back when it hears it."""
    status = s.status
    touched = sorted(_touched(status) & fleet.keys())
    waits = [n for n in touched if fleet[n].online and not is_back(n, targets, status.targets)]
    if waits:
        return
    unheard = [n for n in touched if not fleet[n].online]
    status.phase = "RolledBack"
    if unheard:
        status.message += f"; not heard since: {', '.join(unheard[:10])}"
    for g in status.groups:
        if g.nodes:
            g.phase = "RolledBack"
    s.events.append(("Warning", "RolloutRolledBack", f"run {status.run}: {len(touched)} nodes are at the baseline"))


def _watch(
    rules: Rules, s: Step, targets: list[Target], fleet: Mapping[str, Node], everyone: Mapping[str, Node], now: float
) -> None:
    """What became of the nodes that were let on; too many failures end the run."""
    status = s.status
    by_name = {g.name: g for g in rules.groups}
    for group in status.groups:
        how = by_name.get(group.name) or rules.rest
        closed = _renew(how, s, group, now)
        for name in list(group.nodes):
            node = everyone.get(name)
            if node is None or (name not in fleet and node.online):
                # it has nothing of the targets any more; a dead one, whose share others took, counts as silent
                status.updating.pop(name, None)
                group.nodes = [n for n in group.nodes if n != name]
            elif name not in group.failed:
                _node(rules, how, s, group, node, targets, now, closed)
        group.done = sum(n not in status.updating and n not in group.failed for n in group.nodes)
    failed = {n: why for g in status.groups for n, why in g.failed.items()}
    if len(failed) > rules.failures.of(len(fleet)):
        first = sorted(failed)[0]
        _fail(s, f"{len(failed)} of {len(_touched(status))} nodes failed ({first}: {failed[first]})")


def _renew(how: GroupRules, s: Step, group: GroupStatus, now: float) -> bool:
    """Whether the window has closed behind the group; with the next one its nodes have their time anew."""
    if not group.until or now <= group.until:
        return False
    open_, until = how.opens(now)
    if open_:
        group.until = until
        for name in group.nodes:
            if (trying := s.status.updating.get(name)) is not None and not trying.good:
                trying.released = now
    elif until:
        s.soon(until - now)
    return not open_


def _node(
    rules: Rules,
    how: GroupRules,
    s: Step,
    group: GroupStatus,
    node: Node,
    targets: list[Target],
    now: float,
    closed: bool,
) -> None:
    """One node that was let on."""
    said, why = verdict(node.name, targets, s.status.targets)
    trying = s.status.updating.get(node.name)
    if trying is not None:
        said, why = _judge(rules, s, trying, node, said, why, how.window, now, closed)
    elif not node.online:
        return  # it has proven itself before
    if said == "bad":
        group.failed[node.name] = why
    if said == "left":
        group.nodes = [n for n in group.nodes if n != node.name]
    if said in ("bad", "proven", "left"):
        s.status.updating.pop(node.name, None)


def _judge(
    rules: Rules, s: Step, trying: Trying, node: Node, how: str, why: str, window: float, now: float, closed: bool
) -> tuple[str, str]:
    """One node that has to prove itself: also ``proven``, or ``left`` for later."""
    if not node.online:
        # it was there when it was let on: a version that takes boxes away looks just like this
        trying.good, trying.silent = 0.0, trying.silent or now
        if now - trying.silent >= rules.silent_after:
            return "bad", f"silent for {rules.silent_after:g} s after it was let on"
        s.soon(trying.silent + rules.silent_after - now)
        return "busy", ""
    if node.held and how == "busy":
        # its site said stop before it had begun: it begins when the site says so
        trying.good, trying.silent = 0.0, trying.silent or now
        if now - trying.silent >= rules.silent_after:
            return "left", ""
        s.soon(trying.silent + rules.silent_after - now)
        return "busy", ""
    trying.silent = 0.0
    if how == "good":
        trying.good = trying.good or now
        if now - trying.good >= window:
            return "proven", ""
        s.soon(trying.good + window - now)
        return "busy", ""
    trying.good = 0.0
    if how == "busy" and not closed:
        if now - trying.released >= rules.timeout:
            return "bad", f"not well within {rules.timeout:g} s"
        s.soon(trying.released + rules.timeout - now)
    return how, why


def _let_on(rules: Rules, s: Step, targets: list[Target], fleet: Mapping[str, Node], now: float) -> None:
    """Lets nodes of the first group that is not done on; with all groups done the run has succeeded."""
    status = s.status
    by_name = {g.name: g for g in rules.groups}
    for group in status.groups:
        if group.phase == "Succeeded":
            continue
        how = by_name.get(group.name) or rules.rest
        if not _group(rules, how, s, group, fleet, now):
            _say(s, group)
            return
        if status.phase == "Failed":
            return
        group.phase, group.message = "Succeeded", ""
        if group.nodes:
            s.events.append(("Normal", "RolloutGroupDone", f"run {status.run}: group {group.name}, {group.done} nodes"))
    status.phase, status.message = "Succeeded", ""
    if status.groups and not status.groups[-1].total and rules.groups:
        status.groups.pop()  # nothing was left over
    parts = {(t.kind, t.name): t.parts for t in targets}
    for t in status.targets:
        t.baseline = Version(t.generation, t.digest, parts[t.kind, t.name])
    s.events.append(("Normal", "RolloutSucceeded", f"run {status.run}: everything has the new version"))


def _say(s: Step, group: GroupStatus) -> None:
    status = s.status
    waits = group.phase == "Waiting" and "approval" in group.message
    status.phase = "Paused" if waits else "Running" if _touched(status) else "Pending"
    status.message = f"group {group.name}: {group.message}" if group.message else ""


def _group(rules: Rules, how: GroupRules, s: Step, group: GroupStatus, fleet: Mapping[str, Node], now: float) -> bool:
    """Whether the group is done; lets on who may be."""
    status = s.status
    touched = _touched(status)
    mine = [n for n in sorted(fleet) if n not in touched and how.takes(fleet[n])]
    size = how.size.of(len(fleet), least=1) if how.size is not None else len(mine) + len(group.nodes)
    group.total = min(size, len(mine) + len(group.nodes))
    if not group.total:
        return True
    if how.approval and not group.nodes and f"{status.run}/{group.name}" not in rules.approved:
        group.phase, group.message = "Waiting", "waits for approval"
        return False
    group.since = group.since or now
    room = size - len(group.nodes)
    ready = [n for n in mine if fleet[n].online and not fleet[n].held][: max(0, room)]
    away = [n for n in mine if n not in ready][: max(0, room - len(ready))]
    group.late = len(away)
    busy = [n for n in group.nodes if n in status.updating]
    if ready:
        return _release(how, s, group, ready, len(busy), now)
    if busy:
        group.phase, group.message = "Running", ""
        return False
    silent = [n for n in away if not fleet[n].held]
    if silent and now - group.since < rules.silent_after:
        group.phase, group.message = "Waiting", f"waits for {', '.join(silent[:5])}"
        s.soon(group.since + rules.silent_after - now)
        return False
    wanted = min(group.total, how.success.of(group.total, least=1))
    if group.done >= wanted:
        return True
    if away:
        group.phase, group.message = "Waiting", f"{group.done} of {wanted} have proven it, {len(away)} are away or held"
        return False
    _fail(s, f"group {group.name}: {group.done} of {group.total} nodes have proven it, {wanted} were wanted")
    return True


def _release(how: GroupRules, s: Step, group: GroupStatus, ready: list[str], busy: int, now: float) -> bool:
    """Lets on as many as the batch has room for, while the group's window is open."""
    open_, until = how.opens(now)
    if not open_:
        group.phase, group.message = "Running" if busy else "Waiting", "waits for its maintenance window"
        if until:
            s.soon(until - now)
        return False
    batch = how.batch.of(group.total, least=1) if how.batch is not None else group.total
    chosen = ready[: max(0, batch - busy)]
    group.nodes = [*group.nodes, *chosen]
    for name in chosen:
        s.status.updating[name] = Trying(now)
    if chosen:
        group.until = until
        s.soon(0.0 if not how.window else how.window)
    group.phase, group.message = "Running", ""
    return False


__all__ = ["REST", "Amount", "GroupRules", "Node", "Rules", "Step", "Target", "follow", "run_of", "step"]
