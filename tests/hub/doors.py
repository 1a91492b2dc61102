"""A hub's one port over real TLS, with its enrolment and its nats-server behind it; and boxes that come to it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.nodes.fleet import Fleet, fleet

from edgeward.core import daemon
from edgeward.core.api import build_app
from edgeward.core.audit import Audit
from edgeward.core.authz import Principal, administrator
from edgeward.core.bus import Bus
from edgeward.core.certs import key_pem, make_csr, new_key
from edgeward.core.claims import Claims
from edgeward.core.errors import EdgewardError, Unauthorized
from edgeward.core.identity import NodeIdentity, inbox_prefix
from edgeward.core.natsconf import claims_dir
from edgeward.core.natsserver import AGENT_USER, NatsServer, NodeSpec
from edgeward.core.vault import Vault
from edgeward.hub.enrol import EnrolRoutes
from edgeward.hub.front import Links, front_protocol
from edgeward.nodes import enrol_edge
from edgeward.nodes.door import Address, Door
from edgeward.nodes.enrol import EnrolAsk, Grant, RenewAsk, Token, decode_token, transcript
from edgeward.nodes.enrol_cloud import Enrolment

DAY = 86400.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def until(what: Callable[[], Awaitable[Any]], timeout: float = 20.0) -> Any:
    async with asyncio.timeout(timeout):
        while True:
            got = await what()
            if got:
                return got
            await asyncio.sleep(0.02)


class OpenHub:
    def __init__(self, folder: Path, f: Fleet, enrolment: Enrolment, port: int) -> None:
        self.folder, self.fleet, self.enrolment, self.port = folder, f, enrolment, port
        self.identity = f.identity
        self.shift = 0.0
        self._boxes = 0

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def now(self) -> float:
        return time.time() + self.shift

    async def token(self, node: str = "box", site: str = "plant", **more: Any) -> Token:
        text, _, _ = await self.enrolment.issue(node, site, actor="ann", **more)
        return decode_token(text)

    def box(self) -> Path:
        """An empty directory of a new box."""
        self._boxes += 1
        return self.folder / "boxes" / str(self._boxes)

    async def join(self, token: Token, data: Path | None = None, **more: Any) -> NodeIdentity:
        data = data or self.box()
        await asyncio.to_thread(enrol_edge.join, data, token, **more)
        return NodeIdentity.open(data / "identity")

    def door(self) -> Door:
        return Door(Address("127.0.0.1", self.port), self.identity.authority.trusted)

    async def enrol(self, token: Token, identity: NodeIdentity, **changes: Any) -> Grant:
        """An ask that is put together by hand; ``changes`` are made before it is signed."""

        def ask() -> Grant:
            with self.door() as door:
                a = EnrolAsk(
                    door.nonce(), token.name, token.key.public, token.node, token.site, identity.public_key,
                    make_csr(token.node, new_key()),
                )  # fmt: skip
                for name, value in changes.items():
                    setattr(a, name, value)
                said = transcript(a)
                a.tokenSignature, a.signature = token.key.sign(said), identity.sign(said)
                grant = door.ask("enrol", a)
                assert grant is not None
                return grant

        return await asyncio.to_thread(ask)

    async def renew(
        self, identity: NodeIdentity, node: str, signer: NodeIdentity | None = None, **changes: Any
    ) -> bool:
        def ask() -> bool:
            with self.door() as door:
                if not changes and signer is None:
                    return enrol_edge.renew(identity, node, door)
                key = new_key()
                a = RenewAsk(door.nonce(), node, identity.public_key, make_csr(node, key), identity.certificate)
                for name, value in changes.items():
                    setattr(a, name, value)
                a.signature = (signer or identity).sign(transcript(a))
                grant = door.ask("renew", a)
                assert grant is not None
                return identity.accept(grant.jwt, grant.ca, key_pem=key_pem(key), certificate=grant.certificate)

        return await asyncio.to_thread(ask)

    @asynccontextmanager
    async def leaf(self, identity: NodeIdentity, node: str, **more: Any) -> AsyncIterator[Leaf]:
        spec = NodeSpec(node, f"wss://127.0.0.1:{self.port}", identity.creds_file, identity.trust_file, **more)
        server = NatsServer(identity.directory.parent / "nats", spec)
        await server.start()
        bus = await Bus.connect(
            server.url, name=node, username=AGENT_USER, password=server.secret, inbox=inbox_prefix(node)
        )
        try:
            yield Leaf(node, server, bus)
        finally:
            await bus.close()
            await server.stop()


class Leaf:
    """A node's nats-server that dials the hub."""

    def __init__(self, node: str, server: NatsServer, bus: Bus) -> None:
        self.node, self.server, self.bus = node, server, bus

    async def linked(self) -> bool:
        """Whether the hub's account answers: anybody serves ``ew.hub.echo``."""
        try:
            return bool((await self.bus.request(f"ew.hub.echo.{self.node}", b"x", timeout=0.5)).data == b"x")
        except EdgewardError:
            return False

    def said(self) -> str:
        return (self.server.directory / "nats.log").read_text()


@asynccontextmanager
async def open_hub(folder: Path, *, life: float = 90 * DAY) -> AsyncIterator[OpenHub]:
    async with fleet(folder) as f:
        system = await Bus.connect(f.server.url, name="system", user=f.identity.system_user)
        port = free_port()
        audit = Audit()
        hub: OpenHub
        enrolment = Enrolment(
            f.store,
            f.identity,
            Claims(system, claims_dir(f.server.directory)),
            f.write,
            audit,
            Vault.open(folder / "identity"),
            urls=[f"https://127.0.0.1:{port}"],
            life=life,
            changed=f.nodes.identity_changed,
            now=lambda: hub.now(),  # noqa: PLW0108 - it is made below
        )
        f.nodes.identity = enrolment.status
        hub = OpenHub(folder, f, enrolment, port)
        await enrolment.open()

        async def echo(msg: Any) -> bytes:
            return bytes(msg.data)

        await f.hub.serve("ew.hub.echo.*", echo)

        def auth(token: str | None, client: Any) -> Principal:
            if token != "admin":
                raise Unauthorized("no")
            return administrator("admin")

        told: list[str] = []

        async def tell(node: str) -> None:
            told.append(node)

        def new_ca() -> None:
            f.identity.ensure_certificate()
            hub.server.config.ssl.load_cert_chain(tls)  # type: ignore[attr-defined]

        enrol_routes = EnrolRoutes(enrolment, f.identity, tell=tell, online=lambda n: n != "away", new_ca=new_ca)
        hub.told = told  # type: ignore[attr-defined]
        app = build_app(
            f.resources, f.store, auth=auth, extra_routes=enrol_routes.routes(),
            health=lambda: (True, {}), metrics=lambda: "", info={},
        )  # fmt: skip
        links = Links(lambda: ("127.0.0.1", f.server.ports["websocket"]))
        running = asyncio.create_task(enrolment.run())
        hub.audit = audit  # type: ignore[attr-defined]
        tls = str(f.identity.tls_file)
        try:
            async with daemon.http_server(
                app, host="127.0.0.1", port=port, ssl_certfile=tls, ssl_keyfile=tls, http=front_protocol(links)
            ) as server:
                hub.server = server  # type: ignore[attr-defined]
                yield hub
                links.close()
            assert not running.done() or running.exception() is None, running.exception()
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await system.close()
