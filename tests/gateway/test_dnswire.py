"""The wire codec against dnspython, against floods of odd bytes, and against the words of RFC 7871."""

from __future__ import annotations

import struct

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeward.gateway import dnswire
from edgeward.gateway.dnswire import NOERROR, POINTER, Record, Subnet, answer, name_of, parse, soa

LABEL = st.text("abcxyzABC019-", min_size=1, max_size=12)
NAME = st.lists(LABEL, min_size=1, max_size=6).map(".".join)
ECS = st.one_of(
    st.none(),
    st.builds(
        lambda v, n: dns.edns.ECSOption(".".join(str(b) for b in v.to_bytes(4, "big")), n),
        st.integers(0, 2**32 - 1),
        st.integers(0, 32),
    ),
    st.builds(lambda v, n: dns.edns.ECSOption(f"2001:db8::{v:x}", n), st.integers(0, 65535), st.integers(0, 128)),
)


def ask(name: str, kind: str = "A", ecs: dns.edns.ECSOption | None = None, **more: object) -> dns.message.Message:
    if ecs is not None:
        more["options"] = [ecs]
        more.setdefault("use_edns", 0)
    return dns.message.make_query(name, kind, **more)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(NAME, st.sampled_from(["A", "AAAA", "SOA", "NS", "TXT", "ANY"]), ECS, st.integers(512, 4096))
def test_what_dnspython_writes_is_read(name: str, kind: str, ecs: dns.edns.ECSOption | None, size: int) -> None:
    message = ask(name, kind, ecs, payload=size)
    query = parse(message.to_wire())
    assert query is not None
    assert query.fault == NOERROR
    assert query.name == dns.name.from_text(name.lower()).to_wire() == name_of(name)
    assert (query.id, query.type, query.edns) == (message.id, message.question[0].rdtype, message.edns >= 0)
    if ecs is None:
        assert query.subnet is None
        return
    assert query.size == size and query.subnet is not None
    assert (query.subnet.family, query.subnet.source) == (ecs.family, ecs.srclen)
    # and what is written is read by dnspython, as an answer to that query
    records = (Record(POINTER, dnswire.A, 7, b"\xc0\0\2\1"), Record(POINTER, dnswire.AAAA, 7, b"\x20" * 16))
    wire = answer(query, NOERROR, records, (Record(POINTER, dnswire.SOA, 9, soa(b"\1a\0", b"\0", 1, 5)),), scope=21)
    read = dns.message.from_wire(wire, raise_on_truncation=True)
    assert message.is_response(read)
    assert [str(s[0]) for s in read.answer] == ["192.0.2.1", "2020:2020:2020:2020:2020:2020:2020:2020"]
    assert read.flags & dns.flags.AA and read.flags & dns.flags.RD
    (option,) = read.options
    assert isinstance(option, dns.edns.ECSOption)
    assert (option.family, option.srclen, option.scopelen) == (ecs.family, ecs.srclen, 21 if ecs.srclen else 0)
    assert option.addrdata == ecs.addrdata


def test_an_answer_that_is_too_long_is_cut_whole() -> None:
    query = parse(ask("edge.example.org", use_edns=0).to_wire())
    assert query is not None
    records = tuple(Record(POINTER, dnswire.A, 1, bytes([10, 0, 0, n])) for n in range(9))
    full = answer(query, NOERROR, records)
    assert len(dns.message.from_wire(full).answer[0]) == 9
    cut = dns.message.from_wire(answer(query, NOERROR, records, limit=len(full) - 1))
    assert cut.flags & dns.flags.TC and not cut.answer and cut.edns == 0
    assert answer(query, NOERROR, records, limit=len(full)) == full


def optioned(option: bytes, version: int = 0, more: bytes = b"") -> bytes:
    head = struct.pack("!6H", 9, 0x0100, 1, 0, 0, 1)
    opt = b"\0" + struct.pack("!HHIH", 41, 1232, version << 16, len(option)) + option
    return head + name_of("edge.example.org") + b"\0\1\0\1" + opt + more


