"""The mesh over real sockets: nodes of a site, with certificates of a real CA, and those who should not be heard."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from tests.core.pair import until
from tests.nodes.meshes import Site, enrol

from edgeward.core.errors import Conflict, EdgewardError, Refused, Unreachable
from edgeward.core.identity import NodeIdentity
from edgeward.core.nkeys import public_raw
from edgeward.nodes.mesh import Mesh
from edgeward.nodes.mesh_sockets import Settings, joined, settings_of
from edgeward.nodes.mesh_tcp import MOST, Papers
from edgeward.nodes.mesh_wire import Address, Heard, Known, address_of, sealed, shown, to_sign_certificate


class Ear:
    """What a mesh heard on a topic."""

    def __init__(self, mesh: Mesh, topic: str = "t") -> None:
        self.got: list[tuple[str, bytes]] = []
        self.how: list[Heard] = []
        mesh.hear(topic, self._heard)

    def _heard(self, peer: str, data: bytes, heard: Heard) -> None:
        self.got.append((peer, data))
        self.how.append(heard)


async def said(mesh: Mesh, ear: Ear, data: bytes, times: int = 1) -> None:
    """Says it until it was heard: a datagram may be lost."""
    want = (mesh.node, data)

    async def once() -> bool:
        mesh.say("t", data)
        await asyncio.sleep(0.02)  # the pace of saying it again
        return ear.got.count(want) >= times

    await until(once)


def place(mesh: Mesh) -> Address:
    at = address_of(mesh.address)
    assert at is not None
    return at


def test_words_questions_and_pieces(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, "a", "b", "c")
        a, b, c = (site.meshes[n] for n in "abc")
        ears = Ear(b), Ear(c)
        seen = 0

        def moved() -> None:
            nonlocal seen
            seen += 1

        a.on_peers.append(moved)

        async def echo(peer: str, data: bytes) -> bytes:
            return peer.encode() + b":" + data

        async def refuse(peer: str, data: bytes) -> bytes:
            raise Conflict("changed meanwhile", resource="App/default/web", remedy="read it again")

        async def bug(peer: str, data: bytes) -> bytes:
            raise AttributeError("a secret of the inside")

        async def count(peer: str, data: bytes) -> AsyncIterator[bytes]:
            for n in range(int(data)):
                yield str(n).encode() * 1000

        b.serve("echo", echo)
        b.serve("refuse", refuse)
        b.serve("bug", bug)
        b.serve("count", count)
        async with site.running():
            await site.linked()
            assert seen > 0
            assert set(a.peers()) == {"b", "c"}
            assert a.peers()["b"].address == place(b)
            await asyncio.gather(said(a, ears[0], b"hello"), said(a, ears[1], b"hello"))
            assert ears[0].how[0].epoch == a.epoch
            # to chosen ones only
            assert a.say("t", b"for c", ["c", "nobody"]) == 1
            assert await a.ask("b", "echo", b"x", 60) == b"a:x"
            big = os.urandom(MOST - 10)
            assert await c.ask("b", "echo", big, timeout=60) == b"c:" + big
            with pytest.raises(Conflict) as caught:
                await a.ask("b", "refuse", timeout=60)
            assert caught.value.resource == "App/default/web"
            with pytest.raises(EdgewardError) as failed:
                await a.ask("b", "bug", timeout=60)
            assert "secret" not in str(failed.value)
            with pytest.raises(Refused):
                await a.ask("b", "nothing", timeout=60)
            with pytest.raises(EdgewardError):
                await a.ask("b", "echo", b"x" * (MOST + 1))
            pieces = [p async for p in a.stream("b", "count", b"50", 60)]
            assert pieces == [str(n).encode() * 1000 for n in range(50)]
            # one that is given up takes nothing with it
            stream = a.stream("b", "count", b"100000", 60)
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
            assert await asyncio.gather(*(a.ask("b", "echo", str(n).encode(), 60) for n in range(5))) == [
                f"a:{n}".encode() for n in range(5)
            ]
            with pytest.raises(Unreachable):
                await a.ask("nobody", "echo")
            await site.stop("b")
            with pytest.raises(Unreachable):
                await a.ask("b", "echo", timeout=5)
            assert (b"for c" in [d for _, d in ears[0].got]) is False

    asyncio.run(body())


def test_a_run_keeps_its_port_and_comes_back_by_itself(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, "a", "b")
        async with site.running():
            await site.linked()
            before, epoch = site.meshes["b"].address, site.meshes["b"].epoch
            b = await site.restart("b")
            ear = Ear(b)
            await site.linked()
            assert b.address == before
            assert b.epoch > epoch
            await said(site.meshes["a"], ear, b"again")
            # the clock was set back and what was kept is older: the epoch still grows
            kept = msgspec.json.decode((tmp_path / "b" / "mesh.json").read_bytes())
            kept["epoch"] = b.epoch + 10**9
            (tmp_path / "b" / "mesh.json").write_bytes(msgspec.json.encode(kept))
            c = await site.restart("b")
            assert c.epoch == kept["epoch"] + 1
            await site.linked()

    asyncio.run(body())


def test_with_no_hub_the_last_known_places_do(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, "a", "b")
        async with site.running():
            await site.linked()
            await site.meshes["a"]._keep_addresses()
            await site.stop("b")
            # the hub never heard where b is, nor where a is
            site.told = {n: Known(n, k.key) for n, k in site.told.items()}
            await site.stop("a")
            site.meshes["a"] = Mesh(
                "a", "plant", NodeIdentity.open(tmp_path / "a" / "identity"), tmp_path / "a" / "mesh.json",
                Settings("127.0.0.1"), lambda: list(site.told.values()),
            )  # fmt: skip
            site.meshes["b"]._changed = lambda: None
            site.start("a")
            site.start("b")
            await site.linked()

    asyncio.run(body())


class Tap(asyncio.DatagramProtocol):
    """Somebody in the middle: what comes to it goes on to ``to``, and is kept."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self.to: tuple[Tap, Address] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.DatagramTransport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: Address) -> None:
        self.kept.append(data)
        if self.to is not None:
            self.to[0].transport.sendto(data, self.to[1])

    @property
    def place(self) -> Address:
        host, port = self.transport.get_extra_info("sockname")[:2]
        return str(host), int(port)

    @staticmethod
    async def open() -> Tap:
        _, tap = await asyncio.get_running_loop().create_datagram_endpoint(Tap, local_addr=("127.0.0.1", 0))
        return tap


