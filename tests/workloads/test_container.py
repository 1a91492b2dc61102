"""Apps in containers, with real podman: started, checked, logged, limited, restarted, updated, adopted, cleaned up."""

from __future__ import annotations

import asyncio
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.core.pair import until
from tests.workloads.engines import BOX, Store, a_store
from tests.workloads.test_edge import Node

from edgeward.core import cgroup, proc
from edgeward.core.errors import NotFound
from edgeward.core.resource import decode

SERVE = 'echo "on $PORT as $(id -u)"; echo "$WORD" > /tmp/index.html; exec httpd -f -p "$PORT" -h /tmp'
HTTP = {"ports": [{"name": "http", "env": "PORT"}], "health": {"http": {"port": "http"}, "window": "100ms"}}
WAIT = 120.0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("EDGEWARD_DATA", str(tmp_path / "node"))
    yield from a_store(tmp_path / "store", monkeypatch)


class Box(Node):
    patience = 240.0

    def contain(self, name: str, script: str, container: Any = None, **more: Any) -> None:
        what = {"image": BOX, "args": [script.replace("$", "$$")]} | (container or {})
        spec = {"container": what, "restart": {"backoff": "50ms", "max": "200ms"}, "stop": {"grace": "1s"}} | more
        app = decode({"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": name}, "spec": spec})
        self.wishes[name] = (app, app.spec.replicas)
        if self.edge is not None:
            self.edge.poke("default", name)

    async def log(self, name: str, has: str) -> str:
        """What the app wrote, once it has that."""
        found = ""

        async def there() -> bool:
            nonlocal found
            assert self.edge is not None
            found = b"".join([d async for d in self.edge.logs.read("default", name)]).decode()
            return has in found

        await until(there, WAIT)
        return found


def get(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/index.html", timeout=10) as answer:
        return str(answer.read().decode().strip())


def test_an_app_in_a_container_serves_is_updated_beside_adopted_and_leaves_nothing(
    tmp_path: Path, store: Store
) -> None:
    node = Box(tmp_path / "node")

    async def main() -> None:
        node.contain("web", SERVE, {"env": {"WORD": "one"}, "ports": {"http": 8080}}, **HTTP)
        async with node.agent(leave=True):
            (first,) = await node.runs("web")
            assert get(first["ports"]["http"]) == "one"
            assert first["image"].startswith("sha256:")
            assert "on 8080 as 0" in await node.log("web", "on 8080"), "told the port that it listens on"
            assert len(store.names()) == 1
        assert get(first["ports"]["http"]) == "one", "it outlives its agent"
        async with node.agent():
            (again,) = await node.runs("web")
            assert (again["id"], again["pid"], again["image"]) == (first["id"], first["pid"], first["image"])
            assert not node.starts("web") - 1, "adopted, not started"
            node.contain("web", SERVE, {"env": {"WORD": "two"}, "ports": {"http": 8080}}, **HTTP)
            await until(lambda: any("Switched" in e and "is kept" in e for e in node.events), WAIT)
            (second,) = await node.runs("web")
            assert get(second["ports"]["http"]) == "two"
            assert not any("not healthy" in e or "StartFailed" in e for e in node.events)
            os.kill(second["pid"], 9)
            await until(lambda: node.starts("web") == 3, WAIT)
            (third,) = await node.runs("web")
            assert get(third["ports"]["http"]) == "two", "started again, where it was"
            assert third["ports"] == second["ports"]
            assert any("SIGKILL" in e for e in node.events), node.events
            node.unwish("web")
            await until(lambda: node.said["web"] == {}, WAIT)
            await until(lambda: store.names() == [], WAIT)
        assert not list((tmp_path / "node" / "apps").glob("*/*/*"))
        assert proc.find_by_env("EDGEWARD_DATA", str(tmp_path / "node")) == []

    asyncio.run(main())


def test_what_a_container_sees_and_who_it_is(tmp_path: Path, store: Store) -> None:
    node = Box(tmp_path / "node")
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "given").write_text("of the node\n")
    script = (
        "id -u; cat /srv/given /etc/app/conf; (touch /srv/x) 2>/dev/null && echo writes;"
        " echo kept >> /data/log; cat /data/log; pwd;"
        ' echo "$LINES|$OWN|$HTTP_PROXY|"; echo ready; exec sleep 1000'
    )
    container = {
        "user": "0:7",
        "workingDir": "/tmp",
        "env": {"LINES": "one\ntwo", "OWN": "${EDGEWARD_APP} $$"},
        "volumes": [
            {"hostPath": str(tmp_path / "host"), "path": "/srv", "readOnly": True},
            {"name": "data", "path": "/data"},
        ],
    }
    files = {"files": [{"path": "etc/app/conf", "key": "conf", "config": "settings"}]}

    async def main() -> None:
        node.configs["settings"] = {"conf": "of a config\n"}
        node.contain("box", script, container, **files)
        async with node.agent():
            await node.runs("box")
            said = await node.log("box", "ready")
            assert said.splitlines() == [
                "0", "of the node", "of a config", "kept", "/tmp", "one", "two|box $||", "ready"
            ]  # fmt: skip
            assert node.said["box"]["enforced"] == ["user"]
            container["env"] = {"LINES": "again"}  # another version
            node.contain("box", script, container, **files)
            said = await node.log("box", "again|")
            assert said.count("kept") == 3, "a volume outlives its container"
            node.unwish("box")
            await until(lambda: node.said["box"] == {}, WAIT)

    monkey = pytest.MonkeyPatch()
    with monkey.context() as m:
        m.setenv("HTTP_PROXY", "http://secret@proxy")
        asyncio.run(main())


