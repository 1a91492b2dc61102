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
from edgeward.core.proc import find_by_env, identify, kill_group, wait_exit
from edgeward.core.resource import Resource, decode
from edgeward.workloads import logs
from edgeward.workloads.edge import AppsEdge

SLEEP = ["sleep", "1000"]


class Node:
    """The wishes, and what the node said last."""

    #: Seconds: of one agent's life, and half of it for an app to run. Guards against hanging.
    patience = 60.0

    def __init__(self, data: Path) -> None:
        load()
        self.data = data
        self.wishes: dict[str, tuple[Resource, int]] = {}
        self.said: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, Any] = {}
        self.configs: dict[str, dict[str, str]] = {}
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
        return self.configs.get(name)

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
            node="n", site="s", data_dir=self.data, source=self, report=self._report, event=self._event,
            settings=self.settings,
        )  # fmt: skip
        running = asyncio.create_task(edge.run())
        try:
            async with asyncio.timeout(self.patience):
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

        try:
            await until(there, self.patience / 2)
        except AssertionError:
            raise AssertionError(f"{name}: {self.said.get(name)} {self.events}") from None
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


@pytest.mark.parametrize(
    ("code", "asked", "again"),
    [("0", False, False), ("3", False, True), ("0", True, True)],
)
def test_a_job_that_ends_while_no_agent_is_there(tmp_path: Path, code: str, asked: bool, again: bool) -> None:
    """Success is success, whoever saw it; what a signal asked to end (the machine goes down, say) did not finish."""

    async def main() -> None:
        node = Node(tmp_path / "data")
        wait = f"touch $EDGEWARD_INSTANCE.up; while [ ! -e {tmp_path}/go ]; do sleep 0.01; done"
        script = f"trap 'exit {code}' TERM; {wait}; exit {code}"
        node.wish("job", ["sh", "-c", script], restart={"policy": "on-failure", "backoff": "20ms", "max": "50ms"})
        async with node.agent(leave=True):
            (one,) = await node.runs("job")
            await until(lambda: any(node.data.rglob("*.up")))
        process = identify(one["pid"])
        assert process is not None
        if asked:
            kill_group(process, signal.SIGTERM)
        else:
            (tmp_path / "go").touch()
        assert await wait_exit(process, 60)
        async with node.agent():
            if again:
                await until(lambda: node.starts("job") >= 2, 30)
            else:
                await until(lambda: node.phase("job") == "Stopped", 30)
                node.wish("other", SLEEP)
                await node.runs("other")
                assert node.starts("job") == 1

    asyncio.run(main())


def test_an_adopted_job_that_ends_under_the_next_agent(tmp_path: Path) -> None:
    async def main() -> None:
        node = Node(tmp_path / "data")
        script = f"while [ ! -e {tmp_path}/go ]; do sleep 0.01; done"
        node.wish("job", ["sh", "-c", script], restart={"policy": "on-failure"}, limits={"pids": 2})
        async with node.agent(leave=True):
            (one,) = await node.runs("job")
        async with node.agent():
            assert await node.runs("job") == [one]
            (tmp_path / "go").touch()
            await until(lambda: node.phase("job") == "Stopped", 30)
            assert node.starts("job") == 1

    asyncio.run(main())


def test_nothing_is_kept_of_versions_that_failed(tmp_path: Path) -> None:
    async def main() -> None:
        node = Node(tmp_path)
        quick = {"health": {"window": "20ms"}, "restart": {"backoff": "20ms", "max": "50ms"}}
        async with node.agent() as edge:

            def kept() -> set[str]:
                return {d[:12] for (d,) in edge._db._db.execute("SELECT digest FROM versions")}

            node.wish("web", SLEEP, **quick)
            (good,) = await node.runs("web")
            for n in range(5):
                node.wish("web", ["sh", "-c", f"exit {n}"], **quick)
                await until(lambda n=n: f"status {n} after" in node.said["web"].get("message", ""), 30)  # type: ignore[misc]
                await until(lambda: node.phase("web") == "Degraded", 30)
            assert kept() > {good["version"]}
            assert len(kept()) == 2, "what serves, and what is asked for"
            await until(lambda: len(list((tmp_path / "apps" / "default" / "web").iterdir())) == 1, 30)
        lost = tmp_path / "apps" / "default" / "gone" / "gone-1"  # a kill between two steps left it
        lost.mkdir(parents=True)
        async with node.agent():
            await until(lambda: bool(node.running("web")), 30)
            assert not lost.exists()

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
            await until(lambda: node.said.get("web", {}).get("message", "") == "waits for db", 30)
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


