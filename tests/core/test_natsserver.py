"""Real servers on loopback: a hub, nodes behind a TLS-terminating splice, cuts, kills and forgeries."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from nats.aio.msg import Msg
from nats.js.api import StreamConfig
from paho.mqtt import client as mqtt
from tests.core.pair import until

from edgeward.core import proc
from edgeward.core.bus import Bus
from edgeward.core.claims import Claims
from edgeward.core.errors import Conflict, Refused, Unreachable
from edgeward.core.identity import HubIdentity, NodeIdentity, inbox_prefix
from edgeward.core.natsconf import claims_dir
from edgeward.core.natsserver import AGENT_USER, HubSpec, NatsServer, NodeSpec, free_port
from edgeward.core.nkeys import NatsUser, claims_of

MQTT_PASSWORD = "device"


class Splice:
    """Terminates TLS and forwards the bytes to the WebSocket port, as the hub process does. ``cut`` is a dead WAN."""

    def __init__(self, identity: HubIdentity, target: int) -> None:
        self.identity, self.target, self.port = identity, target, free_port()  # the same after a cut
        self.paths: list[bytes] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, ssl=self.identity.server_context()
        )

    async def cut(self) -> None:
        assert self._server
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        out: asyncio.StreamWriter | None = None
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            self.paths.append(head.split(b" ")[1])
            back, out = await asyncio.open_connection("127.0.0.1", self.target)
            out.write(head)
            one = asyncio.create_task(self._pump(reader, out))
            two = asyncio.create_task(self._pump(back, writer))
            try:
                await asyncio.wait({one, two}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                one.cancel()
                two.cancel()
        except (OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            if out is not None:
                out.close()

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()


@dataclasses.dataclass
class Node:
    name: str
    identity: NodeIdentity
    server: NatsServer
    bus: Bus

    def mqtt(self, *, subscribe: str = "") -> tuple[mqtt.Client, list[tuple[str, bytes]]]:
        """A connected client in its own thread, and what it received."""
        got: list[tuple[str, bytes]] = []
        ready = threading.Event()
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=f"{self.name}-{os.urandom(4).hex()}")
        client.username_pw_set("device", MQTT_PASSWORD)
        client.on_message = lambda c, u, m: got.append((m.topic, bytes(m.payload)))
        client.on_subscribe = lambda *a: ready.set()
        client.on_connect = lambda *a: ready.set() if not subscribe else None
        client.connect("127.0.0.1", self.server.ports["mqtt"])
        if subscribe:
            client.subscribe(subscribe, 1)
        client.loop_start()
        assert ready.wait(60)
        return client, got


class World:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.identity = HubIdentity.open(root / "hub" / "identity")
        self.hub_server = NatsServer(root / "hub" / "nats", self.hub_spec())
        self.hub: Bus
        self.splice: Splice
        self.nodes: list[Node] = []

    def hub_spec(self) -> HubSpec:
        i = self.identity
        return HubSpec(i.operator_jwt, i.system_account, i.accounts)

    def node_spec(self, name: str, identity: NodeIdentity) -> NodeSpec:
        return NodeSpec(
            name,
            f"wss://127.0.0.1:{self.splice.port}",
            identity.creds_file,
            identity.ca_file,
            mqtt_users={"device": MQTT_PASSWORD},
            max_file_store=64 << 20,
        )

    async def node(self, name: str) -> Node:
        directory = self.root / "nodes" / name
        identity = NodeIdentity.open(directory / "identity")
        identity.accept(self.identity.issue_node(name, identity.public_key), self.identity.ca_pem)
        assert await self.hub_server.apply(self.hub_spec()) == "reloaded"
        server = NatsServer(directory / "nats", self.node_spec(name, identity))
        await server.start()
        bus = await node_bus(server, name)
        node = Node(name, identity, server, bus)
        self.nodes.append(node)
        return node

    async def linked(self, node: Node) -> None:
        """Until the node's requests reach the hub (which must serve ``ew.hub.sync.*``)."""
        await until(lambda: answered(node.bus, f"ew.hub.sync.{node.name}"))

    async def poked(self, node: Node, heard: list[tuple[str, bytes]]) -> None:
        """Until what the hub says to the node is ``heard`` there: its subscriptions are known at the hub by then."""
        mark = os.urandom(6).hex().encode()

        async def known() -> bool:
            await self.hub.publish(f"ew.node.{node.name}.mark", mark)
            return (f"ew.node.{node.name}.mark", mark) in heard

        await until(known)


