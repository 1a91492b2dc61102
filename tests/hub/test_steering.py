"""Steering at the hub: real sockets, a real store, nodes that are heard and then are not."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.query
import dns.rcode
import httpx
import pytest
from tests.nodes.fleet import Fleet, doc, fleet

from edgeward.core.api import build_app
from edgeward.core.authz import BUILT_IN, Principal, Rule, administrator
from edgeward.core.errors import EdgewardError, Invalid, Unauthorized, Unreachable
from edgeward.core.resource import CLUSTER, Key
from edgeward.hub.main import Hub
from edgeward.hub.steering import HubSteering, Settings, load_of
from edgeward.nodes.wire import BeatAnswer, BeatAsk

ZONE = "edge.example.org"
CONFIG = {"zone": ZONE, "dns": "127.0.0.1:0", "hosts": ["app"], "redirect": True, "load": "0s"}
ADDRESSES = {"plant": ["192.0.2.1", "2001:db8::1"], "shop": ["2001:db8::2", "192.0.2.2:8080"]}


async def lookup(server: Any, name: str = ZONE, kind: str = "A", subnet: str = "", tcp: bool = False) -> Any:
    options = [dns.edns.ECSOption(subnet, 24)] if subnet else []
    query = dns.message.make_query(name, kind, use_edns=0, options=options)
    host, port = server.address
    way = dns.query.tcp if tcp else dns.query.udp
    return await asyncio.to_thread(way, query, host, port=port, timeout=30)


def said(answer: Any) -> list[str]:
    return [str(r) for s in answer.answer for r in s]


async def until(ready: Any) -> None:
    """A fact that the store's watch brings; the time-out guards only."""
    async with asyncio.timeout(60):
        while not ready():  # noqa: ASYNC110 - a fact of another task
            await asyncio.sleep(0.01)


