"""Certificates from ACME authorities: one in this process that is strict, and pebble where it is installed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.gateway.acme_authority import AcmeAuthority
from tests.gateway.papers import Authority, listener
from tests.gateway.rig import Rig, free_port

from edgeward.core.vault import Vault
from edgeward.gateway import acme, orders
from edgeward.gateway.certificates import Wish
from edgeward.gateway.listens import CertConfig
from edgeward.gateway.orders import Orders
from edgeward.gateway.pems import Pair

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "LOOK", 0.01)


@pytest.fixture
def authority(tmp_path: Path, rig: Rig) -> Iterator[AcmeAuthority]:
    made = AcmeAuthority(tmp_path, rig.port)
    yield made
    made.close()


class Site:
    """The agent's part, with a gateway as the plane."""

    def __init__(self, folder: Path, rig: Rig, now: float | None = None) -> None:
        self.rig = rig
        self.changes = 0
        self.events: list[tuple[str, str]] = []
        self.published: list[dict[str, str]] = []
        self.now = now or time.time()
        self.orders = Orders(
            folder / "acme", Vault(KEY), publish=self.publish, changed=self._changed,
            event=lambda type, reason, message, *_: self.events.append((reason, message)), now=lambda: self.now,
        )  # fmt: skip
        self.changed = asyncio.Event()

    def _changed(self) -> None:
        self.changes += 1
        self.changed.set()

    async def publish(self, proofs: dict[str, str]) -> None:
        self.published.append(proofs)
        self.rig.gate.challenges = {k: v.encode() for k, v in proofs.items()}

    async def get(self, *wishes: Wish) -> list[Pair | str]:
        """Runs until something was decided of each."""
        self.orders.wanted(wishes)
        task = asyncio.create_task(self.orders.run())
        try:
            async with asyncio.timeout(60):
                while self.changes < len(wishes):
                    self.changed.clear()
                    await self.changed.wait()
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.changes = 0
        return [self.orders.found(w) for w in wishes]


def wish(authority: Any, *hosts: str, agreed: bool = True) -> Wish:
    return Wish(hosts, authority.directory, ("mailto:ops@example.org",), agreed, authority.ca, "shop/l")


def test_a_certificate_from_its_order_to_the_disk(tmp_path: Path, rig: Rig, authority: AcmeAuthority) -> None:
    site = Site(tmp_path, rig)
    wanted = wish(authority, "a.example.org", "b.example.org", "192.0.2.7")
    assert site.orders.found(wanted) == f"is asked for at {authority.base.removeprefix('https://')}"
    (pair,) = asyncio.run(site.get(wanted))
    assert isinstance(pair, Pair)
    assert set(pair.names) == {"a.example.org", "b.example.org", "192.0.2.7"}
    assert pair.pem.count("BEGIN CERTIFICATE") == 2
    assert site.events[-1][0] == "CertificateIssued"
    assert [len(p) for p in site.published] == [3, 0]  # nothing stays published
    # the account is one, and has who is to be told
    assert [a["contact"] for a in authority.accounts.values()] == [["mailto:ops@example.org"]]
    # another start has it from the disk, sealed, and asks nobody
    asked = len(authority.asked)
    again = Site(tmp_path, rig)
    assert again.orders.found(wanted) == pair
    assert len(authority.asked) == asked
    for file in (tmp_path / "acme").iterdir():
        assert b"PRIVATE" not in file.read_bytes()
        assert file.stat().st_mode & 0o777 == 0o600
    # a second order goes by the same account
    asyncio.run(again.get(wish(authority, "c.example.org")))
    assert len(authority.accounts) == 1