async def node_bus(server: NatsServer, name: str) -> Bus:
    return await Bus.connect(
        server.url, name=name, username=AGENT_USER, password=server.secret, inbox=inbox_prefix(name), timeout=60
    )


async def answered(bus: Bus, subject: str) -> bool:
    try:
        await bus.request(subject, b"", timeout=1)
    except Unreachable:
        return False
    return True


def threads(pid: int) -> set[str]:
    """The states of a process's threads."""
    return {f.read_text().rpartition(")")[2].split()[0] for f in Path(f"/proc/{pid}/task").glob("*/stat")}


@contextlib.asynccontextmanager
async def world(root: Path) -> AsyncIterator[World]:
    w = World(root)
    try:
        assert await w.hub_server.start()
        w.splice = Splice(w.identity, w.hub_server.ports["websocket"])
        await w.splice.open()
        w.hub = await Bus.connect(w.hub_server.url, name="hub", user=w.identity.user, timeout=60)

        async def sync(msg: Msg) -> bytes:
            return b"hub:" + msg.subject.encode()

        await w.hub.serve("ew.hub.sync.*", sync, node_token=3)
        yield w
    finally:
        for node in w.nodes:
            await node.bus.close()
            await node.server.stop()
        if hasattr(w, "hub"):
            await w.hub.close()
        if hasattr(w, "splice"):
            await w.splice.cut()
        await w.hub_server.stop()


async def data_stream(w: World) -> None:
    js = w.hub.jetstream()
    await js.add_stream(StreamConfig(name="DATA_x", subjects=["ew.data.x.>"], allow_direct=True))


def test_one_port_link(tmp_path: Path) -> None:
    """Requests both ways, acknowledged data, the cursor: all over WSS through a TLS terminator."""

    async def main() -> None:
        async with world(tmp_path) as w:
            await data_stream(w)
            a = await w.node("a")
            await w.linked(a)
            assert w.splice.paths[0] == b"/leafnode"
            assert (await a.bus.request("ew.hub.sync.a", b"hi")).data == b"hub:ew.hub.sync.a"

            async def logs(msg: Msg) -> bytes:
                assert msg.reply.startswith("ew.hub.reply.a.")
                return b"log of a"

            await a.bus.serve("ew.node.a.call.logs", logs)
            await a.bus.flush()
            await until(lambda: called(w.hub, "a"))
            with pytest.raises(Unreachable, match="nobody answers"):
                await w.hub.request_via("ew.node.a.call.nothing", b"", "ew.hub.reply.a.77")

            subject = "ew.data.x.a.q"
            assert await a.bus.last_message("DATA_x", subject, domain="hub") is None
            one = await a.bus.publish_acked(subject, b"1", expect_last=0, headers={"Ew-Src": "l:1:2"})
            assert (one.stream, one.seq) == ("DATA_x", 1)
            with pytest.raises(Conflict):
                await a.bus.publish_acked(subject, b"again", expect_last=0)
            two = await a.bus.publish_acked(subject, bytes(1 << 20), expect_last=one.seq, headers={"Ew-Src": "l:3:4"})
            last = await a.bus.last_message("DATA_x", subject, domain="hub")
            assert last is not None
            assert (last.seq, last.subject, last.headers["Ew-Src"], len(last.data)) == (
                two.seq,
                subject,
                "l:3:4",
                1 << 20,
            )

    asyncio.run(main())


async def called(hub: Bus, node: str) -> bool:
    try:
        msg = await hub.request_via(
            f"ew.node.{node}.call.logs", b"", f"ew.hub.reply.{node}.{os.urandom(6).hex()}", timeout=1
        )
    except Unreachable:
        return False
    return bool(msg.data == f"log of {node}".encode())