def test_what_was_captured_counts_at_nobody(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, "a", "b")
        a, b = site.meshes["a"], site.meshes["b"]
        at_a, at_b = await Tap.open(), await Tap.open()
        site._changed = lambda name: None  # type: ignore[method-assign]
        # each believes that the other is where somebody in the middle listens
        site.told = {"a": Known("a", site.told["a"].key, at_a.place), "b": Known("b", site.told["b"].key, at_b.place)}
        site.look()
        ear = Ear(b)
        async with site.running():
            await until(lambda: bool(a.address and b.address))
            at_a.to, at_b.to = (at_b, place(a)), (at_a, place(b))  # a's go to at_b, and on from at_a
            await site.linked()
            assert a.peers()["b"].address == at_b.place
            await said(a, ear, b"open the valve")
            await said(a, ear, b"that was all")  # it was said more than once, maybe
            captured = list(at_b.kept)
            assert any(sealed(d) for d in captured) and any(shown(d) for d in captured)
            assert not any(b"valve" in d for d in captured), "nothing can be read on the way"
            heard = len(ear.got)

            async def replay() -> None:
                before = sum(site.meshes["b"].counters.values())
                for data in captured:
                    at_a.transport.sendto(data, place(site.meshes["b"]))
                await until(lambda: sum(site.meshes["b"].counters.values()) > before)

            await replay()
            await said(a, ear, b"behind them")  # by the same way, so they were all looked at
            assert b.counters["replayed"] > 0
            assert {d for _, d in ear.got[heard:]} <= {b"behind them", b"that was all"}
            # changed on the way
            forged = bytearray(next(d for d in reversed(captured) if sealed(d)))
            forged[-1] ^= 1
            forged[18] ^= 128  # a number that was not there yet
            at_a.transport.sendto(bytes(forged), place(b))
            await until(lambda: b.counters["forged"] > 0)
            # and after a restart of the one who heard it
            b = await site.restart("b")
            ear = Ear(b)
            await until(lambda: bool(b.address))
            at_b.to = (at_a, place(b))
            await replay()
            await site.linked()
            await replay()
            await said(a, ear, b"close it")
            assert {d for _, d in ear.got} == {b"close it"}
            for tap in (at_a, at_b):
                tap.transport.close()

    asyncio.run(body())


