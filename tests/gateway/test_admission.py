"""Authentication at work: nothing answers before it, nobody can pretend, the cache gives nobody another's answer."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import msgspec
import pytest
from tests.core.test_jws import JWKS, sign
from tests.gateway.rig import PATIENCE, Client, Rig, Target, plain

from edgeward.core import clock
from edgeward.core.invocation import Call, Reply
from edgeward.core.vault import Vault
from edgeward.gateway.auth import AuthConfig, JwtConfig, digest, place
from edgeward.gateway.cors import CorsConfig
from edgeward.gateway.keyring import Keyring
from edgeward.gateway.rules import CacheConfig

Connect = Callable[[], Client]
ALICE, BOB = "a" * 20, "b" * 20


def keys(rig: Rig, route: str = "default/r", **more: Any) -> AuthConfig:
    known = [(n, digest(k, route)) for n, k in (("alice", ALICE), ("bob", BOB))]
    vault = Vault.open(rig.folder / "identity")
    sealed = base64.b64encode(vault.seal(msgspec.json.encode({"keys": known}), place(route))).decode()
    return AuthConfig(header="x-api-key", sealed=sealed, **more)


def jwt(**more: Any) -> AuthConfig:
    keys = {"keys": [{**JWKS["R"], "kid": "r"}]}
    return AuthConfig(jwt=JwtConfig("https://i", ("edge",), **{"jwks": keys, **more}))


def token(kid: str = "r", **claims: Any) -> str:
    found = {"iss": "https://i", "aud": "edge", "exp": clock.now() + 3600, "sub": "u", **claims}
    return "Authorization: Bearer " + sign("RS256", found, kid=kid)


def echo(*headers: str) -> Callable[..., Any]:
    """Answers with the head that it got."""

    async def script(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await target.request(reader)
            lines = "".join(f"{h}\r\n" for h in headers)
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(head)}\r\n{lines}\r\n".encode() + head)
            await writer.drain()

    return script


def test_nobody_gets_further_without_a_key(rig: Rig, client: Connect) -> None:
    target = rig.target(echo())
    rig.route("/", target.port, key="default/r", auth=keys(rig))
    c = client()
    for headers in ([], ["X-Api-Key: wrong"], [f"Authorization: Bearer {ALICE}"], [f"X_Api_Key: {ALICE}"]):
        got = c.get("/a", *headers)
        assert got.status == 401
        assert got.headers["www-authenticate"] == 'ApiKey realm="default/r", header="x-api-key"'
        assert got.headers["content-type"] == "application/problem+json"
        assert got.headers["cache-control"] == "no-store"
    assert c.get("/a", method="HEAD").status == 401
    post = client().get("/a", method="POST", body=b"x")
    assert (post.status, post.headers["connection"]) == (401, "close")
    assert not target.heads
    got = c.get("/a", f"X-Api-Key: {ALICE}")
    assert got.status == 200
    low = got.body.lower()
    assert b"x-edgeward-identity: alice\r\n" in low
    assert b"x-edgeward-auth: apikey\r\n" in low
    assert b"x-api-key" not in low
    upgrade = client().send(b"GET /a HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").answer()
    assert upgrade.status == 401


def test_nobody_can_pretend_on_any_route(rig: Rig, client: Connect) -> None:
    rig.route("/open", rig.target(echo()).port)
    rig.route("/closed", rig.target(echo()).port, key="default/r", auth=keys(rig, forward=True))
    forged = ["X-Edgeward-Identity: root", "x_edgeward_identity: root", "X-Edgeward-Auth: mtls", "X-EDGEWARD-New: root"]
    assert b"root" not in client().get("/open", *forged).body
    got = client().get("/closed", *forged, f"X-Api-Key: {BOB}").body.lower()
    assert b"root" not in got
    assert got.count(b"x-edgeward-identity:") == 1
    assert b"x-edgeward-identity: bob\r\n" in got
    assert f"x-api-key: {BOB}\r\n".encode() in got


def test_a_function_hears_who_asks(rig: Rig, client: Connect) -> None:
    async def function(call: Call) -> Reply:
        http = call.event.http
        assert http is not None
        return Reply(200, [], json.dumps([h for h in http.headers if h[0] != "host"]).encode())

    rig.functions.known["default/f"] = function
    rig.route("/", key="default/r", to="function", function="default/f", auth=keys(rig))
    got = client().get("/", "X-Edgeward-Identity: root", f"X-Api-Key: {ALICE}")
    assert json.loads(got.body) == [["x-edgeward-identity", "alice"], ["x-edgeward-auth", "apiKey"]]


def test_the_cache_does_not_answer_those_who_may_not_ask(rig: Rig, client: Connect) -> None:
    target = rig.target(plain(b"secret", "Cache-Control: public, max-age=600"))
    rig.route("/", target.port, key="default/r", auth=keys(rig), cache=CacheConfig())
    assert client().get("/a", f"X-Api-Key: {ALICE}").body == b"secret"
    hit = client().get("/a", f"X-Api-Key: {BOB}")
    assert hit.headers["cache-status"].startswith("edgeward; hit")
    c = client()
    for _ in range(3):  # heads that were seen before are read from a memory
        assert c.get("/a").status == 401
        assert c.get("/a", "X-Api-Key: no").status == 401
    assert c.get("/a", "Cache-Control: only-if-cached").status == 401
    assert c.get("/a", "If-None-Match: *").status == 401
    assert c.get("/a", "Range: bytes=0-1").status == 401
    assert c.get("/a", method="HEAD").status == 401
    assert len(target.heads) == 1
    # what was open before is closed from the next request on, on connections that are open
    rig.routes = []
    rig.route("/", target.port, key="default/r", cache=CacheConfig())
    assert c.get("/a").body == b"secret"
    rig.routes = []
    rig.route("/", target.port, key="default/r", auth=keys(rig), cache=CacheConfig())
    assert c.get("/a").status == 401


@pytest.mark.parametrize("way", ["key", "token"])
def test_answers_to_the_authorised_are_kept_only_where_they_say_so(rig: Rig, client: Connect, way: str) -> None:
    target = rig.target(echo("Cache-Control: max-age=600"))
    rig.route("/", target.port, key="default/r", auth=keys(rig) if way == "key" else jwt(), cache=CacheConfig())
    one, two = (f"X-Api-Key: {ALICE}", f"X-Api-Key: {BOB}") if way == "key" else (token(), token(sub="v"))
    first, second = client().get("/a", one), client().get("/a", two)
    assert first.body != second.body
    assert "stored" not in first.headers["cache-status"] + second.headers["cache-status"]
    rig.routes = []
    rig.route("/", target.port, key="default/r", cache=CacheConfig())
    assert client().get("/a").headers["cache-status"].endswith("stored")  # anybody's, now
    rig.routes = []
    rig.route("/", target.port, key="default/r", auth=keys(rig) if way == "key" else jwt(), cache=CacheConfig())
    assert "hit" not in client().get("/a", one).headers["cache-status"]  # RFC 9111, section 3.5


def test_an_answer_that_varies_by_who_asks_is_not_kept(rig: Rig, client: Connect) -> None:
    target = rig.target(echo("Cache-Control: public, max-age=600", "Vary: X-Edgeward-Identity"))
    rig.route("/", target.port, key="default/r", auth=keys(rig), cache=CacheConfig())
    assert b"alice" in client().get("/a", f"X-Api-Key: {ALICE}").body
    assert b"bob" in client().get("/a", f"X-Api-Key: {BOB}").body


def test_tokens_end_to_end(rig: Rig, client: Connect) -> None:
    rig.route("/", rig.target(echo()).port, auth=jwt(scopes=("read",)), cors=CorsConfig(("https://app",)))
    c = client()
    got = c.get("/", token(scope="read x"))
    assert (got.status, b"x-edgeward-scope: read x" in got.body, b"Bearer" in got.body) == (200, True, False)
    few = c.get("/", token(), "Origin: https://app")
    assert few.status == 403
    assert few.headers["www-authenticate"] == 'Bearer realm="default/r0", error="insufficient_scope", scope="read"'
    assert few.headers["access-control-allow-origin"] == "https://app"
    asks = c.get("/", "Origin: https://app", "Access-Control-Request-Method: GET", method="OPTIONS")
    assert asks.status == 204  # a browser asks first, without any token
    assert c.get("/", method="OPTIONS").status == 401
    assert "eyJ" not in (rig.folder / "access.log").read_text() if (rig.folder / "access.log").exists() else True


def test_what_cannot_be_opened_lets_nobody_in(rig: Rig, client: Connect) -> None:
    target = rig.target(echo())
    made = keys(rig)
    rig.route("/a", target.port, key="default/a", auth=made)  # sealed for another route
    rig.route(
        "/b", target.port, key="default/b", auth=AuthConfig(header="x-api-key", waiting="Secret/k is not here yet")
    )
    rig.route("/c", target.port, key="default/c", auth=jwt(jwks={"keys": []}))
    rig.route("/open", target.port)
    for path in ("/a", "/b", "/c"):
        got = client().get(path, f"X-Api-Key: {ALICE}", token())
        assert (got.status, got.headers["retry-after"]) == (503, "5")
    assert {k: (v or {}).get("phase") for k, v in rig.heard.statuses.items() if k in ("default/a", "default/b")} == {
        "default/a": "Closed", "default/b": "Closed"
    }  # fmt: skip
    assert client().get("/open").status == 200


class Jwks(BaseHTTPRequestHandler):
    """An issuer's keys."""

    document: ClassVar[dict[str, Any]] = {}
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        body = json.dumps(self.document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def issuer() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Jwks)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def until(c: Client, *headers: str, status: int) -> None:
    """Asks until the keys are there."""
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.05)):
        if (got := c.get("/", *headers)).status == status:
            return
        assert got.status == 503, got
        waiting.wait(0.05)  # the pace of asking
    raise AssertionError(f"no {status}")


