"""The rules of enrolment, without a network: tokens, signatures, the states of a name, when a node renews."""

from __future__ import annotations

import base64
import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.core.errors import EdgewardError, Forbidden, Invalid, NotFound, Refused
from edgeward.core.nkeys import KeyPair
from edgeward.nodes import enrol as rules
from edgeward.nodes.enrol import EnrolAsk, LeaveAsk, Member, RenewAsk, Standing, Token, TokenFacts

NOW = 1_800_000_000.0
DAY = 86400.0
TOKEN = Token(1, "plant-2-x", "plant-2", "plant", ["https://hub:443"], bytes(range(32)), bytes(range(32, 64)))


def facts(
    name: str = "t", *, replace: bool = False, expires: float = NOW + 60, key: KeyPair | None = None
) -> TokenFacts:
    return TokenFacts(name, "plant-2", "plant", rules.digest((key or TOKEN.key).public), expires, replace)


def ask(device: KeyPair, token: KeyPair = TOKEN.key, **changes: Any) -> EnrolAsk:
    a = EnrolAsk("nonce", "t", token.public, "plant-2", "plant", device.public, "csr")
    for name, value in changes.items():
        setattr(a, name, value)
    said = rules.transcript(a)
    a.tokenSignature, a.signature = token.sign(said), device.sign(said)
    return a


# -- the token's text --


def test_a_token_reads_back_and_shows_nothing() -> None:
    text = rules.encode_token(TOKEN)
    assert text.startswith("ewj_")
    assert " " not in text
    assert rules.decode_token(f" {text}\n") == TOKEN
    assert repr(TOKEN.secret) not in repr(TOKEN)


def test_every_damage_of_a_token_is_noticed() -> None:
    text = rules.encode_token(TOKEN)
    for at in range(len("ewj_"), len(text)):
        other = "A" if text[at] != "A" else "B"
        changed = text[:at] + other + text[at + 1 :]
        if base64.urlsafe_b64decode(changed[4:] + "==") == base64.urlsafe_b64decode(text[4:] + "=="):
            continue  # the unused bits of the last character
        with pytest.raises(Invalid, match="damaged"):
            rules.decode_token(changed)
    for bad in (
        text[:-1],
        text[:40],
        text + "A",
        "ewj_",
        "ewj_!!!!",
        "ew_" + text[4:],
        "",
        "ewj_" + "A" * 5000,
        "ewj_é",
    ):
        with pytest.raises(Invalid):
            rules.decode_token(bad)