def test_future_dated_and_held_back(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, "a", "b")
        a, b = site.meshes["a"], site.meshes["b"]
        ear = Ear(b)
        async with site.running():
            await site.linked()
            await said(a, ear, b"now")
            link = a._links._peers["b"].link
            assert link is not None and a._transport is not None
            for later, name in ((3600.0, "future"), (-3600.0, "stale")):
                a._transport.sendto(link.seal(time.monotonic() + later, b"t", b"then"), place(b))
                await until(lambda name=name: b.counters[name] > 0)  # type: ignore[misc]
            await said(a, ear, b"after")
            assert b"then" not in [d for _, d in ear.got]

    asyncio.run(body())


def test_revoked_is_out_at_once_and_its_connections_end(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, "a", "b", "c")
        a, b, c = (site.meshes[n] for n in "abc")
        ear = Ear(b)

        async def drip(peer: str, data: bytes) -> AsyncIterator[bytes]:
            yield b"first"
            await asyncio.Event().wait()

        b.serve("drip", drip)
        async with site.running():
            await site.linked()
            await said(a, ear, b"before")
            signature = a.sign(b"report")
            assert b.check("a", b"report", signature)
            stream = a.stream("b", "drip", timeout=60)
            assert await anext(stream) == b"first"
            # the hub's word reaches b and c only
            word = dict(site.told)
            del word["a"]
            for mesh in (b, c):
                mesh._known = lambda: list(word.values())
                mesh.look()
            with pytest.raises(Unreachable):
                await anext(stream)
            with pytest.raises(Unreachable):
                await a.ask("b", "drip", timeout=10)
            await until(lambda: b.counters["refused"] >= 1)
            assert set(b.peers()) == {"c"}
            assert not b.check("a", b"report", signature)
            before = b.counters["strange"]
            assert a.say("t", b"after") > 0
            await until(lambda: b.counters["strange"] > before)
            assert (("a", b"after")) not in ear.got
            with pytest.raises(Unreachable):
                await b.ask("a", "anything")

    asyncio.run(body())


def test_a_certificate_that_ended_while_the_site_was_cut_is_good(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path)
        a, b = (site.make(n, expires=time.time() - 86400) for n in "ab")
        ear = Ear(b)

        async def echo(peer: str, data: bytes) -> bytes:
            return data

        b.serve("echo", echo)
        async with site.running():
            await site.linked()
            await said(a, ear, b"x")
            assert await a.ask("b", "echo", b"y", 60) == b"y"

    asyncio.run(body())


def test_other_sites_and_other_cas_are_not_answered(tmp_path: Path) -> None:
    async def body() -> None:
        plant = Site(tmp_path, "a", "b")
        ear = Ear(plant.meshes["b"])
        shop = Site(tmp_path, "s", site="shop")  # of the same hub
        other = Site(tmp_path / "other", "a")  # another hub's, with a name of ours
        (tmp_path / "other").mkdir(exist_ok=True)
        async with plant.running(), shop.running(), other.running():
            await plant.linked()
            b = plant.meshes["b"]
            for mesh in (shop.meshes["s"], other.meshes["a"]):
                # they know where b is and by what key
                mesh._known = lambda: [plant.told["b"]]
                mesh.look()
                with pytest.raises(Unreachable):
                    await mesh.ask("b", "anything", timeout=10)
            await until(lambda: b.counters["otherSite"] > 0 and b.counters["forged"] > 0)
            assert not shop.meshes["s"].peers()["b"].linked
            assert not other.meshes["a"].peers()["b"].linked
            await said(plant.meshes["a"], ear, b"ours")
            assert not b.check("s", b"r", shop.meshes["s"].sign(b"r"))
            assert not b.check("a", b"r", other.meshes["a"].sign(b"r"))

    asyncio.run(body())


