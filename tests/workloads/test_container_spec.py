"""What a container may be said to be; every refusal names the field and mostly the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from edgeward.core.errors import Invalid
from edgeward.core.resource import decode
from edgeward.hub.kinds import load
from edgeward.workloads.container_spec import image_problem
from edgeward.workloads.spec import runtime_of

load()

HEX = "0123456789abcdef" * 4


def app(container: Any, **spec: Any) -> Any:
    doc = {"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": "web"}}
    return decode(doc | {"spec": {"container": container} | spec})


def test_what_is_right() -> None:
    found = app(
        {"image": "a", "ports": {"http": 80}, "volumes": [{"name": "d", "path": "/d"}], "args": ["$$HOME ${X}"],
         "env": {"X": "1"}},
        ports=[{"name": "http"}],
    )  # fmt: skip
    assert runtime_of(found.spec) == "container"
    assert app({"archive": f"sha256:{HEX}"}).spec.container.image == ""


@pytest.mark.parametrize(
    ("container", "field", "says"),
    [
        ({}, "image", r"no image is given \(e.g."),
        ({"image": "-v"}, "image", r"'-v' is no image \(write"),
        ({"image": "a b"}, "image", "is no image"),
        ({"image": "a\n"}, "image", "is no image"),
        ({"archive": "box.tar"}, "archive", r"is no digest.*let `edgeward apply` upload"),
        ({"archive": f"sha256:{HEX}", "pull": "always"}, "pull", "an archive is not pulled"),
        ({"image": "a", "pull": "sometimes"}, "pull", "one of"),
        ({"image": "a", "user": "--privileged"}, "user", "is no user"),
        ({"image": "a", "workingDir": "w"}, "workingDir", "no absolute path"),
        ({"image": "a", "filesAt": "etc"}, "filesAt", "no absolute path"),
        ({"image": "a", "volumes": [{"path": "/d"}]}, "volumes[0]", r"give a name or a hostPath \(exactly"),
        ({"image": "a", "volumes": [{"path": "/d", "name": "x", "hostPath": "/x"}]}, "volumes[0]", "exactly one"),
        ({"image": "a", "volumes": [{"path": "/d", "name": "../x"}]}, "volumes[0].name", "no volume's name"),
        ({"image": "a", "volumes": [{"path": "/", "name": "x"}]}, "volumes[0].path", "the container's own"),
        ({"image": "a", "volumes": [{"path": "/a,ro=false", "name": "x"}]}, "volumes[0].path", "no absolute path"),
        ({"image": "a", "volumes": [{"path": "/d", "hostPath": "/a/../b"}]}, "volumes[0].hostPath", "no absolute path"),
        (
            {"image": "a", "volumes": [{"path": "/d", "name": "x"}, {"path": "/d/", "name": "y"}]},
            "volumes[1].path",
            "is given twice",
        ),
        ({"image": "a", "ports": {"nope": 80}}, "ports", r"no port 'nope' \(ports: http"),
        ({"image": "a", "ports": {"http": 0}}, "ports.http", "too small"),
        ({"image": "a", "network": "host", "ports": {"http": 80}}, "ports", "listens on the App's ports themselves"),
        ({"image": "a", "args": ["$HOME ${NO}"]}, "args[0]", r"\$\{NO\} is not known"),
        ({"image": "a", "env": {"A-B": "x"}}, "env", "is no variable name"),
        ({"image": "a", "imag": "b"}, "imag", "did you mean 'image'"),
    ],
)
def test_what_is_refused(container: Any, field: str, says: str) -> None:
    with pytest.raises(Invalid, match=says) as caught:
        app(container, ports=[{"name": "http", "env": "PORT"}])
    assert (caught.value.resource, caught.value.field) == ("App/web", f"$.spec.container.{field}")


def test_one_runtime() -> None:
    with pytest.raises(Invalid, match=r"two runtimes are given \(keep process or container"):
        app({"image": "a"}, process={"command": ["x"]})


@pytest.mark.parametrize(
    ("image", "good"),
    [
        ("nginx", True),
        ("nginx:1.27-alpine", True),
        ("registry.example.org/library/nginx@sha256:" + HEX, True),
        ("REG.example:5000/a/b_c.d-e:V1.2@sha256:" + HEX, True),
        ("sha256:" + HEX, True),
        ("localhost/a__b", True),
        ("", False),
        ("Nginx", False),
        ("a/", False),
        ("/a", False),
        ("a:", False),
        ("a@sha256:12", False),
        ("a;reboot", False),
        ("a" + "-" * 5000 + "!", False),
    ],
)
def test_names_of_images(image: str, good: bool) -> None:
    assert (image_problem(image) == "") is good
