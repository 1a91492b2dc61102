"""From declared Routes to the plane's section, and back to rules."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgeward.core.errors import Invalid
from edgeward.core.registry import kinds
from edgeward.core.resource import Resource, decode
from edgeward.gateway import rules
from edgeward.gateway.balance import Endpoint
from edgeward.gateway.cloud import fold_route
from edgeward.gateway.edge import Around, section
from edgeward.gateway.rules import CacheConfig, Listen, PlaceConfig
from edgeward.gateway.squeeze import CompressConfig
from edgeward.hub.kinds import load

load()


def route(name: str, **spec: Any) -> Resource:
    meta = {"name": name, "namespace": "shop"}
    return decode({"apiVersion": "edgeward/v1", "kind": "Route", "metadata": meta, "spec": spec})


def endpoints(namespace: str, service: str) -> list[dict[str, Any]] | None:
    known = [{"address": "10.0.0.1", "port": 80, "here": True}, {"address": "10.0.0.2", "port": 80, "here": False}]
    return known if (namespace, service) == ("shop", "web") else None


def test_other_sites_are_asked_where_they_let_this_one_in() -> None:
    doors = [
        {"node": "rome-1", "site": "rome", "address": "10.3.0.1:7001"},
        {"node": "plant-2", "site": "plant", "address": "10.2.0.2:7002"},
        {"node": "plant-1", "site": "plant", "address": "[fd00::1]:7001"},
        {"node": "odd-1", "site": "odd", "address": "nothing"},
    ]

    def made(given: list[dict[str, str]] | None, *, remote: bool, fallback: str = "fail") -> Any:
        around = Around(
            [{"site": "plant", "url": "http://192.0.2.1"}, {"site": "else", "url": "http://192.0.2.2"}],
            lambda namespace, name: fallback, lambda namespace, name: ["berlin-1"] if given is not None else None,
            lambda namespace, name: given, lambda namespace, name: remote,
        )  # fmt: skip
        got = section("n", [route("r", to={"service": "web"})], endpoints, {}, [], around=around)
        return rules.decode(got).routes[0]

    plant, rome = made(doors, remote=True).then
    assert [plant.name, rome.name] == ["plant", "rome"], "the nearest first, and none that cannot be understood"
    assert plant.endpoint == Endpoint("10.2.0.2", 7002, True, node="plant-2.node.edgeward.internal")
    assert plant.more == (Endpoint("fd00::1", 7001, True, node="plant-1.node.edgeward.internal"),)
    assert made(doors, remote=True).guests == ("dns:berlin-1.node.edgeward.internal",)
    assert made(doors, remote=False).then == (), "it has one of its own: fail is fail"
    assert [p.name for p in made(doors, remote=False, fallback="nearest").then] == ["plant", "rome"]
    assert "lets this one ask" in made([], remote=False, fallback="nearest").lacking, "others are not asked beside it"
    plain = made(None, remote=False, fallback="nearest")
    assert ([p.name for p in plain.then], plain.guests) == (["plant", "else"], None)


def test_the_section() -> None:
    routes = [
        route("up", to={"upstream": "https://Example.org"}, cache={"staleIfError": "1h", "object": "2Ki"}),
        route(
            "web",
            path="/w/",
            to={"service": "web"},
            headers={"X-A": "1"},
            limits={"rate": {"requests": 60, "per": "1m"}},
        ),
        route("f", path="/f", to={"function": "hello@canary"}, methods=["POST"], timeouts={"answer": "2s"}),
        route("none", path="/n", to={"service": "none"}),
        route("local", path="/l", to={"upstream": "http://[::1]:8080/"}),
    ]
    made = section("n1", routes, endpoints, {"memory": "1Mi", "accessLog": "errors"}, [Listen("127.0.0.1", 80)])
    config = rules.decode(msgspec.json.decode(msgspec.json.encode(made)))
    assert (config.node, config.memory, config.access_log, config.listen) == (
        "n1",
        2**20,
        "errors",
        (Listen("127.0.0.1", 80),),
    )
    f, local, none, up, web = config.routes
    assert (f.key, f.to, f.function, f.version, f.methods, f.answer) == (
        "shop/f", "function", "shop/hello", "canary", ("POST",), 2.0,
    )  # fmt: skip
    assert (local.endpoints, local.send_host) == ((Endpoint("::1", 8080),), "[::1]:8080")
    assert none.endpoints == ()
    assert (up.endpoints, up.send_host) == ((Endpoint("example.org", 443, True),), "example.org")
    assert up.cache == CacheConfig(2048, 3600.0)
    assert web.endpoints == (Endpoint("10.0.0.1", 80, here=True), Endpoint("10.0.0.2", 80))
    assert (web.headers, web.rate, web.burst, web.cache) == ((("x-a", "1"),), 1.0, 60, None)


def test_a_route_knows_whether_its_function_is_here() -> None:
    made = section("n1", [route("a", to={"function": "f"}), route("b", to={"function": "g@x"})], lambda *_: [], {}, [],
                   {"shop/g", "default/f"})  # fmt: skip
    assert [(c.key, c.missing) for c in rules.decode(made).routes] == [("shop/a", True), ("shop/b", False)]


def test_rules_keep_what_they_learnt() -> None:
    def config(budget: float, *ports: int) -> dict[str, Any]:
        where = [{"host": "h", "port": p} for p in ports]
        return {"routes": [{"key": "a/b", "to": "upstream", "target": "t", "endpoints": where, "budget": budget}]}

    first = rules.table(rules.decode(config(0.2, 1, 2)))
    rule = first.rules[0]
    rule.counters.count(200, 0.1, 5, "hit")
    rule.balance.circuits[Endpoint("h", 1)].bad(0.0)
    second = rules.table(rules.decode(config(0.2, 1, 3)), first).rules[0]
    assert second.counters is rule.counters
    assert second.budget is rule.budget
    assert {str(e): c.failures for e, c in second.balance.circuits.items()} == {"h:1": 1, "h:3": 0}
    assert rules.table(rules.decode(config(0.5, 1)), first).rules[0].budget is not rule.budget
    with pytest.raises(Invalid):
        rules.decode({"routes": "x"})


def test_the_status_of_a_route() -> None:
    r = route("up", to={"upstream": "http://h"})
    assert fold_route(r, [], {}) == {"phase": "Pending", "nodes": {}}
    ready, none = {"phase": "Ready"}, {"phase": "NoEndpoints", "message": "no"}
    assert fold_route(r, [], {"a": ready, "b": ready})["phase"] == "Ready"
    both = fold_route(r, [], {"a": ready, "b": none})
    assert (both["phase"], both["message"]) == ("Degraded", "b: no")


def test_the_places_beside_this_site() -> None:
    cloud = "https://c.example"
    routes = [
        route("a", to={"upstream": "http://h"}, fallback=["nearest", "cloud"], cloud=cloud),
        route("b", to={"upstream": "http://h"}, fallback=["nearest"], prefer="cloud", cloud=cloud),
        route("c", to={"service": "web"}),
        route("d", to={"service": "web"}, cloud=cloud),
        route("e", to={"service": "web"}, fallback=["nearest"]),
        route("f", to={"upstream": "http://h"}, fallback=["nearest"], auth={"apiKeys": {"secret": "s"}}),
        route("g", to={"upstream": "http://h"}),
    ]
    near = [
        {"site": "x", "url": "http://192.0.2.1:81"},
        {"site": "y", "url": "https://y"},
        {"url": "http://z"},
        {"site": "q", "url": "q"},
    ]

    def made(neighbours: list[dict[str, Any]], service: str) -> dict[str, Any]:
        around = Around(neighbours, lambda namespace, name: service)
        config = rules.decode(section("n", routes, endpoints, {}, [], around=around))
        return {c.key[-1]: ([p.name for p in c.first], [p.name for p in c.then], c.lacking) for c in config.routes}

    assert rules.decode(section("n", [], endpoints, {"engine": "nginx"}, [])).engine == "nginx"
    assert made(near, "cloud") == {
        "a": ([], ["x", "y", cloud], ""), "b": ([cloud], ["x", "y"], ""),
        "c": ([], [], "Service/web falls back to the cloud, and this Route does not say where it is"),
        "d": ([], [cloud], ""), "e": ([], ["x", "y"], ""), "f": ([], ["y"], ""), "g": ([], [], ""),
    }  # fmt: skip
    alone = made([], "nearest")
    assert alone["a"][1:] == ([cloud], "no other site is known that could answer (see Site status.neighbours)")
    assert alone["c"][2] == alone["e"][2] == alone["a"][2] and alone["g"] == ([], [], "")
    assert made(near, "nearest")["c"] == ([], ["x", "y"], "")
    assert made(near[:1], "fail")["f"][2].startswith("keys and tokens go to no other site without TLS")
    config = rules.decode(section("n", routes[:1], endpoints, {}, [], around=Around(near[:1]))).routes[0]
    assert config.then[0] == PlaceConfig("site", "x", Endpoint("192.0.2.1", 81, ours=True))
    assert config.then[1] == PlaceConfig("cloud", cloud, Endpoint("c.example", 443, True), "c.example")


def test_files_compression_and_the_caches_sizes() -> None:
    routes = [
        route("a", path="/a/", to={"static": {"config": "pages", "cacheControl": "no-cache"}}),
        route("b", path="/b/", to={"static": {"folder": "site", "index": "home.html"}}),
        route("c", path="/c/", to={"static": {"folder": "other"}}),
        route("d", path="/d/", to={"static": {"config": "none"}}),
        route("e", path="/e/", to={"upstream": "http://h"}, compress={"types": ["A/B"], "minSize": "2Ki"},
              cache={"object": "200Mi", "disk": True}),
    ]  # fmt: skip

    def values(kind: str, namespace: str, name: str) -> tuple[dict[str, str], str] | None:
        return ({"index.html": "x"}, "1") if (kind, namespace, name) == ("Config", "shop", "pages") else None

    settings = {"folders": {"site": "/srv/site", "bad": "srv"}, "cache": {"memory": "1Mi", "disk": "2Gi"}}
    config = rules.decode(section("n1", routes, endpoints, settings, [], values=values))
    a, b, c, d, e = config.routes
    assert (config.memory, config.disk) == (2**20, 2 * 2**30)
    assert a.static is not None
    assert (a.to, a.target, a.static.files, a.static.cache_control) == (
        "static", "Config/pages", {"index.html": "x"}, "no-cache",
    )  # fmt: skip
    assert b.static is not None
    assert (b.static.folder, b.static.index, b.static.problem) == ("/srv/site", "home.html", "")
    assert c.static is not None and d.static is not None
    assert (c.static.folder, "gateway.folders" in c.static.problem) == ("", True)
    assert "Config/none is not here yet" in d.static.problem
    assert e.compress == CompressConfig(2048, ("a/b",))
    assert e.cache == CacheConfig(200 * 2**20)
    assert rules.decode(section("n1", [], endpoints, {"memory": "3Mi"}, [])).memory == 3 * 2**20
    assert rules.decode(section("n1", [], endpoints, {"cache": {"disk": 0}}, [])).disk == 0
    with pytest.raises(Invalid) as caught:
        section("n1", [], endpoints, {"cache": {"disk": "much"}}, [])
    assert caught.value.field == "$.gateway.cache.disk"


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"to": {"static": {}}}, "to.static"),
        ({"to": {"static": {"config": "a", "folder": "b"}}}, "to.static"),
        ({"to": {"static": {"folder": "../x"}}}, "to.static.folder"),
        ({"to": {"static": {"folder": "x", "index": "../x"}}}, "to.static.index"),
        ({"to": {"static": {"folder": "x", "cacheControl": "a\r\nb: c"}}}, "to.static.cacheControl"),
        ({"to": {"static": {"folder": "x"}, "upstream": "http://h"}}, "to"),
        ({"to": {"static": {"folder": "x"}}, "cache": {}}, "cache"),
        ({"to": {"upstream": "http://h"}, "compress": {"types": ["html"]}}, "compress.types[0]"),
        ({"to": {"upstream": "http://h"}, "compress": {"minSize": "many"}}, "compress.minSize"),
        ({"to": {"upstream": "http://h"}, "cache": {"object": "257Mi"}}, "cache.object"),
        ({"to": {"upstream": "http://h"}, "cache": {"object": "17Mi", "disk": False}}, "cache.object"),
    ],
    ids=range(11),
)
def test_what_cannot_be_is_refused(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        kinds.get("Route").check(route("x", **spec))
    assert caught.value.field == f"$.spec.{field}"
