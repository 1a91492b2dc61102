"""A lab's machines as network namespaces: own addresses, own loopback, packets that really are dropped (root, Linux).

The hub and every node get a namespace. In it: ``wan0``, a TUN whose packets this process carries as ``wan.py`` decides
(it needs no netem, which many kernels lack); in a node also ``lan0``, a port of its site's bridge, which knows no WAN;
and ``mgmt0``, by which this machine reaches it at the same address. Bridges are in a namespace of their own.

    this machine --mgmt0-- [ node ] --lan0-- bridge of the site
                           [ node ] --wan0-- this process --wan0-- [ hub ] --mgmt0-- this machine

All is named ``edgeward<N>-...`` and ``ewl<N>...``, where N is a block of addresses that a lock file holds. A lab that
was killed leaves its lock free and its namespaces behind; the next one that gets the lock removes them first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core.errors import Invalid, Refused
from edgeward.lab.links import Counters, Profile
from edgeward.lab.topology import Topology
from edgeward.lab.wan import BLOCKS, HUB, Plan, Wan, groups_of

_TUN = Path("/dev/net/tun")
_NETNS = Path("/run/netns")
_LOCKS = Path("/run/edgeward")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
#: Packets taken from one machine before the others get their turn.
_TURN = 64
_COMMAND_TIMEOUT = 60


def unusable() -> str:
    """Why namespaces do not work here; empty when they do."""
    if sys.platform != "linux":
        return "network namespaces are a thing of Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "nsenter"):
        if shutil.which(program, path=_PATH) is None:
            return f"the program {program} is not installed"
    try:
        os.close(_open_tun(f"ewlp{os.getpid() % 10**6}"))
        name = f"edgeward-probe-{os.getpid()}"
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except (OSError, Refused) as exc:
        return str(exc)
    return ""


class NamespaceBacking:
    """See the module's text. ``open`` makes everything, ``close`` removes it."""

    def __init__(self, *, seed: int = 1) -> None:
        self._seed = seed
        self._lock = -1
        self._block = -1
        self._hub_port = 0
        self._topology: Topology
        self._plan: Plan
        self._wan: Wan
        self._tuns: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._parts: dict[str, int] = {}
        self._building = threading.Lock()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def open(self, topology: Topology, hub_port: int) -> None:
        self._topology, self._hub_port = topology, hub_port
        self._lock, self._block = _take_block()
        self._plan = Plan(topology, BLOCKS[self._block])
        self._wan = Wan(topology, self._plan, self._seed)
        await asyncio.to_thread(self._build)
        loop = asyncio.get_running_loop()
        for machine, fd in self._tuns.items():
            loop.add_reader(fd, self._readable, machine, fd)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for fd in self._tuns.values():
            asyncio.get_running_loop().remove_reader(fd)
        if self._lock >= 0:
            await asyncio.to_thread(self._clear)
            os.close(self._lock)
            self._lock = -1

    def _clear(self) -> None:
        with self._building:  # a cancelled ``open`` leaves its thread at work
            _remove(self._block)
            for fd in self._tuns.values():
                os.close(fd)
            self._tuns = {}

    def _namespace(self, machine: str) -> str:
        return f"edgeward{self._block}-{machine}"

    @property
    def _switches(self) -> str:
        return f"edgeward{self._block}-"  # a machine's name is never empty

    def _build(self) -> None:
        with self._building:
            _remove(self._block)
            self._make()

    def _make(self) -> None:
        plan, block = self._plan, self._block
        for machine in ("", *plan.address):
            _ip("netns", "add", self._namespace(machine))
        _batch(self._switches, [f"link add br{n} type bridge" for n in range(len(self._topology.sites))])
        _batch(self._switches, [f"link set br{n} up" for n in range(len(self._topology.sites))])
        site_index = {site.name: n for n, site in enumerate(self._topology.sites)}
        outside: list[str] = []
        for index, (machine, address) in enumerate(plan.address.items()):
            space, tun, veth = self._namespace(machine), f"ewl{block}t{index}", f"ewl{block}m{index}"
            self._tuns[machine] = _open_tun(tun)
            outside += [
                f"link set {tun} netns {space} name wan0",
                f"link add {veth} type veth peer name mgmt0 netns {space}",
                f"addr add {plan.host}/32 dev {veth}",
                f"link set {veth} up",
                f"route add {address}/32 dev {veth} src {plan.host}",
            ]
            inside = ["link set lo up", "link set wan0 up", "link set mgmt0 up"]
            if machine == HUB:
                inside.append(f"addr add {address}/32 dev wan0")
            else:
                site = plan.site_of[machine]
                outside.append(f"link add p{index} netns {self._switches} type veth peer name lan0 netns {space}")
                inside += [f"addr add {address}/{plan.lan[site].prefixlen} dev lan0", "link set lan0 up"]
            inside += [
                f"route add {plan.host}/32 dev mgmt0 src {address}",
                f"route add default dev wan0 src {address}",
            ]
            _batch("", outside)
            _batch(space, inside)
            if machine != HUB:
                bridge = f"br{site_index[plan.site_of[machine]]}"
                _batch(self._switches, [f"link set p{index} master {bridge}", f"link set p{index} up"])
            outside = []

    # --- the WAN ------------------------------------------------------------------------------------------------------

    def _readable(self, machine: str, fd: int) -> None:
        now = time.monotonic()
        for _ in range(_TURN):
            try:
                packet = os.read(fd, 65536)
            except BlockingIOError:
                break
            except OSError as exc:
                if exc.errno != errno.EIO:  # the interface is down
                    raise
                break
            self._wan.send(now, machine, packet)
        self._pump()

    def _pump(self) -> None:
        for delivery in self._wan.due(time.monotonic()):
            with contextlib.suppress(OSError):  # its interface is down or its queue full: gone, as on any network
                os.write(self._tuns[delivery.to], delivery.packet)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self._wan.next_at
        if at is not None:
            self._timer = asyncio.get_running_loop().call_at(at, self._pump)

    # --- the face -----------------------------------------------------------------------------------------------------

    def link_url_host_port(self, node: str) -> tuple[str, int]:
        return self.host_address(None), self._hub_port

    def spawn_prefix(self, node: str | None) -> list[str]:
        # not `ip netns exec`: that mounts another /sys, which has no control groups
        program = shutil.which("nsenter", path=_PATH) or "nsenter"
        return [program, f"--net={_NETNS / self._namespace(node or HUB)}", "--"]

    def host_address(self, node: str | None) -> str:
        return str(self._plan.address[node or HUB])

    def bind_address(self, node: str | None) -> str:
        return "0.0.0.0"  # noqa: S104 - inside a namespace of its own

    async def cut(self, site: str) -> None:
        self._wan.links[site].cut = True

    async def heal(self, site: str) -> None:
        self._wan.links[site].cut = False
        if self._parts.get(site):
            await self.partition(site, [])

    async def set_profile(self, site: str, profile: Profile) -> None:
        self._wan.links[site].set_profile(profile)

    async def partition(self, site: str, groups: list[list[str]]) -> None:
        """Nodes of different groups hear nothing of one another; those not named are one more group."""
        number = [s.name for s in self._topology.sites].index(site)
        nodes = self._topology.site(site).node_names
        try:
            parts = groups_of(nodes, groups)
        except ValueError as exc:
            raise Invalid(str(exc), field="groups", remedy=f"nodes: {', '.join(nodes)}; as: a,b/c") from None
        machines = list(self._plan.address)
        steps = [f"link add br{number}x{n} type bridge" for n in range(self._parts.get(site, 0) + 1, len(parts))]
        steps += [f"link set br{number}x{n} up" for n in range(1, len(parts))]
        for n, part in enumerate(parts):
            bridge = f"br{number}x{n}" if n else f"br{number}"
            steps += [f"link set p{machines.index(node)} master {bridge}" for node in part]
        await asyncio.to_thread(_batch, self._switches, steps)
        self._parts[site] = max(self._parts.get(site, 0), len(parts) - 1)

    def describe(self) -> str:
        return "network namespaces, links emulated in user space packet by packet (TUN; netem is not used)"

    def counters(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(Counters(self._wan.nodes, self._wan.pairs))
        return found


# --- the system's part ------------------------------------------------------------------------------------------------


def _take_block() -> tuple[int, int]:
    _LOCKS.mkdir(mode=0o700, exist_ok=True)
    for n in range(len(BLOCKS)):
        fd = os.open(_LOCKS / f"lab-{n}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        return fd, n
    raise Refused(f"{len(BLOCKS)} labs with namespaces run here already", remedy="stop one, or use --backing relays")


def _open_tun(name: str) -> int:
    try:
        fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise Refused(f"{_TUN} cannot be opened: {exc.strerror}", remedy="modprobe tun, or allow it") from exc
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError as exc:
        os.close(fd)
        raise Refused(f"a TUN interface cannot be made: {exc.strerror}", remedy="it needs CAP_NET_ADMIN") from exc
    return fd


def _ip(*args: str, stdin: str = "") -> str:
    program = shutil.which("ip", path=_PATH) or "ip"
    try:
        done = subprocess.run(
            [program, *args], input=stdin, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Refused(f"ip {' '.join(args)}: {exc}", remedy="use --backing relays") from exc
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise Refused(f"ip {' '.join(args)}: {said}", remedy="use --backing relays, or free what is in the way")
    return done.stdout


def _batch(space: str, steps: list[str]) -> None:
    """Commands of ``ip`` in a namespace, until one fails."""
    if steps:
        _ip(*(["-n", space] if space else []), "-batch", "-", stdin="\n".join(steps) + "\n")


def _remove(block: int) -> None:
    """All of a block: what runs in its namespaces is killed, they go, and with them their interfaces."""
    prefix = f"edgeward{block}-"
    spaces = [f.name for f in _NETNS.iterdir() if f.name.startswith(prefix)] if _NETNS.is_dir() else []
    for space in spaces:
        with contextlib.suppress(Refused):  # half made: no namespace behind the name
            for pid in _ip("netns", "pids", space).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "del", space)
    for link in Path("/sys/class/net").iterdir():
        if link.name.startswith((f"ewl{block}m", f"ewl{block}t")):
            with contextlib.suppress(Refused):  # its other end may have gone with the namespace meanwhile
                _ip("link", "del", link.name)