def test_a_loud_app_is_held_and_a_removed_one_leaves_no_log(tmp_path: Path) -> None:
    async def main() -> None:
        node = Node(tmp_path)
        cap = 1 << 20
        node.wish("loud", ["yes"], logs={"bytes": "1Mi"})
        folder = tmp_path / "logs" / "default" / "loud"
        sizes: list[int] = []

        def turned() -> bool:
            sizes.append(sum(p.stat().st_size for p in folder.glob("*.log*")))
            return any(folder.glob("*.log.1"))

        async with node.agent(leave=True):
            (one,) = await node.runs("loud")
            with contextlib.suppress(FileNotFoundError):  # made the old one under our eyes
                await until(turned, 40)
        async with node.agent() as edge:
            assert await node.runs("loud") == [one]
            assert node.said["loud"]["notEnforced"] == []
            got = b""
            async with contextlib.aclosing(edge.logs.read("default", "loud", tail=2, follow=True)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    got += piece
                    if len(got) > cap:
                        break
            assert set(got.splitlines()) <= {b"y", b"", logs.GAP.strip()}
            node.unwish("loud")
            await until(lambda: node.said["loud"] == {}, 30)
            assert not folder.exists()
        assert max(sizes) <= cap

    asyncio.run(main())


def test_a_line_of_an_ordinary_app_is_never_lost(tmp_path: Path) -> None:
    """Over new files, an agent's end and the pump's; the app waits for us after each batch."""
    go = tmp_path / "go"
    os.mkfifo(go)
    batch = 400
    lines = f"i=0; while read x; do n=$((i + {batch})); while [ $i -lt $n ]; do i=$((i + 1)); echo line $i; done; done"

    async def main() -> None:
        node = Node(tmp_path / "data")
        node.wish("web", ["sh", "-c", f"{{ {lines}; }} < {go}"], logs={"bytes": "16Ki"})
        fd = os.open(go, os.O_RDWR)
        got = b""
        mark: dict[str, str] = {}

        async def some(edge: AppsEdge, count: int, total: int) -> None:
            """So many batches more, read as they come behind what was read before, to so many lines."""
            nonlocal got, mark
            logs = edge.logs.read("default", "web", tail=0, follow=True, after=mark)
            async with contextlib.aclosing(logs) as pieces:  # type: ignore[type-var]
                following = asyncio.ensure_future(anext(pieces))
                await asyncio.sleep(0)  # it stands at the end of what was written
                wanted = total - count * batch
                for _ in range(count):
                    os.write(fd, b"go\n")
                    wanted += batch
                    while got.count(b"\n") < wanted:
                        piece = await following
                        got += piece
                        mark = getattr(piece, "mark", mark)
                        following = asyncio.ensure_future(anext(pieces))
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

        try:
            async with node.agent(leave=True) as edge:
                (one,) = await node.runs("web")
                await some(edge, 3, 3 * batch)
                (pump,) = find_by_env("EDGEWARD_PUMP", str(tmp_path / "data" / "logs"))
                os.kill(pump.pid, signal.SIGKILL)
                await some(edge, 3, 6 * batch)
            log = tmp_path / "data" / "logs" / "default" / "web" / f"{one['id']}.log"
            os.write(fd, b"go\n")  # no agent is there to see it
            await until(lambda: log.read_bytes().endswith(b"line %d\n" % (7 * batch)))
            async with node.agent() as edge:
                assert await node.runs("web") == [one]
                await some(edge, 3, 10 * batch)
            assert got.split(b"\n") == [b"line %d" % n for n in range(1, 10 * batch + 1)] + [b""]
        finally:
            os.close(fd)

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
