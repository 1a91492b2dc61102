"""Closed traffic: what a node's kernel lets through to the instances of Services, and from it to others'. Pure.

In: the Services of the node with the ports of their instances here and the places of those at other sites, and what
belongs to the node's site. Out: a :class:`Wall` (which ports are open to whom), why a Service is not behind it, and the
text by which nftables takes it over whole. Packets to an instance are dropped unless they come from the site (``scope:
site``) or from this machine (``scope: node``); a dial from here to another site's instance is refused at once. Requests
between sites go by the gateways, whose ports are not touched. The shell is ``nft.py``; what is declared is read by
``agent/closing.py``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from edgeward.core.spans import Network

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Before the translation of addresses (-100): a container's port is still the one that was dialled.
_PRIORITY = -150
#: Bridges of container engines: what comes in by them is of this machine.
_BRIDGES = ("podman*", "cni-podman*", "docker*")
#: Instances at other sites that are told apart; what they say of themselves has no end otherwise.
_PLACES = 16384
COUNTERS = ("refused_in", "refused_out")


class Closed(NamedTuple):
    """One Service as this node has it. ``scope``: node, site or any; ``ports``: of its instances here; ``away``:
    ``(address, port)`` of those at other sites."""

    key: str
    scope: str
    ports: tuple[int, ...] = ()
    away: tuple[tuple[str, int], ...] = ()


class Site(NamedTuple):
    """What belongs to a site: ``prefixes`` as they are declared; else ``links``, the networks that the node is in.
    ``nodes``: addresses of its nodes, whatever network they are in."""

    prefixes: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


class Wall(NamedTuple):
    """``site``, ``node``: ports that are open to the site, to this machine alone. ``inside``: the site. ``away``:
    what is not dialled from here."""

    site: tuple[int, ...] = ()
    node: tuple[int, ...] = ()
    inside: tuple[Network, ...] = ()
    away: tuple[tuple[Address, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.site or self.node or self.away)


def _network(text: str) -> Network | None:
    try:
        return None if "%" in text else ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None  # a node may be known by a host name


def inside(site: Site) -> tuple[Network, ...]:
    """The networks of the site, in their smallest form."""
    nets = {n for text in (site.prefixes or site.links) if (n := _network(text)) is not None and n.prefixlen}
    nets |= {n for text in site.nodes if (n := _network(text)) is not None and not n.is_loopback}
    fours = [n for n in nets if isinstance(n, ipaddress.IPv4Network)]
    sixes = [n for n in nets if isinstance(n, ipaddress.IPv6Network)]
    return (*ipaddress.collapse_addresses(fours), *ipaddress.collapse_addresses(sixes))


def build(services: Sequence[Closed], site: Site, address: str) -> tuple[Wall, dict[str, str]]:
    """The wall, and of each Service that is not whole behind it why, by its key. ``address``: this node's own."""
    closed = [s for s in services if s.scope != "any"]
    if (own := _address(address)) is not None and own.is_loopback:
        # nothing comes in from outside, and nodes of other sites on this machine are not told apart
        said = f"this node is at {address}: only this machine reaches it, other sites on this machine do as well"
        return Wall(), {s.key: said for s in closed}
    opened = {p: s.key for s in services if s.scope == "any" for p in s.ports}
    ports: dict[str, set[int]] = {"site": set(), "node": set()}
    why: dict[str, str] = {}
    away: set[tuple[Address, int]] = set()
    for service in closed:
        for port in service.ports:
            if port in opened:
                why[service.key] = f"{opened[port]} opens the same port ({port}) to any site"
            else:
                ports[service.scope].add(port)
        for place in service.away:
            if (ip := _away(place[0], site)) is not None:
                away.add((ip, place[1]))
            elif not site.prefixes and _among(place[0], site.links):
                why.setdefault(
                    service.key,
                    f"{place[0]} of another site is in this site's network as well: say which is this site's in the "
                    "Site's prefixes",
                )
    away -= {(ip, port) for s in services if s.scope == "any" for a, port in s.away if (ip := _address(a)) is not None}
    ports["node"] -= ports["site"]  # one Service opens it to the site
    found = sorted(away, key=lambda a: (a[0].version, int(a[0]), a[1]))[:_PLACES]
    return Wall(tuple(sorted(ports["site"])), tuple(sorted(ports["node"])), inside(site), tuple(found)), why


def _away(text: str, site: Site) -> Address | None:
    """The address where it is another site's for sure. Behind other routers the same private addresses mean other
    machines, so those of this site's own networks are its own."""
    ip = _address(text)
    if ip is None or ip.is_loopback or text in site.nodes or _among(text, site.prefixes or site.links):
        return None
    return ip


