"""The process runtime with real processes: environment, files, user, start, stop, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import pwd
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.core.pair import until

from edgeward.core import cgroup, proc
from edgeward.core.errors import EdgewardError
from edgeward.workloads.ground import MARK, Ground
from edgeward.workloads.process import ProcessRuntime
from edgeward.workloads.spec import AppSpec
from edgeward.workloads.state import InstanceRow, Snapshot

ON_FAILURE = {"policy": "on-failure"}


def row(**more: Any) -> InstanceRow:
    fields: dict[str, Any] = {
        "namespace": "default",
        "name": "web",
        "version": "0123456789abcdef",
        "slot": 0,
        "piped": True,
    }
    return InstanceRow(**{"id": f"i{os.getpid()}", **fields, **more})


def snapshot(command: list[str], *, env: Any = None, files: Any = None, process: Any = None, **spec: Any) -> Snapshot:
    return Snapshot({"process": {"command": command} | (process or {})} | spec, env or {}, files or {})


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[ProcessRuntime]:
    made = ProcessRuntime(Ground(node="plant-1", site="plant", data_dir=tmp_path))
    yield made
    for popen in made._children.values():
        found = proc.identify(popen.pid)
        if found is not None:
            proc.kill_group(found, 9)
        popen.wait()
    asyncio.run(made.ground.close(leave=False))


async def output(runtime: ProcessRuntime, r: InstanceRow, s: Snapshot, extra: Any = None) -> str:
    """What a short program wrote, when it ended."""
    started = await runtime.start(r, s, extra or {})
    assert await proc.wait_exit(started.process, 30)
    await written(runtime)
    return runtime.ground.log_file(r).read_text()


async def written(runtime: ProcessRuntime) -> None:
    """All that ended wrote is in the files: the pump has taken their pipes away."""
    await until(lambda: not runtime.ground.pipes.needed())


def test_the_environment_is_whole_and_nothing_leaks(runtime: ProcessRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_SECRET", "x")
    monkeypatch.delenv("EDGEWARD_DATA", raising=False)
    s = snapshot(
        ["env", "-0"],
        env={"FROM": "config", "EDGEWARD_NODE": "faked", "WINS": "config"},
        process={"env": {"URL": "http://:${PORT}/${FROM}$$", "WINS": "spec"}},
        ports=[{"name": "http", "env": "PORT"}, {"name": "quiet", "port": 80}],
    )
    extra = {"EDGEWARD_SERVICE_DB": "10.0.0.1:1", "FROM": "extra"}
    r = row(ports={"http": 20001, "quiet": 80})
    got = asyncio.run(output(runtime, r, s, extra))
    env = dict(line.split("=", 1) for line in got.split("\0") if line)
    kept = {k: os.environ[k] for k in ("LANG", "LC_ALL", "TZ", "HOME", "TMPDIR", "PATH") if k in os.environ}
    assert env == kept | {
        "EDGEWARD_APP": "web",
        "EDGEWARD_NAMESPACE": "default",
        "EDGEWARD_NODE": "plant-1",
        "EDGEWARD_SITE": "plant",
        "EDGEWARD_VERSION": "0123456789ab",
        "EDGEWARD_INSTANCE": r.id,
        "EDGEWARD_SERVICE_DB": "10.0.0.1:1",
        "FROM": "config",
        "PORT": "20001",
        "URL": "http://:20001/config$",
        "WINS": "spec",
    }
    without = snapshot([sys.executable], process={"inheritPath": False})
    assert "PATH" not in runtime.environment(row(), without, {})


def test_files_and_folder_are_private_and_the_working_folder(runtime: ProcessRuntime) -> None:
    s = snapshot(["sh", "-c", "pwd -P; cat conf/a/b.txt top; umask"], files={"conf/a/b.txt": "é\n", "top": "t\n"})
    r = row()
    folder = runtime.ground.folder(r)
    assert asyncio.run(output(runtime, r, s)).splitlines() == [str(folder.resolve()), "é", "t", "0077"]
    for path in (folder / "conf/a/b.txt", folder / "top"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in (folder, folder / "conf", folder / "conf/a"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    asyncio.run(runtime.clean(r))
    assert not folder.exists()
    assert runtime.ground.log_file(r).exists(), "what it wrote stays"
    asyncio.run(runtime.clean(r))


@pytest.mark.parametrize(
    ("s", "field", "says"),
    [
        (Snapshot({}), "$.spec.process", "no process is declared"),
        (snapshot(["/nowhere/x"]), "$.spec.process.command", r"'/nowhere/x' cannot be started: No such file.*\(check"),
        (snapshot(["/dev/null"]), "$.spec.process.command", "cannot be started: Permission denied"),
        (snapshot(["nope"], restart=ON_FAILURE), "$.spec.process.command", "'nope' cannot be started: No such file"),
        (snapshot(["./no"], restart=ON_FAILURE), "$.spec.process.command", "'./no' cannot be started: No such file"),
        (snapshot(["/dev/null"], restart=ON_FAILURE), "$.spec.process.command", "cannot be started: Permission denied"),
        (snapshot(["x", "${NO}"]), "$.spec.process.command[1]", r"\$\{NO\} is not known \(known: "),
        (snapshot(["x"], process={"args": ["${NO}"]}), "$.spec.process.args[0]", "is not known"),
        (snapshot(["x"], process={"env": {"A": "${NO}"}}), "$.spec.process.env.A", "is not known"),
        (snapshot(["true"], process={"user": "no-such-user"}), "$.spec.process.user", r"no user .* \(create it"),
        (snapshot(["true"], files={"../x": ""}), "$.spec.files", "leaves the working folder"),
        (snapshot(["tr\0ue"]), "$.spec.process.command", "cannot be started: embedded null byte"),
    ],
)
def test_what_cannot_be_started(runtime: ProcessRuntime, s: Snapshot, field: str, says: str) -> None:
    with pytest.raises(EdgewardError, match=says) as caught:
        asyncio.run(runtime.start(row(), s, {}))
    assert (caught.value.resource, caught.value.field) == ("App/web", field)
    assert proc.find_by_env(MARK, row().id) == []
    assert not [p for p in Path("/sys/fs/cgroup").glob(f"*/edgeward/plant-1/{row().id}") if p.exists()]


def test_start_find_stop_and_exit_code(runtime: ProcessRuntime) -> None:
    async def body() -> None:
        r = row()
        assert runtime.find(r) is None
        s = snapshot(["sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 1000 & wait; done"])
        started = await runtime.start(r, s, {})
        await until(lambda: runtime.ground.log_file(r).read_text() == "up\n")
        found = runtime.find(r)
        assert found == started.process, "the leader, not a child with the same environment"
        assert await runtime.stop(r, msgspec.convert(s.spec, AppSpec)), "a row without a process needs no stop"
        assert proc.alive(started.process)
        r.process = str(started.process)
        assert await runtime.stop(r, msgspec.convert(s.spec, AppSpec))
        assert await runtime.exit_code(r, msgspec.convert(s.spec, AppSpec)) == 7
        assert await runtime.exit_code(r, msgspec.convert(s.spec, AppSpec)) is None, "no child of ours any more"
        assert await runtime.stop(r, msgspec.convert(s.spec, AppSpec)), "what is gone is stopped"
        left = proc.find_by_env(MARK, r.id)
        await runtime.clean(r)
        for child in left:
            assert await proc.wait_exit(child, 30)

    asyncio.run(body())


def test_one_that_does_not_listen_is_killed_with_its_children(runtime: ProcessRuntime) -> None:
    async def body() -> None:
        r = row()
        s = snapshot(["sh", "-c", "trap '' INT; sleep 1000 & echo up; wait"], stop={"signal": "INT", "grace": 0.05})
        started = await runtime.start(r, s, {})
        r.process = str(started.process)
        await until(lambda: runtime.ground.log_file(r).read_text() == "up\n")
        assert len(proc.find_by_env(MARK, r.id)) == 2
        all_ = proc.find_by_env(MARK, r.id)
        assert await runtime.stop(r, msgspec.convert(s.spec, AppSpec))
        await runtime.clean(r)
        for process in all_:
            assert await proc.wait_exit(process, 30)
        assert await runtime.exit_code(r, msgspec.convert(s.spec, AppSpec)) == -9

    asyncio.run(body())


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("exit 0", 0), ("kill -9 $$", -9)])
def test_who_witnessed_its_end_knows_the_status(runtime: ProcessRuntime, script: str, code: int) -> None:
    s = snapshot(["./run", "a b", "$HOME"], files={"run": ""}, restart=ON_FAILURE)
    spec, r = msgspec.convert(s.spec, AppSpec), row()
    folder = runtime.ground.folder(r)
    folder.mkdir(parents=True)
    (folder / "run").write_text(f'#!/bin/sh\nprintf "%s|" "$@"\n{script}\n')
    (folder / "run").chmod(0o700)
    s.files.clear()
    got = asyncio.run(output(runtime, r, s))
    assert got.splitlines()[0] == "a b|$HOME|" or got.startswith("a b|$HOME|"), "no shell looks into its arguments"
    other = ProcessRuntime(Ground(node="plant-1", site="plant", data_dir=runtime.ground.data))
    assert asyncio.run(other.exit_code(r, spec)) == code, "also for one that is not its parent"
    assert asyncio.run(runtime.exit_code(r, spec)) == code
    assert asyncio.run(other.exit_code(r, AppSpec())) is None


def test_the_user_it_runs_as(runtime: ProcessRuntime, tmp_path: Path) -> None:
    mine = pwd.getpwuid(os.geteuid()).pw_name
    s = snapshot(["sh", "-c", "id -un; cat f"], process={"user": mine}, files={"f": "text\n"})
    assert asyncio.run(output(runtime, row(), s)) == f"{mine}\ntext\n"
    other = "nobody"
    started = asyncio.run(runtime.start(row(id="other"), snapshot(["id", "-un"], process={"user": other}), {}))
    if os.geteuid() == 0:
        assert "user" in started.enforced
    else:
        assert started.not_enforced == [{"what": "user", "why": "the agent does not run as root"}]


@pytest.mark.root
def test_another_user_owns_its_folder_and_sees_nothing_else(runtime: ProcessRuntime, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    neighbour = row(id="neighbour")
    asyncio.run(output(runtime, neighbour, snapshot(["true"], files={"secret": "s"})))
    for parent in tmp_path.parents[:2]:  # pytest's own folders are closed to others
        parent.chmod(parent.stat().st_mode | 0o011)
    script = "id -un; cat f d/g; echo x > new && cat new; cat ../neighbour/secret; ls .. ; true"
    s = snapshot(["sh", "-c", script], process={"user": "nobody"}, files={"f": "F\n", "d/g": "G\n"})
    out = asyncio.run(output(runtime, row(), s)).splitlines()
    assert out[:4] == ["nobody", "F", "G", "x"]
    assert len(out) == 6
    assert all("ermission denied" in line for line in out[4:])


def test_an_app_is_not_spared_when_memory_runs_out(runtime: ProcessRuntime) -> None:
    """The agent's unit has the kernel end it among the last; who inherits that would have others ended in its place."""
    mine = Path("/proc/self/oom_score_adj")
    before = mine.read_text()
    try:
        mine.write_text("-500")
    except OSError as e:
        pytest.skip(f"cannot protect myself: {e.strerror}")
    try:
        started = asyncio.run(runtime.start(row(), snapshot(["sleep", "60"]), {}))
        assert Path(f"/proc/{started.process.pid}/oom_score_adj").read_text().strip() == "0"
    finally:
        mine.write_text(before)


