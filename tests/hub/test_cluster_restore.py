"""A hub that began alone becomes one of three by its backup; a cluster's backup makes a single hub again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.hub.test_backup import opened
from tests.hub.test_cluster import Cloud, Process, config

from edgeward.core.errors import Invalid
from edgeward.core.natsserver import free_port
from edgeward.core.seal import RecoveryKey
from edgeward.hub.cluster import Member
from edgeward.hub.cluster_restore import restore_cluster
from edgeward.hub.restore import restore


class Became(Cloud):
    """A single hub first, three later; one of the three has the address of the one."""

    def __init__(self, root: Path) -> None:
        ports: list[int] = []
        for _ in range(5):
            ports.append(free_port(taken=ports))
        self.root = root
        self.members = [f"a=127.0.0.1:{ports[0]}:{ports[1]}", f"b=127.0.0.1:{ports[2]}:{ports[3]}"]
        self.witness = f"c=127.0.0.1:{ports[4]}"
        self.single = Process(root / "one", "edgeward.hub")
        self.single.directory.mkdir(parents=True)
        (self.single.directory / "hub.json").write_text(
            json.dumps({"port": ports[0], "certificateLife": "80d", "urls": [f"https://127.0.0.1:{ports[0]}"]})
        )
        self.hubs = {"one": self.single}
        self.urls = {
            n: f"https://127.0.0.1:{p}/api/v1" for n, p in (("one", ports[0]), ("a", ports[0]), ("b", ports[2]))
        }
        self.agents = []

    def opened(self) -> None:
        identity = self.single.directory / "identity"
        self.token, self.ca = (identity / "admin.token").read_text().strip(), identity / "ca.crt"


def program(*args: str, code: int = 0) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("EDGEWARD_")}
    done = subprocess.run(
        [sys.executable, "-m", "edgeward", *args], capture_output=True, text=True, env=env, timeout=240
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_one_hub_becomes_three(tmp_path: Path) -> None:
    cloud = Became(tmp_path / "cloud")

    async def body() -> None:
        cloud.single.start()

        async def ready(name: str) -> bool:
            return bool(cloud.hubs[name].state.get("ready"))

        await cloud.until("the single hub is ready", lambda: ready("one"))
        cloud.opened()
        async with cloud.client() as client:
            one = cloud.urls["one"]
            site = {"apiVersion": "edgeward/v1", "kind": "Site", "metadata": {"name": "s"}}
            await client.post(f"{one}/sites", json=site)
            for n in range(30):
                assert (await client.post(f"{one}/configs", json=config(n))).status_code == 201
            issued = await client.post(f"{one}/issue/jointoken", json={"node": "n1", "site": "s"})
            made = await client.post(f"{one}/issue/accesstoken", json={"role": "viewer", "name": "ci"})
            assert made.status_code == 201
            agent = Process(tmp_path / "n1", "edgeward.agent")
            from edgeward.nodes.enrol import decode_token
            from edgeward.nodes.enrol_edge import join

            agent.directory.mkdir()
            await asyncio.to_thread(join, agent.directory, decode_token(issued.json()["token"]))
            cloud.agents.append(agent)
            agent.start()

            async def online(name: str) -> bool:
                node = (await client.get(f"{cloud.urls[name]}/nodes/n1")).json()
                return bool(node.get("status", {}).get("online"))

            await cloud.until("the node is online", lambda: online("one"))
            highest = int((await client.get(f"{one}/configs")).json()["metadata"]["resourceVersion"])

        # the hub stops; what it has goes into three folders
        assert cloud.single.process is not None
        cloud.single.process.send_signal(signal.SIGTERM)
        cloud.single.process.wait(60)
        backup, key = tmp_path / "hub.backup", cloud.single.directory / "recovery.key"
        data = ("--data", str(cloud.single.directory))
        await asyncio.to_thread(program, "backup", "create", str(backup), *data)
        out = cloud.root / "three"
        argv = ["hub", "cluster", str(out), *(x for m in cloud.members for x in ("--member", m))]
        argv += ["--witness", cloud.witness, "--restore", str(backup), "--key", str(key), "--with-tokens"]
        said = await asyncio.to_thread(program, *argv)
        assert "n1" in said and "ci" in said
        assert not [p for p in out.iterdir() if p.name not in ("a", "b", "c")], "nothing else is left"
        await asyncio.to_thread(program, *argv, code=3)  # not over what is there
        docs = {n: json.loads((out / n / "hub.json").read_text()) for n in "abc"}
        assert docs["b"]["certificateLife"] == "80d" and len(docs["b"]["urls"]) == 2 and docs["c"]["witness"]

        cloud.hubs = {n: Process(out / n, "edgeward.hub") for n in "abc"}
        for process in cloud.hubs.values():
            process.start()
        async with cloud.client() as client:
            for name in "abc":
                await cloud.until(f"{name} is ready", lambda name=name: ready(name))
            for name in "ab":
                await cloud.until(f"the node is online at {name}", lambda name=name: online(name))
                found = (await client.get(f"{cloud.urls[name]}/configs", params={"limit": 100})).json()
                assert {c["metadata"]["name"] for c in found["items"]} == {f"c{n}" for n in range(30)}
                assert int(found["metadata"]["resourceVersion"]) > highest, "revisions never go back"
            bearer = {"Authorization": f"Bearer {made.json()['token']}"}
            answer = await client.get(f"{cloud.urls['b']}/configs/c1", headers=bearer)
            assert answer.status_code == 200
            # the node, which knew the one address, is told of the others
            known = agent.directory / "identity" / "urls.json"

            async def told() -> bool:
                return known.exists() and len(json.loads(known.read_text())) == 2

            await cloud.until("the node knows both addresses", told)
            # every stream has three copies: any of the three may go
            cloud.hubs["a"].kill()

            async def written() -> bool:
                return (await client.post(f"{cloud.urls['b']}/configs", json=config(100))).status_code in (201, 409)

            await cloud.until("a write without a", written)

            async def answers() -> bool:
                top = (await client.get(f"{cloud.urls['b']}/top")).json()
                return any(n["name"] == "n1" and n.get("agentMB") for n in top["nodes"])

            await cloud.until("the node answers at b", answers)
            cloud.hubs["a"].start()
            await cloud.until("a is back", lambda: ready("a"))
            cloud.hubs["c"].kill()

            async def there() -> bool:
                return (await client.get(f"{cloud.urls['a']}/configs/c100")).status_code == 200

            await cloud.until("a has what was written without it", there)
            cloud.hubs["c"].start()
            await cloud.until("the witness is back", lambda: ready("c"))
            # and back: the cluster's backup makes a single hub
            taken = tmp_path / "cluster.backup"
            answer = await client.get(f"{cloud.urls['a']}/backup", timeout=120)
            assert answer.status_code == 200, answer.text
            taken.write_bytes(answer.content)
        single = tmp_path / "single"
        report = await restore(taken, single, RecoveryKey.parse(key.read_text()))
        assert report.nodes == ["n1"]
        async with opened(single) as (store, _):
            assert {c.metadata.name for c in store.items("Config")} == {*(f"c{n}" for n in range(30)), "c100"}

    try:
        asyncio.run(body())
    finally:
        for process in (*cloud.agents, *cloud.hubs.values(), cloud.single):
            process.close()


def test_what_is_no_backup_or_no_cluster_leaves_nothing(tmp_path: Path) -> None:
    from edgeward.core.seal import new_keys

    recovery: RecoveryKey = new_keys()[0]
    members = [Member("a", "h", 1, 2), Member("b", "h", 3, 4), Member("c", "h", 0, 5, witness=True)]
    bad = tmp_path / "bad"
    bad.write_bytes(b"nothing")
    out = tmp_path / "out"
    for wrong in (members, members[:2]):
        with pytest.raises(Invalid):
            asyncio.run(restore_cluster(bad, out, wrong, recovery))
    assert not out.exists()
