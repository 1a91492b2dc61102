"""Nodes of a site that speak over real sockets on the loopback, with identities of a real hub's CA, and no hub."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.core.pair import until

from edgeward.core.certs import check_csr, key_pem, make_csr, new_key, pem
from edgeward.core.identity import HubIdentity, NodeIdentity
from edgeward.core.nkeys import public_raw
from edgeward.nodes.mesh import Mesh
from edgeward.nodes.mesh_sockets import Settings
from edgeward.nodes.mesh_wire import Known, address_of


def enrol(hub: HubIdentity, root: Path, name: str, *, expires: float = 0.0) -> NodeIdentity:
    """A device key in ``root`` and what the hub gives for it."""
    identity = NodeIdentity.open(root / "identity")
    key = new_key()
    cert = hub.authority.node(check_csr(make_csr(name, key), name), name, expires or time.time() + 3600)
    jwt = hub.issue_node(name, identity.public_key)
    identity.accept(jwt, hub.ca_pem, key_pem=key_pem(key), certificate=pem(cert))
    return identity


class Site:
    """The nodes of a site. ``told`` is what the hub says of them: node -> its device key and address."""

    def __init__(self, root: Path, *names: str, site: str = "plant") -> None:
        self.root, self.site = root, site
        self.hub = HubIdentity.open(root / "hub")
        self.told: dict[str, Known] = {}
        self.meshes: dict[str, Mesh] = {}
        self.events: list[tuple[str, str, str]] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        for name in names:
            self.make(name)

    def make(self, name: str, *, expires: float = 0.0, settings: Settings | None = None, listed: bool = True) -> Mesh:
        identity = enrol(self.hub, self.root / name, name, expires=expires)
        mesh = Mesh(
            name, self.site, identity, self.root / name / "mesh.json", settings or Settings("127.0.0.1"),
            lambda: list(self.told.values()),
            event=lambda *what: self.events.append(what), changed=lambda: self._changed(name),
        )  # fmt: skip
        self.meshes[name] = mesh
        if listed:
            self.told[name] = Known(name, public_raw(identity.public_key, "user"))
        return mesh

    def _changed(self, name: str) -> None:
        """As the hub would pass it on."""
        known, mesh = self.told.get(name), self.meshes[name]
        if known is not None:
            self.told[name] = Known(name, known.key, address_of(mesh.address))
        self.look()

    def look(self) -> None:
        for mesh in self.meshes.values():
            mesh.look()

    def revoke(self, name: str) -> None:
        del self.told[name]
        self.look()

    def start(self, name: str) -> None:
        self._tasks[name] = asyncio.create_task(self.meshes[name].run())

    async def stop(self, name: str) -> None:
        task = self._tasks.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def restart(self, name: str) -> Mesh:
        await self.stop(name)
        mesh = self.make(name)
        self.start(name)
        return mesh

    async def linked(self, *names: str) -> None:
        names = names or tuple(self._tasks)
        await until(
            lambda: all(
                self.meshes[a].peers()[b].linked for a in names for b in names if a != b and b in self.meshes[a].peers()
            )
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Site]:
        for name in self.meshes:
            self.start(name)
        try:
            async with asyncio.timeout(240):
                yield self
        finally:
            for name in list(self._tasks):
                await self.stop(name)
