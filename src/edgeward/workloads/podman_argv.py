"""The words of podman's command line, from what a host can do and what a container shall be. Pure.

Podman finds out much for itself, and stops with an error where a host is unusual: without systemd, with both kinds of
cgroups (crun refuses those), without the right to raise limits, without iptables. :func:`options` and
:func:`network` say it what suits the host, from facts that ``podman.py`` collects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from edgeward.core.errors import Invalid
from edgeward.workloads.engine import INSTANCE_LABEL, NODE_LABEL, Mount, Run

#: Words of podman's own surroundings, its libraries' and its helpers': a container's must not change them.
_ITS_OWN = (
    "BUILDAH", "CNI", "CONTAINER", "DBUS", "DOCKER", "GO", "HOME", "LD_", "LISTEN_", "NETAVARK", "NOTIFY", "PATH",
    "PODMAN", "REGISTRY", "SSL_", "STORAGE", "TMPDIR", "USER", "XDG_", "_",
)  # fmt: skip
#: Longest line of an environment file that podman reads.
_LINE = 60_000


class Facts(NamedTuple):
    """``cgroups``: 2, 1, or 12 for both at once. ``network``: ``bridge``, ``slirp4netns``, or "" for podman's own
    choice. ``limits``: name to (soft, hard) for those that the agent may not raise; ``oom``: its own score."""

    root: bool
    systemd: bool
    cgroups: int
    runc: bool
    network: str
    rlimits: Mapping[str, tuple[int, int]]
    controllers: Sequence[str]
    oom: int = 0


def options(facts: Facts) -> list[str]:
    """What comes before the command."""
    # its warnings would go where the program's output goes
    found = ["--log-level=error", "--events-backend=none"]
    if not facts.systemd:
        found.append("--cgroup-manager=cgroupfs")
    if facts.cgroups == 12 and facts.runc:
        found.append("--runtime=runc")
    return found


def run_argv(run: Run, facts: Facts) -> tuple[list[str], dict[str, str], str]:
    """``run`` and its arguments, what to add to podman's own environment, and the text of the environment file
    (``env`` in the instance's folder): nothing secret stands on a command line. Raises ``Invalid``."""
    beside, text = environment(run.env)
    argv = ["run", "--detach", "--name", run.name, "--pull", "never", "--log-driver", "passthrough", "--restart", "no"]
    argv += ["--http-proxy=false", "--no-healthcheck", "--label", f"{NODE_LABEL}={run.node}"]
    argv += ["--label", f"{INSTANCE_LABEL}={run.instance}"]
    argv += ["--pidfile", str(run.folder / "pid"), "--cidfile", str(run.folder / "cid")]
    argv += ["--env-file", str(run.folder / "env")]
    for name in beside:
        argv += ["--env", name]
    if run.command is not None:
        argv += ["--entrypoint", json.dumps(run.command)]
    if run.user:
        argv += ["--user", run.user]
    if run.workdir:
        argv += ["--workdir", run.workdir]
    for mount in run.mounts:
        argv += ["--mount", mounted(mount)]
    if run.host_network:
        argv += ["--network", "host"]
    else:
        argv += ["--network", facts.network] if facts.network else []
        for address, port, inside in run.publish:
            argv += ["--publish", f"[{address}]:{port}:{inside}" if ":" in address else f"{address}:{port}:{inside}"]
    argv += limits(run, facts)
    return [*argv, "--", run.image, *run.args], beside, text


def limits(run: Run, facts: Facts) -> list[str]:
    """The limits that the host can set; the others are found missing when they are read back."""
    can = facts.controllers if facts.root else ("memory", "cpu", "pids")
    argv: list[str] = []
    if run.limits.memory is not None and "memory" in can:
        argv += ["--memory", str(run.limits.memory), "--memory-swap", str(run.limits.memory)]
    if run.limits.cpu is not None and "cpu" in can:
        argv += ["--cpus", f"{run.limits.cpu:g}"]
    if run.limits.pids is not None and "pids" in can:
        argv += ["--pids-limit", str(run.limits.pids)]
    for name, (soft, hard) in sorted(facts.rlimits.items()):
        argv += ["--ulimit", f"{name}={soft}:{hard}"]
    if facts.oom < 0:  # the agent is among the last that a machine out of memory ends; its apps are not
        argv += ["--oom-score-adj", "0"]
    return argv


def mounted(mount: Mount) -> str:
    kind = "volume" if mount.volume else "bind"
    return f"type={kind},source={mount.source},target={mount.target}{',readonly' if mount.read_only else ''}"


def environment(env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """What goes through podman's own environment, since a file has no way to say it, and the text of the file."""
    beside: dict[str, str] = {}
    lines = []
    for name, value in sorted(env.items()):
        if "\0" in value:
            raise Invalid(f"the variable {name} holds a zero byte", field="$.spec.container.env")
        if "\n" not in value and "\r" not in value and len(value.encode()) < _LINE:
            lines.append(f"{name}={value}\n")
        elif name.startswith(_ITS_OWN):
            raise Invalid(
                f"the variable {name} has several lines", field="$.spec.container.env", remedy="give it another name"
            )
        else:
            beside[name] = value
    return beside, "".join(lines)


def loaded(said: str) -> list[str]:
    """The images that ``load`` names in its answer."""
    found = []
    for line in said.splitlines():
        head, colon, rest = line.partition(": ")
        if colon and head in ("Loaded image", "Loaded image(s)"):
            found += [name.strip() for name in rest.split(",") if name.strip()]
    return found