def test_nodes_are_apart(tmp_path: Path) -> None:
    """Through its own server, and as a forger that speaks the leaf protocol itself, a node is confined to its name."""

    async def main() -> None:
        async with world(tmp_path) as w:
            await data_stream(w)
            js = w.hub.jetstream()
            await js.add_stream(StreamConfig(name="KV_resources", subjects=["$KV.resources.>"], allow_direct=True))
            a, b = await w.node("a"), await w.node("b")
            await w.linked(a)
            await w.linked(b)
            seen: list[tuple[str, bytes]] = []
            heard: dict[str, list[tuple[str, bytes]]] = {"a": [], "b": []}

            async def see(msg: Msg) -> None:
                if not msg.subject.startswith(("$SYS", "_INBOX", "$JS", "_R_")):
                    seen.append((msg.subject, msg.data))

            def hear(name: str) -> Callable[[Msg], Awaitable[None]]:
                async def handler(msg: Msg) -> None:
                    heard[name].append((msg.subject, msg.data))

                return handler

            await w.hub.subscribe(">", see)
            await w.hub.flush()
            for subject in ("ew.node.>", "_INBOX_b.>", "ew.data.>", "ew.hub.>", "$MQTT.>", "site.>"):
                await a.bus.subscribe(subject, hear("a"))
            await b.bus.subscribe("ew.node.b.>", hear("b"))
            await w.poked(a, heard["a"])
            await w.poked(b, heard["b"])

            # a tries to be b; b talks; the hub talks to b
            for subject in (
                "ew.hub.beat.b",
                "ew.data.x.b.q",
                "ew.hub.reply.b.1",
                "ew.node.b.poke",
                "_INBOX_b.x",
                "site.t",
            ):
                await a.bus.publish(subject, b"forged")
            await a.bus.flush()
            await b.bus.publish("ew.hub.beat.b", b"true")
            await b.bus.publish("site.b", b"true")
            await b.bus.publish_acked("ew.data.x.b.q", b"true")
            await w.hub.publish("ew.node.b.poke", b"true")
            await until(lambda: ("ew.node.b.poke", b"true") in heard["b"])
            with pytest.raises(Unreachable):
                await a.bus.publish_acked("ew.data.x.b.q", b"forged", timeout=0.5)
            with pytest.raises(Unreachable):
                await a.bus.last_message("DATA_x", "ew.data.x.b.q", domain="hub", timeout=0.5)
            for request in ("STREAM.INFO.DATA_x", "STREAM.PURGE.DATA_x", "STREAM.MSG.GET.DATA_x"):
                with pytest.raises(Unreachable):
                    await a.bus.request(f"$JS.hub.API.{request}", b"{}", timeout=0.5)
            await a.bus.publish("ew.hub.beat.a", b"last")
            await until(lambda: ("ew.hub.beat.a", b"last") in seen)
            await w.poked(a, heard["a"])  # behind whatever the hub might have sent it
            assert [m for m in seen if m[1] == b"forged"] == []
            assert [m for m in heard["a"] if m[1] == b"true"] == []
            assert {m for m in heard["b"] if m[0] != "ew.node.b.mark"} == {("ew.node.b.poke", b"true")}
            assert heard["b"].count(("ew.node.b.poke", b"true")) == 1
            assert (await js.stream_info("DATA_x")).state.messages == 1

            # The reply subject is the asker's choice and what answers at the hub has the hub's rights: an answer must
            # still not become b's data, b's orders, desired state or a request to JetStream.
            before = len(seen)
            victims = ["ew.node.b.call.x", "ew.data.x.b.q", "$KV.resources.r.App.default.x", "_INBOX_b.x"]
            victims += [f"$JS.API.STREAM.{verb}.KV_resources" for verb in ("DELETE", "PURGE")]
            for victim in victims:
                await a.bus.publish("ew.data.x.a.q", b"", reply=victim)
                await a.bus.publish("$JS.hub.API.DIRECT.GET.DATA_x.ew.data.x.a.q", b"", reply=victim)
                await a.bus.publish("ew.hub.sync.a", b"", reply=victim)
            # one more on every way, answered behind all of those; and then to b
            await a.bus.publish_acked("ew.data.x.a.q", b"", timeout=60)
            await a.bus.last_message("DATA_x", "ew.data.x.a.q", domain="hub", timeout=60)
            await a.bus.request("ew.hub.sync.a", timeout=60)
            heard_before = len(heard["b"])
            await w.poked(b, heard["b"])
            assert {subject for subject, _ in seen[before:]} - {"ew.node.b.mark"} == {"ew.data.x.a.q", "ew.hub.sync.a"}
            assert {subject for subject, _ in heard["b"][heard_before:]} == {"ew.node.b.mark"}
            assert heard["b"].count(("ew.node.b.poke", b"true")) == 1
            assert (await js.stream_info("KV_resources")).state.messages == 0
            state = (await js.stream_info("DATA_x", subjects_filter=">")).state
            assert state.subjects == {"ew.data.x.a.q": len(victims) + 1, "ew.data.x.b.q": 1}

            # a forger without our server; the hub ends such a connection at the first thing that is not a's
            for n, forged in enumerate(("ew.hub.beat.b", "ew.data.x.b.q"), 1):
                before = len(seen)
                said = await forge_leaf(w, a, ["ew.hub.beat.a", forged])
                await until(lambda n=n: seen.count(("ew.hub.beat.a", b"forged")) == n)  # type: ignore[misc]
                assert [m[0] for m in seen[before:] if m[1] == b"forged"] == ["ew.hub.beat.a"]
                assert b"Permissions Violation" in said
            said = await forge_leaf(w, a, ["ew.hub.beat.a"], subscribe="ew.node.b.>")
            await until(lambda: seen.count(("ew.hub.beat.a", b"forged")) == 3)
            assert b"ew.node.b.poke" not in said and b"secret" not in said

            # the same key opens no client connection
            jwt = a.identity.creds_file.read_text().splitlines()[1]
            assert claims_of(jwt)["sub"] == a.identity.public_key
            with pytest.raises(Unreachable):
                await Bus.connect(w.hub_server.url, name="forger", user=NatsUser(jwt, a.identity._key), timeout=1)

    asyncio.run(main())