@pytest.mark.parametrize(
    "changes", [{"secret": b"x" * 31}, {"pin": b""}, {"urls": []}, {"urls": ["u"] * 17}, {"version": 2}]
)
def test_a_token_with_a_good_checksum_may_still_be_none(changes: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        rules.decode_token(rules.encode_token(msgspec.structs.replace(TOKEN, **changes)))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_token_or_refused(raw: bytes) -> None:
    import hashlib

    check = hashlib.sha256(raw).digest()[:4]
    with pytest.raises(Invalid):
        rules.decode_token("ewj_" + base64.urlsafe_b64encode(check + raw).decode())


# -- signatures --


def test_a_good_ask_passes() -> None:
    a = ask(KeyPair.create("user"))
    rules.check_enrol(a, rules.check_secret(a, facts()))


def test_who_has_not_the_secret_learns_nothing() -> None:
    device = KeyPair.create("user")
    with pytest.raises(Forbidden) as none:
        rules.check_secret(ask(device), None)
    with pytest.raises(Forbidden) as other:
        rules.check_secret(ask(device, KeyPair.create("user")), facts())
    assert str(none.value) == str(other.value)
    # the public half is not enough
    a = ask(device)
    a.tokenSignature = device.sign(rules.transcript(a))
    with pytest.raises(Forbidden, match="join token's signature"):
        rules.check_secret(a, facts())


@pytest.mark.parametrize("field", [f.name for f in msgspec.structs.fields(EnrolAsk) if "ignature" not in f.name])
def test_nothing_in_an_ask_can_be_changed_on_the_way(field: str) -> None:
    """What a proxy that looks into TLS could try: another device key, another request, another name."""
    device = KeyPair.create("user")
    a = ask(device)
    setattr(a, field, KeyPair.create("user").public if field in ("key", "tokenKey") else "other")
    with pytest.raises(Forbidden):
        rules.check_enrol(a, rules.check_secret(a, facts()))


def test_fields_cannot_run_into_one_another() -> None:
    a, b = LeaveAsk("ab", "c", "d"), LeaveAsk("a", "bc", "d")
    assert rules.transcript(a) != rules.transcript(b)
    assert rules.transcript(LeaveAsk("n", "a", "k")) != rules.transcript(RenewAsk("n", "a", "k", ""))


def test_a_token_is_for_its_name_and_site() -> None:
    device = KeyPair.create("user")
    with pytest.raises(Forbidden, match=r"for node 'plant-2', not for 'plant-3'"):
        rules.check_enrol(ask(device, node="plant-3"), facts())
    with pytest.raises(Forbidden, match=r"for site 'plant', not for 'shop'"):
        rules.check_enrol(ask(device, site="shop"), facts())


@pytest.mark.parametrize(
    "key",
    ["", "x", KeyPair.create("account").public, KeyPair.create("user").seed],
    ids=["empty", "short", "account", "seed"],
)
def test_a_key_that_is_none_is_a_wrong_signature(key: str) -> None:
    a = ask(KeyPair.create("user"))
    a.key = key
    with pytest.raises(Forbidden):
        rules.check_enrol(a, facts())


# -- the states of a name --


def test_once_only_but_the_same_box_may_ask_again() -> None:
    free = Member("seed")
    held = rules.enrol(free, facts(), "K1", NOW)
    assert (held.key, held.used, held.barred) == ("K1", {"t": "K1"}, {})
    assert rules.enrol(held, facts(), "K1", NOW + 1) is held, "its answer was lost"
    assert rules.enrol(held, facts(), "K1", NOW + 9999) is held, "and it took long"
    with pytest.raises(Forbidden, match="used before"):
        rules.enrol(held, facts(), "K2", NOW)
    with pytest.raises(Forbidden, match="cannot be taken by another"):
        rules.enrol(held, facts("t2"), "K2", NOW)
    with pytest.raises(Forbidden, match="expired"):
        rules.enrol(free, facts(), "K1", NOW + 60)


def test_a_revoked_name_comes_back_by_replacement_only() -> None:
    held = rules.enrol(Member("seed"), facts(), "K1", NOW)
    gone = rules.revoke(held, NOW + 1)
    assert gone.revoked
    assert gone.barred == {"K1": int(NOW + 1)}
    for token, key in ((facts(), "K1"), (facts("t2"), "K2"), (facts(), "K2"), (facts("t3", replace=True), "K1")):
        with pytest.raises(Forbidden):
            rules.enrol(gone, token, key, NOW)
    other = rules.enrol(gone, facts("t3", replace=True), "K2", NOW)
    assert (other.key, other.revoked) == ("K2", False)
    assert "K1" in other.barred
    with pytest.raises(Forbidden):
        rules.enrol(other, facts("t3", replace=True), "K3", NOW)
    assert rules.revoke(rules.revoke(other, NOW), NOW + 5).barred.keys() == {"K1", "K2"}


def test_a_replacement_takes_the_name_from_a_box_that_is_there() -> None:
    held = rules.enrol(Member("seed"), facts(), "K1", NOW)
    other = rules.enrol(held, facts("t2", replace=True), "K2", NOW)
    assert other.key == "K2"
    assert list(other.barred) == ["K1"]


def test_a_deleted_node_frees_its_name_but_not_its_key() -> None:
    held = rules.enrol(Member("seed"), facts(), "K1", NOW)
    free = rules.release(held, NOW)
    for token in (facts("t2"), facts()):
        with pytest.raises(Forbidden):
            rules.enrol(free, token, "K1", NOW)
    with pytest.raises(Forbidden, match="used before"):
        rules.enrol(free, facts(), "K2", NOW)
    assert rules.enrol(free, facts("t2"), "K2", NOW).key == "K2"
    assert rules.release(rules.revoke(held, NOW), NOW).revoked, "deleting a revoked node is no way round it"


def test_a_node_of_an_earlier_release_is_held_by_whom_we_do_not_know() -> None:
    legacy = Member("seed", legacy=True)
    with pytest.raises(Forbidden):
        rules.enrol(legacy, facts(), "K1", NOW)
    assert rules.revoke(legacy, NOW).barred == {"*": int(NOW) - 1}
    assert rules.enrol(legacy, facts(replace=True), "K1", NOW).key == "K1"


KEYS = ["K1", "K2", "K3"]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("enrol"), st.sampled_from(["a", "b", "c", "ra", "rb"]), st.sampled_from(KEYS)),
        st.tuples(st.sampled_from(["revoke", "release"]), st.just(""), st.just("")),
        st.tuples(st.just("wait"), st.just(""), st.just("")),
    ),
    max_size=30,
)


