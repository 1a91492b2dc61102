"""A request that a site cannot answer goes to the next place, never twice where that matters, and it is said where."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.gateway.papers import Authority, certificate, listener
from tests.gateway.rig import Answer, Client, Rig, Target, free_port, plain
from tests.gateway.test_admission import jwt, token

from edgeward.core.invocation import Call, CallFailed, Reply
from edgeward.gateway.balance import Endpoint
from edgeward.gateway.http1 import FALLBACK, PLACE, REFUSED, UNTOUCHED
from edgeward.gateway.rules import CacheConfig, PlaceConfig

KEY = "default/r"


class Sites:
    """Two sites and what is the cloud: ``here`` asks ``there`` for the same Route."""

    def __init__(self, folder: Path) -> None:
        (folder / "here").mkdir()
        (folder / "there").mkdir()
        self.here, self.there = Rig(folder / "here", "n1"), Rig(folder / "there", "n2")
        self.cloud = self.here.target(plain(b"cloud"))

    def near(self, port: int = 0) -> PlaceConfig:
        return PlaceConfig("site", "berlin", Endpoint("127.0.0.1", port or self.there.port))

    def far(self, port: int = 0) -> PlaceConfig:
        return PlaceConfig("cloud", "http://cloud", Endpoint("127.0.0.1", port or self.cloud.port), "cloud")

    def ask(self, path: str = "/r", *headers: str, **more: Any) -> Answer:
        client = Client(self.here.port)
        try:
            return client.get(path, *headers, **more)
        finally:
            client.close()


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    made = Sites(tmp_path)
    try:
        yield made
    finally:
        made.here.close()
        made.there.close()
        while _held:
            _held.pop().close()


_held: list[socket.socket] = []


def closed() -> int:
    """A port at which nothing listens, and nobody else will: it is held."""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind(("127.0.0.1", 0))
    _held.append(s)
    port: int = s.getsockname()[1]
    return port


async def takes_and_goes(target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await target.request(reader)


def chunked(body: bytes) -> bytes:
    return b"POST /r HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def test_the_nearest_site_answers_what_this_one_cannot(sites: Sites) -> None:
    target = sites.there.target(plain(b"berlin", "Edgeward-Place: forged"))
    sites.there.route("/r", target.port, key=KEY, send_host="")
    sites.here.route("/r", key=KEY, then=(sites.near(), sites.far()), send_host="")
    got = sites.ask("/r", "Edgeward_Fallback: x", method="POST", body=b"data", host="shop.example")
    assert (got.status, got.body) == (200, b"berlin")
    assert got.headers[PLACE] == 'site; name="berlin"; because="test has no endpoint here"'
    assert target.bodies == [b"data"]
    head = target.heads[0].lower()
    assert b"host: shop.example\r\n" in head and b"edgeward" not in head.replace(
        b"via: 1.1 n1.edgeward, 1.1 n2.edgeward", b""
    )
    client = Client(sites.here.port)
    client.send(chunked(b"in pieces"))
    assert client.answer("POST").body == b"berlin" and target.bodies[-1] == b"in pieces"
    client.close()
    assert sites.cloud.connections == 0
    rule = sites.here.gate.table.rules[0]
    assert rule.counters.places == {"site": 2}
    sites.here.call(sites.here.gate.access.flush)
    line = json.loads((sites.here.folder / "access.log").read_text().splitlines()[0])
    assert (line["place"], line["because"], line["status"]) == ("site berlin", "test has no endpoint here", 200)
    assert sites.here.heard.statuses[KEY] == {
        "phase": "Fallback", "target": "test", "endpoints": 0, "places": ["here", "site berlin", "http://cloud"],
        "message": "test has no running endpoint at this site: requests go to site berlin, then http://cloud",
    }  # fmt: skip


def test_a_site_that_can_answers_itself(sites: Sites) -> None:
    target = sites.here.target(plain(b"here"))
    sites.here.route("/r", target.port, key=KEY, then=(sites.near(), sites.far()))
    got = sites.ask()
    assert (got.body, got.headers[PLACE]) == (b"here", "here")


def refusing(sites: Sites, how: str) -> None:
    """Makes the other site's gateway one that does nothing of it."""
    there = sites.there
    target = there.target(plain(b"berlin"))
    if how == "no endpoint":
        there.route("/r", key=KEY)
    elif how == "another route":
        there.route("/", target.port, key="default/all")
    elif how == "at its bound":
        there.route("/r", target.port, key=KEY, requests=0)
    elif how == "rate":
        there.route("/r", target.port, key=KEY, rate=0.001, burst=1)
        client = Client(there.port)
        assert client.get("/r").body == b"berlin"
        client.close()
    elif how == "no function":
        there.route("/r", key=KEY, to="function", function="default/f", missing=True)
    elif how == "refused function":

        async def refused(call: Call) -> Reply:
            raise CallFailed("refused", "is not enforced here", function="f")

        there.functions.known["default/f"] = refused
        there.route("/r", key=KEY, to="function", function="default/f")


