"""TLS at declared Listeners: which certificate is shown to whom, what changes under open connections, who is let in."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.gateway.papers import Authority, certificate, listener
from tests.gateway.rig import PATIENCE, Client, Pour, Rig, Target, free_port, plain

from edgeward.gateway.auth import AuthConfig
from edgeward.gateway.listens import CertConfig


class TlsClient(Client):
    """A client by TLS."""

    def __init__(
        self, port: int, ca: str, name: str | None = "a.example.org", *, alpn: list[str] | None = None,
        show: tuple[str, str] | None = None, folder: Path | None = None, version: Any = None,
    ) -> None:  # fmt: skip
        context = ssl.create_default_context(cadata=ca)
        context.set_alpn_protocols(alpn or ["http/1.1"])
        context.check_hostname = name is not None
        if version is not None:
            context.maximum_version = version
        if show is not None and folder is not None:
            file = folder / "client.pem"
            file.write_text(show[1] + show[0])
            context.load_cert_chain(file)
        self._data = b""
        raw = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        try:
            self.socket = context.wrap_socket(raw, server_hostname=name)
        except BaseException:
            raw.close()
            raise

    def rest_of_buffer(self) -> bytes:
        got, self._data = self._data, b""
        return got

    @property
    def shown(self) -> str:
        """SHA-256 of the server's certificate."""
        return hashlib.sha256(self.socket.getpeercert(True) or b"").hexdigest()  # type: ignore[attr-defined]


@pytest.fixture
def ca() -> Authority:
    return Authority()


@pytest.fixture
def port() -> int:
    return free_port()


Connect = Callable[..., TlsClient]


@pytest.fixture
def tls(ca: Authority, port: int, tmp_path: Path) -> Iterator[Connect]:
    made: list[TlsClient] = []

    def connect(name: str | None = "a.example.org", **more: Any) -> TlsClient:
        made.append(TlsClient(more.pop("port", port), ca.pem, name, folder=tmp_path, **more))
        return made[-1]

    yield connect
    for c in made:
        c.close()


