"""Roles on a running system: people and programs with tokens of their own, at the hub and at a cut site."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

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

    # ended at the hub, it ends at the site
    system.run("token", "revoke", made["name"])
    assert call(system, operator, "GET", "/api/v1/configs")[0] == 401
    monkeypatch.setenv("EDGEWARD_TOKEN", operator)
    system.wait("gone from the node", lambda: not whoami(system, *at))
    monkeypatch.delenv("EDGEWARD_TOKEN")


def whoami(system: System, *at: str) -> str:
    try:
        return str(system.run("whoami", *at))
    except AssertionError:
        return ""