@settings(max_examples=1000, deadline=None)
@given(STEPS)
def test_whatever_happens_a_lost_key_stays_lost_and_a_token_is_one_boxs(steps: list[tuple[str, str, str]]) -> None:
    member, now = Member("seed"), NOW
    lost: set[str] = set()
    winner: dict[str, str] = {}
    for act, token, key in steps:
        before = member
        if act == "enrol":
            replace = token.startswith("r")
            try:
                member = rules.enrol(member, facts(token, replace=replace, expires=NOW + 100), key, now)
            except Forbidden:
                assert member == before
                continue
            assert member.key == key
            assert key not in lost
            assert winner.setdefault(token, key) == key, "two boxes with one token"
            assert replace or not before.revoked
            assert replace or before.key in ("", key), "a name was taken from a box without a replacement"
            assert now < NOW + 100 or before.key == key
        elif act == "wait":
            now += 60
        else:
            member = rules.revoke(member, now) if act == "revoke" else rules.release(member, now)
            assert member.key == ""
            assert act != "revoke" or member.revoked
        if before.key and before.key != member.key:
            lost.add(before.key)
        assert set(member.barred) == lost
        assert member.key not in lost
        assert not (member.revoked and member.key)


@pytest.mark.parametrize(
    ("member", "site", "replace", "good"),
    [
        (None, None, False, True),
        (None, "plant", False, True),
        (None, "shop", False, False),
        (Member("s", key="K"), "plant", False, False),
        (Member("s", key="K"), "plant", True, True),
        (Member("s", key="K"), "shop", True, False),
        (Member("s", revoked=True), "plant", False, False),
        (Member("s", revoked=True), None, True, True),
        (Member("s"), None, False, True),
        (Member("s"), "plant", True, False),
        (None, None, True, False),
        (Member("s", legacy=True), "plant", False, False),
        (Member("s", legacy=True), "plant", True, True),
    ],
)
def test_for_which_names_tokens_are_made(member: Member | None, site: str | None, replace: bool, good: bool) -> None:
    if good:
        rules.may_issue(member, "n", "plant", site, replace=replace)
    else:
        with pytest.raises(Refused):
            rules.may_issue(member, "n", "plant", site, replace=replace)


def test_the_life_of_a_token_is_bounded() -> None:
    assert [rules.check_ttl(t) for t in (1, 86400, 30 * DAY)] == [1, 86400, 30 * DAY]
    for bad in (0, -1, 0.5, 30 * DAY + 1, float("inf"), float("nan")):
        with pytest.raises(Invalid):
            rules.check_ttl(bad)


def test_who_may_renew() -> None:
    key, other = KeyPair.create("user"), KeyPair.create("user")

    def renewal(signer: KeyPair) -> RenewAsk:
        a = RenewAsk("n", "plant-2", key.public, "csr")
        a.signature = signer.sign(rules.transcript(a))
        return a

    held = Member("s", key=key.public, expires=1.0)
    assert rules.check_renew(renewal(key), held) is held, "long expired, and still that box"
    cases: list[tuple[KeyPair, Member | None, type[EdgewardError]]] = [
        (other, held, Forbidden),
        (key, None, NotFound),
        (key, Member("s", key=other.public), Forbidden),
        (key, Member("s", key=key.public, revoked=True), Forbidden),
        (key, Member("s", key=key.public, barred={key.public: 1}), Forbidden),
        (key, Member("s"), Forbidden),
    ]
    for signer, member, error in cases:
        with pytest.raises(error):
            rules.check_renew(renewal(signer), member)


# -- when a node renews --


@given(st.floats(1, 1e9), st.floats(0, 1))
def test_renewal_is_due_from_two_thirds_of_the_life_on(life: float, spread: float) -> None:
    at = rules.renew_at(NOW, NOW + life, spread)
    assert NOW + life * 0.66 < at < NOW + life * 0.76


def test_a_thousand_nodes_of_one_hour_do_not_renew_at_once() -> None:
    due = sorted(rules.renew_at(NOW, NOW + 90 * DAY, n / 1000) for n in range(1000))
    assert due[-1] - due[0] > 7 * DAY
    assert max(b - a for a, b in itertools.pairwise(due)) < DAY


GOOD = Standing(NOW, NOW + 90 * DAY)


def test_with_a_link_the_clock_decides() -> None:
    assert rules.next_step(GOOD, NOW, 0.5) == ("wait", 60.0)
    assert rules.next_step(GOOD, NOW + 59 * DAY, 0.0) == ("wait", 60.0)
    assert rules.next_step(GOOD, NOW + 61 * DAY, 0.0) == ("renew", 0.0)
    assert rules.next_step(GOOD, NOW + 400 * DAY, 1.0) == ("renew", 0.0)
    assert rules.next_step(Standing(NOW, 0), NOW, 0.5) == ("renew", 0.0), "credentials that know no end get one"