def program(name: str) -> str:
    """A program of the machine's, as users have it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def digest(chain: str) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(chain)).hexdigest()


def until(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if got := what():
            return got
        time.sleep(0.02)  # between two looks
    raise AssertionError("did not come to be")


def test_the_name_that_is_asked_for_chooses_the_certificate(rig: Rig, ca: Authority, port: int, tls: Connect) -> None:
    target = rig.target(plain(b"hello"))
    rig.route("/", target.port)
    first, second = ca.issue("a.example.org", "127.0.0.1"), ca.issue("*.shop.example.org")
    rig.listeners = [listener(port, certificate(*first), certificate(*second, source="Secret/y"))]
    rig.apply()
    assert rig.heard.statuses["default/tls"]["phase"] == "Ready"  # type: ignore[index]
    a = tls()
    assert a.shown == digest(first[0])
    got = a.get("/x", host="a.example.org")
    assert (got.status, got.body) == (200, b"hello")
    assert b"x-forwarded-proto: https\r\n" in target.heads[-1]
    b = tls("b.shop.example.org")
    assert b.shown == digest(second[0])
    assert b.get("/x", host="b.shop.example.org:8443").status == 200
    # by an address, without a name: the first one
    assert tls("127.0.0.1").shown == digest(first[0])
    for name in ("c.example.org", "b.b.shop.example.org", "shop.example.org"):
        with pytest.raises(ssl.SSLError) as e:
            tls(name)
        assert not isinstance(e.value, ssl.SSLCertVerificationError)  # it was shown none
    # a connection for one host is no door to another one
    for host in ("c.example.org", "localhost"):
        got = a.get("/x", host=host)
        assert (got.status, got.headers["content-type"]) == (421, "application/problem+json")
    assert a.get("/x", host="b.shop.example.org").status == 200  # of the same listener


def test_a_target_may_answer_http_and_https_differently(rig: Rig, ca: Authority, port: int, tls: Connect) -> None:
    async def script(target: Any, reader: Any, writer: Any) -> None:
        while True:
            head = await target.request(reader)
            body = b"secure" if b"x-forwarded-proto: https" in head else b"go to https"
            writer.write(
                b"HTTP/1.1 200 OK\r\nCache-Control: max-age=600\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )

    from edgeward.gateway.rules import CacheConfig

    rig.route("/", rig.target(script).port, cache=CacheConfig())
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
    rig.apply()
    for _ in range(2):
        c = Client(rig.port)
        assert c.get("/x", host="a.example.org").body == b"go to https"
        c.close()
        assert tls().get("/x", host="a.example.org").body == b"secure"
    assert len(rig.gate.shelf) == 2


def test_a_new_certificate_without_dropping_anybody(rig: Rig, ca: Authority, port: int, tls: Connect) -> None:
    rig.route("/", rig.target(plain(b"ok")).port)
    old, new = ca.issue("a.example.org"), ca.issue("a.example.org")
    rig.listeners = [listener(port, certificate(*old))]
    rig.apply()
    before = tls()
    assert before.shown == digest(old[0])
    assert before.get("/1", host="a.example.org").status == 200
    rig.listeners = [listener(port, certificate(*new))]
    rig.apply()
    assert before.get("/2", host="a.example.org").status == 200
    after = tls()
    assert after.shown == digest(new[0])
    # one that is not good, or not there any more, does not take its place
    broken = CertConfig("Secret/x", ("a.example.org",), "d", "bm8gcGVt")
    gone = CertConfig("Secret/x", ("a.example.org",), waiting="Secret/x is not here yet")
    for bad in (broken, gone):
        rig.listeners = [listener(port, bad)]
        rig.apply()
        assert tls().shown == digest(new[0])
        status = rig.heard.statuses["default/tls"] or {}
        assert status["phase"] == "Degraded"
        assert "the one before it is shown" in status["message"]
    assert before.get("/3", host="a.example.org").status == 200


def test_without_a_certificate_nobody_is_let_in(rig: Rig, ca: Authority, port: int, tls: Connect) -> None:
    rig.listeners = [listener(port, CertConfig("Secret/x", ("a.example.org",), waiting="Secret/x is not here yet"))]
    rig.apply()
    status = rig.heard.statuses["default/tls"] or {}
    assert (status["phase"], status["message"]) == ("Pending", "Secret/x Secret/x is not here yet")
    with pytest.raises(ConnectionRefusedError):
        tls()
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
    rig.apply()
    assert tls().get("/", host="a.example.org").status == 404
    rig.listeners = []
    rig.apply()
    assert rig.heard.statuses["default/tls"] is None
    with pytest.raises(ConnectionRefusedError):
        tls()


def test_a_listener_that_is_gone_takes_its_idle_connections_along(
    rig: Rig, ca: Authority, port: int, tls: Connect
) -> None:
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
    rig.apply()
    c = tls()
    assert c.get("/", host="a.example.org").status == 404
    rig.listeners = []
    rig.apply()
    assert c.closed()


def test_a_listener_that_cannot_be_opened_stops_nothing_and_is_tried_again(
    rig: Rig, ca: Authority, port: int, tls: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeward.gateway.openings.AGAIN", 0.05)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
        rig.route("/", rig.target(plain(b"ok")).port)
        status = rig.heard.statuses["default/tls"] or {}
        assert (status["phase"], status["message"]) == ("Failed", f"cannot listen on 127.0.0.1:{port}: it is in use")
        c = Client(rig.port)
        assert c.get("/").status == 200
        c.close()
    until(lambda: (rig.heard.statuses["default/tls"] or {})["phase"] == "Ready")
    assert tls().get("/", host="a.example.org").status == 200
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")), refused="the owner says no")]
    rig.apply()
    assert (rig.heard.statuses["default/tls"] or {})["phase"] == "Refused"
    with pytest.raises(ConnectionRefusedError):
        tls()


def test_plain_listeners_and_the_way_to_https(rig: Rig, port: int) -> None:
    rig.route("/", rig.target(plain(b"ok")).port)
    other = free_port()
    rig.listeners = [listener(port, key="default/plain"), listener(other, key="default/to", redirect=8443)]
    rig.apply()
    c = Client(port)
    assert c.get("/a", host="any").body == b"ok"
    c.close()
    c = Client(other)
    for host, where in (("a.example.org", "a.example.org"), ("a.example.org:80", "a.example.org"), ("[::1]", "[::1]")):
        got = c.get("/a?b=1", host=host)
        assert (got.status, got.headers["location"]) == (308, f"https://{where}:8443/a?b=1")
    rig.listeners = [listener(port, key="default/plain"), listener(other, key="default/to", redirect=443)]
    rig.apply()
    assert c.get("/a", host="a.example.org").headers["location"] == "https://a.example.org/a"
    # what an authority wants to find goes before that, on plain ports
    rig.gate.challenges = {"/.well-known/acme-challenge/tok": b"tok.thumb"}
    got = c.get("/.well-known/acme-challenge/tok", host="a.example.org")
    assert (got.status, got.body) == (200, b"tok.thumb")
    assert c.get("/.well-known/acme-challenge/other", host="a.example.org").status == 308
    c.close()
    c = Client(rig.port)
    assert c.get("/.well-known/acme-challenge/tok", host="a.example.org").body == b"tok.thumb"
    c.close()


def test_old_versions_and_weak_ciphers_are_refused(rig: Rig, ca: Authority, port: int, tls: Connect) -> None:
    cert = certificate(*ca.issue("a.example.org"))
    rig.listeners = [listener(port, cert)]
    rig.apply()
    assert tls(version=ssl.TLSVersion.TLSv1_2).socket.version() == "TLSv1.2"  # type: ignore[attr-defined]
    argv = [program("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "a.example.org"]
    for options in (["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], ["-tls1_2", "-cipher", "AES128-SHA256"]):
        done = subprocess.run([*argv, *options], input=b"", capture_output=True, timeout=60)
        assert done.returncode != 0, options
        assert b"Cipher is (NONE)" in done.stdout
    rig.listeners = [listener(port, cert, min_version="1.3")]
    rig.apply()
    with pytest.raises(ssl.SSLError):
        tls(version=ssl.TLSVersion.TLSv1_2)
    assert tls().get("/", host="a.example.org").status == 404


def test_clients_show_a_certificate(rig: Rig, ca: Authority, port: int, tls: Connect, tmp_path: Path) -> None:
    rig.route("/", rig.target(plain(b"ok")).port)
    others, mine = Authority("clients"), certificate(*ca.issue("a.example.org"))
    good, strange = others.issue("till-7.shop", common="till-7"), ca.issue(common="stranger")
    old = others.issue("till-8.shop", end=datetime.datetime(2021, 1, 1, tzinfo=datetime.UTC))

    def answer(show: tuple[str, str] | None, path: str = "/x") -> int:
        """Refusals come with the first read in TLS 1.3."""
        try:
            return tls(show=show).get(path, host="a.example.org").status
        except (ssl.SSLError, EOFError, ConnectionError):
            return 0

    rig.listeners = [listener(port, mine, client_ca=others.pem)]
    rig.apply()
    assert [answer(s) for s in (good, None, strange, old)] == [200, 0, 0, 0]
    rig.listeners = [listener(port, mine, client_ca=others.pem, client_optional=True)]
    rig.apply()
    assert [answer(s) for s in (good, None, strange, old)] == [200, 200, 0, 0]
    peers: list[Any] = []
    read = rig.gate.read
    rig.gate.read = lambda head, scheme, peer: peers.append(peer) or read(head, scheme, peer)  # type: ignore[method-assign]
    answer(good)
    answer(None, "/not-asked-before")  # what is remembered is not read again
    assert peers[0][:2] == ("CN=till-7", ("dns:till-7.shop",))
    assert peers[0].fingerprint == digest(good[0])
    assert peers[1] is None


def test_routes_for_those_with_a_certificate(rig: Rig, ca: Authority, port: int, tls: Connect, tmp_path: Path) -> None:
    target = rig.target(plain(b"ok"))
    rig.route("/any", target.port, auth=AuthConfig(mtls=True))
    rig.route("/till", target.port, auth=AuthConfig(mtls=True, sans=("dns:till-7.shop",)))
    rig.route("/open", target.port)
    others = Authority("clients")
    chain, key = others.issue("till-7.shop", common="till-7")
    other = others.issue("till-8.shop", common="till-8")
    mine = certificate(*ca.issue("a.example.org"))
    rig.listeners = [listener(port, mine, client_ca=others.pem, client_optional=True)]
    rig.apply()

    def statuses(show: tuple[str, str] | None) -> list[int]:
        c = tls(show=show)
        return [c.get(p, host="a.example.org").status for p in ("/any", "/till", "/open", "/till")]

    assert statuses((chain, key)) == [200, 200, 200, 200]
    assert b"x-edgeward-identity: dns:till-7.shop\r\n" in target.heads[-1]
    refused = statuses(other)
    assert (refused[0], refused[2]) == (200, 200)
    assert {refused[1], refused[3]} <= {401, 403}
    refused = statuses(None)
    assert refused[2] == 200
    assert {refused[0], refused[1], refused[3]} <= {401, 403}
    # the same words at the plain port say nothing
    c = Client(rig.port)
    assert c.get("/any", "Client-Cert: x", "X-Edgeward-Identity: dns:till-7.shop").status in (401, 403)
    c.close()
    # and by HTTP/2
    (tmp_path / "ca.pem").write_text(ca.pem)
    (tmp_path / "show.pem").write_text(chain + key)
    at = ["--resolve", f"a.example.org:{port}:127.0.0.1", "--cacert", str(tmp_path / "ca.pem")]
    argv = [program("curl"), "-sS", "--http2", *at]
    url = f"https://a.example.org:{port}/till"
    for show, status in (["--cert", str(tmp_path / "show.pem")], {"200"}), ([], {"401", "403"}):
        done = subprocess.run([*argv, *show, "-o", "-", "-w", " %{http_code}", url], capture_output=True, timeout=60)
        assert done.stdout.decode().rpartition(" ")[2] in status, done


def test_what_is_measured(rig: Rig, ca: Authority, port: int, tls: Connect) -> None:
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
    rig.apply()
    tls()
    with pytest.raises(ssl.SSLError):
        tls("other.example.org")
    until(lambda: rig.gate.openings.metrics()['edgeward_gateway_handshakes_failed_total{listener="default/tls"}'] == 1)
    values = rig.gate.openings.metrics()
    assert values['edgeward_gateway_handshakes_total{listener="default/tls"}'] == 2
    assert values['edgeward_gateway_certificate_end_seconds{listener="default/tls",source="Secret/x"}'] > 3e9


def test_a_certificate_that_has_ended_is_told(rig: Rig, ca: Authority, port: int) -> None:
    old = ca.issue("a.example.org", end=datetime.datetime(2021, 1, 1, tzinfo=datetime.UTC))
    rig.listeners = [listener(port, certificate(*old))]
    rig.apply()
    status = rig.heard.statuses["default/tls"] or {}
    assert (status["phase"], status["message"]) == ("Degraded", "Secret/x has ended: clients refuse it")


def test_a_session_does_not_outlive_the_authority_that_let_it_in(
    rig: Rig, ca: Authority, port: int, tmp_path: Path
) -> None:
    """Who resumes is not asked for a certificate again: with other authorities there is nothing to resume."""
    rig.route("/", rig.target(plain(b"ok")).port)
    one, other, mine = Authority("one"), Authority("other"), certificate(*ca.issue("a.example.org"))
    show = one.issue("till.shop")
    rig.listeners = [listener(port, mine, client_ca=one.pem)]
    rig.apply()
    context = ssl.create_default_context(cadata=ca.pem)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # its session is there when the handshake is
    file = tmp_path / "show.pem"
    file.write_text(show[1] + show[0])
    context.load_cert_chain(file)

    def connect(session: Any) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        return context.wrap_socket(raw, server_hostname="a.example.org", session=session)

    with connect(None) as first, connect(first.session) as again:
        assert again.session_reused
        session = again.session
    rig.listeners = [listener(port, mine, client_ca=other.pem)]
    rig.apply()
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connect(session)


def test_slow_handshakes_make_room_for_others(
    rig: Rig, ca: Authority, port: int, tls: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeward.gateway.openings.HANDSHAKES", 4)
    monkeypatch.setattr("edgeward.gateway.openings.HANDSHAKE_TIME", 3600.0)
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
    rig.apply()
    slow = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in range(12)]
    try:
        assert tls().get("/", host="a.example.org").status == 404
        assert slow[0].recv(1) == b""  # the oldest had to go
    finally:
        for s in slow:
            s.close()


def test_no_key_is_on_a_disk(rig: Rig, ca: Authority, port: int, tls: Connect) -> None:
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
    rig.apply()
    tls()
    assert not [f for f in Path("/proc/self/fd").iterdir() if "certificate" in _link(f)]


def _link(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


def test_curl_and_openssl_get_along(rig: Rig, ca: Authority, port: int, tmp_path: Path) -> None:
    rig.route("/", rig.target(plain(b"hello from the target")).port)
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
    rig.apply()
    (tmp_path / "ca.pem").write_text(ca.pem)
    at = ["--resolve", f"a.example.org:{port}:127.0.0.1", "--cacert", str(tmp_path / "ca.pem")]
    url = f"https://a.example.org:{port}/x"
    for option, version in (("--http1.1", b"1.1"), ("--http2", b"2")):
        argv = [program("curl"), "-sS", option, *at, "-w", " %{http_version}", url]
        done = subprocess.run(argv, capture_output=True, timeout=60)
        assert done.stdout == b"hello from the target " + version, done.stderr
    argv = [program("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", "-alpn", "h2", "-servername"]
    argv += ["a.example.org", "-CAfile", str(tmp_path / "ca.pem")]
    done = subprocess.run(argv, input=b"", capture_output=True, timeout=60)
    assert b"ALPN protocol: h2" in done.stdout
    assert b"Verify return code: 0 (ok)" in done.stdout


def test_a_client_that_does_not_read_stops_the_target(rig: Rig, ca: Authority, port: int, tls: Connect) -> None:
    pour = Pour(48 * 1024 * 1024)
    rig.route("/large", rig.target(pour).port)
    rig.route("/", rig.target(plain(b"ok")).port)
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
    rig.apply()
    c = tls()
    c.send(b"GET /large HTTP/1.1\r\nHost: a.example.org\r\n\r\n")
    until(lambda: pour.sent > 0)
    for _ in range(50):  # others are served meanwhile
        assert tls().get("/s", host="a.example.org").body == b"ok"
    assert not pour.done
    assert pour.sent < pour.size // 2
    c.until(b"\r\n\r\n")
    got, room = len(c.rest_of_buffer()), bytearray(1024 * 1024)
    while got < pour.size:
        got += c.socket.recv_into(room)
    assert got == pour.size


def test_a_websocket_by_tls(rig: Rig, ca: Authority, port: int, tls: Connect) -> None:
    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await target.request(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
        while data := await reader.read(100):
            writer.write(data[::-1])

    rig.route("/", rig.target(script).port)
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
    rig.apply()
    c = tls()
    c.send(b"GET /ws HTTP/1.1\r\nHost: a.example.org\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert c.answer().status == 101
    c.send(b"hello")
    assert c.exactly(5) == b"olleh"
    # a new certificate does not end it
    rig.listeners = [listener(port, certificate(*ca.issue("a.example.org")))]
    rig.apply()
    c.send(b"again")
    assert c.exactly(5) == b"niaga"