def test_a_liar_with_a_good_certificate_is_nobody_else(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, "a", "b", "c")
        b, c = site.meshes["b"], site.meshes["c"]

        async def echo(peer: str, data: bytes) -> bytes:
            return peer.encode()

        b.serve("echo", echo)
        async with site.running():
            await site.linked()
            assert await c.ask("b", "echo", timeout=60) == b"c"
            assert set(b._requests._served) == {"c"}
            c._requests.drop("b")
            await until(lambda: not b._requests._served)  # nothing is left of who has gone
            # c says that it is a, by its own certificate and key
            identity = c._identity
            print_ = c._present_papers()
            print_.vouch = msgspec.msgpack.encode(["a", identity.sign(to_sign_certificate(b"x" * 32))])
            c._requests.drop("b")
            before = b.counters["refused"]
            with pytest.raises(Unreachable):
                await c.ask("b", "echo", timeout=60)
            await until(lambda: b.counters["refused"] == before + 1)
            # the box that had the name before: its certificate is of the CA, and for that name
            old = enrol(site.hub, tmp_path / "old", "a")
            papers = Papers(old, "a")
            reader, writer = await asyncio.open_connection(
                *place(b), ssl=papers.client, server_hostname="b.node.edgeward.internal"
            )
            writer.write(b"\x01" + len(papers.vouch).to_bytes(4, "big") + papers.vouch)
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert await asyncio.wait_for(reader.read(100), 30) == b""
            writer.transport.abort()
            await until(lambda: b.counters["refused"] == before + 2)
            # a question of who has proved nothing is not even read: it would be held, 4 MiB of each such connection
            reader, writer = await asyncio.open_connection(
                *place(b), ssl=papers.client, server_hostname="b.node.edgeward.internal"
            )
            writer.write(b"\x02" + (4 << 20).to_bytes(4, "big") + bytes(1000))
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert await asyncio.wait_for(reader.read(100), 30) == b""
            writer.transport.abort()
            await until(lambda: b.counters["refused"] == before + 3)
            # nobody is taken for another when asked either: c stands where a is said to be
            a = site.meshes["a"]
            word = {**site.told, "a": Known("a", site.told["a"].key, place(c))}
            await site.stop("a")
            b._known = lambda: list(word.values())
            b.look()
            b._links._peers["a"].learned = None
            with pytest.raises(Unreachable):
                await b.ask("a", "echo", timeout=10)
            assert not b.check("a", b"r", c.sign(b"r"))
            assert b.check("a", b"r", a.sign(b"r"))
            assert not b.check("a", b"s", a.sign(b"r"))

    asyncio.run(body())


def test_a_storm_of_strangers_stops_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, "a", "b")
        a, b = site.meshes["a"], site.meshes["b"]
        ear = Ear(b)

        async def echo(peer: str, data: bytes) -> bytes:
            return data

        b.serve("echo", echo)
        rng = random.Random(11)
        async with site.running():
            await site.linked()
            with contextlib.ExitStack() as held:
                flood = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                flood.bind(("127.0.0.2", 0))
                heads = (b"", b"EM\x01\x01", b"EM\x02")
                for n in range(3000):
                    flood.sendto(rng.choice(heads) + rng.randbytes(rng.randrange(1, 1400)), place(b))
                    if n % 50 == 0:
                        await asyncio.sleep(0)  # they are taken
                idle = []
                for _ in range(60):  # connections that say nothing
                    one = held.enter_context(socket.socket())
                    one.bind(("127.0.0.2", 0))
                    one.connect(place(b))
                    idle.append(one)
                await until(lambda: b.counters["flooded"] >= 36)
                assert await a.ask("b", "echo", b"x", timeout=60) == b"x"
                await said(a, ear, b"through it all")
            assert {p for p, _ in ear.got} == {"a"}
            assert b.counters["garbage"] + b.counters["strange"] > 100

    asyncio.run(body())


