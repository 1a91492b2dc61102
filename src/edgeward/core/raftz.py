"""What nats-server says of its raft groups, and which of them should elect anew now. No I/O.

nats-server looks for a new leader 4 to 9 s after it last heard of the old one, and has no setting for that. A follower
that hears a vote request of a replica whose log is behind its own does not grant it; it sees that the group has no
leader and campaigns itself within 0.8 s (``processVoteRequest`` in nats-server's raft.go). Such a request is what a
replica sends that comes back with an empty disk. So whoever *knows* that the leader is gone can send one in its name:
nobody votes for an empty log, raft's rules decide who leads, and nothing acknowledged is at stake. What it may cost is
an election that was not needed; hence :func:`overdue` names only groups whose leader was not heard of since its server
ended, or for long, and none where this server may be the one that is cut off.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping

import msgspec

#: Seconds without a word of a leader (they beat each second) after which it is taken for dead.
SILENT = 3.0
#: Seconds that a server may be away and come back the same: its connection broke, no more.
_FLAP = 0.3
#: Seconds for which a server's end is remembered; by then its groups have other leaders.
_REMEMBERED = 30.0
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(h|ms|m|s|µs|us|ns)")
_UNIT = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "µs": 1e-6, "us": 1e-6, "ns": 1e-9}


class Peer(msgspec.Struct):
    name: str = ""
    #: Go's spelling of a duration; empty: never.
    last_seen: str = ""


class Group(msgspec.Struct):
    """One raft group as this server sees it (``raftz``)."""

    id: str
    state: str
    leader: str = ""
    term: int = 0
    pindex: int = 0
    system_account: bool = False
    peers: dict[str, Peer] = {}


class Nudge(msgspec.Struct, frozen=True):
    """A message on the system account that has a group elect."""

    group: str
    gone: str
    subject: str
    payload: bytes


class Servers:
    """The other servers: who is connected, and who ended when."""

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}
        self._away: dict[str, float] = {}
        self._restarted: dict[str, float] = {}

    def look(self, connected: Mapping[str, str], now: float) -> None:
        """``connected``: name to id, which is another one after each start."""
        for name, id in connected.items():
            if self._ids.get(name, id) != id:
                self._restarted[name] = self._away.get(name, now)
            self._away.pop(name, None)
        for name in self._ids:
            if name not in connected:
                self._away.setdefault(name, now)
        self._ids |= connected
        self._restarted = {n: at for n, at in self._restarted.items() if now - at < _REMEMBERED}

    def ended(self, now: float) -> dict[str, float]:
        """Name to the seconds since it was noticed that the server is gone, or is not the same any more."""
        away = {n: now - at for n, at in self._away.items() if now - at >= _FLAP}
        return {n: now - at for n, at in self._restarted.items()} | away


def seconds(text: str) -> float | None:
    """Of Go's ``1m2.5s``; None where it says nothing that we understand."""
    parts = _PART.findall(text)
    if not parts or "".join(n + u for n, u in parts) != text:
        return None
    return sum(float(n) * _UNIT[u] for n, u in parts)


def overdue(groups: Mapping[str, Group], ended: Mapping[str, float], connected: int) -> Iterator[Nudge]:
    """Groups that follow a leader who is not there: not heard of since its server ended, or for :data:`SILENT`.

    ``groups``: by name; ``ended``: see :meth:`Servers.ended`; ``connected``: how many servers this one is connected to.
    None without any: then it is this server that is alone, and an election could only disturb the others later.
    """
    if not connected:
        return
    for name, group in sorted(groups.items()):
        leader = group.peers.get(group.leader)
        if group.state != "FOLLOWER" or leader is None or not leader.name or group.leader == group.id:
            continue
        if not group.system_account or len(group.leader) != 8 or group.pindex < 1 or not 0 < group.term < 2**62:
            continue  # spoken of elsewhere or in another way; or a log so empty that its vote would be granted
        silence = seconds(leader.last_seen)
        patience = min(SILENT, ended.get(leader.name, SILENT))
        if (silence is None and leader.name not in ended) or (silence is not None and silence < patience):
            continue
        # term, last term, last index (little endian), who asks: voteRequest.encode in raft.go
        payload = struct.pack("<QQQ", group.term + 1, 0, 0) + group.leader.encode()
        yield Nudge(name, leader.name, f"$NRG.V.{name}", payload)