def test_an_issuers_keys_are_fetched_kept_and_looked_for_again(
    rig: Rig, client: Connect, issuer: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Jwks.document, Jwks.asked = {"keys": [{**JWKS["R"], "kid": "r"}]}, 0
    monkeypatch.setattr("edgeward.gateway.keyring.AGAIN", 3600.0)
    url = f"http://127.0.0.1:{issuer.server_address[1]}/keys"
    rig.route("/", rig.target(echo()).port, auth=jwt(jwks=None, url=url))
    c = client()
    until(c, token(), status=200)
    assert Jwks.asked == 1
    # a key that nobody knows costs the issuer one question in a while, not one for each token
    for n in range(5):
        assert c.get("/", token(kid=f"x{n}")).status == 401
    assert Jwks.asked == 1
    # another key: it is looked for when it is met
    monkeypatch.setattr("edgeward.gateway.keyring.AGAIN", 0.0)
    Jwks.document = {"keys": [{**JWKS["R"], "kid": "new"}]}
    until(c, token(kid="new"), status=200)
    assert c.get("/", token()).status == 503  # it may be back in a moment: it is looked for again
    # the issuer is gone, and this process begins anew: what was kept holds
    issuer.shutdown()
    issuer.server_close()

    async def again() -> Any:
        tasks = []

        def spawn(work: Any) -> None:
            tasks.append(asyncio.create_task(work))

        kept = Keyring(rig.folder / "gateway" / "jwks", spawn, lambda url, why: None).of(url)
        found = kept(False)
        await asyncio.gather(*tasks)
        return found

    found = rig.do(again())
    assert [k.kid for k in found] == ["new"]
