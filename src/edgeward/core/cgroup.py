"""Limits by cgroups, v1 and v2, set and read back: what is reported as enforced was verified.

Every instance has a group of its own below ``edgeward/<node>``; where only a systemd unit's own group is ours (v2, no
root: ``Delegate=yes``), right below that one. On hosts where groups cannot be made (no root, no cgroups, another
system) nothing is enforced, and the reason is told.

A group that governs groups below it holds no processes itself (v2's rule), and systemd starts a unit's process in the
unit's group. So the agent moves to the group ``agent`` in it, and before systemd starts the next one the unit runs
:func:`release`; the limits are off from then until that agent begins.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

#: Set by our own units only: another program's group, which may be ours to write to, is not ours to divide.
DELEGATED_ENV = "EDGEWARD_DELEGATED"

_ROOT = Path("/sys/fs/cgroup")
_PERIOD = 100_000
#: Below a unit's own group: the agent, its nats-server, and apps without limits.
_LEAF = "agent"
_INSTANCE = "instance-"
#: Limits that :func:`release` takes off for a moment.
_KEPT = ("memory.max", "memory.swap.max", "cpu.max", "pids.max")
_ATTRIBUTE = "user.edgeward.limits"


class Limits(NamedTuple):
    memory: int | None = None
    cpu: float | None = None
    pids: int | None = None


class Verdict(NamedTuple):
    enforced: list[str]
    #: what -> why not
    refused: dict[str, str]


class _Host(NamedTuple):
    version: int
    #: controller -> directory under which groups are made
    roots: dict[str, Path]
    why: str
    #: ``roots`` is the group of our own service.
    own: bool = False


def _own_path(controller: str) -> str:
    """The path of our own group in a v1 hierarchy (or in v2 for ``""``), e.g. inside a container."""
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(",") if controller else names == "":
                return path
    except OSError:
        pass
    return "/"


@functools.cache
def host() -> _Host:
    """What this host can do; probed once by making a group."""
    if not sys.platform.startswith("linux"):
        return _Host(0, {}, "this system has no cgroups")
    if (_ROOT / "cgroup.controllers").exists():
        return _probe_v2()
    roots: dict[str, Path] = {}
    why = "cgroup v1 controllers are not mounted"
    controllers: tuple[str, ...] = ("memory", "cpu", "pids")
    for controller in controllers:
        base = _ROOT / controller
        if not base.is_dir():
            continue
        probe = base / "edgeward"
        try:
            probe.mkdir(exist_ok=True)
            _try_group(probe)
            roots[controller] = probe
        except OSError as e:
            why = f"cannot make a cgroup: {e.strerror} (needs root)"
    return _Host(1, roots, why if not roots else "")


def _try_group(base: Path) -> None:
    """Raises ``OSError`` where groups cannot be made: that ``base`` is there does not say that it is ours."""
    probe = base / f".probe-{os.getpid()}"
    probe.mkdir(exist_ok=True)
    probe.rmdir()


def _probe_v2() -> _Host:
    base = _ROOT / "edgeward"
    try:
        base.mkdir(exist_ok=True)
        _try_group(base)
        for group in (_ROOT, base):
            _govern(group)
    except OSError as e:
        if os.environ.get(DELEGATED_ENV) == "1":
            return _probe_own()
        return _Host(2, {}, f"cannot make a cgroup: {e.strerror} (needs root, or a unit of install-service)")
    roots = dict.fromkeys(_governed(base), base)
    return _Host(2, roots, "" if roots else "the cgroup v2 controllers cannot be delegated here")


def _probe_own() -> _Host:
    """The group that systemd gave to this service, made ready for groups below it."""
    try:
        base = _own_group()
        (base / _LEAF).mkdir(exist_ok=True)
        for _ in range(100):  # what starts meanwhile starts there too
            pids = (base / "cgroup.procs").read_text().split()
            if not pids:
                break
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    (base / _LEAF / "cgroup.procs").write_text(pid)
        _govern(base)
        _restore(base)
        roots = dict.fromkeys(_governed(base), base)
    except OSError as e:
        return _Host(2, {}, f"the service's cgroup cannot be divided: {e.strerror} (needs Delegate=yes)", own=True)
    return _Host(2, roots, "" if roots else "the service was given no cgroup controllers", own=True)


def _own_group() -> Path:
    """The unit's group: ours, or the one above when we are in a part of it."""
    own = _ROOT / _own_path("").lstrip("/")
    return own.parent if own.name in (_LEAF, ".control") else own