def test_without_a_link_what_the_hub_says_decides() -> None:
    def step(now: float = NOW, **of: Any) -> tuple[str, float]:
        return rules.next_step(msgspec.structs.replace(GOOD, **of), now, 1.0)

    assert step(down_for=5) == ("wait", 15.0)
    assert step(down_for=25) == ("probe", 0.0)
    assert step(down_for=25, probe="unreachable", probes=9) == ("probe", 30.0)
    assert step(down_for=25, probe="untrusted", probes=1) == ("renew", 0.0)
    assert step(down_for=25, probe="reachable", probes=1)[0] == "probe", "it will be back by itself"
    assert step(down_for=25, probe="reachable", probes=2) == ("renew", 0.0), "something keeps it out"
    # 400 days away; and a clock at 1970: at once
    assert step(NOW + 400 * DAY, down_for=25, probe="reachable", probes=1) == ("renew", 0.0)
    assert step(NOW + 400 * DAY, down_for=1) == ("wait", 1.0)
    assert step(NOW + 400 * DAY, down_for=3) == ("probe", 0.0), "it knows that it is its own fault"
    assert step(0.0, down_for=25, probe="reachable", probes=1) == ("renew", 0.0)
    assert step(NOW + 400 * DAY, down_for=25, probe="unreachable", probes=1)[0] == "probe"


def test_a_clock_that_is_wrong_makes_no_node_renew_again_and_again() -> None:
    """Ahead by years, or at 1970: with the link, and without it."""
    for now in (NOW + 400 * DAY, 100.0):
        renewed = msgspec.structs.replace(GOOD, renewed=0.0)
        assert rules.next_step(renewed, now, 0.0) == ("wait", 60.0)
        assert rules.next_step(msgspec.structs.replace(GOOD, renewed=59 * DAY), now, 0.0) == ("wait", 60.0)
        assert rules.next_step(msgspec.structs.replace(GOOD, renewed=60 * DAY), now, 0.0) == ("renew", 0.0)
        waits = []
        for vain in range(1, 9):
            out = msgspec.structs.replace(GOOD, down_for=30, probe="reachable", probes=1, vain=vain, renewed=0.0)
            act, wait = rules.next_step(out, now, 1.0)
            assert act == "renew"
            waits.append(wait)
        assert waits == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0, 60.0]


@given(st.floats(0.001, 1e8), st.integers(0, 1000), st.sampled_from(["", "unreachable", "untrusted", "reachable"]),
       st.integers(0, 9), st.floats(-1e9, 1e10), st.floats(0, 1), st.floats(1, 1e8))  # fmt: skip
def test_a_node_never_sleeps_for_long(
    down: float, failed: int, probe: rules.Probe, probes: int, now: float, spread: float, life: float
) -> None:
    for down_for in (0.0, down):
        _, wait = rules.next_step(Standing(NOW, NOW + life, down_for, failed, probe, probes), now, spread)
        assert 0 <= wait <= (rules.RETRY_MOST if not down_for else 60.0)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 60), st.booleans(), st.booleans()), max_size=12), st.floats(0, 1))
def test_over_400_days_a_node_always_gets_back_in(days: list[tuple[float, bool, bool]], spread: float) -> None:
    """A simulated node, 90 days of life: the link is there or not for days at a time; tries fail now and then."""
    now, issued = NOW, NOW
    for length, cut, fails in [*days, (400.0, True, False), (1.0, False, False)]:
        end, down, failed, probe, probes = now + length * DAY, 0.0, 0, "", 0
        lived = issued + 90 * DAY
        while now < end:
            link = not cut and now < lived
            down = 0.0 if link else down + 0.001
            act, wait = rules.next_step(Standing(issued, lived, down, failed, probe, probes), now, spread)  # type: ignore[arg-type]
            if act == "probe" or (act == "renew" and wait == 0):
                wait = max(wait, 1.0)
            if cut and act == "probe" and wait > 1:
                break  # it looks twice a minute until the cut ends: nothing else happens
            step = min(wait if wait > 1 or act != "wait" else 1.0, end - now) or 1.0
            if act == "wait" and link:
                step = min(end, max(now + step, rules.renew_at(issued, lived, spread))) - now  # many waits in one
            now += max(step, 0.001)
            down = 0.0 if link else down + step
            if act == "probe":
                found = "unreachable" if cut else "reachable"
                probe, probes = found, probes + 1 if found == probe else 1
            elif act == "renew":
                if cut or (fails and failed < 3):
                    failed, probe, probes = failed + 1, "", 0
                else:
                    issued, failed, probe, probes = now, 0, "", 0
                    lived = issued + 90 * DAY
        now = end
    assert now < issued + 90 * DAY, "it has good credentials again within a day"
