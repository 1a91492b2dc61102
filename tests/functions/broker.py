"""A node's nats-server with the data plane's users, and a plane's functions part beside it, for tests.

``python -m tests.functions.broker DIR`` runs such a part until it is killed, with the section of ``DIR/section.json``;
``DIR/listens`` is there when its triggers take messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import uvloop
from tests.core.pair import until

from edgeward.core.bus import Bus
from edgeward.core.natsserver import AGENT_USER, NatsServer, NodeSpec
from edgeward.core.resource import Resource, decode
from edgeward.core.vault import Vault
from edgeward.functions.edge import Sections
from edgeward.functions.plane import FunctionsPart

PASSWORD = "pw"


def resource(name: str, code: str, *triggers: dict[str, Any], **spec: Any) -> Resource:
    doc = {"apiVersion": "edgeward/v1", "kind": "Function", "metadata": {"name": name}}
    own = {"runtime": "python", "source": {"inline": code}, "triggers": list(triggers)}
    return decode(doc | {"spec": own | spec})


class Broker:
    """``async with Broker(folder) as broker``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        spec = NodeSpec("n1", mqtt_users={"edge": PASSWORD}, plane_password=PASSWORD)
        self.server = NatsServer(folder / "nats", spec)
        self._clients: list[mqtt.Client] = []

    async def __aenter__(self) -> Broker:
        await self.server.start()
        self.bus = await self.connect(AGENT_USER, self.server.secret)
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            client.disconnect()
            client.loop_stop()
        await self.bus.close(0.5)
        await self.server.stop(grace=5)

    async def connect(self, user: str, password: str = PASSWORD, inbox: str = "_INBOX") -> Bus:
        return await Bus.connect(self.server.url, name="t", username=user, password=password, inbox=inbox, timeout=30)

    def section(self, *functions: Resource) -> dict[str, Any]:
        """What the agent would tell the plane."""
        nothing = lambda ns, name: None  # noqa: E731
        made = Sections(nothing, nothing, Vault.open(self.folder / "identity")).section(functions)
        ports = self.server.ports
        reach = {"url": self.server.url, "password": PASSWORD, "mqtt_host": "127.0.0.1", "mqtt_port": ports["mqtt"]}
        return dict(json.loads(json.dumps(made | {"broker": reach})))

    def client(self) -> mqtt.Client:
        """A device, connected."""
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        client.username_pw_set("edge", PASSWORD)
        client.connect("127.0.0.1", self.server.ports["mqtt"])
        client.loop_start()
        self._clients.append(client)
        return client

    @staticmethod
    async def send(client: mqtt.Client, topic: str, *payloads: bytes, qos: int = 1) -> None:
        """Until the broker has acknowledged them all."""
        infos = [client.publish(topic, payload, qos) for payload in payloads]
        for info in infos:
            await asyncio.to_thread(info.wait_for_publish, 60)
            assert info.is_published()


class Voice:
    def __init__(self) -> None:
        self.statuses: dict[str, dict[str, Any] | None] = {}
        self.events: list[str] = []

    def report(self, kind: str, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        self.statuses[name] = status

    def event(self, type: str, reason: str, message: str, namespace: str, name: str, kind: str) -> None:
        self.events.append(f"{reason} {name}: {message}")


class Plane:
    """The functions part with what a test asks of it."""

    def __init__(self, part: FunctionsPart, voice: Voice) -> None:
        self.part, self.voice = part, voice

    async def take(self, section: dict[str, Any]) -> None:
        self.part.commit(await self.part.provision(section))

    async def listens(self, name: str) -> None:
        """Until all its triggers take messages and what was declared runs."""
        key = f"default/{name}"

        def there() -> bool:
            status = self.part._inlets.adorn(key, {})
            triggers = status.get("triggers", [])
            said = self.part.dispatcher.status(key) or {}
            running = said.get("phase") == "Running" and "wanted" not in said
            return running and bool(triggers) and all(t["connected"] for t in triggers)

        await until(there, 60)

    def state(self, name: str) -> dict[str, str]:
        """What the function remembers."""
        memory = self.part.dispatcher.asks.memory
        found = {}
        for key in memory._scan(f"default/{name}", "") if memory._read() is not None else []:
            entry = memory.get(f"default/{name}", key)
            if entry is not None:
                found[key] = entry[0].decode()
        return found

    async def letters(self, name: str, do: str = "list") -> list[dict[str, Any]]:
        args = {"namespace": "default", "name": name, "do": do}
        return [doc["letter"] async for doc in self.part.verbs["functions.deadletters"](args)]


@contextlib.asynccontextmanager
async def plane(folder: Path) -> AsyncIterator[Plane]:
    voice = Voice()
    part = FunctionsPart(data=folder, node="n1", site="s1", voice=voice)
    task = asyncio.create_task(part.run())
    try:
        yield Plane(part, voice)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def main(folder: Path) -> None:
    async with plane(folder) as p:
        section = json.loads((folder / "section.json").read_text())
        await p.take(section)
        for entry in section["functions"]:
            await p.listens(entry["key"].removeprefix("default/"))
        (folder / "listens").touch()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1])))
