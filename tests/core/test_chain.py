"""The chain: whatever is done to it is found, and where."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.core.chain import GENESIS, Head, Link, check, link, link_hash


def chain(bodies: list[str], seq: int = 1, prev: str = GENESIS) -> list[Link]:
    links = []
    for n, body in enumerate(bodies, seq):
        links.append(link(prev, n, body))
        prev = links[-1].hash
    return links


def head_of(links: list[Link], at: int = -1) -> Head:
    return Head(links[at].seq, links[at].hash, links[0].seq, links[0].prev, "then")


def test_a_whole_chain_is_whole() -> None:
    assert check([]).broken == 0
    links = chain(["a", "b", "c"])
    assert check(links) == msgspec.structs.replace(check(links), records=3, first=1, last=3, broken=0, vouched=0)
    assert check(links, head_of(links)).vouched == 3
    # written on since; the oldest gone by rule, and the head not yet, or already, telling so
    later = chain(["d"], 4, links[-1].hash)
    assert check([*links, *later], head_of(links)).broken == 0
    cut = Head(3, links[2].hash, 2, links[1].prev)
    assert check(links[1:], cut).broken == 0
    assert check(links, cut).broken == 0
    assert check([], Head(0, GENESIS, 1, GENESIS)).broken == 0


bodies = st.lists(st.text(max_size=8), min_size=1, max_size=12)


@given(bodies, st.data())
@settings(max_examples=400, deadline=None)
def test_any_change_is_found_at_the_first_record_that_it_touches(texts: list[str], data: Any) -> None:
    links = chain(texts)
    head = head_of(links)
    at = data.draw(st.integers(0, len(links) - 1))
    one = links[at]
    what = data.draw(
        st.sampled_from(["body", "hash", "prev", "gone", "twice", "swapped", "rewritten", "tail", "first"])
    )
    forged, where = list(links), one.seq
    if what == "body":
        forged[at] = msgspec.structs.replace(one, body=one.body + "x")
    elif what == "hash":
        forged[at] = msgspec.structs.replace(one, hash="f" * 64)
    elif what == "prev":
        forged[at] = msgspec.structs.replace(one, prev="e" * 64)
    elif what == "gone":
        del forged[at]
    elif what == "twice":
        forged.insert(at, one)
        where = one.seq + 1
    elif what == "swapped" and at + 1 < len(links):
        forged[at], forged[at + 1] = forged[at + 1], forged[at]
    elif what == "rewritten":  # with right hashes from here on
        forged = links[:at] + chain([one.body + "x", *texts[at + 1 :]], one.seq, one.prev)
        where = head.seq
    elif what == "tail":
        forged = links[:at]
    elif what == "first":
        forged, where = links[at + 1 :], 1
    else:
        return
    found = check(forged, head)
    assert found.broken == where, (what, found)
    assert found.why


def test_a_head_made_of_another_chain_is_not_this_one() -> None:
    links, others = chain(["a", "b"]), chain(["a", "c"])
    assert check(others, head_of(links)).broken == 2
    assert check(links, Head(2, links[1].hash, 1, "1" * 64)).broken == 1
    assert check([msgspec.structs.replace(links[0], prev="no hex")]).broken == 1
    assert link_hash(GENESIS, 1, "a") != link_hash(GENESIS, 2, "a") != link_hash(links[0].hash, 2, "a")
