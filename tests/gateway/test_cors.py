"""What browsers are told about pages of other origins."""

from __future__ import annotations

from collections.abc import Callable

from tests.gateway.rig import Client, Rig, plain

from edgeward.gateway.cors import CorsConfig
from edgeward.gateway.rules import CacheConfig

Connect = Callable[[], Client]
APP = "https://app.example"
ASK = (f"Origin: {APP}", "Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: X-Mine, X-Other")


def allow(c: Client, path: str, *headers: str, method: str = "GET") -> dict[str, str]:
    got = c.get(path, *headers, method=method).headers
    return {n.removeprefix("access-control-"): v for n, v in got.items() if n.startswith(("access-control-", "vary"))}


def test_a_named_origin(rig: Rig, client: Connect) -> None:
    target = rig.target(plain(b"x", "Access-Control-Allow-Origin: *", "Cache-Control: max-age=60"))
    cors = CorsConfig((APP,), ("GET", "PUT"), ("x-mine",), ("ETag",), credentials=True, max_age=60)
    rig.route("/a", target.port, methods=("GET", "PUT"), cors=cors)
    rig.route("/c", target.port, cache=CacheConfig(), cors=cors)
    c = client()
    got = c.get("/a", *ASK, method="OPTIONS")
    assert (got.status, got.body) == (204, b"")
    mine = {"allow-origin": APP, "allow-credentials": "true", "vary": "origin"}
    assert allow(c, "/a", *ASK, method="OPTIONS") == {
        **mine, "allow-methods": "GET, PUT", "allow-headers": "x-mine", "max-age": "60",
    }  # fmt: skip
    assert target.heads == []  # the target is not asked
    assert allow(c, "/a", "Origin: https://evil", *ASK[1:], method="OPTIONS") == {"vary": "origin"}
    assert c.get("/a", f"Origin: {APP}", method="OPTIONS").status == 405  # no question of a browser
    assert allow(c, "/a", f"Origin: {APP}") == {**mine, "expose-headers": "ETag"}
    # the target's own word is not passed on; what is in the cache is the same for all, what is said of it is not
    for _ in range(2):
        assert allow(c, "/c", "Origin: https://evil") == {"vary": "origin", "expose-headers": "ETag"}
        assert allow(c, "/c", f"Origin: {APP}") == {**mine, "expose-headers": "ETag"}
    assert c.get("/c").headers["cache-status"].startswith("edgeward; hit")
    assert len(target.heads) == 2


def test_every_origin_and_errors(rig: Rig, client: Connect) -> None:
    rig.route("/", to="service", cors=CorsConfig(("*",), ("GET",), ("*",)))
    c = client()
    assert c.get("/", f"Origin: {APP}").status == 503
    assert allow(c, "/", f"Origin: {APP}") == {"allow-origin": "*"}
    assert allow(c, "/", *ASK, method="OPTIONS")["allow-headers"] == "x-mine, x-other"


def test_without_it_the_target_speaks(rig: Rig, client: Connect) -> None:
    target = rig.target(plain(b"x", "Access-Control-Allow-Origin: *"))
    rig.route("/", target.port)
    c = client()
    assert allow(c, "/", f"Origin: {APP}") == {"allow-origin": "*"}
    assert c.get("/", *ASK, method="OPTIONS").status == 200
    assert len(target.heads) == 2
