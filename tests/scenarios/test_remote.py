"""Programs, terminals and files of a node, by the command line, through a running hub; and with the hub cut off."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.scenarios.conftest import System

from edgeward.core import proc

NODE = "plant-1"
LONG = 60.0


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("remote")
    (folder / "lab.yaml").write_text("sites: [{name: plant, nodes: 1}]")
    made = System(folder / "lab", "lab", "up", "-f", str(folder / "lab.yaml"))
    yield made
    made.close()


def start(system: System, *args: str, token: str = "", **options: Any) -> subprocess.Popen[bytes]:
    env = {**os.environ, "EDGEWARD_CONTEXT": str(system.data / "context.json"), "NO_COLOR": "1"}
    if token:
        env["EDGEWARD_TOKEN"] = token
    return subprocess.Popen(
        [sys.executable, "-m", "edgeward", *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def token_of(system: System, role: str, *verbs: str) -> str:
    rules = [{"verbs": list(verbs), "kinds": ["Node"]}]
    system.apply({"kind": "Role", "metadata": {"name": role}, "spec": {"rules": rules}})
    out = system.run("token", "create", "--role", role, "--ttl", "1h", "-o", "json")
    return str(json.loads(out)["token"])


def records(system: System, verb: str, *at: str) -> list[dict[str, Any]]:
    items = json.loads(system.run(*at, "audit", "-o", "json"))["items"]
    return [r for r in items if r["verb"] == verb]


def gone(pid: int) -> None:
    if found := proc.identify(pid):
        assert proc.wait_exit_blocking(found, LONG)


def test_a_program_s_outputs_and_exit_code_are_the_command_s(system: System) -> None:
    assert system.run("exec", NODE, "--", "/bin/sh", "-c", "echo out; echo err >&2; exit 7", code=7) == "out\n"
    assert system.stderr == "err\n"
    words = ["$HOME", "a  b", ";", "-n", "--", "*"]
    told = system.run("exec", NODE, "--", sys.executable, "-c", "import sys; print(sys.argv[1:])", *words)
    assert told.strip() == repr(words)
    assert system.run("exec", NODE, "--", "cat", stdin="typed\n" * 50_000) == "typed\n" * 50_000
    assert system.run("exec", "--no-stdin", NODE, "--", "cat", stdin="not for it") == ""
    assert system.run("exec", "-e", "A=b", "--cwd", "/tmp", NODE, "--", "sh", "-c", "echo $A; pwd") == "b\n/tmp\n"
    system.run("exec", NODE, "--", "no-such-program", code=127)
    assert "there is no such program" in system.stderr
    system.run("exec", NODE, "--", "sh", "-c", "kill -KILL $$", code=137)
    system.run("exec", "nobody", "--", "true", code=5)
    system.run("exec", NODE, code=2)


def test_who_ran_what_is_in_the_audit_of_both_and_what_was_typed_is_not(system: System) -> None:
    system.run("exec", NODE, "--", "sh", "-c", "cat >/dev/null; exit 5", "--token", "hidden!", stdin="typed!", code=5)

    def mine(*at: str) -> list[dict[str, Any]]:
        verb = "exec" if at else "tunnel"
        return [r for r in records(system, verb, *at) if "--token" in r.get("detail", {}).get("argv", [])]

    (here,) = system.wait("the hub's record", mine)
    (there,) = system.wait("the node's record", lambda: mine("--at", NODE))
    assert (here["actor"], there["actor"]) == ("admin", "admin")
    assert there["detail"]["code"] == 5
    assert there["detail"]["in"] == 6
    assert there["detail"]["argv"][:2] == ["sh", "-c"]
    assert "!" not in json.dumps([here, there])


def test_only_who_may_and_whoever_may_not_any_more_is_cut(system: System) -> None:
    for role in ("operator", "viewer"):
        out = json.loads(system.run("token", "create", "--role", role, "--ttl", "1h", "-o", "json"))
        refused = start(system, "exec", NODE, "--", "id", token=out["token"])
        _, err = refused.communicate(timeout=LONG)
        assert refused.returncode == 3, err
        assert b"may not" in err
    token = token_of(system, "runner", "exec")
    running = start(system, "exec", NODE, "--", "sh", "-c", "sleep 1000 & echo $! $$; wait", token=token)
    assert running.stdout is not None
    pids = [int(p) for p in running.stdout.readline().split()]
    system.run("delete", "role", "runner")
    _, err = running.communicate(timeout=LONG)
    assert running.returncode == 3, err
    for pid in pids:
        gone(pid)


def app(system: System, name: str, **more: Any) -> dict[str, Any]:
    """A process App that runs; its one instance."""
    process = {"command": ["sleep", "1000"], "env": {"WORD": "its own"}}
    system.apply(
        {"kind": "App", "metadata": {"name": name, "labels": {"team": name}}, "spec": {"process": process} | more}
    )

    def runs() -> Any:
        found = system.get("app", name).get("status", {}).get("instances") or []
        return next((i for i in found if i["phase"] == "Running"), None)

    return dict(system.wait(f"{name} to run", runs))


def test_a_program_runs_inside_an_app_as_the_app_does(system: System) -> None:
    one = app(system, "inner", limits={"pids": 40})
    look = "echo $WORD $EDGEWARD_APP; pwd; cat; cat /proc/$$/cgroup; exit 4"
    out = system.run("exec", "--app", "inner", "--", "sh", "-c", look, stdin="typed\n", code=4).splitlines()
    assert out[0] == "its own inner"
    assert out[1] == str(Path(f"/proc/{one['pid']}/cwd").readlink())
    assert out[2] == "typed"
    if "pids" in one.get("enforced", system.get("app", "inner")["status"].get("enforced") or []):
        groups = Path(f"/proc/{one['pid']}/cgroup").read_text().splitlines()
        assert [g for g in out[3:] if "pids" in g] == [g for g in groups if "pids" in g]
    at = ("--at", NODE)
    for where in ((), at):
        chosen = ("--app", "default/inner", "--instance", one["id"])
        assert system.run(*where, "exec", *chosen, "--", "sh", "-c", "echo $WORD") == "its own\n"
        system.run(*where, "exec", "--app", "inner", "--instance", "other", "--", "true", code=5)
        system.run(*where, "exec", "--app", "none", "--", "true", code=5)
    system.run("exec", "--app", "inner", "-e", "A=b", "--", "true", code=2)

    def mine(verb: str, *where: str) -> list[dict[str, Any]]:
        return [r for r in records(system, verb, *where) if r.get("detail", {}).get("app") == "default/inner"]

    assert system.wait("the hub's record", lambda: mine("tunnel"))[0]["actor"] == "admin"
    assert system.wait("the node's record", lambda: mine("exec", *at))


def test_who_may_look_into_one_app_may_do_nothing_else(system: System) -> None:
    app(system, "mine")
    app(system, "theirs")

    def denied(token: str, *args: str) -> bool:
        running = start(system, "exec", *args, token=token)
        _, err = running.communicate(timeout=LONG)
        assert running.returncode in (0, 3), err
        return running.returncode == 3

    on_node = token_of(system, "on-node", "exec", "tunnel", "get")
    assert denied(on_node, "--app", "mine", "--node", NODE, "--", "true")
    assert not denied(on_node, NODE, "--", "true")
    rules = [
        {"verbs": ["exec"], "kinds": ["App"], "namespaces": ["default"], "labelSelector": "team=mine"},
        {"verbs": ["get"], "kinds": ["App"]},
    ]
    system.apply({"kind": "Role", "metadata": {"name": "within"}, "spec": {"rules": rules}})
    out = system.run("token", "create", "--role", "within", "--ttl", "1h", "-o", "json")
    within = str(json.loads(out)["token"])
    assert not denied(within, "--app", "mine", "--", "true")
    assert denied(within, "--app", "theirs", "--", "true")
    assert denied(within, NODE, "--", "true")
    for args in (("shell", NODE), ("cp", f"{NODE}:/etc/passwd", "-"), ("tunnel", "stdio", NODE, "1")):
        running = start(system, *args, token=within, stdin=subprocess.DEVNULL)
        _, err = running.communicate(timeout=LONG)
        assert running.returncode == 3, err
    running = start(system, "exec", "--app", "mine", "--", "sh", "-c", "echo $$; exec sleep 1000", token=within)
    assert running.stdout is not None
    pid = int(running.stdout.readline())
    system.run("delete", "role", "within")
    _, err = running.communicate(timeout=LONG)
    assert running.returncode == 3, err
    gone(pid)


def test_what_runs_inside_an_instance_ends_with_it(system: System) -> None:
    app(system, "brief")
    running = start(system, "exec", "--app", "brief", "--", "sh", "-c", "sleep 1000 & echo $$ $!; wait")
    assert running.stdout is not None
    pids = [int(p) for p in running.stdout.readline().split()]
    system.run("delete", "app", "brief")
    running.communicate(timeout=LONG)
    for pid in pids:
        gone(pid)


def test_who_interrupts_twice_does_not_wait_for_the_program(system: System) -> None:
    running = start(system, "exec", NODE, "--", "sh", "-c", "trap '' INT TERM HUP; sleep 1000 & echo $! $$; wait; wait")
    assert running.stdout is not None
    pids = [int(p) for p in running.stdout.readline().split()]
    running.send_signal(signal.SIGINT)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=LONG)
    assert b"second signal" in err
    for pid in pids:
        gone(pid)


def test_an_interrupt_is_the_program_s(system: System) -> None:
    running = start(system, "exec", NODE, "--", "sh", "-c", "trap 'exit 9' INT; echo on; while :; do sleep 0.1; done")
    assert running.stdout is not None
    assert running.stdout.readline() == b"on\n"
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=LONG)
    assert running.returncode == 9


def test_a_shell_is_a_terminal(system: System) -> None:
    master, slave = os.openpty()
    running = start(system, "shell", NODE, "-e", "PS1=ready> ", stdin=slave, preexec_fn=os.setsid)
    assert running.stdout is not None
    os.write(master, b"tty; test -t 0 && echo in''side; exit 4\n")
    out, err = running.communicate(timeout=LONG)
    os.close(slave)
    os.close(master)
    assert running.returncode == 4, err
    assert b"/dev/pts/" in out
    assert b"inside" in out


def test_files_and_folders_go_there_and_come_back(system: System, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "in").mkdir(parents=True)
    (source / "in" / "big").write_bytes(os.urandom(2_000_000))
    (source / "run").write_bytes(b"#!/bin/sh\n")
    (source / "run").chmod(0o755)
    assert system.run("cp", str(source), f"{NODE}:{tmp_path}/there") == "2 files, 2000010 bytes\n"
    assert system.run("cp", f"{NODE}:{tmp_path}/there", f"{tmp_path}/back") == "2 files, 2000010 bytes\n"
    for name in ("in/big", "run"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert os.access(tmp_path / "back" / "run", os.X_OK)
    (tmp_path / "folder").mkdir()
    assert system.run("cp", f"{NODE}:{tmp_path}/there", str(tmp_path / "folder")) == "2 files, 2000010 bytes\n"
    again = system.run("cp", f"{NODE}:{tmp_path}/there", str(tmp_path / "folder"))
    assert again == "2 files, 2000010 bytes, 0 of them sent\n"
    system.run("cp", f"{NODE}:/none", str(tmp_path), code=5)
    system.run("cp", str(tmp_path), str(tmp_path), code=2)
    (copied,) = [r for r in records(system, "copy", "--at", NODE) if r["detail"].get("path") == f"{tmp_path}/there"][
        -1:
    ]
    assert copied["outcome"] == "done"


def test_stdin_and_stdout_are_a_port_for_ssh(system: System) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        taken, _ = listener.accept()
        with taken:
            got = b""
            while data := taken.recv(65536):
                got += data
            taken.sendall(got.upper())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert system.run("tunnel", "stdio", NODE, str(listener.getsockname()[1]), stdin="x" * 300_000) == "X" * 300_000
    thread.join(LONG)
    listener.close()


def test_a_cut_site_s_own_api_serves_the_same(system: System, tmp_path: Path) -> None:
    """Runs last: the link is healed at its end."""
    system.run("lab", "cut", "plant")
    system.wait("the node to be missed", lambda: not system.get("node", NODE)["status"]["online"])
    try:
        system.run("exec", NODE, "--", "true", code=6)
        at = ("--at", NODE)
        assert system.run(*at, "exec", NODE, "--", "sh", "-c", "cat; exit 3", stdin="here", code=3) == "here"
        (tmp_path / "f").write_bytes(b"f")
        system.run(*at, "cp", str(tmp_path / "f"), f"{NODE}:{tmp_path}/g")
        assert (tmp_path / "g").read_bytes() == b"f"
        system.run(*at, "exec", "plant-2", "--", "true", code=5)  # it leads to no other node
        assert [r["actor"] for r in records(system, "copy", *at)][-1] == "local"
        ran = [r["detail"] for r in records(system, "exec", *at)]  # its end is said here, and once
        assert [d["code"] for d in ran if d["argv"] == ["sh", "-c", "cat; exit 3"]] == [3]
        told = [r["outcome"] for r in records(system, "tunnel", *at) if r.get("detail", {}).get("use") == "exec"]
        assert "opened" in told and "ended" not in told
    finally:
        system.run("lab", "heal", "plant")


def test_an_agent_that_is_killed_leaves_no_program(system: System) -> None:
    """Its next run ends it."""
    system.wait("the node", lambda: system.get("node", NODE)["status"]["online"])
    running = start(
        system, "--at", NODE, "exec", NODE, "--", "sh", "-c", "trap '' HUP PIPE; echo $$; while :; do sleep 1; done"
    )
    assert running.stdout is not None
    pid = int(running.stdout.readline())
    run = json.loads((system.data / "nodes" / NODE / "run.json").read_text())
    os.kill(run["pid"], signal.SIGKILL)
    gone(pid)
    running.kill()
    running.communicate(timeout=LONG)
