"""The directories of a hub that is several processes: two or more that serve, and a witness, on machines of their own.

In: a name and an address for each. Out: a directory each, with the same keys (one certificate authority, one vault, one
administrator), to be brought to its machine and started there. Nothing here starts or copies over a network.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from edgeward.core.errors import Invalid, Refused
from edgeward.core.files import ensure_dir, read_json, write_json
from edgeward.core.identity import HubIdentity
from edgeward.core.resource import check_name
from edgeward.core.vault import Vault
from edgeward.hub.backup import sealing_key

#: A NATS cluster keeps three copies; fewer servers cannot lose one, more are of no use here.
SERVERS = 3


class Member(msgspec.Struct, frozen=True):
    """One process: where people and nodes reach it, and where its peers do."""

    name: str
    host: str
    port: int
    peer_port: int
    witness: bool = False


def parse_member(text: str, *, witness: bool = False) -> Member:
    """``name=host:port:peer-port``; for a witness ``name=host:peer-port``, since it serves nobody."""
    name, _, where = text.partition("=")
    host, *ports = where.rsplit(":", 1 if witness else 2)
    if not host or len(ports) != (1 if witness else 2) or not all(p.isdigit() and 0 < int(p) < 65536 for p in ports):
        form = "name=host:peer-port" if witness else "name=host:port:peer-port"
        raise Invalid(
            f"{text[:80]!r} is no member", remedy=f"write {form}, e.g. a=10.0.0.1:{443 if not witness else ''}"
        )
    check_name(name, "name")
    numbers = [int(p) for p in ports]
    return Member(name, host, 0 if witness else numbers[0], numbers[-1], witness)


def check_members(members: list[Member]) -> None:
    """Raises what would not make a cluster that can lose one."""
    if len({m.name for m in members}) != len(members):
        raise Invalid("two members have one name", remedy="name each differently")
    if len({(m.host, m.peer_port) for m in members}) != len(members):
        raise Invalid("two members have one address", remedy="give each a peer port of its own")
    if len(members) != SERVERS:
        raise Invalid(
            f"a cluster has {SERVERS} servers, these are {len(members)}",
            remedy="name two or three members, and a witness where there are two",
        )
    if sum(not m.witness for m in members) < 2:
        raise Invalid("only one of them serves", remedy="at least two members that are no witness")


def config_of(member: Member, members: list[Member], bind: str) -> dict[str, object]:
    """A member's ``hub.json``."""
    others = [m for m in members if m.name != member.name]
    return {
        "name": member.name,
        "bind": bind or member.host,
        "advertise": member.host,
        "port": member.port,
        "names": sorted({m.host for m in members}),
        # the one that a box asks first is the one that made its token; then it tries the others
        "urls": [f"https://{m.host}:{m.port}" for m in (member, *others) if not m.witness],
        "cluster": {
            "listen": f"{bind or member.host}:{member.peer_port}",
            "routes": [f"{m.host}:{m.peer_port}" for m in others],
        },
        "witness": member.witness,
    }


def folders(out: Path, members: list[Member]) -> list[Path]:
    """``out/<name>`` for each member, in order. Refuses what would not make a cluster, or write over a hub."""
    check_members(members)
    made = [out / m.name for m in members]
    for directory in made:
        if directory.exists() and any(directory.iterdir()):
            raise Refused("is not empty", resource=str(directory), remedy="give an empty folder")
    return made


def prepare(out: Path, members: list[Member], *, bind: str = "") -> list[Path]:
    """Makes ``out/<name>`` for each member; gives them in order. Refuses to write over a hub that is there."""
    made = folders(out, members)
    first = made[0]
    names = sorted({m.host for m in members})
    identity = HubIdentity.open(ensure_dir(first) / "identity", names)
    identity.admin_token()
    Vault.open(first / "identity")
    sealing_key(first)
    share(made, members, bind)
    return made


def share(made: list[Path], members: list[Member], bind: str) -> None:
    """The first folder's keys into the others, and each member's configuration; other settings are the first's."""
    first, *rest = made
    for directory in rest:
        ensure_dir(directory)
        for name in ("identity", "recovery"):
            if (first / name).is_dir():
                shutil.copytree(first / name, directory / name)
    kept = read_json(first / "hub.json", {})
    for member, directory in zip(members, made, strict=True):
        write_json(directory / "hub.json", kept | config_of(member, members, bind))
