"""What an App and a Service may say; every refusal names the resource, the field and mostly the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.core.errors import Invalid
from edgeward.core.registry import kinds
from edgeward.core.resource import decode
from edgeward.hub.kinds import load
from edgeward.workloads.spec import BUILT_IN, check_path, substitute

load()

RUN = {"command": ["run"]}
HTTP = {"name": "http", "env": "PORT"}


def app(process: Any = RUN, **spec: Any) -> Any:
    doc = {"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": "web"}}
    return decode(doc | {"spec": ({"process": process} if process else {}) | spec})


@pytest.mark.parametrize(
    ("spec", "field", "says"),
    [
        ({"process": None}, "$.spec.process", r"no runtime is given \(add process"),
        ({"process": {"command": []}}, "$.spec.process.command", r"is empty \(at least 1"),
        ({"proces": {}}, "$.spec.proces", "did you mean 'process'"),
        ({"replicas": -1}, "$.spec.replicas", "too small .at least 0"),
        ({"replicas": 1001}, "$.spec.replicas", "too large .at most 1000"),
        ({"ports": [HTTP, HTTP]}, "$.spec.ports[0].name", r"'http' is given twice \(rename one"),
        ({"ports": [{"name": "Http", "env": "P"}]}, "$.spec.ports[0].name", "lower-case letters.*at most 32"),
        ({"ports": [{"name": "http", "env": "1P"}]}, "$.spec.ports[0].env", "is no variable name"),
        ({"ports": [{"name": "http"}]}, "$.spec.ports[0].env", "needs env .name the variable"),
        ({"ports": [{"name": "http", "port": 0}]}, "$.spec.ports[0].port", "too small .at least 1"),
        ({"ports": [{"name": "http", "port": 65536}]}, "$.spec.ports[0].port", "too large .at most 65535"),
        ({"health": {"http": {"port": "x"}}}, "$.spec.health.http.port", r"no port 'x' \(ports: none"),
        ({"ports": [HTTP], "health": {"tcp": {"port": "x"}}}, "$.spec.health.tcp.port", "ports: http"),
        ({"ports": [HTTP], "health": {"http": {"port": "http", "path": "a"}}}, "$.spec.health.http.path", "must match"),
        (
            {"ports": [HTTP], "health": {"tcp": {"port": "http"}, "exec": {"command": ["x"]}}},
            "$.spec.health",
            r"more than one check is given: tcp, exec \(keep one",
        ),
        ({"health": {"interval": "soon"}}, "$.spec.health.interval", "no duration"),
        ({"health": {"interval": 0}}, "$.spec.health.interval", "more than 0"),
        ({"health": {"timeout": "0s"}}, "$.spec.health.timeout", "more than 0"),
        ({"health": {"startup": -1}}, "$.spec.health.startup", "is negative"),
        ({"health": {"window": float("nan")}}, "$.spec.health.window", "is no duration"),
        ({"stop": {"grace": float("inf")}}, "$.spec.stop.grace", "is no duration"),
        ({"stop": {"signal": "KILL"}}, "$.spec.stop.signal", "one of: TERM, INT"),
        ({"restart": {"max": -5}}, "$.spec.restart.max", "is negative"),
        ({"limits": {"memory": 4095}}, "$.spec.limits.memory", "4095 bytes are too few .at least 4Ki"),
        ({"limits": {"memory": "9" * 400}}, "$.spec.limits.memory", "is no size"),
        ({"limits": {"memory": "1.5X"}}, "$.spec.limits.memory", "no size"),
        ({"limits": {"cpu": 0}}, "$.spec.limits.cpu", "more than 0"),
        ({"limits": {"pids": 0}}, "$.spec.limits.pids", "too small .at least 1"),
        ({"logs": {"bytes": "1Ki"}}, "$.spec.logs.bytes", "1024 bytes are too few"),
        ({"files": [{"path": "a", "key": "k"}]}, "$.spec.files[0]", "exactly one of the two"),
        ({"files": [{"path": "a", "key": "k", "config": "c", "secret": "s"}]}, "$.spec.files[0]", "exactly one"),
        ({"files": [{"path": "../a", "key": "k", "config": "c"}]}, "$.spec.files[0].path", "leaves the working folder"),
        ({"envFrom": [{"config": "a"}, {}]}, "$.spec.envFrom[1]", "exactly one"),
        ({"process": RUN | {"env": {"A-B": "x"}}}, "$.spec.process.env", "'A-B' is no variable name"),
        ({"dependsOn": ["db", "web"]}, "$.spec.dependsOn", "cannot wait for itself"),
        ({"process": {"command": ["x", "${PROT}"]}}, "$.spec.process.command[1]", r"\$\{PROT\} is not known \(known"),
        ({"process": RUN | {"args": ["${}"]}}, "$.spec.process.args[0]", r"write \$\$ for a plain \$"),
    ],
)
def test_refusals(spec: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(Invalid, match=says) as caught:
        app(**spec)
    assert (caught.value.resource, caught.value.field) == ("App/web", field)


def test_what_is_taken() -> None:
    assert app().spec.replicas == 1
    whole = app(
        {"command": ["x", "${PORT}", "$$HOME", "${EDGEWARD_NODE}", "$x"], "args": ["${EDGEWARD_SERVICE_DB}", "${A}"],
         "env": {"A": "1", "_b2": "2"}},
        replicas=0,
        ports=[HTTP, {"name": "fixed", "port": 65535}],
        health={"http": {"port": "http", "path": "/x?y"}, "interval": "1m30s", "timeout": 0.5, "window": 0},
        limits={"memory": "4Ki", "cpu": 0.01, "pids": 1},
        files=[{"path": "a/b", "key": "k", "secret": "s"}],
        dependsOn=["db"],
        placement={"site": "plant"},
    )  # fmt: skip
    refs = kinds.get("App").refs(whole)
    assert [(r.kind, r.namespace, r.name, r.path) for r in refs] == [
        ("Site", "_", "plant", "$.spec.placement.site"),
        ("Secret", "default", "s", "$.spec.files[0].secret"),
    ]
    # with envFrom, names are known only where the settings are
    from_config = app({"command": ["${ANY}"]}, envFrom=[{"config": "c"}])
    assert [(r.kind, r.path) for r in kinds.get("App").refs(from_config)] == [("Config", "$.spec.envFrom[0].config")]


@pytest.mark.parametrize("path", ["", ".", "./", "/", "/etc/x", "..", "a/../../b", "a/..", "a\0b", "a\\b", "../" * 60])
def test_paths_that_leave_the_working_folder(path: str) -> None:
    with pytest.raises(Invalid, match=r"^\$\.f: .* \(write a relative path without '..'\)$"):
        check_path(path, "$.f")


@pytest.mark.parametrize("path", ["a", "a/b.txt", ".hidden", "..a", "a..", "./a", "é"])
def test_paths_that_stay(path: str) -> None:
    check_path(path, "$.f")


@settings(deadline=None)
@given(st.lists(st.sampled_from(["$$", "${A}", "$", "{", "}", "x", "$A"]), max_size=8))
def test_substitution_replaces_names_and_leaves_the_rest(parts: list[str]) -> None:
    """A value that looks like a name is not replaced again."""
    text = "|".join(parts)
    values = {"$$": "$", "${A}": "${B}"}
    assert substitute(text, {"A": "${B}"}, "$.x") == "|".join(values.get(p, p) for p in parts)


def test_an_unknown_name_tells_the_known_ones() -> None:
    env = dict.fromkeys([*BUILT_IN, "EDGEWARD_SERVICE_DB"], "")
    with pytest.raises(Invalid, match="EDGEWARD_APP") as caught:
        substitute("a ${NOPE}", env, "$.x")
    assert "SERVICE" not in caught.value.remedy
    assert caught.value.field == "$.x"


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"port": "http"}, "$.spec.app"),
        ({"app": "", "port": "http"}, "$.spec.app"),
        ({"app": "web"}, "$.spec.port"),
        ({"app": "web", "port": "http", "scope": "world"}, "$.spec.scope"),
    ],
)
def test_services(spec: dict[str, Any], field: str) -> None:
    doc = {"apiVersion": "edgeward/v1", "kind": "Service", "metadata": {"name": "s", "namespace": "n"}}
    with pytest.raises(Invalid) as caught:
        decode(doc | {"spec": spec})
    assert (caught.value.resource, caught.value.field) == ("Service/s", field)
    good = decode(doc | {"spec": {"app": "web", "port": "http"}})
    (ref,) = kinds.get("Service").refs(good)
    assert (ref.kind, ref.namespace, ref.name) == ("App", "n", "web")


def test_columns_and_examples() -> None:
    d = app(placement={"site": "plant"}).document() | {
        "status": {"phase": "Degraded", "instances": [{"phase": "Running", "node": "b"}, {"phase": "X", "node": "a"}]}
    }
    assert {c.title: c.value(d) for c in kinds.get("App").columns} == {
        "PHASE": "Degraded", "READY": "1/2", "SITE": "plant", "VERSION": "", "NODES": "a,b", "MESSAGE": "",
    }  # fmt: skip
    for name in ("App", "Service"):
        decode(yaml.safe_load(kinds.get(name).example))


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"scope": "any", "allowFrom": ["berlin"]}, "$.spec.allowFrom"),
        ({"scope": "node", "allowFrom": ["berlin"]}, "$.spec.allowFrom"),
        ({"allowFrom": ["Berlin!"]}, "$.spec.allowFrom[0]"),
    ],
)
def test_only_what_is_closed_is_opened_to_some(spec: dict[str, Any], field: str) -> None:
    doc = {"apiVersion": "edgeward/v1", "kind": "Service", "metadata": {"name": "web"}}
    with pytest.raises(Invalid) as caught:
        decode(doc | {"spec": {"app": "web", "port": "http", **spec}})
    assert caught.value.field == field


def test_other_sites_are_no_business_of_a_site() -> None:
    doc = {"apiVersion": "edgeward/v1", "kind": "Service", "metadata": {"name": "web"}}
    one = decode(doc | {"spec": {"app": "web", "port": "http", "allowFrom": ["berlin"]}})
    kind = kinds.get("Service")
    assert [(r.kind, r.name) for r in kind.refs(one)] == [("App", "web"), ("Site", "berlin")]
    assert [(r.kind, r.name) for r in kind.refs(kind.at(one, "plant"))] == [("App", "web")]
    assert "allowFrom" in kind.hub_fields