def ecs(family: int, source: int, scope: int, address: bytes) -> bytes:
    return struct.pack("!HHHBB", 8, 4 + len(address), family, source, scope) + address


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        (ecs(1, 24, 0, b"\x0a\1\2"), 0),
        (ecs(1, 0, 0, b""), 0),
        (ecs(0, 0, 0, b""), 0),
        (ecs(2, 33, 0, b"\x20\1\x0d\xb8\x80"), 0),
        (b"\0\x0a\0\x08" + b"c" * 8, 0),  # a cookie
        (ecs(1, 24, 24, b"\x0a\1\2"), 1),  # the scope of a query is zero
        (ecs(1, 24, 0, b"\x0a\1\2\0"), 1),  # more bytes than the prefix needs
        (ecs(1, 24, 0, b"\x0a\1"), 1),
        (ecs(1, 20, 0, b"\x0a\1\x0f"), 1),  # bits behind the prefix
        (ecs(1, 33, 0, b"\x0a\1\2\3\x80"), 1),
        (ecs(2, 129, 0, b"\x20" * 17), 1),
        (ecs(3, 8, 0, b"\x0a"), 1),
        (ecs(0, 8, 0, b"\x0a"), 1),
        (ecs(1, 8, 0, b"\x0a") * 2, 1),
        (b"\0\x08\0\x03\0\1\x08", 1),
        (b"\0\x08\0\x09\0", 1),
        (b"\0", 1),
    ],
)
def test_the_client_subnet_is_read_strictly(option: bytes, fault: int) -> None:
    query = parse(optioned(option))
    assert query is not None and query.fault == fault
    if option[4:6] != b"\0\0":  # dnspython does not know the family of those who tell nothing
        assert dns.message.from_wire(answer(query, query.fault)).rcode() == fault


def test_what_is_refused_and_what_is_not_answered() -> None:
    good = optioned(b"")
    assert parse(good) is not None and parse(good).fault == 0  # type: ignore[union-attr]
    assert parse(good[:11]) is None
    assert parse(good[:2] + b"\x80" + good[3:]) is None, "an answer gets no answer: two servers would never end"

    def fault(data: bytes) -> int:
        query = parse(data)
        assert query is not None
        assert dns.message.from_wire(answer(query, query.fault)).rcode() == query.fault
        return query.fault

    assert fault(optioned(b"", version=1)) == dnswire.BADVERS
    assert fault(good[:2] + b"\x28" + good[3:]) == dnswire.NOTIMP  # an UPDATE
    assert fault(good + b"\0") == dnswire.FORMERR
    assert fault(good[:-1]) == dnswire.FORMERR
    assert fault(good[:5] + b"\2" + good[6:]) == dnswire.FORMERR  # two questions
    assert fault(good[:7] + b"\1" + good[8:]) == dnswire.FORMERR  # with an answer
    assert fault(good[:11] + b"\2" + good[12:] + good[-11:]) == dnswire.FORMERR  # two OPT
    assert fault(good[:12] + b"\xc0\x0c" + b"\0\1\0\1" + good[-11:]) == dnswire.FORMERR  # a name that is its own end
    long = struct.pack("!6H", 9, 0, 1, 0, 0, 0) + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1"
    assert fault(long) == dnswire.FORMERR
    for bad in ("", "a..b", "a" * 64, ".".join(["a" * 60] * 5), "büro.example"):
        with pytest.raises(ValueError):
            name_of(bad)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4))
@example(b"", [(2, 0x80)])
def test_no_bytes_make_it_stumble_or_grow(noise: bytes, flips: list[tuple[int, int]]) -> None:
    good = bytearray(optioned(ecs(1, 24, 0, b"\x0a\1\2")))
    for at, value in flips:
        good[at % len(good)] = value
    for data in (noise, b"\0\7\1\0\0\1" + noise, bytes(good), bytes(good) + noise):
        query = parse(data)
        if query is None:
            continue
        wire = answer(query, query.fault)
        assert len(wire) <= len(data) + 11, "with OPT as it was asked, and no more"
        if query.fault:
            continue
        # whom both understand, both understand in the same way; dnspython looks into options that we leave alone
        try:
            read = dns.message.from_wire(data)
        except (dns.exception.DNSException, ValueError):
            continue
        assert read.question[0].name.canonicalize().to_wire() == query.name
        assert read.question[0].rdtype == query.type
        subnets = [o for o in read.options if isinstance(o, dns.edns.ECSOption)]
        want = [(o.family, o.srclen, o.scopelen) for o in subnets]
        assert want == ([(query.subnet.family, query.subnet.source, 0)] if query.subnet else [])


def test_a_subnet_is_an_address() -> None:
    assert str(Subnet(1, 20, b"\x0a\1\x10").client) == "10.1.16.0"
    assert str(Subnet(2, 33, b"\x20\1\x0d\xb8\x80").client) == "2001:db8:8000::"
