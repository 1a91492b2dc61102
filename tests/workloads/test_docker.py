"""Containers by docker's API, answered by podman's own service of it: started, followed, adopted, looked into, removed.

Nothing here has docker's daemon; what podman's service does otherwise is not seen.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.core.pair import until
from tests.workloads.engines import Store, a_store
from tests.workloads.test_container import HTTP, SERVE, WAIT, Box, get

from edgeward.core.cgroup import Limits
from edgeward.core.errors import EdgewardError
from edgeward.workloads import docker, podman
from edgeward.workloads.docker import Docker, created, nanoseconds
from edgeward.workloads.engine import Mount, Run
from edgeward.workloads.pipes import Pipes
from edgeward.workloads.podman_argv import options


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("EDGEWARD_DATA", str(tmp_path / "node"))
    yield from a_store(tmp_path / "store", monkeypatch)


@pytest.fixture
def socket(tmp_path: Path, store: Store) -> Iterator[str]:
    """Where docker's API is."""
    path = tmp_path / "d.sock"
    argv = ["podman", *options(podman.facts()), "system", "service", "--time", "0", f"unix://{path}"]
    service = subprocess.Popen(argv, env=os.environ | store.env, start_new_session=True)
    try:
        asyncio.run(_there(path))
        yield str(path)
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait(60)


async def _there(path: Path) -> None:
    await until(path.is_socket, WAIT)


def test_an_app_by_dockers_api(tmp_path: Path, store: Store, socket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker.shutil, "which", lambda name: None)  # type: ignore[attr-defined] # no docker client here
    node = Box(tmp_path / "node")
    node.settings = {"engine": "docker", "socket": socket}
    web = {"network": "host", "env": {"WORD": "one"}, "volumes": [{"name": "data", "path": "/data"}]}
    script = "(while ! test -e /tmp/on; do sleep 0.1; done; echo later) & " + SERVE

    async def main() -> None:
        node.contain("web", script, web, limits={"pids": 40}, **HTTP)
        node.contain("job", "echo said; exit 0", {"network": "host"}, restart={"policy": "on-failure"})
        async with node.agent(leave=True) as edge:
            (one,) = await node.runs("web")
            assert get(one["ports"]["http"]) == "one"
            assert node.said["web"]["enforced"] == ["pids"], node.said["web"]
            await node.log("web", "as 0")
            assert await node.log("job", "said") == "said\n"
            await until(lambda: node.phase("job") == "Stopped", WAIT)
            inside = edge.inside("default", "web", ["sh", "-c", "echo $WORD; touch /tmp/on; exit 3"])
            done = await asyncio.to_thread(
                subprocess.run, inside.argv, env=inside.env, capture_output=True, text=True, timeout=60
            )
            assert (done.stdout, done.returncode) == ("one\n", 3), done.stderr
        assert get(one["ports"]["http"]) == "one", "it outlives its agent"
        async with node.agent():
            (again,) = await node.runs("web")
            assert (again["id"], again["pid"]) == (one["id"], one["pid"])
            said = await node.log("web", "later")
            assert said.count("as 0") == said.count("later") == 1, "each line once, those in between too"
            node.contain("web", SERVE, web | {"env": {"WORD": "two"}}, **HTTP)
            await until(lambda: any("is kept" in e for e in node.events), WAIT)
            (two,) = await node.runs("web")
            assert get(two["ports"]["http"]) == "two"
            for name in ("web", "job"):
                node.unwish(name)
            await until(lambda: node.said["web"] == node.said["job"] == {}, WAIT)
            await until(lambda: store.names() == [], WAIT)

    asyncio.run(main())


def test_images_by_dockers_api(tmp_path: Path, store: Store, socket: str) -> None:
    engine = Docker({"socket": socket})
    id = store.box("localhost/app:1")
    file = tmp_path / "app.tar"
    store.podman("save", "--quiet", "--output", str(file), "localhost/app:1")
    store.podman("rmi", "--force", "localhost/app:1")

    async def main() -> None:
        assert engine.absent() == ""
        assert await engine.image("localhost/app:1") is None
        assert await engine.load(file) == ["localhost/app:1"]
        found = await engine.image("localhost/app:1")
        assert found is not None
        assert (found.id, found.names) == (id, ("localhost/app:1",))
        await engine.remove_image(id)
        assert await engine.image(id) is None
        with pytest.raises(EdgewardError):
            await engine.pull("127.0.0.1:1/none:1")
        assert await engine.containers("n") == {}
        await engine.remove("none")
        assert await engine.wait("none") is None

    asyncio.run(main())
    assert "does not listen at" in Docker({"socket": str(tmp_path / "no.sock")}).absent()


def test_what_is_asked_of_docker() -> None:
    run = Run(
        "n", "f00d" * 16, "node", "i", Path("/x"), {"A": "a\nb"}, ["/bin/a"], ["c"], "7", "/w",
        [Mount("/h", "/t", True), Mount("v", "/d", False, volume=True)], False,
        [("127.0.0.1", 20001, 80), ("::1", 20001, 80)], Limits(1 << 20, 0.25, 9),
    )  # fmt: skip
    doc = created(run)
    host = doc.pop("HostConfig")
    assert doc == {
        "Image": f"sha256:{'f00d' * 16}",
        "Env": ["A=a\nb"], "Entrypoint": ["/bin/a"], "Cmd": ["c"], "User": "7",
        "WorkingDir": "/w",
        "Labels": {"edgeward.node": "node", "edgeward.instance": "i"}, "ExposedPorts": {"80/tcp": {}},
    }  # fmt: skip
    assert host["PortBindings"] == {
        "80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "20001"}, {"HostIp": "::1", "HostPort": "20001"}]
    }
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"], host["PidsLimit"]) == (1 << 20, 1 << 20, 250000000, 9)
    assert [(m["Type"], m["ReadOnly"]) for m in host["Mounts"]] == [("bind", True), ("volume", False)]


@pytest.mark.parametrize(
    ("stamp", "at"),
    [
        (b"1970-01-01T00:00:01Z", 10**9),
        (b"1970-01-01T00:00:01.5Z", 1_500_000_000),
        (b"1970-01-01T02:00:01.000000007+02:00", 1_000_000_007),
        (b"no time", 0),
        (b"", 0),
    ],
)
def test_times_of_lines(stamp: bytes, at: int) -> None:
    assert nanoseconds(stamp) == at


def test_a_pipe_whose_name_is_still_there_gets_another(tmp_path: Path) -> None:
    """An agent that takes up an output at once makes its pipe before the pump has taken away the one before."""

    async def main() -> None:
        pipes = Pipes(tmp_path / "logs")
        log = tmp_path / "logs" / "default" / "web" / "web-1.log"
        try:
            first, second = pipes.make(log, 1 << 20), pipes.make(log, 1 << 20)
            os.write(first, b"one\n")
            os.close(first)
            os.write(second, b"two\n")
            await until(lambda: sorted(log.read_text().split()) == ["one", "two"], WAIT)
            os.write(second, b"three\n")
            await until(lambda: "three" in log.read_text(), WAIT)
            os.close(second)
            await until(lambda: not pipes.needed(), WAIT)
        finally:
            await pipes.close(leave=False)

    asyncio.run(main())
