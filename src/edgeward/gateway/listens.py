"""What the agent tells the plane of declared Listeners, and which name a certificate is for. Pure.

A certificate travels as one PEM text (key first, then the chain), sealed for its Listener; its digest names it without
telling it. One that is not there yet, or not good, comes with the reason, and the plane keeps what it had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

import msgspec

T = TypeVar("T")


class CertConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    #: ``Secret/shop``, ``platform`` or ``acme host``: what it is called in the status.
    source: str
    hosts: tuple[str, ...] = ()
    digest: str = ""
    #: Base64 of the sealed PEM; empty: there is none, see ``waiting``.
    sealed: str = ""
    waiting: str = ""
    #: When it ends, seconds since 1970.
    ends: float = 0.0


class TlsConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    certificates: tuple[CertConfig, ...] = ()
    #: PEM; empty: no certificate of clients is asked for.
    client_ca: str = ""
    client_optional: bool = False
    min_version: Literal["1.2", "1.3"] = "1.2"
    http2: bool = True


class ListenerConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    key: str
    host: str
    port: int
    tls: TlsConfig | None = None
    redirect: int = 0
    #: Why it is not to be opened.
    refused: str = ""
    #: The door for other sites' gateways (``guests.py``): any host is asked for there.
    guests: bool = False

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def place(key: str, digest: str) -> str:
    """Where a Listener's certificate is sealed for."""
    return f"Listener/{key}/{digest}"


def find(names: Mapping[str, T], host: str) -> T | None:
    """Of what is known by name, that for ``host``: its own, else ``*.`` in place of its first label (RFC 9525)."""
    found = names.get(host)
    if found is None and (dot := host.find(".")) > 0:
        found = names.get("*" + host[dot:])
    return found


def by_host(entries: Iterable[tuple[Iterable[str], T]]) -> dict[str, T]:
    """The first entry that names a host has it."""
    found: dict[str, T] = {}
    for hosts, entry in entries:
        for host in hosts:
            found.setdefault(host, entry)
    return found