async def forge_leaf(w: World, node: Node, publish: list[str], subscribe: str = "") -> bytes:
    """Speaks the leaf protocol with the node's credentials and says what it pleases; returns what the hub said.

    Until the hub ends the connection, or until it was sent something that the node may hear, behind what it may not.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", w.hub_server.ports["leaf"])
    info = json.loads((await asyncio.wait_for(reader.readline(), 60))[5:])
    key = node.identity._key
    jwt = node.identity.creds_file.read_text().splitlines()[1]
    sig = base64.urlsafe_b64encode(key.sign(info["nonce"].encode())).decode().rstrip("=")
    connect = {"jwt": jwt, "sig": sig, "name": "forger", "server_id": "FORGER", "headers": True, "version": "2.15.1"}
    said = ["CONNECT " + json.dumps(connect), "PING"]
    said += [f"LS+ {subscribe}", f"LS+ ew.node.{node.name}.>"] if subscribe else []
    said += [f"LMSG {subject} 6\r\nforged" for subject in publish]
    writer.write("\r\n".join([*said, "PING", ""]).encode())  # at once: a violation ends the connection
    answer = b""
    async with asyncio.timeout(60):
        with contextlib.suppress(OSError):
            await writer.drain()
            while answer.count(b"PONG") < 2 and (data := await reader.read(65536)):
                answer += data
            await w.hub.publish("ew.node.b.poke", b"secret")
            await w.hub.publish(f"ew.node.{node.name}.end", b"the end")
            while b"the end" not in answer and (data := await reader.read(65536)):
                answer += data
    writer.close()
    return answer


def test_kills_and_cut(tmp_path: Path) -> None:
    """kill -9 of both servers; cut off, a site's MQTT and JetStream go on; the MQTT of two sites never meets."""

    async def main() -> None:
        async with world(tmp_path) as w:
            await data_stream(w)
            a, b = await w.node("a"), await w.node("b")
            await w.linked(a)
            restarts: list[int] = []
            w.hub_server.on_restart = lambda: restarts.append(1)
            keepers = [asyncio.create_task(s.run()) for s in (w.hub_server, a.server)]
            try:
                one = await a.bus.publish_acked("ew.data.x.a.q", b"1", expect_last=0)
                ports = w.hub_server.ports
                assert w.hub_server.pid and a.server.pid
                os.kill(w.hub_server.pid, signal.SIGKILL)
                await until(lambda: bool(restarts))
                assert w.hub_server.ports == ports
                await w.linked(a)
                last = await a.bus.last_message("DATA_x", "ew.data.x.a.q", domain="hub")
                assert last is not None and last.seq == one.seq

                os.kill(a.server.pid, signal.SIGKILL)
                await until(lambda: a.server.restarts == 1)
                await a.bus.wait_connected(60)
                await w.linked(a)
                await w.linked(b)

                await w.splice.cut()
                await until(lambda: unanswered(a))
                js = a.bus.jetstream()
                await js.add_stream(StreamConfig(name="OUT_q", subjects=["ew.out.q"], allow_direct=True))
                await a.bus.publish_acked("ew.out.q", b"kept")
                assert (await a.bus.last_message("OUT_q", "ew.out.q")).data == b"kept"  # type: ignore[union-attr]

                sub_a, got_a = await asyncio.to_thread(a.mqtt, subscribe="#")
                sub_b, got_b = await asyncio.to_thread(b.mqtt, subscribe="#")
                pub, _ = await asyncio.to_thread(a.mqtt)
                sent = pub.publish("line/1/temp", b"21.5", 1)
                await asyncio.to_thread(sent.wait_for_publish, 60)
                for forged in ("ew/hub/beat/a", "_INBOX_a/x/y", "$JS/API/STREAM/DELETE/OUT_q"):
                    pub.publish(forged, b"not for devices", 1)
                pub.publish("line/2/temp", b"22", 1)
                await until(lambda: ("line/2/temp", b"22") in got_a)
                assert (await js.stream_info("$MQTT_msgs")).state.messages >= 0

                await w.splice.open()
                await w.linked(a)
                await w.linked(b)
                pub.publish("line/3/temp", b"23", 1)
                pub.publish("line/3/temp", b"retained", 1, retain=True)
                await until(lambda: ("line/3/temp", b"retained") in got_a)
                assert {t for t, _ in got_a} == {"line/1/temp", "line/2/temp", "line/3/temp"}
                assert (await js.stream_info("OUT_q")).state.messages == 1
                late, got_late = await asyncio.to_thread(b.mqtt, subscribe="line/#")
                late.publish("line/own", b"b's", 1)  # a retained one of a would come before it
                await until(lambda: bool(got_late) and bool(got_b))
                assert got_late == got_b == [("line/own", b"b's")]
                names = {s.config.name for s in await w.hub.jetstream().streams_info()}
                assert names == {"DATA_x"}
                for client in (sub_a, sub_b, pub, late):
                    client.disconnect()
                    await asyncio.to_thread(client.loop_stop)
            finally:
                for keeper in keepers:
                    keeper.cancel()
                await asyncio.gather(*keepers, return_exceptions=True)

    asyncio.run(main())