def test_a_taken_port_stops_nothing_and_is_told(tmp_path: Path) -> None:
    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            site = Site(tmp_path, "a", "b")
            c = site.make("c", settings=Settings("127.0.0.1", port))
            async with site.running():
                await until(lambda: bool(c.problem))
                assert c.status() == {"meshProblem": c.problem}
                assert str(port) in c.problem
                assert [e[:2] for e in site.events] == [("Warning", "MeshDown")]
                assert c.say("t", b"x") == 0
                with pytest.raises(Unreachable):
                    await site.meshes["a"].ask("c", "x", timeout=5)
                await site.linked("a", "b")
                taken.close()
                c.renewed()  # does not wait for the next try
                await site.linked()
                assert c.status() == {"mesh": f"127.0.0.1:{port}"}
                assert [e[:2] for e in site.events] == [("Warning", "MeshDown"), ("Normal", "MeshUp")]

    asyncio.run(body())


def test_a_kept_port_that_somebody_took_is_changed(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path, "a", "b")
        async with site.running():
            await site.linked()
            before = site.meshes["b"].address
            await site.stop("b")
            with socket.create_server(place(site.meshes["b"]), reuse_port=False):
                site.make("b")
                site.start("b")
                await site.linked()
                assert site.meshes["b"].address != before
                assert site.events == []

    asyncio.run(body())


def test_those_whose_place_nobody_knows_are_called(tmp_path: Path) -> None:
    async def body() -> None:
        site = Site(tmp_path)
        called = Settings("127.0.0.1", multicast=True)
        for name in "ab":
            site.make(name, settings=called)
        site._changed = lambda name: None  # type: ignore[method-assign]  # the hub tells nobody where they are
        site.look()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                joined("127.0.0.1", probe).close()
            except OSError as e:
                pytest.skip(f"no multicast on the loopback here: {e}")
        async with site.running():
            assert all(k.address is None for k in site.told.values())
            await site.linked()

    asyncio.run(body())


def test_what_node_json_says() -> None:
    assert settings_of(None, "127.0.0.1", "127.0.0.1") == Settings("127.0.0.1", 0, "127.0.0.1")
    assert settings_of({"listen": "10.0.0.1:700"}, "127.0.0.1", "x") == Settings("10.0.0.1", 700, "10.0.0.1")
    assert settings_of({"listen": "[::]:700"}, "::", "10.0.0.9").address == "10.0.0.9"
    assert settings_of({"multicast": True}, "127.0.0.1", "x").multicast
    assert settings_of({"listen": ""}, "127.0.0.1", "x").host == ""
    assert "$.mesh.listen" in settings_of({"listen": "nonsense"}, "127.0.0.1", "x").problem


def test_a_box_that_is_not_enrolled_waits_for_its_certificate(tmp_path: Path) -> None:
    async def body() -> None:
        identity = NodeIdentity.open(tmp_path / "d" / "identity")
        told: list[dict[str, str]] = []
        mesh = Mesh(
            "d", "plant", identity, tmp_path / "d" / "mesh.json", Settings("127.0.0.1"),
            lambda: [Known("d", public_raw(identity.public_key, "user"))], changed=lambda: told.append(mesh.status()),
        )  # fmt: skip
        task = asyncio.create_task(mesh.run())
        try:
            await until(lambda: bool(mesh.problem))
            site = Site(tmp_path)
            enrol(site.hub, tmp_path / "d", "d")
            mesh.renewed()
            await until(lambda: bool(mesh.address))
            assert "meshProblem" in told[0] and "mesh" in told[-1]
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(body())
