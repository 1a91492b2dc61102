"""The DNS responder: its bounds, what it keeps, and its sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.rcode

from edgeward.gateway.dnszone import FACTOR, Zone
from edgeward.gateway.steer import Edge, Steering
from edgeward.hub.responder import _CONNECTIONS, DnsServer, Responder

ZONE = "edge.example.org"
SITES = Steering.of(
    [Edge("a", ("10.1.0.0/16",), None, ("192.0.2.1",)), Edge("b", ("10.2.0.0/16",), None, ("192.0.2.2",))]
)


def known() -> Steering:
    return SITES


def test_a_source_has_a_bound_and_who_is_real_gets_through() -> None:
    responder = Responder(Zone(ZONE), known, 5.0)
    query = dns.message.make_query(ZONE, "A").to_wire()
    got = [responder.udp(query, "198.51.100.1", 0.0) for _ in range(25)]
    full = [g for g in got if g and not dns.message.from_wire(g).flags & dns.flags.TC]
    cut = [g for g in got if g and dns.message.from_wire(g).flags & dns.flags.TC]
    assert (len(full), len(cut)) == (5, 10), "the rest gets nothing"
    assert all(len(g) <= len(query) for g in cut) and all(len(g) <= FACTOR * len(query) for g in full)
    assert responder.udp(query, "198.51.100.2", 0.0) == full[0], "another source has its own"
    assert responder.udp(query, "198.51.100.1", 1.0) == full[0]
    six = [responder.udp(query, f"2001:db8::{n:x}", 0.0) for n in range(8)]
    assert six[4] and not dns.message.from_wire(six[4]).flags & dns.flags.TC
    assert six[7] is None or dns.message.from_wire(six[7]).flags & dns.flags.TC, "an IPv6 network is one source"
    assert responder.udp(b"\0" * 5, "198.51.100.3", 0.0) is None


def test_what_is_kept_is_bounded_and_true() -> None:
    sites = [SITES]
    responder = Responder(Zone(ZONE), lambda: sites[0], 1e6)
    query = dns.message.make_query(ZONE, "A", id=1).to_wire()
    again = b"\x77\x77" + query[2:]
    first, second = responder.udp(query, "10.0.0.1", 0.0), responder.udp(again, "10.0.0.1", 0.0)
    assert first is not None and second == b"\x77\x77" + first[2:]
    for n in range(9000):
        responder.udp(dns_query(n), "10.0.0.1", 0.0)
    assert len(responder._kept) <= 8192
    sites[0] = Steering.of([])
    gone = responder.udp(query, "10.0.0.1", 0.0)
    assert gone is not None and dns.message.from_wire(gone).rcode() == dns.rcode.SERVFAIL
    assert responder.tcp(query, "10.0.0.1") is not None


def dns_query(n: int) -> bytes:
    label = f"h{n}".encode()
    return b"\0\1\1\0\0\1\0\0\0\0\0\0" + bytes([len(label)]) + label + b"\4edge\7example\3org\0\0\1\0\1"


def test_what_is_made_for_one_who_asks_is_not_given_to_another() -> None:
    responder = Responder(Zone(ZONE), known, 1e6)
    query = dns.message.make_query(ZONE, "A").to_wire()
    for _ in range(2):
        for host, want in (("10.1.0.1", "192.0.2.1"), ("10.2.0.1", "192.0.2.2")):
            got = responder.udp(query, host, 0.0)
            assert got is not None and str(dns.message.from_wire(got).answer[0][0]) == want
    subnet = dns.message.make_query(ZONE, "A", use_edns=0, options=[dns.edns.ECSOption("10.2.0.0", 24)]).to_wire()
    assert responder.udp(subnet, "10.1.0.1", 0.0) == responder.udp(subnet, "10.2.0.1", 0.0)


async def _tcp_is_bounded() -> None:
    server = DnsServer(Responder(Zone(ZONE), known, 1e6))
    await server.open("127.0.0.1", 0)
    query = dns.message.make_query(ZONE, "NS").to_wire()
    framed = len(query).to_bytes(2, "big") + query
    opened: list[Any] = []

    async def ended(reader: asyncio.StreamReader) -> bool:
        async with asyncio.timeout(60):
            try:
                return await reader.read() == b""
            except ConnectionResetError:  # with something unread
                return True

    async def connect(data: bytes = b"") -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection(*server.address)
        opened.append(writer)
        writer.write(data)
        return reader

    try:
        both = await connect(framed + framed)
        for _ in range(2):
            async with asyncio.timeout(60):
                size = int.from_bytes(await both.readexactly(2), "big")
                answer = dns.message.from_wire(await both.readexactly(size))
            assert str(answer.answer[0][0]) == f"ns.{ZONE}."
        assert await ended(await connect(b"\xff\xff")), "no query is that long"
        assert await ended(await connect(b"\0\5hello")), "nothing that could be answered"
        readers = [await connect(framed) for _ in range(_CONNECTIONS - 1)]
        for reader in readers:
            async with asyncio.timeout(60):
                await reader.readexactly(2)  # it is one of those that are served
        assert await ended(await connect(framed)), "one too many"
    finally:
        await server.close()
        for writer in opened:
            writer.close()
    assert not server._open


def test_tcp_is_bounded() -> None:
    asyncio.run(_tcp_is_bounded())
