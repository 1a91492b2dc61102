"""Ways to the hub, and changes of it: proxies, also such that look into TLS; another CA; nodes that were away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from pathlib import Path
from typing import Any

import pytest
from tests.hub.doors import DAY, Leaf, OpenHub, open_hub, until
from tests.hub.proxy import proxy
from tests.hub.test_enrol import post, run

from edgeward.core.bus import Bus
from edgeward.core.certs import fingerprint, pem
from edgeward.core.errors import Conflict, Forbidden, NotFound, Refused, Unreachable
from edgeward.core.identity import NodeIdentity, inbox_prefix
from edgeward.core.natsserver import AGENT_USER, NatsServer, NodeSpec
from edgeward.core.resource import CLUSTER, Key
from edgeward.nodes import enrol_edge
from edgeward.nodes.door import Door, parse_address


def test_through_a_connect_proxy(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub, proxy(tmp_path / "p", login="ann:p@ss") as p:
            token = await hub.token()
            for wrong in (f"http://127.0.0.1:{p.port}", f"http://ann:no@127.0.0.1:{p.port}"):
                with pytest.raises(Unreachable, match="the proxy refused"):
                    await hub.join(token, proxy=wrong)
            way = f"http://ann:p%40ss@127.0.0.1:{p.port}"
            identity = await hub.join(token, proxy=way)
            assert set(p.asked) == {f"127.0.0.1:{hub.port}"}, "the hub was asked through it only"
            asked = len(p.asked)
            async with hub.leaf(identity, "box", proxy=way) as leaf:
                await until(leaf.linked)
            assert len(p.asked) > asked, "the link goes through it too"
            assert b"ewj_" not in p.seen
            with pytest.raises(Unreachable):
                await hub.join(await hub.token("b"), proxy="http://127.0.0.1:1")

    run(body())


def test_a_proxy_that_drops_idle_links_is_dialled_again_each_time(tmp_path: Path) -> None:
    """Nothing crosses but what is sent here: with an agent no link is idle for 60 s, see test_liveness.py."""

    async def body() -> None:
        async with open_hub(tmp_path) as hub, proxy(tmp_path / "p") as p:
            identity = await hub.join(await hub.token())
            p.idle = 1.0
            async with hub.leaf(identity, "box", proxy=f"http://127.0.0.1:{p.port}") as leaf:
                for dropped in range(3):
                    await until(leaf.linked)
                    await until(lambda dropped=dropped: _holds(p.dropped > dropped))
                p.idle = 0.0
                await until(leaf.linked)

    run(body())


async def _holds(what: bool) -> bool:
    return what


def test_through_a_proxy_that_looks_into_tls(tmp_path: Path) -> None:
    """With its CA given: the box gets in, the link works; and what the proxy saw is of no use to it."""

    async def body() -> None:
        async with open_hub(tmp_path) as hub:  # noqa: SIM117 - the proxy needs the hub's CA
            async with proxy(tmp_path / "p", inspects=True, upstream_ca=hub.identity.ca_file) as p:
                token = await hub.token()
                way, ca = f"http://127.0.0.1:{p.port}", pem(p.authority.cert)
                with pytest.raises(Unreachable, match="--proxy-ca"):
                    await hub.join(token, proxy=way)
                identity = await hub.join(token, proxy=way, proxy_ca=ca)
                async with hub.leaf(identity, "box", proxy=way) as leaf:
                    await until(leaf.linked)
                seen = bytes(p.seen)
                assert b"/api/v1/enrol" in seen, "it does see what is said"
                seed = (identity.directory / "node.seed").read_text().strip().encode()
                for secret in (token.secret, seed):
                    assert secret not in seen
                # renewal the same way, and the hub's own CA is what counts: not the proxy's
                door = Door(parse_address(hub.url, way), identity.trusted(), ca)
                await asyncio.to_thread(enrol_edge.renew, identity, "box", door)
                assert [fingerprint(c) for c in identity.trusted()] == [fingerprint(hub.identity.authority.cert)]

    run(body())


def test_a_proxy_that_answers_in_the_hubs_place_is_found_out(tmp_path: Path) -> None:
    """It has a hub of its own behind it, and its CA is trusted for TLS: the answers are still not our hub's."""

    async def body() -> None:
        async with open_hub(tmp_path / "a") as hub, open_hub(tmp_path / "b") as evil:  # noqa: SIM117
            async with proxy(tmp_path / "p", inspects=True, upstream_ca=evil.identity.ca_file) as p:
                token = await hub.token()
                way, ca = f"http://127.0.0.1:{p.port}", pem(p.authority.cert)
                with pytest.raises(Refused, match="certificate authority is not the one"):
                    await hub.join(token, hub=evil.url, proxy=way, proxy_ca=ca)
                identity = await hub.join(token)
                door = Door(parse_address(evil.url, way), identity.trusted(), ca)
                with pytest.raises((Refused, Forbidden, NotFound)):
                    await asyncio.to_thread(enrol_edge.renew, identity, "box", door)
                # even when it hands on our hub's CAs: it cannot sign
                from edgeward.nodes.enrol import RenewAsk, transcript

                def ask() -> None:
                    with Door(parse_address(evil.url, way), identity.trusted(), ca) as d:
                        a = RenewAsk(d.nonce(), "box", identity.public_key, "x")
                        a.signature = identity.sign(transcript(a))
                        d.ask("renew", a)

                with pytest.raises((Refused, NotFound)):
                    await asyncio.to_thread(ask)

    run(body())


