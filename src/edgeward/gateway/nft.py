"""The kernel's side of closed traffic: one nftables table of our own, replaced whole and taken away. A thin shell.

What stands in it is made by ``closed.py``. Every change is one ``nft -f`` (one transaction: the old rules or the new
ones), on a table that has this node's name; no other table is read or written. ``/proc/net`` says in which networks the
machine is.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core import proc
from edgeward.core.errors import Refused
from edgeward.gateway import closed

_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_TIMEOUT = 20.0
_ETHERNET, _SIOCGIFHWADDR = 1, 0x8927
_CAP_NET_ADMIN = 12


def program() -> str | None:
    return shutil.which("nft", path=_PATH)


def unusable() -> str:
    """Why this process cannot tell the kernel; empty when it can, as far as one sees without trying."""
    if sys.platform != "linux":
        return "nftables is a thing of Linux"
    if not _may():
        return "needs root (CAP_NET_ADMIN)"
    if program() is None:
        return "the program nft is not installed (Debian: apt-get install nftables)"
    return ""


def _may() -> bool:
    may = proc.capable(_CAP_NET_ADMIN)
    return os.geteuid() == 0 if may is None else may


class Nft:
    """One table. Its methods raise ``Refused`` with what nft said."""

    def __init__(self, table: str) -> None:
        self.table = table

    async def apply(self, wall: closed.Wall) -> None:
        """The kernel does this from now on, and its counters go on."""
        await self._run("-f", "-", stdin=closed.script(self.table, wall, await self.counted()))

    async def remove(self) -> None:
        await self._run("-f", "-", stdin=closed.removal(self.table))

    async def counted(self) -> dict[str, tuple[int, int]] | None:
        """Packets and bytes that were refused, by counter; None: the table is not there."""
        try:
            said = await self._run("-j", "list", "counters", "table", "inet", self.table)
        except Refused:
            return None
        doc: Any = msgspec.json.decode(said)
        found = {c["name"]: (int(c["packets"]), int(c["bytes"])) for e in doc["nftables"] if (c := e.get("counter"))}
        return found or None

    async def _run(self, *args: str, stdin: str = "") -> bytes:
        # in a thread: a program that ends before it has read its input is an error of no event loop's there
        return await asyncio.to_thread(_nft, args, stdin.encode())


def _nft(args: tuple[str, ...], stdin: bytes) -> bytes:
    try:
        done = subprocess.run(
            [program() or "nft", *args], input=stdin, capture_output=True, timeout=_TIMEOUT, check=False
        )
    except OSError as e:
        raise Refused(f"nft cannot be run: {e.strerror}", remedy="install nftables") from e
    except subprocess.TimeoutExpired:
        raise Refused(f"nft did not end within {_TIMEOUT:g} s") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[:300]
        raise Refused(f"nftables: {said}", remedy="see whether the kernel has nf_tables")
    return done.stdout


def links() -> tuple[str, ...]:
    """The networks that this machine is in, without those behind routers and tunnels."""
    ethernet = [name for _, name in socket.if_nameindex() if _hardware(name) == _ETHERNET]
    found: list[str] = []
    for file, read in (("route", closed.links4), ("ipv6_route", closed.links6)):
        with contextlib.suppress(OSError):
            found += read(Path("/proc/self/net", file).read_text(), ethernet)
    return tuple(found)


def _hardware(name: str) -> int:
    """The ARP protocol hardware identifier of an interface (netdevice(7)); 0: none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            answer = fcntl.ioctl(s.fileno(), _SIOCGIFHWADDR, struct.pack("16s24x", name.encode()[:15]))
        except OSError:
            return 0
    return int(struct.unpack_from("H", answer, 16)[0])