def test_it_is_renewed_at_two_thirds_of_its_life_and_served_until_then(
    tmp_path: Path, rig: Rig, authority: AcmeAuthority
) -> None:
    begin = datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC)
    authority.begin, authority.end = begin, begin + datetime.timedelta(days=90)
    day, t = 86400.0, begin.timestamp()
    site = Site(tmp_path, rig, t + day)
    wanted = wish(authority, "a.example.org")

    async def run() -> None:
        (first,) = await site.get(wanted)
        assert isinstance(first, Pair)
        site.now = t + 59 * day
        assert await site.orders._look_after(site.orders._id(wanted), wanted) == orders.AGAIN
        assert site.orders.found(wanted) == first
        site.now = t + 61 * day
        authority.limited = "7200"
        (still,) = await site.get(wanted)
        assert still == first  # it lasts for another month
        assert "rateLimited" in site.events[-1][1]
        # it is left alone for as long as it said, also by an agent that starts anew
        asked = len(authority.asked)
        again = Site(tmp_path, rig, site.now + 7000)
        assert again.orders.found(wanted) == first
        assert await again.orders._look_after(again.orders._id(wanted), wanted) <= 200
        assert len(authority.asked) == asked
        authority.limited = ""
        authority.begin, authority.end = begin + datetime.timedelta(days=61), begin + datetime.timedelta(days=151)
        again.now = site.now + 7300
        (second,) = await again.get(wanted)
        assert isinstance(second, Pair)
        assert second.ends > first.ends
        assert second.digest != first.digest

    asyncio.run(run())


def test_stale_nonces_are_no_failure_but_not_for_ever(tmp_path: Path, rig: Rig, authority: AcmeAuthority) -> None:
    authority.stale = 2
    (pair,) = asyncio.run(Site(tmp_path, rig).get(wish(authority, "a.example.org")))
    assert isinstance(pair, Pair)
    authority.stale = 1000
    (why,) = asyncio.run(Site(tmp_path, rig).get(wish(authority, "b.example.org")))
    assert isinstance(why, str)
    assert "badNonce" in why


def test_why_there_is_none(tmp_path: Path, rig: Rig, authority: AcmeAuthority) -> None:
    site = Site(tmp_path, rig)

    async def why(wanted: Wish) -> str:
        (found,) = await site.get(wanted)
        assert isinstance(found, str)
        return found

    async def nothing(proofs: dict[str, str]) -> None:
        await Site.publish(site, {})

    async def run() -> None:
        assert "agree to the terms" in await why(wish(authority, "a.example.org", agreed=False))
        site.orders._publish = nothing
        said = await why(wish(authority, "b.example.org"))
        assert "b.example.org: unauthorized: b.example.org said status 404" in said
        site.orders._publish = site.publish
        authority.wrong = True
        said = await why(wish(authority, "c.example.org"))
        assert "the authority's certificate is not for c.example.org" in said
        # its own certificate is not by the CA that was given
        stranger = Wish(("d.example.org",), authority.directory, (), True, Authority().pem, "shop/l")
        assert "does not answer" in await why(stranger)
        nobody = Wish(("e.example.org",), f"https://127.0.0.1:{free_port()}/dir", (), True, authority.ca, "shop/l")
        assert "does not answer" in await why(nobody)

    asyncio.run(run())
    assert {reason for reason, _ in site.events} == {"CertificateFailed"}
    assert not site.rig.gate.challenges


@pytest.mark.parametrize(
    "url",
    ["http://a/", "https:///x", "https://u@a/", "ftp://a/", "https://a:99999/", "https://a/\r\nx", "", "https://ä/"],
)
def test_nothing_signed_goes_anywhere_but_to_https(url: str) -> None:
    with pytest.raises(acme.Invalid):
        acme.secure(url)


def test_what_an_authority_may_say() -> None:
    good = acme.Authorization("pending", acme.Identifier("dns", "a.org"), [acme.Challenge("dns-01", "https://a/", "x")])
    with pytest.raises(acme.Invalid, match="offers no http-01, but dns-01"):
        good.http()
    for token in ("short", "../../etc/passwd-is-long", "a" * 300, "with blank with blank"):
        with pytest.raises(acme.Invalid, match="token"):
            acme.Authorization("pending", good.identifier, [acme.Challenge("http-01", "https://a/", token)]).http()
    assert acme.retry_after("120") == 120.0
    assert acme.retry_after("999999999") == 86400.0
    assert acme.retry_after("Wed, 21 Oct 2026 07:28:00 GMT") == acme.retry_after(None) == acme.retry_after("-1") == 0.0
    for body in (b"", b"[]", b'{"status": "pending"}', b'{"status": "new", "authorizations": [], "finalize": "x"}'):
        with pytest.raises(acme.Invalid):
            acme.read(body, acme.Order)
    assert isinstance(acme.refusal(503, b"<html>", 5.0)[1], acme.Limited)
    assert "500" in str(acme.refusal(500, b"<html>", 0.0)[1])