@asynccontextmanager
async def steering(root: Path) -> AsyncIterator[tuple[HubSteering, Fleet, httpx.AsyncClient]]:
    async with fleet(root) as f:
        loads = {"plant-1": 0.0}

        async def usage(node: str) -> dict[str, Any]:
            if node not in loads:
                raise Unreachable("it does not answer")
            return {"nodes": [{"name": node, "load1": loads[node], "cpus": 2}]}

        s = HubSteering(f.store, Settings.read(CONFIG), usage)
        who = {
            "admin": administrator("admin"),
            "viewer": Principal("v", "person", "viewer", BUILT_IN["viewer"]),
            "apps": Principal("a", "person", "own", (Rule(verbs=["*"], kinds=["App"]),)),
        }

        def auth(token: str | None, _: Any) -> Principal:
            if token not in who:
                raise Unauthorized("the token is wrong")
            return who[token]

        served = build_app(
            f.resources, f.store, auth=auth, extra_routes=s.routes(),
            health=lambda: (True, {}), metrics=lambda: "", info={},
        )  # fmt: skip
        for site, prefix, lat in (("plant", "10.1.0.0/16", 48), ("shop", "10.2.0.0/16", 52)):
            old = f.store.get(Key("Site", CLUSTER, site))
            spec = {"addresses": ADDRESSES[site], "prefixes": [prefix], "coordinates": {"lat": lat, "lon": 8}}
            await f.write(doc("Site", site, spec), old.key, old.revision, "ann")
        await s.open()
        task = asyncio.create_task(s.run())
        transport = httpx.ASGITransport(served, client=("10.1.7.7", 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://hub") as client:
            try:
                yield s, f, client
                assert not task.done()
            finally:
                task.cancel()
                await s.close()


async def heard(f: Fleet, *nodes: str) -> None:
    for node in nodes:
        for n in range(2):
            await f.ask(node, "beat", BeatAsk(n + 1, "run"), BeatAnswer)


async def _a_site_that_falls_silent_is_taken_out(tmp_path: Path) -> None:
    async with steering(tmp_path) as (s, f, client):
        assert s.dns is not None
        assert (await lookup(s.dns, subnet="10.1.7.0")).rcode() == dns.rcode.SERVFAIL, "nobody is heard yet"
        refused = await client.get("/steer")
        assert refused.status_code == 503 and "no site is there" in refused.text
        await heard(f, "plant-1", "shop-1")
        await until(lambda: len(s.known.serving()) == 2)
        answer = await lookup(s.dns, subnet="10.1.7.0")
        assert said(answer) == ["192.0.2.1"]
        assert answer.options[0].scopelen == 24, "plant-2 is not heard, so plant has less than its whole share"
        assert said(await lookup(s.dns, "app." + ZONE, subnet="10.2.7.0")) == ["192.0.2.2"]
        assert said(await lookup(s.dns, kind="AAAA", subnet="10.2.7.0", tcp=True)) == ["2001:db8::2"]
        assert said(await lookup(s.dns, kind="NS")) == [f"ns.{ZONE}."]
        assert said(await lookup(s.dns, "ns." + ZONE)) == ["127.0.0.1"]

        auth = {"Authorization": "Bearer viewer"}
        got = (await client.get("/api/v1/steer?client=10.2.7.7", headers=auth)).json()
        assert (got["client"], got["site"], got["addresses"]) == ("10.2.7.7", "shop", ADDRESSES["shop"])
        assert got["why"] == ["10.2.7.7 is in 10.2.0.0/16 of site shop", "shop is its own site"]
        mine = (await client.get("/api/v1/steer", headers=auth)).json()
        assert (mine["client"], mine["site"]) == ("10.1.7.7", "plant")
        for path, token, code in (
            ("/api/v1/steer?client=plant", "viewer", 422), ("/api/v1/steer?ip=10.1.7.7", "viewer", 422),
            ("/api/v1/steer", "apps", 403), ("/api/v1/steer", "", 401), ("/steer?path=evil.example", "", 422),
            ("/steer?path=/a%0d%0aX:b", "", 422), ("/steer?path=/%5Cevil", "", 422), ("/steer?url=/a", "", 422),
        ):  # fmt: skip
            answer = await client.get(path, headers={"Authorization": f"Bearer {token}"} if token else {})
            assert answer.status_code == code, (path, answer.text)
        led = await client.get("/steer", params={"path": "/news/a b?c=d&e=ä"})
        assert led.status_code == 307 and led.headers["cache-control"] == "no-store"
        assert led.headers["location"] == "http://192.0.2.1/news/a%20b?c=d&e=%C3%A4"

        f.nodes._live["plant-1"].down_after = 0.0  # from now on its silence is one
        await until(lambda: s.known.serving() == ["shop-1"])
        assert said(await lookup(s.dns, subnet="10.1.7.0")) == ["192.0.2.2"], "what was kept is forgotten"
        got = (await client.get("/api/v1/steer?client=10.1.7.7", headers=auth)).json()
        assert got["why"][1:] == [
            "plant is not taken: none of its 2 nodes is heard",
            "shop is the nearest that takes it, 445 km from plant",
        ]
        led = await client.get("/steer")
        assert led.headers["location"] == "http://[2001:db8::2]/"
        assert s.metrics()['edgeward_hub_dns_queries_total{outcome="tcp"}'] == 1.0


async def _load_is_asked_of_the_nodes(tmp_path: Path) -> None:
    async with steering(tmp_path) as (s, f, _):
        await heard(f, "plant-1", "shop-1")
        await until(lambda: len(s.known.serving()) == 2)
        calm = s.known.now
        await s._load("plant-1")
        await s._load("shop-1")
        assert s.known.now is not None and s.known.now.edges["plant"].load == 0.0
        s.known.loaded("plant-1", 1.234)
        assert s.known.now is not calm and s.known.now.edges["plant"].load == pytest.approx(1.25)
        same = s.known.now
        s.known.loaded("plant-1", 1.26)
        assert s.known.now is same, "a small difference changes nothing"
        s.known.loaded("plant-1", None)
        assert s.known.now.edges["plant"].load == 0.0
    assert load_of("a", {"nodes": [{"name": "b"}, {"name": "a", "load1": 3.0, "cpus": 2}]}) == 1.5
    for odd in ({}, {"nodes": [{"name": "a", "load1": 3.0}]}, {"nodes": ["a", {"name": "a", "load1": "x", "cpus": 0}]}):
        assert load_of("a", odd) is None


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"dns": "127.0.0.1:53"}, "zone"), ({"dns": "127.0.0.1", "zone": ZONE}, "ADDRESS:PORT"),
        ({"dns": ":53", "zone": ZONE}, "ADDRESS:PORT"), ({"dns": "127.0.0.1:53", "zone": "a..b"}, "no DNS name"),
        ({"dns": "127.0.0.1:53", "zone": ZONE, "servers": {"ns": ["x"]}}, "x"), ({"zones": 1}, "zones"),
        ({"scheme": "ftp"}, "ftp"), ({"ttl": -1}, "ttl"), ({"rate": 0}, "rate"), ({"load": "often"}, "often"),
    ],
)  # fmt: skip
def test_odd_settings_are_refused(found: dict[str, Any], says: str) -> None:
    with pytest.raises(Invalid, match=says) as caught:
        Settings.read(found)
    assert caught.value.file == "hub.json" and caught.value.field.startswith("$.steering")


async def _the_hub_has_it_off_and_on(tmp_path: Path) -> None:
    """The whole process: nothing listens unless it is told to, and a port that is taken is said."""
    assert not Settings.read(None).dns and not Settings.read(None).redirect
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "hub.json").write_text(json.dumps({"port": 0, "steering": {"hosts": ["app"]}}))
    stop = asyncio.Event()
    hub = Hub(folder, "127.0.0.1:0", ZONE)
    task = asyncio.create_task(hub.run(stop))
    await until(lambda: hub._ready or task.done())
    try:
        assert hub.steering.dns is not None
        assert (await lookup(hub.steering.dns, "app." + ZONE)).rcode() == dns.rcode.SERVFAIL
        assert (await lookup(hub.steering.dns, "www." + ZONE, tcp=True)).rcode() == dns.rcode.NXDOMAIN
        assert "edgeward_hub_dns_queries_total" in hub._metrics()
        assert [r.path for r in hub.steering.routes()] == ["/api/v1/steer"], "the redirect is off"
        taken = "{}:{}".format(*hub.steering.dns.address)
        other = HubSteering(hub.store, Settings.read({"zone": ZONE, "dns": taken}), hub._usage_of)
        with pytest.raises(EdgewardError, match="cannot listen on"):
            await other.open()
    finally:
        stop.set()
        await task
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(hub.steering.dns.address)  # it is given back


@pytest.mark.parametrize(
    "case", [_a_site_that_falls_silent_is_taken_out, _load_is_asked_of_the_nodes, _the_hub_has_it_off_and_on]
)
def test_of_a_running_hub(case: Any, tmp_path: Path) -> None:
    asyncio.run(case(tmp_path))