def presented(hub: OpenHub) -> bytes:
    """The issuer of what the listener shows."""
    return ssl.get_server_certificate(("127.0.0.1", hub.port)).encode()


def call(hub: OpenHub, act: str) -> dict[str, Any]:
    status, doc = post(hub, f"/api/v1/ca/{act}", b"", "admin")
    if status >= 400:
        raise Conflict(str(doc))
    return doc


def test_another_ca_without_a_gap(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            box, away = await hub.join(await hub.token()), await hub.join(await hub.token("away"))
            old = hub.identity.authority.cert
            async with hub.leaf(box, "box") as leaf:
                await until(leaf.linked)
                state = await asyncio.to_thread(call, hub, "rotate")
                assert state["waiting"] == ["away", "box"]
                assert state["waitingOnline"] == ["box"]
                await until(lambda: _told(hub, "box"))
                assert await hub.renew(box, "box") is True, "other CAs than before"
                assert len(box.trusted()) == 2
                await leaf.server.restart()  # what the agent does then
                await until(leaf.linked)
                before = await asyncio.to_thread(presented, hub)
                state = await asyncio.to_thread(call, hub, "activate")
                assert (state["next"], state["trusted"]) == (None, 2)
                assert await leaf.linked(), "what is connected stays"
                assert await asyncio.to_thread(presented, hub) != before
                await leaf.server.restart()
                await until(leaf.linked), "and what connects anew trusts the new one"
            assert hub.identity.authority.cert != old
            with pytest.raises(Conflict):
                await asyncio.to_thread(call, hub, "activate")
            state = await asyncio.to_thread(call, hub, "retire")
            assert state["trusted"] == 1
            # one that was away all the time: it trusts a CA that is not even known as trusted any more
            assert [fingerprint(c) for c in away.trusted()] == [fingerprint(old)]
            async with hub.leaf(away, "away") as leaf:
                await until(lambda: _said(leaf, "unknown authority"))

                def renew() -> bool:
                    with Door(parse_address(hub.url), away.trusted()) as door:
                        assert door.probe() == "untrusted"
                        return enrol_edge.renew(away, "away", door)

                assert await asyncio.to_thread(renew)
                await leaf.server.restart()
                await until(leaf.linked)

    async def _told(hub: OpenHub, node: str) -> bool:
        return node in hub.told  # type: ignore[attr-defined]

    async def _said(leaf: Any, text: str) -> bool:
        return text in leaf.said()

    run(body())


def test_a_token_from_before_the_rotation_is_good(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            token = await hub.token()
            for act in ("rotate", "activate", "retire", "rotate"):
                await asyncio.to_thread(call, hub, act)
            identity = await hub.join(token)
            assert len(identity.trusted()) == 2
            async with hub.leaf(identity, "box") as leaf:
                await until(leaf.linked)
            with pytest.raises(Conflict):
                await asyncio.to_thread(call, hub, "retire")

    run(body())


def test_both_at_once_400_days_away_and_three_rotations(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            hub.shift = -400 * DAY
            identity = await hub.join(await hub.token())
            hub.shift = 0
            for _ in range(3):
                for act in ("rotate", "activate", "retire"):
                    await asyncio.to_thread(call, hub, act)
            with Door(parse_address(hub.url), identity.trusted()) as door:
                assert await asyncio.to_thread(enrol_edge.renew, identity, "box", door)
            async with hub.leaf(identity, "box") as leaf:
                await until(leaf.linked)

    run(body())


def test_a_node_leaves(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            data = hub.box()
            token = await hub.token()
            identity = await hub.join(token, data)
            old = identity.public_key
            stranger = NodeIdentity.open(hub.box() / "identity")
            stranger.accept(hub.identity.issue_node("x", stranger.public_key), hub.identity.ca_pem)
            with pytest.raises(Forbidden), hub.door() as door:
                await asyncio.to_thread(enrol_edge.leave, stranger, "box", door)
            assert await asyncio.to_thread(enrol_edge.leave_fleet, data) == ("box", None)
            assert hub.fleet.store.find(Key("Node", CLUSTER, "box")) is None
            assert not list((data / "identity").glob("node.*"))
            with pytest.raises(Refused, match="no node of a fleet"):
                await asyncio.to_thread(enrol_edge.leave_fleet, data)
            again = await hub.join(await hub.token(), data)
            assert again.public_key != old
            # without a hub: only by force
            config = json.loads((data / "node.json").read_text())
            config["hub"]["port"] = 1
            (data / "node.json").write_text(json.dumps(config))
            with pytest.raises(Unreachable, match="--force"):
                await asyncio.to_thread(enrol_edge.leave_fleet, data)
            node, error = await asyncio.to_thread(lambda: enrol_edge.leave_fleet(data, force=True))
            assert node == "box"
            assert isinstance(error, Unreachable)

    run(body())


def test_a_hub_that_moves(tmp_path: Path) -> None:
    """Its operator names the new address beforehand; at the next renewal nodes know it, and the old one may go."""

    async def body() -> None:
        async with open_hub(tmp_path) as hub:
            # the old address is one that ends later: a plain forwarder in front of the hub
            async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                up, down = await asyncio.open_connection("127.0.0.1", hub.port)

                async def pump(a: asyncio.StreamReader, b: asyncio.StreamWriter) -> None:
                    with contextlib.suppress(OSError):
                        while data := await a.read(65536):
                            b.write(data)
                    b.close()

                await asyncio.gather(pump(reader, down), pump(up, writer))

            old = await asyncio.start_server(forward, "127.0.0.1", 0)
            old_url = f"https://127.0.0.1:{old.sockets[0].getsockname()[1]}"
            data = hub.box()
            identity = await hub.join(await hub.token(), data, hub=old_url)
            config = json.loads((data / "node.json").read_text())["hub"]
            assert [d.address.url for d in enrol_edge.doors_of(identity, config)] == [old_url]
            hub.enrolment._named = [hub.url]

            def renew() -> bool:
                doors = enrol_edge.doors_of(identity, config)
                return enrol_edge.at_first(doors, lambda door: enrol_edge.renew(identity, "box", door))

            assert await asyncio.to_thread(renew) is True, "other addresses than before"
            assert await asyncio.to_thread(renew) is False
            assert [d.address.url for d in enrol_edge.doors_of(identity, config)] == [old_url, hub.url]
            old.close()
            assert await asyncio.to_thread(renew) is False, "by the new one"
            more = tuple(u.replace("https:", "wss:") for u in identity.urls)
            spec = NodeSpec("box", old_url.replace("https:", "wss:"), identity.creds_file, identity.trust_file,
                            more_urls=more)  # fmt: skip
            server = NatsServer(data / "nats", spec)
            await server.start()
            try:
                bus = await Bus.connect(
                    server.url, name="box", username=AGENT_USER, password=server.secret, inbox=inbox_prefix("box")
                )
                await until(Leaf("box", server, bus).linked)
                await bus.close()
            finally:
                await server.stop()

    run(body())
