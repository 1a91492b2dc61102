"""The hub's CA: what it signs, how it is replaced, and who is led from the old one to the new one."""

from __future__ import annotations

import time
from datetime import UTC, datetime, tzinfo
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509 import verification

from edgeward.core import certs
from edgeward.core.certs import Authority, Trust, check_certificate, check_csr, fingerprint, follow, make_csr, new_key
from edgeward.core.errors import Conflict, Invalid, Refused

DAY = 86400.0


def named(authority: Authority, node: str = "n", days: float = 90, ago: float = 0) -> str:
    now = time.time() - ago * DAY
    return certs.pem(authority.node(check_csr(make_csr(node, new_key()), node), node, now + days * DAY))


def test_a_rotation_leaves_no_gap(tmp_path: Path) -> None:
    a = Authority(tmp_path)
    first, issued = a.cert, named(a)
    with pytest.raises(Conflict):
        a.activate()
    assert a.rotate()
    assert not a.rotate(), "one at a time"
    assert a.cert == first, "the old one signs on"
    assert len(a.trust().trusted) == 2
    a.activate()
    assert a.cert != first
    assert first in a.trusted
    now = time.time()
    check_certificate(issued, "n", a.trusted, now)
    check_certificate(named(a), "n", a.trusted, now)
    assert a.retire() == 1
    assert a.trusted == [a.cert]
    with pytest.raises(Refused, match="not made by this hub"):
        check_certificate(issued, "n", a.trusted, now)
    check_certificate(issued, "n", a.known(), now), "a node that was away shows the old one"
    assert a.retire() == 0
    again = Authority(tmp_path)
    assert (again.cert, again.trusted, len(again.links)) == (a.cert, a.trusted, 1)


def test_who_was_away_for_many_rotations_is_led_on(tmp_path: Path) -> None:
    a = Authority(tmp_path)
    first = a.cert
    for _ in range(5):
        a.rotate()
        a.activate()
        a.retire()
    assert follow([first], a.trust()) == [a.cert]
    assert follow([a.cert], a.trust()) == [a.cert]


def test_nobody_else_leads_a_node_anywhere(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "a"), Authority(tmp_path / "b")
    first = ours.cert
    theirs.rotate()
    theirs.activate()
    with pytest.raises(Refused, match="not the one that we know"):
        follow([first], theirs.trust())
    forged = certs.Link(certs.pem(first), certs.pem(theirs.cert), theirs.sign(certs._vouch(first, theirs.cert)))
    with pytest.raises(Refused):
        follow([first], Trust([certs.pem(theirs.cert)], [forged]))
    # a link that is good leads to its end only
    ours.rotate()
    link = ours.links[0]
    with pytest.raises(Refused):
        follow([first], Trust([certs.pem(theirs.cert)], [certs.Link(link.old, certs.pem(theirs.cert), link.signature)]))
    assert follow([first], Trust([certs.pem(theirs.cert), *ours.trust().trusted])) == [first]
    with pytest.raises(Refused):
        follow([first], Trust([certs.pem(first)] * 100))
    with pytest.raises(Invalid):
        follow([first], Trust(["x"]))
    with pytest.raises(Refused):
        follow([], ours.trust())


@pytest.mark.parametrize("step", range(4))
def test_a_killed_activation_is_finished_by_the_next_start(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = Authority(tmp_path)
    old = a.cert
    a.rotate()
    following = a.next
    done = 0

    def dying(real: object) -> object:
        def call(*args: object, **more: object) -> object:
            nonlocal done
            if done == step:
                raise KeyboardInterrupt
            done += 1
            return real(*args, **more)  # type: ignore[operator]

        return call

    with monkeypatch.context() as m:
        m.setattr(certs, "write_atomic", dying(certs.write_atomic))
        m.setattr(certs, "remove", dying(certs.remove))
        if step < 3:
            with pytest.raises(KeyboardInterrupt):
                a.activate()
        else:
            a.activate()
    again = Authority(tmp_path)
    assert again.cert == (old if step == 0 else following)
    assert set(again.trusted) == ({old} if step == 0 else {old, following})
    check_certificate(named(again), "n", again.trusted, time.time())


def test_a_ca_whose_key_is_anothers_is_refused(tmp_path: Path) -> None:
    Authority(tmp_path / "a")
    Authority(tmp_path / "b")
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with pytest.raises(Invalid, match="another one's"):
        Authority(tmp_path / "a")


def test_a_new_ca_gives_the_listener_a_new_certificate_with_the_same_names(tmp_path: Path) -> None:
    a = Authority(tmp_path / "ca")
    file = tmp_path / "tls.pem"
    assert a.server(file, ["hub.example"])
    assert not a.server(file, [])
    a.rotate()
    assert not a.server(file, [])
    a.activate()
    assert a.server(file, [])
    assert "hub.example" in str(certs._names_of(file))


def judged(ca: x509.Certificate, shown: x509.Certificate, at: float) -> list[x509.Certificate]:
    """What a TLS client with its clock at ``at`` makes of it, names and usage included (RFC 5280, CA/B's profile)."""
    then = datetime.fromtimestamp(at, UTC).replace(tzinfo=None)
    checks = verification.PolicyBuilder().store(verification.Store([ca])).time(then)
    return checks.build_server_verifier(x509.DNSName("hub.example")).verify(shown, [])


def test_a_box_at_1970_can_judge_the_hub_and_an_end_is_an_end(tmp_path: Path) -> None:
    a = Authority(tmp_path)
    a.server(tmp_path / "tls.pem", ["hub.example"])
    shown = x509.load_pem_x509_certificate((tmp_path / "tls.pem").read_bytes())
    for at in (0.0, 100.0, time.time() - DAY, time.time(), time.time() + DAY):
        assert judged(a.cert, shown, at)
    with pytest.raises(verification.VerificationError):
        judged(a.cert, shown, time.time() + 400 * DAY)
    with pytest.raises(verification.VerificationError):
        judged(Authority(tmp_path / "other").cert, shown, 100.0)
    assert not a.server(tmp_path / "tls.pem", ["hub.example"]), "it is not renewed because it began long ago"


def test_a_hub_that_starts_at_1970_makes_certificates_that_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unset(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.fromtimestamp(100, tz)

    monkeypatch.setattr(certs, "datetime", Unset)
    a = Authority(tmp_path)
    a.server(tmp_path / "tls.pem", ["hub.example"])
    monkeypatch.undo()
    shown = x509.load_pem_x509_certificate((tmp_path / "tls.pem").read_bytes())
    assert judged(a.cert, shown, certs.MADE.timestamp() + 300 * DAY)


def test_what_a_nodes_certificate_must_be(tmp_path: Path) -> None:
    a = Authority(tmp_path)
    now = time.time()
    assert fingerprint(check_certificate(named(a), "n", a.trusted, now))
    with pytest.raises(Refused, match="ended on"):
        check_certificate(named(a, ago=100), "n", a.trusted, now)
    check_certificate(named(a, ago=100), "n", a.trusted, now, expired=True)
    check_certificate(named(a), "n", a.trusted, 100.0), "the hub's own clock was set back"
    with pytest.raises(Refused, match="'m'"):
        check_certificate(named(a, "m"), "n", a.trusted, now)
    with pytest.raises(Refused, match="not made by this hub"):
        check_certificate(named(a), "n", [], now)
    for junk in ("", "x", "x" * 10_000):
        with pytest.raises(Invalid):
            check_certificate(junk, "n", a.trusted, now)
