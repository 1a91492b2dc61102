"""Roles on a running system: people and programs with tokens of their own, at the hub and at a cut site."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.scenarios.test_join import box

__all__ = ["box"]

System = Any


def call(system: System, token: str, method: str, path: str) -> tuple[int, Any]:
    context = system.context
    tls = ssl.create_default_context(cafile=context["ca_file"])
    request = urllib.request.Request(context["hub_url"] + path, method=method)  # noqa: S310 - our own hub
    request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, context=tls, timeout=20) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def test_tokens_of_roles_at_the_hub_and_at_a_cut_site(
    systems: Callable[..., System], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = systems("up", "up")
    system.apply({"kind": "Config", "metadata": {"name": "web"}, "spec": {"data": {"a": "1"}}})
    out = system.run("token", "create", "--role", "viewer", "--ttl", "1h", "--name", "eve")
    viewer = out.split()[-1]
    made = json.loads(system.run("token", "create", "--role", "operator", "--ttl", "1h", "--sites", "*", "-o", "json"))
    operator = made["token"]
    assert viewer.startswith("ew_eve_") and operator.startswith("ew_operator-")

    status, problem = call(system, viewer, "DELETE", "/api/v1/configs/web")
    assert (status, problem["verb"], problem["kind"], problem["name"]) == (403, "delete", "Config", "web")
    assert call(system, viewer, "GET", "/api/v1/configs/web")[0] == 200
    monkeypatch.setenv("EDGEWARD_TOKEN", viewer)
    system.run("delete", "config", "web", code=3)
    assert "eve (role viewer) may not delete Config web" in system.stderr
    assert system.run("whoami").startswith("eve: person, role viewer")
    assert system.run("can", "get", "config").strip() == "yes"
    assert system.run("can", "delete", "config", code=1).strip() == "no"
    system.run("token", "create", "--role", "viewer", code=3)
    monkeypatch.delenv("EDGEWARD_TOKEN")
    assert "eve" in system.run("token", "list")
    system.run("token", "create", "--role", "none", code=3)
    system.run("token", "create", code=2)

    # the operator's token reaches the site's node; the viewer's, made for the hub only, does not
    monkeypatch.setenv("EDGEWARD_TOKEN", operator)
    at = ("--at", "plant-1")
    env_app = {"kind": "App", "metadata": {"name": "web"}, "spec": {"process": {"command": ["sleep", "1000"]}}}
    system.wait("token at the node", lambda: "operator" in whoami(system, *at))
    system.apply({**env_app, "spec": {**env_app["spec"], "placement": {"site": "plant"}}}, *at)
    monkeypatch.setenv("EDGEWARD_TOKEN", viewer)
    system.run("get", "apps", *at, code=3)
    monkeypatch.delenv("EDGEWARD_TOKEN")
    assert system.run("whoami", *at).startswith("local: local, role admin")

    # what was done there and here is in the audits, which are whole; a cut end is seen, also after a restart
    system.wait("vouched for", lambda: "vouched" in system.run("audit", "verify"))
    system.wait("vouched for at the node", lambda: "vouched" in system.run("audit", "verify", *at))
    assert "operator" in system.run("audit", *at)

    # the hub hears of its use there
    def used() -> bool:
        return "plant-1" in system.get("accesstoken", made["name"])["status"].get("nodes", {})

    system.wait("use at the site", used)
    assert "never" not in next(line for line in system.run("token", "list").splitlines() if "operator" in line)

    # ended at the hub, it ends at the site
    system.run("token", "revoke", made["name"])
    assert call(system, operator, "GET", "/api/v1/configs")[0] == 401
    monkeypatch.setenv("EDGEWARD_TOKEN", operator)
    system.wait("gone from the node", lambda: not whoami(system, *at))
    monkeypatch.delenv("EDGEWARD_TOKEN")


def test_people_of_a_site_come_in_over_tls_with_a_token_while_it_is_cut_off(
    systems: Callable[..., System], box: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up = systems("hub", "up")
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    data = tmp_path / "one"
    data.mkdir(mode=0o700)
    (data / "node.json").write_text(json.dumps({"api": {"listen": f"127.0.0.1:{port}"}}))
    box("one", up.run("token", "create", "--site", "plant", "--node", "box-1", "--ttl", "24h").split()[-1])
    here = up.run("token", "create", "--role", "operator", "--sites", "plant", "--ttl", "1h", "--name", "here").split()[
        -1
    ]
    hub_only = up.run("token", "create", "--role", "admin", "--ttl", "1h").split()[-1]
    nodes = [{"name": "box-1", "site": "plant", "api": f"https://127.0.0.1:{port}"}]
    context = tmp_path / "site.json"
    context.write_text(json.dumps({"nodes": nodes, "ca_file": up.context["ca_file"]}))

    def at(*args: str, token: str, code: int = 0) -> str:
        env = {**os.environ, "EDGEWARD_TOKEN": token, "EDGEWARD_CONTEXT": str(context)}
        argv = [sys.executable, "-m", "edgeward", *args, "--at", "box-1"]
        done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=60)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def open_() -> bool:
        try:
            return "operator" in at("whoami", token=here)
        except AssertionError:
            return False

    up.wait("the site knows the token", open_)
    assert "the token is wrong" in at("get", "apps", token=hub_only, code=3)
    assert "token" in at("get", "apps", token="", code=3)
    assert "may not" in at("get", "accesstokens", token=here, code=3)
    up.stop()
    assert "here: person, role operator" in at("whoami", token=here), "while the hub is away"
    assert "box-1" in at("get", "nodes", token=here)
    # who does not trust the hub's CA trusts no node; who asks for another node does not take this one for it
    nodes[0]["name"] = "box-2"
    context.write_text(json.dumps({"nodes": nodes, "ca_file": up.context["ca_file"]}))
    done = subprocess.run(
        [sys.executable, "-m", "edgeward", "whoami", "--at", "box-2"], capture_output=True, text=True, timeout=60,
        env={**os.environ, "EDGEWARD_TOKEN": here, "EDGEWARD_CONTEXT": str(context)},
    )  # fmt: skip
    assert (done.returncode, "certificate" in done.stderr) == (6, True)


def vouched(system: System, *at: str) -> bool:
    found = json.loads(system.run("audit", "verify", "-o", "json", *at))
    return bool(found.get("vouched") == found["last"])


def test_an_audit_that_was_cut_off_is_seen_at_hub_and_node(systems: Callable[..., System]) -> None:
    system = systems("up", "up")
    at = ("--at", "plant-1")
    for n in range(3):
        system.apply({"kind": "Config", "metadata": {"name": f"c{n}"}, "spec": {"data": {"a": "1"}}}, *at)
    system.wait("reported", lambda: system.get("node", "plant-1")["status"].get("audit", {}).get("last", 0) >= 3)
    for where, db in (((), system.data / "hub" / "audit.db"), (at, system.data / "nodes" / "plant-1" / "audit.db")):
        system.wait("the last one is there", lambda where=where: " c2 " in system.run("audit", *where))
        system.wait("all are vouched for", lambda where=where: vouched(system, *where))
        with contextlib.closing(sqlite3.connect(db)) as forger, forger:
            forger.execute("DELETE FROM chain WHERE seq=(SELECT max(seq) FROM chain)")
        out = system.run("audit", "verify", "-o", "json", *where, code=3)
        assert json.loads(out)["broken"] and "cut off" in out


def whoami(system: System, *at: str) -> str:
    try:
        return str(system.run("whoami", *at))
    except AssertionError:
        return ""