def test_limits_are_read_back_and_what_does_not_hold_is_told(tmp_path: Path, store: Store) -> None:
    if not {"memory", "cpu", "pids"} <= set(cgroup.available()):
        pytest.skip(f"no limits here: {cgroup.host().why}")
    node = Box(tmp_path / "node")
    limits = {"memory": "48Mi", "cpu": 0.5, "pids": 30}

    async def main() -> None:
        node.contain("box", "exec sleep 1000", limits=limits)
        async with node.agent(leave=True) as edge:
            (one,) = await node.runs("box")
            assert node.said["box"]["enforced"] == ["cpu", "memory", "pids"]
            assert cgroup.holds(one["pid"], cgroup.Limits(48 << 20, 0.5, 30)).refused == {}
            assert one["pid"] in cgroup.members(one["pid"])
            assert [u["instance"] for u in edge.usage()] == [one["id"]]
            groups = cgroup._groups_of(one["pid"])
            v2 = "cpu" not in groups
            (groups["" if v2 else "pids"] / "pids.max").write_text("max")  # as somebody else may do
            file, value = ("cpu.max", "100000 100000") if v2 else ("cpu.cfs_quota_us", "100000")
            (groups["" if v2 else "cpu"] / file).write_text(value)
        async with node.agent():
            await until(lambda: node.said["box"]["enforced"] == ["memory"], WAIT)
            cpu, pids = node.said["box"]["notEnforced"]
            assert (cpu["what"], cpu["why"], pids["what"]) == ("cpu", "set to 0.5, reads 1", "pids")
            node.contain("box", "exec tail -c 200m /dev/zero", limits=limits)
            await until(lambda: any("RolledBack" in e for e in node.events), WAIT)

    asyncio.run(main())


