"""One node's apps with real processes: restart policies, ports, order, kept versions, adoption, log caps."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pwd
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.core.pair import until

from edgeward.agent.kinds import load
from edgeward.core.resource import Resource, decode
from edgeward.workloads.edge import AppsEdge

SLEEP = ["sleep", "1000"]


class Node:
    """The wishes, and what the node said last."""

    def __init__(self, data: Path) -> None:
        load()
        self.data = data
        self.wishes: dict[str, tuple[Resource, int]] = {}
        self.said: dict[str, dict[str, Any]] = {}
        self.events: list[str] = []
        self.edge: AppsEdge | None = None

    def wish(self, name: str, command: list[str], **more: Any) -> None:
        process = {"command": command} | more.pop("process", {})
        spec = {"process": process, "restart": {"backoff": "50ms", "max": "200ms"}, "stop": {"grace": "2s"}} | more
        doc = {"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": name}, "spec": spec}
        app = decode(doc)
        self.wishes[name] = (app, app.spec.replicas)
        if self.edge is not None:
            self.edge.poke("default", name)

    def unwish(self, name: str) -> None:
        del self.wishes[name]
        assert self.edge is not None
        self.edge.poke("default", name)

    # the Source of AppsEdge
    def apps(self) -> dict[tuple[str, str], tuple[Resource, int]]:
        return {("default", name): found for name, found in self.wishes.items()}

    def config(self, namespace: str, name: str) -> dict[str, str] | None:
        return None

    def secret(self, namespace: str, name: str) -> dict[str, str] | None:
        return None

    def service_env(self, namespace: str) -> dict[str, str]:
        return {}

    def _report(self, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        self.said[name] = status or {}

    def _event(self, type: str, reason: str, message: str, *rest: str) -> None:
        self.events.append(f"{reason} {message}")

    @contextlib.asynccontextmanager
    async def agent(self, *, leave: bool = False) -> AsyncIterator[AppsEdge]:
        """An agent's life. ``leave``: what it runs outlives it."""
        edge = self.edge = AppsEdge(
            node="n", site="s", data_dir=self.data, source=self, report=self._report, event=self._event
        )
        running = asyncio.create_task(edge.run())
        try:
            async with asyncio.timeout(60):
                yield edge
        except BaseException:
            leave = False
            raise
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await edge.shutdown(leave=leave)
            self.edge = None

    def phase(self, name: str) -> str:
        return str(self.said.get(name, {}).get("phase"))

    def running(self, name: str) -> list[dict[str, Any]]:
        return [i for i in self.said.get(name, {}).get("instances", []) if i["phase"] == "Running"]

    async def runs(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        def there() -> bool:
            return len(self.running(name)) == count == len(self.said.get(name, {}).get("instances", []))

        await until(there, 30)
        return self.running(name)

    def starts(self, name: str) -> int:
        return sum(e.startswith(f"Started instance {name}-") for e in self.events)


@pytest.mark.parametrize(
    ("policy", "code", "again"),
    [
        ("always", 0, True),
        ("always", 3, True),
        ("on-failure", 0, False),
        ("on-failure", 3, True),
        ("never", 0, False),
        ("never", 3, False),
    ],
)
def test_restart_policies(tmp_path: Path, policy: str, code: int, again: bool) -> None:
    async def main() -> None:
        node = Node(tmp_path)
        node.wish("job", ["sh", "-c", f"exit {code}"], restart={"policy": policy, "backoff": "20ms", "max": "50ms"})
        async with node.agent():
            if again:
                await until(lambda: node.starts("job") >= 4, 30)
            else:
                await until(lambda: node.phase("job") == "Stopped", 30)
                node.wish("other", SLEEP)
                await node.runs("other")
                assert node.starts("job") == 1
        if not again:  # what was done stays done, also for the next agent
            async with node.agent():
                await node.runs("other")
                await until(lambda: node.phase("job") == "Stopped", 30)
            assert node.starts("job") == 1

    asyncio.run(main())


def test_back_off_doubles_up_to_its_longest(tmp_path: Path) -> None:
    """Read from what is recorded of the slot, not from a clock of the test's."""

    async def main() -> None:
        node = Node(tmp_path)
        node.wish("bad", ["false"], restart={"backoff": "40ms", "max": "300ms"})
        pauses: dict[int, float] = {}
        async with node.agent() as edge:

            def look() -> bool:
                for slot in edge._states[("default", "bad")].slots.values() if edge._states else []:
                    if slot.restarts and slot.restarts not in pauses:
                        pauses[slot.restarts] = slot.not_before
                return len(pauses) >= 6

            await until(look, 30)
        ends = sorted(pauses.items())
        # from one planned start to the next there is at least the later pause
        for (_, a), (n, b) in itertools.pairwise(ends):
            assert b - a >= min(0.3, 0.04 * 2 ** (n - 1)) - 0.001

    asyncio.run(main())


def test_a_crash_and_a_new_start_of_the_node_keep_the_ports(tmp_path: Path) -> None:
    """Who was told the port, by EDGEWARD_SERVICE_<NAME> say, still finds it."""

    async def main() -> None:
        node = Node(tmp_path)
        ports = [{"name": "http", "env": "PORT"}, {"name": "admin", "env": "ADMIN"}]
        node.wish("web", SLEEP, ports=ports, replicas=2)
        async with node.agent():
            before = await node.runs("web", 2)
            had = sorted(i["ports"]["http"] for i in before)
            assert len({p for i in before for p in i["ports"].values()}) == 4
            os.kill(before[0]["pid"], signal.SIGKILL)
            await until(lambda: node.starts("web") == 3, 30)
            after = await node.runs("web", 2)
            assert sorted(i["ports"]["http"] for i in after) == had
        async with node.agent():  # all was stopped with the first agent
            await until(lambda: node.starts("web") == 5, 30)
            again = await node.runs("web", 2)
            assert sorted(i["ports"]["http"] for i in again) == had

    asyncio.run(main())


def test_a_port_that_somebody_else_has_by_now_is_not_given_out(tmp_path: Path) -> None:
    import socket

    async def main() -> None:
        node = Node(tmp_path)
        node.wish("web", SLEEP, ports=[{"name": "http", "env": "PORT"}])
        async with node.agent():
            (one,) = await node.runs("web")
        with socket.socket() as s:
            s.bind(("127.0.0.1", one["ports"]["http"]))
            s.listen()
            async with node.agent():
                await until(lambda: node.starts("web") == 2, 30)
                (two,) = await node.runs("web")
                assert two["ports"]["http"] != one["ports"]["http"]

    asyncio.run(main())


def test_apps_start_in_their_order(tmp_path: Path) -> None:
    """What depends on an app waits until that one is healthy, not only started."""

    async def main() -> None:
        node = Node(tmp_path / "data")
        go = tmp_path / "go"
        node.wish("db", SLEEP, health={"exec": {"command": ["test", "-e", str(go)]}})
        node.wish("web", SLEEP, dependsOn=["db"])
        node.wish("alone", SLEEP)
        async with node.agent():
            await node.runs("alone")
            await until(lambda: "waits for" in node.said.get("web", {}).get("message", ""), 30)
            assert node.starts("db") == 1
            assert node.starts("web") == 0
            go.touch()
            await node.runs("web")
            order = [e.split()[2].rpartition("-")[0] for e in node.events if e.startswith("Started")]
            assert order.index("db") < order.index("web")

    asyncio.run(main())


def test_apps_outlive_their_agent_and_the_last_three_versions_are_kept(tmp_path: Path) -> None:
    async def main() -> None:
        node = Node(tmp_path)
        quick = {"health": {"window": "50ms", "startup": "2s"}, "stop": {"grace": "2s", "drain": "10ms"}}
        async with node.agent(leave=True) as edge:
            for n in range(5):
                node.wish("web", ["sleep", f"{2000 + n}"], **quick)
                await until(lambda n=n: node.starts("web") == n + 1, 30)  # type: ignore[misc]
                (one,) = await node.runs("web")
            kept = edge._db._db.execute("SELECT count(*) FROM versions WHERE name='web'").fetchone()[0]
            assert kept == 3
            assert len(node.said["web"]["history"]) == 2
        async with node.agent():
            (same,) = await node.runs("web")
            assert same["pid"] == one["pid"], "adopted, not started anew"
            assert node.starts("web") == 5
            # a version that fails leaves the one that serves alone, and says so
            node.wish("web", ["false"], **quick)
            await until(lambda: node.phase("web") == "Degraded", 30)
            assert [i["pid"] for i in await node.runs("web")] == [one["pid"]]
            assert "status 1 after" in node.said["web"]["message"]
            assert "goes on" in node.said["web"]["message"]
            node.wish("web", ["no-such-program"], **quick)
            await until(lambda: "'no-such-program' cannot be started" in node.said["web"].get("message", ""), 30)
            never = {"health": {"exec": {"command": ["sh", "-c", "exit 9"]}, "startup": "300ms"}}
            node.wish("web", SLEEP, **(quick | never))
            await until(
                lambda: "not healthy within 0.3 s (ended with status 9)" in node.said["web"].get("message", ""), 30
            )
            assert [i["pid"] for i in await node.runs("web")] == [one["pid"]]
            # and what is adopted is looked after: it dies, it comes back
            before = node.starts("web")
            os.kill(one["pid"], signal.SIGKILL)
            await until(lambda: node.starts("web") == before + 1, 30)
            await node.runs("web")

    asyncio.run(main())


def test_a_loud_app_is_cut_and_a_removed_one_leaves_no_log(tmp_path: Path) -> None:
    async def main() -> None:
        node = Node(tmp_path)
        script = "while :; do head -c 100000 /dev/zero | tr '\\0' x; echo; sleep 0.02; done"
        node.wish("loud", ["sh", "-c", script], logs={"bytes": "256Ki"})
        folder = tmp_path / "logs" / "default" / "loud"
        async with node.agent():
            (one,) = await node.runs("loud")
            log = folder / f"{one['id']}.log"
            ends: list[int] = []

            def cut_thrice() -> bool:
                size = log.stat().st_size
                if ends and size < ends[-1]:
                    ends.append(size)
                elif ends:
                    ends[-1] = size
                else:
                    ends.append(size)
                return len(ends) > 3

            await until(cut_thrice, 40)
            assert log.with_name(log.name + ".1").stat().st_size == 128 * 1024
            node.unwish("loud")
            await until(lambda: node.said["loud"] == {}, 30)
            assert not folder.exists()

    asyncio.run(main())


@pytest.mark.root
def test_an_exec_check_has_the_rights_and_names_of_its_app(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    nobody = pwd.getpwnam("nobody").pw_uid
    for parent in tmp_path.parents[:2]:  # pytest's own folders are closed to others
        parent.chmod(parent.stat().st_mode | 0o011)

    async def main() -> None:
        node = Node(tmp_path)
        check = ["sh", "-c", f'test "$(id -u)" = {nobody} && test "$1" = "$PORT" && touch seen', "sh", "${PORT}"]
        node.wish(
            "web", SLEEP, process={"user": "nobody"}, ports=[{"name": "http", "env": "PORT"}],
            health={"exec": {"command": check}},
        )  # fmt: skip
        async with node.agent():
            (one,) = await node.runs("web")
            seen = tmp_path / "apps" / "default" / "web" / one["id"] / "seen"
            assert seen.stat().st_uid == nobody
            assert "user" in node.said["web"]["enforced"]

    asyncio.run(main())