async def unanswered(node: Node) -> bool:
    return not await answered(node.bus, f"ew.hub.sync.{node.name}")


def test_revoked_node_is_cut(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            a, b = await w.node("a"), await w.node("b")
            await w.linked(a)
            await w.linked(b)
            w.identity.revoke_node(a.name, a.identity.public_key)
            pid = w.hub_server.pid
            system = await Bus.connect(w.hub_server.url, name="system", user=w.identity.system_user)
            claims = Claims(system, claims_dir(w.hub_server.directory))
            assert await claims.bring(w.identity.accounts.values()) == 1
            assert await claims.bring(w.identity.accounts.values()) == 0
            await system.close()
            assert w.hub_server.pid == pid
            await until(lambda: unanswered(a))
            await asyncio.sleep(2.5)  # it would be back by now
            assert await unanswered(a)
            assert await answered(b.bus, "ew.hub.sync.b")

    asyncio.run(main())


def test_mqtt_bounds(tmp_path: Path) -> None:
    """A message over the limit is refused and the server goes on; a wrong password too."""

    async def main() -> None:
        spec = NodeSpec("solo", mqtt_users={"device": MQTT_PASSWORD})
        server = NatsServer(tmp_path, spec)
        await server.start()
        try:
            bus = await node_bus(server, "solo")
            node = Node("solo", NodeIdentity.open(tmp_path / "id"), server, bus)
            big, _ = await asyncio.to_thread(node.mqtt)
            gone = threading.Event()
            big.on_disconnect = lambda *a: gone.set()
            big.publish("big", bytes(64 << 20), 1)
            assert await asyncio.to_thread(gone.wait, 120)
            big.loop_stop()
            good, got = await asyncio.to_thread(node.mqtt, subscribe="ok")
            good.publish("ok", b"1", 1)
            await until(lambda: got == [("ok", b"1")])
            good.disconnect()
            good.loop_stop()

            codes: list[Any] = []
            bad = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
            bad.username_pw_set("device", "wrong")
            bad.on_connect = lambda c, u, f, reason, p: codes.append(reason)
            bad.connect("127.0.0.1", server.ports["mqtt"])
            bad.loop_start()
            await until(lambda: bool(codes))
            assert codes[0].is_failure
            bad.loop_stop()

            await server.apply(dataclasses.replace(spec, mqtt_anonymous="device"))
            codes.clear()
            nameless = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
            nameless.on_connect = lambda c, u, f, reason, p: codes.append(reason)
            nameless.connect("127.0.0.1", server.ports["mqtt"])
            nameless.loop_start()
            await until(lambda: bool(codes))
            assert not codes[0].is_failure
            nameless.loop_stop()
            await bus.close()
        finally:
            await server.stop()

    asyncio.run(main())


def test_adoption(tmp_path: Path) -> None:
    """A live server of a dead parent is adopted if it runs the same configuration, replaced if not, never doubled."""

    async def main() -> None:
        spec = NodeSpec("solo", mqtt_users={"device": MQTT_PASSWORD})
        first = NatsServer(tmp_path, spec)
        assert await first.start()
        pid, ports = first.pid, first.ports
        second = NatsServer(tmp_path, spec)
        try:
            assert not await second.start()
            assert (second.pid, second.ports) == (pid, ports)

            (tmp_path / "server.json").unlink()  # killed between starting and recording
            third = NatsServer(tmp_path, spec)
            assert await third.start()
            assert third.pid != pid
            assert third.ports == ports
            assert len(proc.find_by_env("EDGEWARD_NATS_DIR", str(tmp_path))) == 1
            frozen = third.pid
            assert frozen
            os.kill(frozen, signal.SIGSTOP)  # alive and deaf
            if Path("/proc").is_dir():
                await until(lambda: threads(frozen) == {"T"})
            assert await second.start(patience=0.5)
            assert second.pid not in (None, frozen)

            fourth = NatsServer(tmp_path, dataclasses.replace(spec, mqtt_users={"other": "x"}))
            assert await fourth.start()
            assert fourth.pid != second.pid
            assert fourth.ports == ports
            assert await fourth.apply(dataclasses.replace(spec, mqtt_users={"more": "x"})) == "reloaded"
            assert await fourth.apply(dataclasses.replace(spec, sync_interval="always")) in ("reloaded", "restarted")
            assert not await NatsServer(tmp_path, fourth.spec).start()
            assert (tmp_path / "nats.conf").stat().st_mode & 0o777 == 0o600
            await fourth.stop()
            assert second.pid is None and fourth.pid is None
            await fourth.stop()

            with socket.socket() as taken:  # the kept port is somebody else's now
                taken.bind(("127.0.0.1", ports["mqtt"]))
                taken.listen()
                assert await fourth.start()
                assert fourth.ports["mqtt"] != ports["mqtt"]
                assert fourth.ports["client"] == ports["client"]
                with pytest.raises(Refused, match="in use"):
                    await NatsServer(tmp_path / "b", dataclasses.replace(spec, mqtt_port=ports["mqtt"])).start()
        finally:
            await second.stop()

    asyncio.run(main())


def test_a_bad_configuration_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        server = NatsServer(tmp_path, NodeSpec("solo", sync_interval="sometimes"))
        with pytest.raises(Unreachable, match="sometimes"):
            await server.start()
        await server.stop()

    asyncio.run(main())