HOWS = ["no route", "no endpoint", "another route", "at its bound", "rate", "no function", "refused function"]


@pytest.mark.parametrize("how", HOWS)
def test_a_site_that_cannot_says_so_and_the_cloud_is_asked(sites: Sites, how: str) -> None:
    refusing(sites, how)
    sites.here.route("/r", key=KEY, then=(sites.near(), sites.far()))
    got = sites.ask(method="POST", body=b"once")
    assert (got.status, got.body) == (200, b"cloud")
    assert got.headers[PLACE].startswith(
        'cloud; name="http://cloud"; because="test has no endpoint here; the gateway of'
    )
    assert sites.cloud.bodies == [b"once"]
    assert b"host: cloud\r\n" in sites.cloud.heads[0].lower()


def test_when_nobody_can_each_reason_is_told(sites: Sites) -> None:
    sites.here.route("/r", key=KEY, then=(sites.near(closed()), sites.far(closed())))
    got = sites.ask()
    assert got.status == 503 and REFUSED not in got.headers
    why = json.loads(got.body)["detail"]
    assert why.startswith("test has no endpoint here; no connection to the target: ") and why.count(";") == 2


def test_what_was_sent_and_is_not_idempotent_goes_nowhere_else(sites: Sites) -> None:
    target = sites.here.target(takes_and_goes)
    sites.here.route("/r", target.port, key=KEY, then=(sites.far(),))
    got = sites.ask(method="POST", body=b"once")
    assert got.status == 502 and sites.cloud.connections == 0 and target.bodies == [b"once"]
    assert sites.ask(method="PUT", body=b"again").body == b"cloud", "doing it twice is like doing it once"
    assert sites.ask().body == b"cloud"


def test_nor_what_the_other_site_has_taken(sites: Sites) -> None:
    target = sites.there.target(takes_and_goes)
    sites.there.route("/r", target.port, key=KEY)
    sites.here.route("/r", key=KEY, then=(sites.near(), sites.far()))
    got = sites.ask(method="POST", body=b"once")
    assert got.status == 502 and sites.cloud.connections == 0 and target.bodies == [b"once"]
    assert sites.ask(method="PUT", body=b"again").body == b"cloud", "which the other gateway could not get answered"


def test_an_app_cannot_claim_that_nothing_was_done(sites: Sites) -> None:
    target = sites.there.target(plain(b"no", f"{REFUSED}: {UNTOUCHED}", status="503 Busy"))
    sites.there.route("/r", target.port, key=KEY)
    sites.here.route("/r", key=KEY, then=(sites.near(), sites.far()))
    got = sites.ask(method="POST", body=b"once")
    assert (got.status, got.body) == (503, b"no") and sites.cloud.connections == 0
    home = sites.here.target(plain(b"no", f"{REFUSED}: {UNTOUCHED}", status="503 Busy"))
    sites.here.route("/h", home.port, then=(sites.far(),))
    assert sites.ask("/h").body == b"no", "the target's own answers are answers"


def test_nobody_is_asked_for_another(sites: Sites) -> None:
    """Two sites that have nothing, each the other's neighbour: one question, no loop; and a stranger who asks so."""
    back = PlaceConfig("site", "bremen", Endpoint("127.0.0.1", sites.here.port))
    sites.there.route("/r", key=KEY, then=(back,))
    sites.here.route("/r", key=KEY, then=(sites.near(),))
    got = sites.ask()
    assert got.status == 503 and "cannot answer it either (503)" in json.loads(got.body)["detail"]
    assert [r.counters.statuses for r in (sites.here.gate.table.rules[0], sites.there.gate.table.rules[0])] == [
        {503: 1}
    ] * 2
    assert sites.here.gate.refusals == sites.there.gate.refusals == {}, "it did not even come back"
    told = sites.ask("/r", f"{FALLBACK}: {KEY}")
    assert (told.status, told.headers[REFUSED]) == (503, UNTOUCHED)
    wrong = sites.ask("/r", f"{FALLBACK}: default/other")
    assert (wrong.status, wrong.headers[REFUSED]) == (421, UNTOUCHED)