def test_a_check_runs_inside_and_an_end_is_known_to_the_next_agent(tmp_path: Path, store: Store) -> None:
    node = Box(tmp_path / "node")
    once = {"restart": {"policy": "on-failure", "backoff": "50ms", "max": "100ms"}}

    async def main() -> None:
        check = {"exec": {"command": ["test", "-e", "/tmp/${EDGEWARD_APP}"]}, "window": "50ms"}
        node.contain("well", "touch /tmp/well; exec sleep 1000", health=check)
        node.contain("ill", "exec sleep 1000", health=check | {"startup": "30s"})
        node.contain("job", "while ! test -e /tmp/go; do sleep 0.1; done; exit 0", **once)
        node.contain("short", "exit 0", **once)
        node.contain("bad", "exit 3", **once)
        async with node.agent(leave=True) as edge:
            await node.runs("well")
            inside = edge.inside("default", "well", ["cat", "/proc/1/cmdline", "-"], stdin=True)
            done = subprocess.run(inside.argv, env=inside.env, input=b"given", capture_output=True, timeout=60)
            assert done.stdout == b"sleep\x001000\x00given"
            with pytest.raises(NotFound, match="no instance 'other' of it runs on node n"):
                edge.inside("default", "well", ["id"], "other")
            (job,) = await node.runs("job")
            await until(lambda: node.phase("short") == "Stopped", WAIT)
            await until(lambda: node.starts("bad") >= 3, WAIT)
            assert any("ended with exit status 3" in e for e in node.events)
            assert "status 1" in node.said["ill"]["instances"][0]["message"]
            assert node.phase("ill") == "Starting"
            node.unwish("bad")
            node.unwish("ill")
            await until(lambda: node.said["bad"] == node.said["ill"] == {}, WAIT)
        (name,) = [n for n in store.names() if job["id"] in n]
        store.podman("exec", name, "touch", "/tmp/go")
        assert await asyncio.to_thread(proc.wait_exit_blocking, proc.ProcId(job["pid"], "x"), WAIT)
        async with node.agent():
            await node.runs("well")
            await until(lambda: node.phase("job") == "Stopped", WAIT)
            assert node.starts("job") == 1, "it had done its work, while no agent was there"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("container", "says"),
    [
        ({"image": "localhost/none:1", "pull": "never"}, "localhost/none:1 is not on this node (load it there"),
        ({"image": f"localhost/box@sha256:{'0' * 64}", "pull": "never"}, "is not on this node"),
        ({"archive": f"sha256:{'0' * 64}"}, "no hub to fetch it from"),
    ],
)
def test_an_image_that_cannot_be_had(tmp_path: Path, store: Store, container: Any, says: str) -> None:
    node = Box(tmp_path / "node")

    async def main() -> None:
        node.contain("box", "exec sleep 1000")
        async with node.agent():
            (first,) = await node.runs("box")
            node.contain("box", "exec sleep 1000", container)
            await until(lambda: says in node.said["box"].get("message", ""), WAIT)
            assert [i["id"] for i in node.running("box")] == [first["id"]], "what served goes on"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("container", "says"),
    [
        ({"command": ["/nope"]}, r'"/nope"'),
        ({"args": ["\0"]}, "embedded null byte"),
        ({"user": "nobody-here"}, "nobody-here"),
        ({"volumes": [{"hostPath": "/not/there", "path": "/x"}]}, "/not/there is not on this node (make it first)"),
    ],
)
def test_what_cannot_be_started_says_why_and_leaves_nothing(
    tmp_path: Path, store: Store, container: Any, says: str
) -> None:
    node = Box(tmp_path / "node")

    async def main() -> None:
        node.contain("box", "exec sleep 1000", container)
        async with node.agent():
            await until(lambda: any("StartFailed" in e and says in e for e in node.events), WAIT)
            node.unwish("box")
            await until(lambda: node.said["box"] == {}, WAIT)
        assert store.names() == []

    asyncio.run(main())


def test_a_version_stays_what_it_was_whatever_becomes_of_its_tag(tmp_path: Path, store: Store) -> None:
    node = Box(tmp_path / "node")

    async def main() -> None:
        store.box("localhost/app:1", **{"etc/which": "first\n"})
        node.contain("box", "cat /etc/which; exec sleep 1000", {"image": "localhost/app:1"})
        async with node.agent():
            (one,) = await node.runs("box")
            store.box("localhost/app:1", **{"etc/which": "second\n"})
            os.kill(one["pid"], 9)
            await until(lambda: node.starts("box") == 2, WAIT)
            (two,) = await node.runs("box")
            assert two["image"] == one["image"]
            assert "second" not in await node.log("box", "first")
            store.podman("rmi", "--force", one["image"].removeprefix("sha256:"))

    asyncio.run(main())


def test_what_an_agent_had_begun_when_it_was_killed_is_taken_away(tmp_path: Path, store: Store) -> None:
    """The row is there and the container is not its own yet; another container has the node's label and no row."""
    node = Box(tmp_path / "node")

    async def main() -> None:
        node.contain("box", "exec sleep 1000")
        async with node.agent(leave=True) as edge:
            (one,) = await node.runs("box")
            runtime: Any = edge._runtimes["container"]
            (row,) = edge._db.instances()
            row.process = ""  # as if it had been killed before it knew
            edge._db.save_instance(row)
            store.podman("create", "--name", "lost", "--label", f"edgeward.node={runtime.label}",
                         "--label", "edgeward.instance=box-000000", BOX)  # fmt: skip
            store.podman("create", "--name", "foreign", BOX)
        async with node.agent():
            (again,) = await node.runs("box")
            assert (again["id"], again["pid"]) == (one["id"], one["pid"]), "found by what podman left in its folder"
            await until(lambda: "lost" not in store.names(), WAIT)
            assert "foreign" in store.names()

    asyncio.run(main())