# --- the test server of Let's Encrypt ---------------------------------------------------------------------------------


class Pebble:
    """Debian's packages pebble; ``EDGEWARD_PEBBLE`` names the folder of its programs where it is not installed."""

    def __init__(self, folder: Path, http_port: int) -> None:
        programs = [shutil.which(n, path=os.environ.get("EDGEWARD_PEBBLE")) for n in ("pebble", "pebble-challtestsrv")]
        if None in programs:
            pytest.skip("pebble is not installed (Debian: pebble; or EDGEWARD_PEBBLE=FOLDER)")
        self.own = Authority("pebble")
        chain, key = self.own.issue("127.0.0.1")
        (folder / "pebble.crt").write_text(chain)
        (folder / "pebble.key").write_text(key)
        port, management, dns, dns_management = (free_port() for _ in range(4))
        config = {
            "listenAddress": f"127.0.0.1:{port}", "managementListenAddress": f"127.0.0.1:{management}",
            "certificate": str(folder / "pebble.crt"), "privateKey": str(folder / "pebble.key"),
            "httpPort": http_port, "tlsPort": free_port(), "ocspResponderURL": "",
        }  # fmt: skip
        (folder / "pebble.json").write_text(json.dumps({"pebble": config}))
        off = ["-http01", "", "-https01", "", "-tlsalpn01", ""]
        self.processes = [
            subprocess.Popen(
                [str(programs[1]), *off, "-dns01", f"127.0.0.1:{dns}", "-management", f"127.0.0.1:{dns_management}",
                 "-defaultIPv4", "127.0.0.1", "-defaultIPv6", ""],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            ),
            subprocess.Popen(
                [str(programs[0]), "-config", str(folder / "pebble.json"), "-strict", "-dnsserver", f"127.0.0.1:{dns}"],
                env={**os.environ, "PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "20"},
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            ),
        ]  # fmt: skip
        self.directory, self.ca = f"https://127.0.0.1:{port}/dir", self.own.pem
        self.management = management
        self._ports = (port, dns_management)

    def started(self) -> None:
        end = time.monotonic() + 60
        for at in self._ports:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", at), timeout=5):
                    break
                assert time.monotonic() < end, "pebble does not start"
                time.sleep(0.05)

    def root(self) -> str:
        context = ssl.create_default_context(cadata=self.ca)
        connection = http.client.HTTPSConnection("127.0.0.1", self.management, context=context, timeout=30)
        connection.request("GET", "/roots/0")
        text = connection.getresponse().read().decode()
        connection.close()
        return text

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.wait(30)


def test_with_pebble(tmp_path: Path, rig: Rig) -> None:
    """The gateway shows its certificate, and who trusts pebble's root believes it; a fifth of all nonces is refused."""
    port = free_port()
    pebble = Pebble(tmp_path, rig.port)
    try:
        pebble.started()
        site = Site(tmp_path, rig)
        wanted = wish(pebble, "a.example.org", "b.example.org")
        (pair,) = asyncio.run(site.get(wanted))
        assert isinstance(pair, Pair), pair
        sealed = base64.b64encode(pair.pem.encode()).decode()
        rig.listeners = [listener(port, CertConfig("acme", pair.names, pair.digest, sealed))]
        rig.apply()
        context = ssl.create_default_context(cadata=pebble.root())
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as raw,
            context.wrap_socket(raw, server_hostname="b.example.org") as shown,
        ):
            assert shown.version() == "TLSv1.3"
    finally:
        pebble.close()
