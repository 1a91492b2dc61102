"""get, describe, explain: tables, documents, watches, and no secret anywhere it was not asked for."""

from __future__ import annotations

import json
import signal
from typing import Any

import yaml

Program = Any

SECRET = {"kind": "Secret", "metadata": {"name": "db"}, "spec": {"data": {"password": "hunter2"}}}


def web(name: str = "web", **labels: str) -> dict[str, Any]:
    return {
        "kind": "App",
        "metadata": {"name": name, "labels": labels},
        "spec": {"placement": {"site": "plant"}, "process": {"command": ["true"]}},
    }


def test_table_has_no_colour_and_no_trailing_blanks_in_a_pipe(edgeward: Program, hub: Any) -> None:
    hub.put(web("a-rather-long-name-" + "x" * 40), status={"phase": "Running"})
    hub.put(web(), status={"phase": "Failed"})
    out = edgeward("get", "apps", TERM="xterm-256color", COLUMNS="20").stdout
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].startswith("NAME") and "AGE" in lines[0]
    assert "x" * 40 in out and "Failed" in lines[2]
    assert all(line == line.rstrip() for line in lines)


def test_one_is_the_resource_several_are_items(edgeward: Program, hub: Any) -> None:
    stored = hub.put(web(), status={"phase": "Running", "instances": [{"node": "plant-1"}]})
    assert json.loads(edgeward("get", "app", "web", "-o", "json").stdout) == stored
    assert json.loads(edgeward("get", "app/web", "-o", "json").stdout) == stored
    assert yaml.safe_load(edgeward("get", "app/web", "-o", "yaml").stdout) == stored
    assert json.loads(edgeward("get", "apps", "-o", "json").stdout) == {"items": [stored]}
    assert json.loads(edgeward("get", "nodes", "-o", "json").stdout) == {"items": []}
    assert edgeward("get", "apps", "-o", "name").stdout == "app/web\n"
    done = edgeward("get", "nodes")
    assert done.stdout == "" and "no nodes" in done.stderr


def test_several_kinds_and_several_names(edgeward: Program, hub: Any) -> None:
    hub.put(web())
    hub.put(web("api"))
    hub.put({"kind": "Node", "metadata": {"name": "plant-1"}, "spec": {"site": "plant"}})
    out = edgeward("get", "apps,nodes").stdout
    assert "app/web" in out and "node/plant-1" in out
    done = edgeward("get", "app", "web", "gone", "api", "-o", "name", code=5)
    assert done.stdout == "app/web\napp/api\n"
    assert "gone" in done.stderr


def test_selectors_pages_and_namespaces(edgeward: Program, hub: Any) -> None:
    hub.page = 2
    for i in range(5):
        hub.put(web(f"w{i}", tier="a" if i % 2 else "b"))
    other = web("far")
    other["metadata"]["namespace"] = "other"
    hub.put(other)
    assert edgeward("get", "apps", "-o", "name").stdout.split() == [f"app/w{i}" for i in range(5)]
    assert edgeward("get", "apps", "-l", "tier=a", "-o", "name").stdout.split() == ["app/w1", "app/w3"]
    assert edgeward("-n", "other", "get", "apps", "-o", "name").stdout == "app/far\n"
    out = edgeward("get", "apps", "-A").stdout
    assert out.startswith("NAMESPACE") and "other" in out and "w4" in out
    assert "fieldSelector=status.phase%3DRunning" in _last(edgeward, hub, "get", "apps", "-f", "status.phase=Running")


def _last(edgeward: Program, hub: Any, *args: str) -> str:
    edgeward(*args)
    return str(hub.requests[-1][1])


def test_secrets_are_hidden_everywhere(edgeward: Program, hub: Any) -> None:
    hub.put(SECRET)
    for args in (
        ("get", "secrets"),
        ("get", "secrets", "-o", "wide"),
        ("get", "secret", "db", "-o", "json"),
        ("get", "secrets", "-o", "yaml"),
        ("describe", "secret", "db"),
    ):
        done = edgeward(*args)
        assert "hunter2" not in done.stdout + done.stderr, args
    shown = json.loads(edgeward("get", "secret/db", "-o", "json").stdout)
    assert shown["spec"]["data"] == {"password": "***"}
    assert "hunter2" in edgeward("get", "secret/db", "-o", "json", "--show-secrets").stdout


def test_an_override_of_a_secret_is_hidden_too(edgeward: Program, hub: Any) -> None:
    hub.put(SECRET)
    spec = {
        "target": {"kind": "Secret", "name": "db", "namespace": "default"},
        "site": "plant",
        "patch": {"data": {"password": "hunter3"}},
    }
    hub.put({"kind": "Override", "metadata": {"name": "secret-db-plant"}, "spec": spec})
    for args in (("get", "overrides", "-o", "json"), ("override", "list"), ("describe", "secret", "db")):
        out = edgeward(*args).stdout
        assert "hunter" not in out
    assert "secret-db-plant" in edgeward("describe", "secret", "db").stdout


