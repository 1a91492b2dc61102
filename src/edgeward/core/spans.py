"""Places on a network as people list them: an address, a network or a name, and ports. Pure.

``192.0.2.10:443``, ``10.0.0.0/8:8000-8999``, ``[2001:db8::]/32:*``, ``plc-1:502``; without a port: every one. What may
be listened on and what may be reached are lists of such.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_SPAN = re.compile(r"(\[[0-9A-Fa-f:.]+(?:/\d{1,3})?\](?:/\d{1,3})?|[^\s:\[\]]+)(?::(\*|\d{1,5}(?:-\d{1,5})?))?")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


class Span(NamedTuple):
    #: In lower case; empty where a network is given.
    name: str
    network: Network | None
    low: int
    high: int


def is_address(text: str) -> bool:
    """Whether it is an IPv4 or IPv6 address. One with a zone (``fe80::1%eth0``) is none: what stands behind the ``%``
    makes two texts of one address, and no certificate and no other machine knows it."""
    try:
        return "%" not in text and bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def host_port(host: str, port: int) -> str:
    """``host:port``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_span(text: str, *, need_port: bool = False) -> Span:
    """Raises ``ValueError`` with what is wrong."""
    match = _SPAN.fullmatch(text)
    if match is None or (need_port and match[2] is None):
        raise ValueError(f"{text[:80]!r} is no host:port")
    host, ports = match[1], match[2] or "*"
    low, _, high = ports.partition("-")
    first, last = (1, 65535) if low == "*" else (int(low), int(high or low))
    if not 1 <= first <= last <= 65535:
        raise ValueError(f"{ports} is no port")
    try:
        return Span("", ipaddress.ip_network(host.replace("[", "").replace("]", "")), first, last)
    except ValueError as e:
        if "/" in host or host.startswith("[") or re.fullmatch(r"[0-9.]+", host):
            raise ValueError(f"{host[:80]!r} is no address or network: {e}") from None
    name = host.lower().rstrip(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError(f"{host[:80]!r} is no name")
    return Span(name, None, first, last)
