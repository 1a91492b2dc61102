"""What may pass through a tunnel, as words: ``tcp:22``, ``http:[fd00::1]:80``, ``exec``. Pure.

A word names a protocol (the name of a service at the node), and for those that lead to a port also which hosts and
ports: ``tcp`` or ``tcp:*`` is every port of the node itself, ``tcp:22`` and ``tcp:8000-8100`` are some of them,
``tcp:192.168.1.0/24:502`` is a port of machines behind the node, ``tcp:*:*`` is everything, ``*`` is every protocol at
the node itself and ``*:*:*`` at every host. The same words stand in rules of roles (``tunnel:tcp:22`` among the verbs,
``authz.py``) and in a node's own policy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from edgeward.core.errors import Invalid

ANY = "*"
#: The hosts that are the node itself.
ITSELF = frozenset({"", "localhost", "127.0.0.1", "::1"})
_HIGHEST = 65535


@dataclass(frozen=True, slots=True)
class Passage:
    """A use of a tunnel: ``port`` 0 where there is none, ``host`` empty for the node itself."""

    protocol: str
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if not self.port:
            return self.protocol
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.protocol}:{host + ':' if host else ''}{self.port}"


@dataclass(frozen=True, slots=True)
class Word:
    """A word, taken apart. ``host``: empty for the node itself, ``*`` for all, a name, an address or a network."""

    protocol: str
    host: str = ""
    low: int = 0
    high: int = _HIGHEST

    def takes(self, use: Passage) -> bool:
        if self.protocol not in (ANY, use.protocol) or not self.low <= use.port <= self.high:
            return False
        host = use.host.lower()
        if host in ITSELF:
            return self.host in ITSELF or self.host == ANY
        if self.host in (ANY, host):
            return True
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(self.host)
        except ValueError:
            return False

    def covers(self, other: Word) -> bool:
        """Whether it takes all that ``other`` takes; may say no where a cleverer look would say yes."""
        if self.protocol not in (ANY, other.protocol) or not (self.low <= other.low and other.high <= self.high):
            return False
        return self.host in (ANY, other.host) or {self.host, other.host} <= ITSELF


@lru_cache(maxsize=4096)
def parse(text: str) -> Word:
    """Raises ``Invalid``."""
    bad = Invalid(f"{text[:80]!r} is nothing that passes a tunnel", remedy="write e.g. exec, tcp:22, http:10.0.0.5:80")
    protocol, _, rest = text.partition(":")
    if not protocol or (protocol != ANY and not protocol.isidentifier()):
        raise bad
    if not rest:
        if ":" in text:
            raise bad
        return Word(protocol)
    host, ports = "", rest
    if rest.startswith("["):
        host, bracket, behind = rest[1:].partition("]")
        if not bracket or not behind.startswith(":"):
            raise bad
        ports = behind[1:]
    elif ":" in rest:
        host, _, ports = rest.rpartition(":")
    low, high = _ports(ports, bad)
    if ("/" in host or ":" in host) and host != ANY:
        try:
            host = str(ipaddress.ip_network(host)) if "/" in host else str(ipaddress.ip_address(host))
        except ValueError:
            raise bad from None
    return Word(protocol, host.lower(), low, high)


def _ports(text: str, bad: Invalid) -> tuple[int, int]:
    if text == ANY:
        return 0, _HIGHEST
    first, dash, last = text.partition("-")
    if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
        raise bad
    low, high = int(first), int(last) if dash else int(first)
    if not 0 < low <= high <= _HIGHEST:
        raise bad
    return low, high


def allowed(words: Iterable[str], use: Passage) -> bool:
    """Whether any of the words takes the use. A word of a later release that is not understood takes nothing."""
    for text in words:
        try:
            if parse(text).takes(use):
                return True
        except Invalid:
            continue
    return False


def covered(have: Iterable[str], want: str) -> bool:
    """Whether any word of ``have`` takes all that ``want`` takes."""
    try:
        wanted = parse(want)
    except Invalid:
        return False
    for text in have:
        try:
            if parse(text).covers(wanted):
                return True
        except Invalid:
            continue
    return False
