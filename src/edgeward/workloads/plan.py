"""What to do next with one app on one node: state and observations in, actions out. Pure; time is an argument.

An app has a *current* version (what serves), perhaps a *candidate* (what was asked for and has to prove itself) and
versions known to be *bad*. An update starts the candidate beside the current one, waits until all its instances were
healthy for the window, switches, then stops the old ones. A candidate that fails is marked bad and goes; the current
one never stopped. With a fixed port the old instances stop first, and come back if the candidate fails. Whatever step a
SIGKILL interrupts, the next plan starts from what is recorded and alive, and ends with one whole version.
"""

from __future__ import annotations

import msgspec

from edgeward.core.backoff import backoff


class Rules(msgspec.Struct, frozen=True):
    """The numbers of the spec that matter here, in seconds."""

    replicas: int
    startup: float = 30.0
    window: float = 1.0
    drain: float = 0.2
    backoff: float = 0.2
    backoff_max: float = 30.0
    policy: str = "always"
    fixed_port: bool = False


#: Versions that are kept, the one that serves among them.
KEEP = 3


class Slot(msgspec.Struct):
    """The restarts of one place of one version."""

    restarts: int = 0
    not_before: float = 0.0
    done: bool = False
    #: The ports of its last instance: the next one gets them again if it can, so that who knows them goes on.
    ports: dict[str, int] = {}


class State(msgspec.Struct):
    """What is recorded of the app; digests name versions."""

    current: str = ""
    candidate: str = ""
    bad: dict[str, str] = {}
    history: list[str] = []
    slots: dict[str, Slot] = {}
    #: When the current version took over.
    switched_at: float = 0.0
    #: Of an App with a schedule: the time that was last run or passed over (Unix), and whether a run is not over yet.
    ran: float = 0.0
    due: bool = False

    def serve(self, version: str) -> None:
        """The version takes over; the one before is kept."""
        if self.current:
            before = [self.current, *(h for h in self.history if h != self.current)]
            self.history = [h for h in before if h != version][: KEEP - 1]
        self.current, self.candidate = version, ""


class Seen(msgspec.Struct):
    """One instance as it is now."""

    id: str
    version: str
    slot: int
    alive: bool
    healthy: bool = False
    healthy_since: float = 0.0
    started_at: float = 0.0
    stopping: bool = False
    #: Checks failed often enough in a row, after it had been healthy.
    failing: bool = False
    exit_code: int | None = None
    #: It ended while no agent was there (the node was switched off, say): no failure of the app.
    lost: bool = False


class Start(msgspec.Struct, frozen=True):
    version: str
    slot: int


class Stop(msgspec.Struct, frozen=True):
    id: str
    why: str


class Forget(msgspec.Struct, frozen=True):
    """The instance is dead: take its record away; ``failed`` counts for the back-off."""

    id: str
    failed: bool


class Switch(msgspec.Struct, frozen=True):
    version: str


class MarkBad(msgspec.Struct, frozen=True):
    version: str
    why: str


class Adopt(msgspec.Struct, frozen=True):
    """The wanted version becomes the candidate (recorded before anything of it is started)."""

    version: str


class Gone(msgspec.Struct, frozen=True):
    """Nothing is left of an unwanted app: take its records away."""


Action = Start | Stop | Forget | Switch | MarkBad | Adopt | Gone


class Plan(msgspec.Struct):
    actions: list[Action] = []
    look_at: float = float("inf")
    phase: str = "Pending"
    message: str = ""
    #: Something is not started because of what it depends on.
    waits: bool = False

    def look(self, at: float) -> None:
        self.look_at = min(self.look_at, at)


def slot_key(version: str, slot: int) -> str:
    return f"{version}:{slot}"


def delay_after(restarts: int, rules: Rules) -> float:
    """The pause before the next start after ``restarts`` failures in a row (seconds)."""
    return backoff(restarts, rules.backoff, rules.backoff_max) if restarts > 0 else 0.0