def test_gateways_ask_each_other_by_tls_and_trust_the_hub(sites: Sites) -> None:
    ca, other = Authority(), Authority("others")
    target = sites.there.target(plain(b"berlin"))
    port = free_port()
    sites.there.route("/r", target.port, key=KEY)
    place = PlaceConfig("site", "berlin", Endpoint("127.0.0.1", port, True, ours=True))
    sites.here.route("/r", key=KEY, then=(place, sites.far()), failures=0)
    file = sites.here.folder / "identity" / "ca.crt"
    file.parent.mkdir()
    for authority, hosts, answers in (
        (other, ("127.0.0.1", "shop.example"), b"cloud"),  # nobody we know
        (ca, ("127.0.0.1", "shop.example"), b"berlin"),
        (ca, ("127.0.0.1",), b"cloud"),  # not for this host: a connection for one is no door to another
        (ca, ("127.0.0.2", "shop.example"), b"cloud"),  # not the one that was to be asked
    ):
        file.write_text(ca.pem)
        sites.there.listeners = [listener(port, certificate(*authority.issue(*hosts)))]
        sites.there.apply()
        assert sites.ask(method="POST", body=b"x", host="shop.example").body == answers, hosts
    assert target.bodies == [b"x"]


def test_an_endpoint_that_is_down_is_left_alone(sites: Sites) -> None:
    sites.here.route("/r", closed(), key=KEY, failures=3, pause=3600.0, then=(sites.far(),))
    for _ in range(5):
        assert sites.ask(method="POST", body=b"x").body == b"cloud"
    assert [r for r, _ in sites.here.heard.events] == ["CircuitOpen"]
    assert "left alone" in sites.ask().headers[PLACE]
    assert sites.here.gate.table.rules[0].counters.retries == 0, "it is not asked twice when another place is there"
    explained = sites.here.do(_explained(sites.here, "/r"))
    assert [(p["place"], bool(p["why"])) for p in explained["places"]] == [("here", True), ("cloud", False)]
    assert explained["asked"] == "http://cloud"


async def _explained(rig: Rig, url: str) -> Any:
    return await anext(rig.gate.verbs["gateway.explain"]({"url": url}))


def fails(kind: Any) -> Callable[[Call], Any]:
    async def function(call: Call) -> Reply:
        raise CallFailed(kind, "no", function="f")

    return function


@pytest.mark.parametrize(
    ("kind", "body"),
    [("unknown", b"cloud"), ("unavailable", b"cloud"), ("refused", b"cloud"), ("busy", b"cloud"),
     ("error", b""), ("crashed", b""), ("timeout", b""), ("memory", b"")],
)  # fmt: skip
def test_a_function_that_was_not_called_is_called_elsewhere(sites: Sites, kind: str, body: bytes) -> None:
    sites.here.functions.known["default/f"] = fails(kind)
    sites.here.route("/r", key=KEY, to="function", function="default/f", then=(sites.far(),))
    client = Client(sites.here.port)
    client.send(chunked(b"event"))
    got = client.answer("POST")
    client.close()
    if body:
        assert got.body == body and sites.cloud.bodies == [b"event"]
    else:
        assert got.status >= 500 and kind in got.body.decode() and sites.cloud.connections == 0


def test_a_function_that_is_elsewhere_takes_what_is_larger_than_an_event(sites: Sites) -> None:
    sites.here.route("/r", key=KEY, to="function", function="default/f", missing=True, then=(sites.far(),))
    body = random.Random(1).randbytes(7 * 1024 * 1024)
    got = sites.ask(method="POST", body=body)
    assert got.body == b"cloud" and sites.cloud.bodies == [body], "it is passed on as it comes"


def test_the_cloud_first_and_this_site_when_it_is_gone(sites: Sites) -> None:
    async def function(call: Call) -> Reply:
        return Reply(200, [], b"here " + call.event.data)

    sites.here.functions.known["default/f"] = function
    target = sites.here.target(plain(b"here"))
    sites.here.route("/r", target.port, key=KEY, first=(sites.far(),))
    sites.here.route("/f", to="function", function="default/f", first=(sites.far(),))
    for path in ("/r", "/f"):
        got = sites.ask(path, method="POST", body=b"x")
        assert (got.body, got.headers[PLACE]) == (b"cloud", 'cloud; name="http://cloud"')
    sites.here.routes.clear()
    gone = sites.far(closed())
    sites.here.route("/r", target.port, key=KEY, first=(gone,))
    sites.here.route("/f", to="function", function="default/f", first=(gone,))
    assert sites.ask(method="POST", body=b"x").body == b"here"
    got = sites.ask("/f", method="POST", body=b"x")
    assert got.body == b"here x" and got.headers[PLACE].startswith('here; because="no connection to the target')