def _among(text: str, networks: Iterable[str]) -> bool:
    ip = _address(text)
    return ip is not None and any((n := _network(t)) is not None and n.prefixlen and ip in n for t in networks)


def _address(text: str) -> Address | None:
    """None: it is none. Nodes say their addresses themselves, and what an address may have behind ``%`` is any text
    that would stand in our rules then."""
    try:
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None


# -- what the kernel is told -------------------------------------------------------------------------------------------


def table_name(node: str, mark: str) -> str:
    """A name that is this node's alone; ``mark``: of its folder, for two nodes of one name on one machine."""
    return f"edgeward_{re.sub('[^a-z0-9]', '_', node)}_{mark}"


def removal(table: str) -> str:
    """Takes the table away, whether it is there or not."""
    return f"table inet {table} {{}}\ndelete table inet {table}\n"


def script(table: str, wall: Wall, counted: Mapping[str, tuple[int, int]] | None = None) -> str:
    """What ``nft -f`` takes in one transaction: the table as it is now in place of the one before. ``counted``:
    packets and bytes that its counters go on from."""
    if not wall:
        return removal(table)
    parts = [removal(table) + f"table inet {table} {{"]
    for name in COUNTERS:
        packets, size = (counted or {}).get(name, (0, 0))
        parts.append(f"  counter {name} {{ packets {packets} bytes {size} }}")
    for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        nets = [str(n) for n in wall.inside if n.version == version]
        parts.append(_set(f"inside{version}", f"type {kind}; flags interval;", nets))
        places = [f"{ip} . {port}" for ip, port in wall.away if ip.version == version]
        parts.append(_set(f"away{version}", f"type {kind} . inet_service;", places))
    parts += [
        _set(name, "type inet_service;", map(str, ports)) for name, ports in (("site", wall.site), ("node", wall.node))
    ]
    containers = "\n".join(f'    iifname "{name}" jump dial' for name in _BRIDGES)
    own = "\n".join(f'    iifname "{name}" return' for name in ("lo", *_BRIDGES))
    parts.append(f"""\
  chain arrive {{
    type filter hook prerouting priority {_PRIORITY}; policy accept;
{own}
    fib daddr type != local return
    meta l4proto {{ tcp, udp }} th dport @node counter name refused_in drop
    meta l4proto {{ tcp, udp }} th dport @site jump closed
  }}
  chain closed {{
    ip saddr @inside4 return
    ip6 saddr @inside6 return
    counter name refused_in drop
  }}
  chain leave {{
    type filter hook output priority {_PRIORITY}; policy accept;
    jump dial
  }}
  chain pass {{
    type filter hook forward priority {_PRIORITY}; policy accept;
{containers}
  }}
  chain dial {{
    meta l4proto {{ tcp, udp }} ip daddr . th dport @away4 counter name refused_out goto refuse
    meta l4proto {{ tcp, udp }} ip6 daddr . th dport @away6 counter name refused_out goto refuse
  }}
  chain refuse {{
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
}}
""")
    return "\n".join(parts)


def _set(name: str, kind: str, elements: Iterable[str]) -> str:
    listed = ", ".join(elements)
    return f"  set {name} {{ {kind} {f'elements = {{ {listed} }} ' if listed else ''}}}"


# -- the networks that a node is in ------------------------------------------------------------------------------------


def links4(table: str, ethernet: Iterable[str]) -> tuple[str, ...]:
    """Of ``/proc/net/route`` (proc(5)): the IPv4 networks that are reached by no router, on interfaces ``ethernet``.

    A tunnel's are not taken: at its other end there may be other sites.
    """
    found = set()
    wanted = set(ethernet)
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8 or fields[0] not in wanted or fields[2] != "00000000":
            continue
        try:
            words = [int.from_bytes(bytes.fromhex(fields[n]), "little") for n in (1, 7)]
        except ValueError:
            continue
        length = words[1].bit_count()
        if 0 < length < 32:  # a route to a single host says nothing of a network
            found.add(f"{ipaddress.IPv4Address(words[0])}/{length}")
    return tuple(sorted(found))


def links6(table: str, ethernet: Iterable[str]) -> tuple[str, ...]:
    """The same of ``/proc/net/ipv6_route``."""
    found = set()
    wanted = set(ethernet)
    for line in table.splitlines():
        fields = line.split()
        if len(fields) < 10 or fields[9] not in wanted or int(fields[4], 16):
            continue
        length = int(fields[1], 16)
        net = ipaddress.IPv6Address(bytes.fromhex(fields[0]))
        if 0 < length < 128 and not net.is_multicast:
            found.add(f"{net}/{length}")
    return tuple(sorted(found))