def plan(
    wanted: str | None, rules: Rules, state: State, seen: list[Seen], now: float, *, may_start: bool = True
) -> Plan:
    """``wanted``: digest of the desired version, None when the app has no business here. ``may_start``: what it
    depends on is healthy."""
    p = Plan()
    for i in seen:
        if not i.alive:
            p.actions.append(Forget(i.id, _failed(i, rules)))
    live = [i for i in seen if i.alive]
    if wanted is None:
        p.actions += [Stop(i.id, "no longer wanted here") for i in live if not i.stopping]
        p.phase = "Stopped"
        if not seen:
            p.actions.append(Gone())
        return p
    if any(not i.alive for i in seen):
        # the records change first (back-off, restarts); the next plan goes on from there
        p.phase = _phase(p, state, live, rules, wanted)
        p.look(now)
        return p
    if not state.current and not state.candidate:
        p.actions.append(Adopt(wanted))
        p.look(now)
        p.phase = "Starting"
        return p
    if state.candidate and state.candidate != wanted:
        # something else was asked for before the candidate proved itself
        p.actions += [Stop(i.id, "replaced") for i in live if i.version == state.candidate and not i.stopping
                      and state.candidate != state.current]  # fmt: skip
        p.actions.append(Adopt(wanted if wanted not in state.bad else ""))
        p.look(now)
        p.phase = _phase(p, state, live, rules, wanted)
        return p
    if not state.candidate and wanted != state.current and wanted not in state.bad:
        p.actions.append(Adopt(wanted))
        p.look(now)
        p.phase = _phase(p, state, live, rules, wanted)
        return p
    if state.candidate:
        _prove(p, rules, state, live, now, may_start)
    if state.current:
        hold_back = rules.fixed_port and bool(state.candidate)
        if not hold_back:
            _keep(p, state.current, rules, state, live, now, may_start)
    known = {state.current, state.candidate}
    for i in live:
        if i.version not in known and not i.stopping:
            # a time to come is from before a restart of the machine, whose clock was set back
            drained = min(now, state.switched_at) + rules.drain
            if now >= drained or not state.current:
                p.actions.append(Stop(i.id, "an older version"))
            else:
                p.look(drained)
    p.phase = _phase(p, state, live, rules, wanted)
    if wanted in state.bad:
        p.message = f"version {wanted[:8]} failed: {state.bad[wanted]}; {state.current[:8] or 'nothing'} goes on"
    return p


def _failed(i: Seen, rules: Rules) -> bool:
    return not i.stopping and not i.lost and not (rules.policy != "always" and i.exit_code == 0)


def _keep(p: Plan, version: str, rules: Rules, state: State, live: list[Seen], now: float, may_start: bool) -> None:
    """Exactly ``replicas`` instances of a version, restarted with back-off."""
    mine = [i for i in live if i.version == version]
    for i in mine:
        if i.slot >= rules.replicas and not i.stopping:
            p.actions.append(Stop(i.id, "fewer replicas"))
        elif i.failing and not i.stopping:
            p.actions.append(Stop(i.id, "its health check fails"))
        elif not i.healthy and not i.stopping:
            limit = i.started_at + rules.startup
            if now >= limit and not i.healthy_since:
                p.actions.append(Stop(i.id, f"not healthy within {rules.startup:g} s"))
            else:
                p.look(limit)
    taken = {i.slot for i in mine}
    for slot in range(rules.replicas):
        record = state.slots.get(slot_key(version, slot), Slot())
        if slot in taken or record.done:
            continue
        if not may_start:
            p.waits = True
            continue
        if now < record.not_before <= now + rules.backoff_max + 1:  # farther off: from before the clock was set back
            p.look(record.not_before)
        else:
            p.actions.append(Start(version, slot))


def _prove(p: Plan, rules: Rules, state: State, live: list[Seen], now: float, may_start: bool) -> None:
    """The candidate's way: start, healthy for the window, switch; or bad."""
    version = state.candidate
    mine = [i for i in live if i.version == version]
    others = [i for i in live if i.version != version]
    restarts = sum(state.slots.get(slot_key(version, n), Slot()).restarts for n in range(rules.replicas))
    late = [i for i in mine if not i.healthy_since and now >= i.started_at + rules.startup]
    if state.current and (restarts or late or any(i.failing for i in mine)):
        why = "it ended by itself" if restarts else f"not healthy within {rules.startup:g} s"
        p.actions += [Stop(i.id, "its version failed") for i in mine if not i.stopping]
        p.actions.append(MarkBad(version, why))
        p.look(now)
        return
    if rules.fixed_port and state.current:
        waiting = [i for i in others if i.version == state.current]
        if waiting:
            p.actions += [Stop(i.id, "the new version needs its port") for i in waiting if not i.stopping]
            return
    _keep(p, version, rules, state, live, now, may_start)
    finished = all(state.slots.get(slot_key(version, n), Slot()).done for n in range(rules.replicas))
    healthy = [i for i in mine if i.healthy and not i.stopping]
    if len(healthy) >= rules.replicas or (rules.replicas and finished):
        # with nothing to lose, the first version serves at once
        since = max((i.healthy_since for i in healthy), default=now) + (rules.window if state.current else 0.0)
        if now >= since:
            p.actions.append(Switch(version))
            p.look(now)
        else:
            p.look(since)


def _phase(p: Plan, state: State, live: list[Seen], rules: Rules, wanted: str) -> str:
    serving = [i for i in live if i.version == (state.current or state.candidate) and i.healthy and not i.stopping]
    slots = [state.slots.get(slot_key(state.current or state.candidate, n), Slot()) for n in range(rules.replicas)]
    if rules.replicas and slots and all(s.done for s in slots):
        return "Stopped"
    if rules.replicas == 0:
        return "Stopped"
    if len(serving) >= rules.replicas:
        return "Degraded" if wanted in state.bad else "Running"
    if serving:
        return "Degraded"
    if any(s.restarts >= 3 for s in slots):
        return "Failed"
    return "Starting"
