"""`edgeward up`: the everyday form."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeward.lab.publisher import Publisher

WEB = """\
apiVersion: edgeward/v1
kind: App
metadata: {name: web}
spec:
  placement: {site: plant}
  process: {command: [python3, -m, http.server, "${PORT}", --bind, 127.0.0.1]}
  ports: [{name: http, env: PORT}]
  health: {http: {port: http, path: /}}
"""


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as got:
            return bool(got.status == 200)
    except OSError:
        return False


def test_up_runs_restarts_its_children_and_keeps_its_state(systems: Callable[..., Any], tmp_path: Path) -> None:
    up = systems("a", "up", "--port", "0")
    assert (up.data / "context.json").stat().st_mode & 0o777 == 0o600
    assert up.get("node", "plant-1")["spec"] == {"site": "plant"}
    up.run("apply", "-f", "-", "--wait", stdin=WEB)
    app = up.get("app", "web")
    (instance,) = app["status"]["instances"]
    assert app["status"]["phase"] == "Running"
    assert instance["node"] == "plant-1"
    assert answers(instance["ports"]["http"])
    assert "serving" in up.run("logs", "web").lower() or "GET" in up.run("logs", "web")

    # a child that dies is started again, and the ready file tells; the app outlives its agent
    before = up.context["nodes"][0]["pids"]["agent"]
    os.kill(before, signal.SIGKILL)
    up.wait("a new agent", lambda: up.context["nodes"][0]["pids"]["agent"] not in (None, before))
    assert answers(instance["ports"]["http"])
    up.wait("adopted", lambda: up.get("app", "web")["status"]["instances"][0]["pid"] == instance["pid"])
    hub = up.context["pids"]["hub"]
    os.kill(hub, signal.SIGKILL)
    up.wait("a new hub", lambda: up.context["pids"]["hub"] not in (None, hub))

    # two systems side by side share nothing
    other = systems("b", "up", "--port", "0")
    assert other.context["hub_url"] != up.context["hub_url"]
    assert other.run("get", "apps", "-o", "name") == ""

    # Ctrl-C leaves no process behind, and the next start has everything
    assert up.stop(signal.SIGINT) == 0
    assert up.processes() == []
    assert not answers(instance["ports"]["http"])
    owners = up.data / "nodes" / "plant-1" / "node.json"
    owners.write_text(json.dumps({**json.loads(owners.read_text()), "gateway": {"accessLog": "errors"}}))
    again = systems("a", "up", "--port", "0")
    assert json.loads(owners.read_text())["gateway"] == {"accessLog": "errors"}
    again.wait(
        "the app runs again",
        lambda: (
            (s := again.get("app", "web")["status"]).get("phase") == "Running"
            and answers(s["instances"][0]["ports"]["http"])
        ),
    )
    assert again.get("app", "web")["metadata"]["uid"] == app["metadata"]["uid"]


def send(pid: int, sig: int) -> None:
    """To a process that may have ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sig)


def test_all_killed_at_once_comes_back_as_it_was(systems: Callable[..., Any]) -> None:
    """The power goes: supervisor, hub, agent, both brokers and the apps, in one moment."""
    up = systems("a", "up")
    service = "apiVersion: edgeward/v1\nkind: Service\nmetadata: {name: web}\nspec: {app: web, port: http}\n"
    up.run("apply", "-f", "-", "--wait", stdin=f"{WEB}---\n{service}")
    show = {
        "process": {"command": ["sh", "-c", "echo at=$EDGEWARD_SERVICE_WEB; exec sleep 1000"]},
        "dependsOn": ["web"],
    }
    export = {"from": {"mqtt": "sensors/#"}, "to": {"hub": {"stream": "line1"}}, "identity": "$.id"}
    up.apply({"kind": "Export", "metadata": {"name": "line1"}, "spec": export})
    up.apply({"kind": "App", "metadata": {"name": "client"}, "spec": show}, "--wait")
    port = up.get("app", "web")["status"]["instances"][0]["ports"]["http"]
    up.wait("its log", lambda: f"at=127.0.0.1:{port}" in up.run("logs", "client"))
    up.wait("the capture", lambda: "plant-1" in up.get("export", "line1")["status"].get("nodes", {}))
    node = up.context["nodes"][0]
    publisher = Publisher(node["mqtt_url"], node["mqtt_user"], node["mqtt_password"], rate=200)
    publisher.start()
    up.wait("some readings", lambda: publisher.acked_count() > 50)
    before = [up.get(kind)["items"] for kind in ("apps", "services", "exports", "nodes")]

    # in one moment: first nobody moves any more, so nobody sees another one die and starts it again
    os.kill(up.process.pid, signal.SIGSTOP)
    stopped = {up.process.pid}
    while new := {*up.context["pids"].values(), *up.processes()} - stopped:
        for pid in new:
            send(pid, signal.SIGSTOP)
        stopped |= new
    for pid in stopped:
        send(pid, signal.SIGKILL)
    up.process.wait()
    publisher.end(0)
    acked = publisher.acked()
    up.wait("nothing is left", lambda: not up.processes())
    up.ready_file.unlink()
    again = systems("a", "up")
    assert again.context["nodes"][0]["mqtt_url"] == node["mqtt_url"], "devices find it where it was"
    assert again.context["token"] == up.context["token"]
    after = [again.get(kind)["items"] for kind in ("apps", "services", "exports", "nodes")]
    for had, has in zip(before, after, strict=True):
        assert [(r["metadata"]["uid"], r["spec"]) for r in had] == [(r["metadata"]["uid"], r["spec"]) for r in has]
    again.wait("the app at its old port", lambda: answers(port))
    again.wait("the client", lambda: again.get("app", "client")["status"].get("phase") == "Running")

    def readings() -> list[int]:
        lines = again.run("stream", "read", "line1", "--from", "0", "-o", "json").splitlines()
        return [json.loads(line)["payload"]["id"] for line in lines]

    again.wait("every acknowledged reading", lambda: acked <= set(readings()))
    got = readings()
    assert len(got) == len(set(got))
    assert got == sorted(got)