def test_control_characters_do_not_reach_the_terminal(edgeward: Program, hub: Any) -> None:
    hub.put(web(), status={"phase": "\x1b]0;owned\x07"})
    assert "\x1b" not in edgeward("get", "apps").stdout + edgeward("describe", "app", "web").stdout


def test_watch_shows_changes_from_the_list_on(edgeward: Program, hub: Any) -> None:
    hub.put(web(), status={"phase": "Starting"})
    running = edgeward.start("get", "app", "web", "-w", "-o", "json")
    first = json.loads(running.stdout.readline())
    hub.put(web("other"))
    hub.set_status("App", "default", "web", {"phase": "Running"})
    second = json.loads(running.stdout.readline())
    running.kill()
    running.communicate()
    assert (first["type"], first["object"]["status"]["phase"]) == ("ADDED", "Starting")
    assert (second["type"], second["object"]["status"]["phase"]) == ("MODIFIED", "Running")


def test_describe(edgeward: Program, hub: Any) -> None:
    hub.put(web(tier="a"), status={"phase": "Running", "instances": [{"node": "plant-1", "phase": "Running"}]})
    hub.extra["/api/v1/events"] = {
        "items": [
            {"seq": 1, "time": "2026-01-01T00:00:00Z", "resource": "App/web", "reason": "Started", "message": "v1 up"},
            {"seq": 2, "time": "2026-01-01T00:00:00Z", "resource": "App/api", "reason": "Started", "message": "not me"},
        ]
    }
    out = edgeward("describe", "app", "web").stdout
    assert "tier=a" in out and "- node: plant-1" in out and "v1 up" in out and "not me" not in out
    hub.put({**web(), "spec": {"process": {"command": ["sh", "-c", "a, b"]}}})
    assert 'command: [sh, -c, "a, b"]' in edgeward("describe", "app", "web").stdout, "entries stay apart"


def test_what_is_no_kind_names_its_own_command(edgeward: Program, hub: Any) -> None:
    for word, command in (("events", "edgeward events"), ("journal", "edgeward journal"), ("streams", "stream list")):
        assert command in edgeward("get", word, code=5).stderr


def test_explain_comes_from_the_kind(edgeward: Program) -> None:
    assert "FIELDS" in edgeward("explain", "app").stdout
    assert "process" in edgeward("explain", "app.spec").stdout
    assert json.loads(edgeward("explain", "app.replicas", "-o", "json").stdout)["path"] == "spec.replicas"
    assert "labels" in edgeward("explain", "app.metadata").stdout
    assert "its fields" in edgeward("explain", "app.spec.nonsense", code=5).stderr


def test_watch_goes_on_over_a_restart_of_the_server(edgeward: Program, hub: Any) -> None:
    hub.put(web("web"))
    running = edgeward.start("get", "apps", "-w", "-o", "name")
    assert running.stdout.readline() == "app/web\n"
    hub.put(web("one"))
    assert running.stdout.readline() == "app/one\n"
    hub.down.set()
    assert "trying again until Ctrl-C" in running.stderr.readline()
    hub.put(web("two"))
    hub.down.clear()
    assert running.stderr.readline() == "connected again\n"
    assert running.stdout.readline() == "app/two\n", "what came meanwhile, and nothing of before"
    hub.put(web("three"))
    assert running.stdout.readline() == "app/three\n"
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert (running.returncode, out) == (130, ""), err


def test_a_watch_whose_revision_is_gone_lists_anew_and_tells_the_difference(edgeward: Program, hub: Any) -> None:
    for name in ("web", "old", "same"):
        hub.put(web(name))
    running = edgeward.start("get", "apps", "-w", "-o", "json")
    shown = [json.loads(running.stdout.readline()) for _ in range(3)]
    assert {s["object"]["metadata"]["name"] for s in shown} == {"web", "old", "same"}
    hub.down.set()
    assert "trying again" in running.stderr.readline()
    with hub.lock:
        hub.tell("DELETED", hub.docs.pop(("App", "default", "old")))
    hub.put(web("new"))
    hub.set_status("App", "default", "web", {"phase": "Running"})
    hub.history.clear()
    hub.compacted = hub.revision
    hub.down.clear()
    assert "listed anew" in running.stderr.readline()
    told = [json.loads(running.stdout.readline()) for _ in range(3)]
    assert [(t["type"], t["object"]["metadata"]["name"]) for t in told] == [
        ("DELETED", "old"),
        ("ADDED", "new"),
        ("MODIFIED", "web"),
    ]
    hub.put(web("new"))
    assert json.loads(running.stdout.readline())["type"] == "MODIFIED"
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=120)
    assert running.returncode == 130


def test_a_token_that_ends_ends_the_watch(edgeward: Program, hub: Any) -> None:
    hub.put(web("web"))
    running = edgeward.start("get", "apps", "-w", "-o", "name")
    assert running.stdout.readline() == "app/web\n"
    hub.token = "another"
    hub.down.set()
    running.stderr.readline()
    hub.down.clear()
    _, err = running.communicate(timeout=120)
    assert running.returncode == 3, err
    assert "token" in err
