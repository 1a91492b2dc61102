"""Foreign files through the door that `apply`, `diff` and `delete` use: read, translated, validated, in order."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.imports import test_compose, test_kube

from edgeward.cli.manifests import read_declared
from edgeward.cli.session import Session
from edgeward.core.errors import Invalid


def keys(file: Path, session: Session | None = None, told: list[str] | None = None) -> list[str]:
    words = told if told is not None else []
    return [
        f"{d.key.kind}/{d.key.namespace}/{d.key.name}"
        for d in read_declared(session or Session(), [str(file)], told=words.append)
    ]


def test_a_compose_file_with_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {**test_compose.FILES, "nginx.conf": "events {}\n", ".env": "TAG=7\nWHO=dotenv\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "html").mkdir()
    file = tmp_path / "docker-compose.yml"
    file.write_text(test_compose.SHOP)
    monkeypatch.setenv("WHO", "shell")
    told: list[str] = []
    declared = read_declared(Session(), [str(file)], told=told.append)
    assert [f"{d.key.kind}/{d.key.namespace}/{d.key.name}" for d in declared] == [
        "Config/default/web-nginx-conf", "Config/default/banner", "Secret/default/db-password",
        "App/default/web", "App/default/db", "App/default/once", "Service/default/web", "Service/default/db",
    ]  # fmt: skip
    apps = {d.name: d.resource.spec for d in declared if d.kind.name == "App"}
    assert apps["web"].container.image.endswith("web:7") and apps["once"].container.args[1] == "shell"
    assert all(line.startswith(str(file) + ":") and "not taken over" in line for line in told) and len(told) == 6


def test_kubernetes_documents_in_several_files(tmp_path: Path) -> None:
    for n, text in enumerate(test_kube.SHOP.split("---\n")):
        (tmp_path / f"{n}.yaml").write_text(text)
    found = keys(tmp_path)
    assert found == [
        "Namespace/_/shop", "Config/shop/web-conf", "Config/shop/web-env", "Secret/shop/db", "Secret/shop/web-env",
        "App/shop/web", "App/shop/clean", "Service/shop/web", "Service/shop/web-metrics",
    ]  # fmt: skip


def test_the_namespace_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("{apiVersion: v1, kind: ConfigMap, metadata: {name: a}, data: {x: y}}")
    assert keys(file, Session(namespace_given="prod")) == ["Config/prod/a"]
    file.write_text("{apiVersion: v1, kind: ConfigMap, metadata: {name: a, namespace: other}, data: {x: y}}")
    with pytest.raises(Invalid, match="names namespace 'other'"):
        keys(file, Session(namespace_given="prod"))


def test_an_error_of_what_was_made_points_to_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text("services:\n  ok: {image: a}\n  bad:\n    image: a\n    environment: {1X: y}\n")
    with pytest.raises(Invalid) as e:
        keys(file)
    assert (e.value.file, e.value.line) == (str(file), 3)


def test_a_file_that_is_too_large_is_named(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * (2 << 20))
    file = tmp_path / "compose.yaml"
    file.write_text("services: {a: {image: x}}\nconfigs: {c: {file: big}}\n")
    assert keys(file) == ["App/default/a"]  # nobody uses it
    file.write_text("services: {a: {image: x, configs: [c]}}\nconfigs: {c: {file: big}}\n")
    with pytest.raises(Invalid, match="has more than"):
        keys(file)