def test_a_second_up_of_one_directory_is_refused(systems: Callable[..., Any]) -> None:
    up = systems("a", "up")
    done = subprocess.run(up.process.args, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "--data" in done.stderr


def test_refusals_say_why_and_what_to_do(systems: Callable[..., Any], tmp_path: Path) -> None:
    up = systems("a", "up")
    up.apply({"kind": "Config", "metadata": {"name": "a"}, "spec": {"data": {"k": "v"}}})
    up.run("get", "app", "nothing", code=5)
    up.run("get", "nokind", code=5)
    up.apply({"kind": "App", "metadata": {"name": "x"}, "spec": {"proces": {"command": ["a"]}}}, code=3)
    assert "did you mean 'process'?" in up.stderr
    up.apply({"kind": "App", "metadata": {"name": "../../etc"}, "spec": {}}, code=3)
    assert "$.metadata.name" in up.stderr
    bad_file = {"process": {"command": ["a"]}, "files": [{"path": "../x", "config": "a", "key": "k"}]}
    up.apply({"kind": "App", "metadata": {"name": "x"}, "spec": bad_file}, code=3)
    assert "working folder" in up.stderr
    missing = {"process": {"command": ["a"]}, "files": [{"path": "x", "config": "nope", "key": "k"}]}
    up.apply({"kind": "App", "metadata": {"name": "x"}, "spec": missing}, code=3)
    assert "there is no Config 'nope'" in up.stderr
    stale = {"kind": "Config", "metadata": {"name": "a", "resourceVersion": "1"}, "spec": {"data": {"k": "w"}}}
    up.apply(stale, code=4)
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n" for p, c in zip("abcdef", "bcdefg", strict=True)
    )
    up.run("apply", "-f", "-", stdin=bomb, code=3)
    assert "aliases" in up.stderr
    up.run("apply", "-f", "-", stdin="kind: App\nkind: App\n", code=3)
    assert ":2:" in up.stderr and "twice" in up.stderr
    big = {"kind": "Config", "metadata": {"name": "big"}, "spec": {"data": {"k": "x" * 1_100_000}}}
    up.apply(big, code=3)
    context = up.context | {"token": "ew_wrong"}
    (tmp_path / "wrong.json").write_text(json.dumps(context))
    up.run("get", "apps", "--context", str(tmp_path / "wrong.json"), code=3)
    assert "token" in up.stderr
    (tmp_path / "away.json").write_text(json.dumps(context | {"hub_url": "https://127.0.0.1:1"}))
    up.run("get", "apps", "--context", str(tmp_path / "away.json"), code=6)


def test_a_secret_is_nowhere_but_where_it_is_used(systems: Callable[..., Any]) -> None:
    up = systems("a", "up")
    value = "s3cr3t-Zw9kPq71"
    up.apply({"kind": "Secret", "metadata": {"name": "db"}, "spec": {"data": {"password": value}}})
    app = {
        "process": {"command": ["python3", "-c", "import time; print('up', flush=True); time.sleep(600)"]},
        "files": [{"path": "pw", "secret": "db", "key": "password"}],
    }
    up.apply({"kind": "App", "metadata": {"name": "user"}, "spec": app}, "--wait")
    files = list((up.data / "nodes" / "plant-1" / "apps").rglob("pw"))
    assert [f.read_text() for f in files] == [value]
    assert files[0].stat().st_mode & 0o777 == 0o600
    for shown in (
        up.run("get", "secret", "db", "-o", "json"),
        up.run("get", "secret", "db", "-o", "yaml"),
        up.run("describe", "secret", "db"),
        up.run("describe", "app", "user"),
        up.run("events"),
        up.run("audit", "-o", "json"),
        up.run("get", "apps", "-o", "json"),
    ):
        assert value not in shown
    allowed = ("workloads.db", "replica.db", "jetstream", "apps")
    for path, _, content in up.contents(up.data):
        if not any(part.startswith(allowed) for part in path.parts):
            assert value.encode() not in content, path
    assert value not in up.log.read_text()