def test_what_stands_in_is_not_kept_and_what_is_kept_stands_in_last(sites: Sites) -> None:
    fresh = "Cache-Control: max-age=0, stale-if-error=600"
    home = sites.here.target(plain(b"here", fresh, 'ETag: "1"'))
    cloud = sites.here.target(plain(b"cloud", "Cache-Control: max-age=600", 'ETag: "1"'))
    more: dict[str, Any] = {"key": KEY, "cache": CacheConfig(), "target": "test"}
    sites.here.route("/r", home.port, then=(sites.far(cloud.port),), **more)
    assert sites.ask().body == b"here"
    sites.here.routes.clear()
    sites.here.route("/r", closed(), then=(sites.far(cloud.port),), **more)
    for _ in range(2):
        assert sites.ask().body == b"cloud"
    assert len(cloud.heads) == 2 and b"if-none-match" not in cloud.heads[0].lower()
    sites.here.routes.clear()
    sites.here.route("/r", closed(), then=(sites.far(closed()),), **more)
    got = sites.ask()
    assert got.body == b"here" and "stale-if-error" in got.headers["cache-status"]


class Counting:
    """A service that is killed and comes back at the same port, and counts what was done."""

    def __init__(self, rig: Rig, word: bytes, done: dict[bytes, int]) -> None:
        self.rig, self.word, self.done = rig, word, done
        self.server: asyncio.Server | None = None
        self.port = closed()
        self.open: set[asyncio.StreamWriter] = set()

    async def up(self) -> None:
        if self.server is None:
            self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_port=True)

    async def down(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None
        for writer in tuple(self.open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, RuntimeError):  # it was killed
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                name = head.partition(b"x-id: ")[2].partition(b"\r\n")[0]
                if head.startswith(b"POST"):
                    await reader.readexactly(len(name))
                    self.done[name] = self.done.get(name, 0) + 1
                await asyncio.sleep(0)
                body = self.word + b" " + name
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        self.open.discard(writer)
        writer.close()


def test_killed_and_flapping_endpoints_under_load(sites: Sites) -> None:
    """Seeded. Each answer is the asker's own, nothing that is done once is done twice, and GET never fails: the cloud
    stays."""
    done: dict[bytes, int] = {}
    made = [(sites.here, b"here"), (sites.here, b"here"), (sites.there, b"berlin"), (sites.here, b"cloud")]
    one, two, other, cloud = (Counting(rig, word, done) for rig, word in made)
    for c in (one, two, other, cloud):
        c.rig.do(c.up())
    sites.there.route("/r", other.port, key=KEY, failures=3, pause=0.1)
    sites.here.route(
        "/r", one.port, two.port, key=KEY, failures=3, pause=0.1, then=(sites.near(), sites.far(cloud.port)), budget=1.0
    )
    wrong: list[Any] = []
    failed: list[bytes] = []
    answered: list[bytes] = []
    stop = threading.Event()

    def load(seed: int) -> None:
        rng = random.Random(seed)
        client = Client(sites.here.port)
        while not stop.is_set() or len(answered) < 400:
            name = uuid.UUID(int=rng.getrandbits(128)).hex.encode()
            post = rng.random() < 0.5
            got = client.get(
                "/r", f"x-id: {name.decode()}", method="POST" if post else "GET", body=name if post else b""
            )
            if got.status == 200:
                answered.append(name)
                if got.body.partition(b" ")[2] != name or (post and done.get(name) != 1):
                    wrong.append((got, name, done.get(name)))
            elif post:
                failed.append(name)
            else:
                wrong.append((got, name))
            if got.headers.get("connection") == "close":
                client.close()
                client = Client(sites.here.port)
        client.close()

    threads = [threading.Thread(target=load, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    rng = random.Random(11)
    for _ in range(40):
        victim = rng.choice((one, two, other))
        victim.rig.do(victim.down() if rng.random() < 0.6 else victim.up())
        stop.wait(0.03)  # the changes are spread over the load
    stop.set()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads)
    assert wrong == []
    assert max(done.values()) == 1
    assert len(answered) > len(failed), "that which was under way when its endpoint died, and no more"
    for c in (one, two, other, cloud):
        c.rig.do(c.down())


def test_the_other_site_looks_at_the_token_itself_and_the_cloud_gets_none(sites: Sites) -> None:
    target = sites.there.target(plain(b"berlin"))
    sites.there.route("/r", target.port, key=KEY, auth=jwt())
    sites.here.route("/r", key=KEY, auth=jwt(), then=(sites.near(), sites.far()))
    assert sites.ask().status == 401 and target.connections == 0
    assert sites.ask("/r", token(sub="ann")).body == b"berlin"
    assert b"x-edgeward-identity: ann\r\n" in target.heads[0] and b"authorization" not in target.heads[0]
    sites.there.routes.clear()
    sites.there.route(
        "/r",
        target.port,
        key=KEY,
        auth=msgspec.structs.replace(jwt(), jwt=msgspec.structs.replace(jwt().jwt, audience=("others",))),
    )
    assert sites.ask("/r", token(sub="ann")).body == b"cloud", "which that site does not let in"
    assert b"x-edgeward-identity: ann\r\n" in sites.cloud.heads[0] and b"authorization" not in sites.cloud.heads[0]