def test_an_adopted_instance_is_limited_again(runtime: ProcessRuntime) -> None:
    if not {"memory", "pids"} <= set(cgroup.available()):
        pytest.skip(f"no limits here: {cgroup.host().why}")
    s = snapshot(["sleep", "60"], limits={"pids": 7})
    spec = msgspec.convert(s.spec, AppSpec)
    r = row()
    started = asyncio.run(runtime.start(r, s, {}))
    assert started.enforced == ["pids"]
    group = cgroup._group(cgroup.host().roots["pids"], "plant-1", r.id)
    (group / "pids.max").write_text("max")  # as when a unit's group was released for its next agent
    r.enforced, r.not_enforced = ["user"], [{"what": "pids", "why": "gone"}]
    runtime.resume(r, spec, started.process)
    assert (group / "pids.max").read_text().strip() == "7"
    assert (r.enforced, r.not_enforced) == (["pids", "user"], [])
    r.piped = False  # an older release started it
    for _ in range(2):
        runtime.resume(r, spec, started.process)
        assert [n["what"] for n in r.not_enforced] == ["logs"]
    r.process = str(started.process)
    proc.kill_group(started.process, 9)
    assert proc.wait_exit_blocking(started.process, 30)
    asyncio.run(runtime.clean(r))
    assert not group.exists()  # the group above it may be another system's too