def _govern(group: Path) -> None:
    """Lets ``group`` set limits for the groups below it, as far as the kernel agrees."""
    for c in (group / "cgroup.controllers").read_text().split():
        if c in ("memory", "cpu", "pids"):
            with contextlib.suppress(OSError):
                (group / "cgroup.subtree_control").write_text(f"+{c}")


def _governed(group: Path) -> list[str]:
    enabled = (group / "cgroup.subtree_control").read_text().split()
    return [c for c in ("memory", "cpu", "pids") if c in enabled]


def release() -> None:
    """Makes the unit's group one that systemd can start a process in. The limits below it are off until the next agent
    comes: each group keeps its own, in an attribute, for :func:`_restore`."""
    base = _own_group()
    for group in base.glob(f"{_INSTANCE}*"):
        kept = {name: (group / name).read_text().strip() for name in _KEPT if (group / name).exists()}
        if kept:
            os.setxattr(group, _ATTRIBUTE, json.dumps(kept).encode())
    for c in (base / "cgroup.subtree_control").read_text().split():
        (base / "cgroup.subtree_control").write_text(f"-{c}")


def _restore(base: Path) -> None:
    for group in base.glob(f"{_INSTANCE}*"):
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(os.getxattr(group, _ATTRIBUTE))
            for name in _KEPT:
                if name in kept:
                    (group / name).write_text(kept[name])
            os.removexattr(group, _ATTRIBUTE)


def available() -> list[str]:
    """The limits that this node can enforce."""
    return sorted(host().roots)


def _group(root: Path, node: str, instance: str) -> Path:
    return root / f"{_INSTANCE}{instance}" if host().own else root / node / instance


def _dirs(node: str, instance: str) -> set[Path]:
    return {_group(root, node, instance) for root in host().roots.values()}


def _settings(limits: Limits) -> dict[str, list[tuple[str, str]]]:
    """controller -> (file, value), in order."""
    v2 = host().version == 2
    found: dict[str, list[tuple[str, str]]] = {}
    if limits.memory is not None:
        value = str(limits.memory)
        # without a swap limit a program over its memory would be slow instead of ended
        found["memory"] = (
            [("memory.max", value), ("memory.swap.max", "0")]
            if v2
            else [("memory.limit_in_bytes", value), ("memory.memsw.limit_in_bytes", value)]
        )
    if limits.cpu is not None:
        quota = max(1000, int(limits.cpu * _PERIOD))
        found["cpu"] = (
            [("cpu.max", f"{quota} {_PERIOD}")]
            if v2
            else [("cpu.cfs_period_us", str(_PERIOD)), ("cpu.cfs_quota_us", str(quota))]
        )
    if limits.pids is not None:
        found["pids"] = [("pids.max", str(limits.pids))]
    return found


def prepare(node: str, instance: str, limits: Limits) -> Verdict:
    """Makes the instance's group with its limits, each read back."""
    enforced, refused = [], {}
    for controller, files in _settings(limits).items():
        root = host().roots.get(controller)
        if root is None:
            refused[controller] = host().why or f"the {controller} controller is not there"
            continue
        group = _group(root, node, instance)
        try:
            group.mkdir(parents=True, exist_ok=True)
            if host().version == 2 and group.parent != root:
                with contextlib.suppress(OSError):
                    (root / node / "cgroup.subtree_control").write_text(f"+{controller}")
            for n, (name, value) in enumerate(files):
                try:
                    (group / name).write_text(value)
                except OSError:
                    if n == 0 or ("swap" not in name and "memsw" not in name):
                        raise  # swap accounting may be off; the limit itself must hold
            name, value = files[0]
            got = (group / name).read_text().split()
            if controller == "memory" and abs(int(got[0]) - int(value)) > os.sysconf("SC_PAGE_SIZE"):
                refused[controller] = f"set to {value}, reads {got[0]}"
            else:
                enforced.append(controller)
        except (OSError, ValueError) as e:
            refused[controller] = str(e)
    return Verdict(enforced, refused)


def _groups_of(pid: int) -> dict[str, Path]:
    """controller -> the group that a process is in, whoever made it; ``""`` is v2's."""
    found: dict[str, Path] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            for name in names.split(","):
                found[name] = (_ROOT / name if names else _ROOT) / path.lstrip("/")
    return found


def holds(pid: int, limits: Limits) -> Verdict:
    """Which limits hold for a process whose group somebody else made, a container's say: read from that group."""
    groups, v2 = _groups_of(pid), (_ROOT / "cgroup.controllers").exists()
    enforced, refused = [], {}
    for controller, wanted in limits._asdict().items():
        if wanted is None:
            continue
        try:
            group = groups["" if v2 else controller]
            if controller == "memory":
                got = float((group / ("memory.max" if v2 else "memory.limit_in_bytes")).read_text())
                near = float(os.sysconf("SC_PAGE_SIZE"))
            elif controller == "cpu":
                quota, period = (
                    (group / "cpu.max").read_text().split()
                    if v2
                    else ((group / name).read_text() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
                )
                got, near = float(quota) / float(period), 0.01
            else:
                got, near = float((group / "pids.max").read_text()), 0.0
            if 0 < got <= wanted + near:
                enforced.append(controller)
            else:
                refused[controller] = f"set to {wanted:g}, reads {got:g}"
        except (OSError, KeyError):
            refused[controller] = f"the {controller} controller is not there"
        except ValueError:  # "max"
            refused[controller] = host().why or "the engine did not set it"
    return Verdict(enforced, refused)


def members(pid: int) -> list[int]:
    """All processes of a process's own group, which somebody else made, and of those below it."""
    groups, v2 = _groups_of(pid), (_ROOT / "cgroup.controllers").exists()
    found: list[int] = []
    group = next((groups[c] for c in ([""] if v2 else ["memory", "pids", "cpu"]) if c in groups), _ROOT)
    if group.parent != _ROOT and group != _ROOT:  # not everybody's
        for file in group.rglob("cgroup.procs"):
            with contextlib.suppress(OSError, ValueError):
                found += [int(word) for word in file.read_text().split()]
    return found


def enter(node: str, instance: str, pid: int) -> None:
    """Moves a process into its groups (it was just started; children made before this moment are moved by theirs)."""
    for group in _dirs(node, instance):
        if group.is_dir():
            (group / "cgroup.procs").write_text(str(pid))


def doors(node: str, instance: str) -> list[str]:
    """The files that a process writes its number to, to enter the groups that were prepared."""
    return sorted(str(group / "cgroup.procs") for group in _dirs(node, instance) if group.is_dir())


def remove(node: str, instance: str) -> None:
    """Takes the empty groups away."""
    for group in _dirs(node, instance):
        with contextlib.suppress(OSError):
            group.rmdir()


def kill(node: str, instance: str) -> bool:
    """Ends every process of the groups. False when some may be left: then it has to be called again."""
    left = False
    for group in _dirs(node, instance):
        if not group.is_dir():
            continue
        with contextlib.suppress(OSError):
            (group / "cgroup.kill").write_text("1")  # v2 since Linux 5.14
        with contextlib.suppress(OSError, ValueError):
            for pid in (group / "cgroup.procs").read_text().split():
                # read and signalled at once: in that time no number goes round to a stranger
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
                left = True
    return not left


def out_of_memory(node: str, instance: str) -> int:
    """How many of its processes the kernel ended because the group was over its memory."""
    root = host().roots.get("memory")
    if root is None:
        return 0
    name = "memory.events" if host().version == 2 else "memory.oom_control"
    with contextlib.suppress(OSError, ValueError):
        for line in (_group(root, node, instance) / name).read_text().splitlines():
            what, _, count = line.partition(" ")
            if what == "oom_kill":
                return int(count)
    return 0


def leftovers(node: str, prefix: str) -> list[str]:
    """Instances whose groups are still there and whose names begin so."""
    found = set()
    for root in set(host().roots.values()):
        with contextlib.suppress(OSError):
            above = _group(root, node, prefix)
            skip = len(above.name) - len(prefix)
            found |= {p.name[skip:] for p in above.parent.iterdir() if p.is_dir() and p.name.startswith(above.name)}
    return sorted(found)


if __name__ == "__main__":  # ExecStopPost= of the units that cli/service.py writes
    release()
