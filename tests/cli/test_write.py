"""apply, delete, edit, label, diff: what is written, on which revision, and what a refusal says."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

Program = Any

WEB = """\
apiVersion: edgeward/v1
kind: App
metadata: {name: web, labels: {tier: a}}
spec:
  placement: {site: plant}
  process: {command: [sleep, "1"]}
"""
CONFIG = """\
apiVersion: edgeward/v1
kind: Config
metadata: {name: settings}
spec: {data: {a: "1"}}
"""
SECRET = """\
apiVersion: edgeward/v1
kind: Secret
metadata: {name: db}
spec: {data: {password: hunter2, user: joe}}
"""
NAMESPACE = "apiVersion: edgeward/v1\nkind: Namespace\nmetadata: {name: shop}\n"


def writes(hub: Any) -> list[tuple[str, str]]:
    return [(m, p) for m, p, _ in hub.requests if m != "GET"]


def test_apply_creates_configures_and_leaves_alone(edgeward: Program, hub: Any, tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(WEB)
    assert edgeward("apply", "-f", str(file)).stdout == "app/web created\n"
    assert edgeward("apply", "-f", str(file)).stdout == "app/web unchanged\n"
    file.write_text(WEB.replace("tier: a", "tier: b"))
    assert edgeward("apply", "-f", str(file)).stdout == "app/web configured\n"
    assert hub.docs["App", "default", "web"]["metadata"]["labels"] == {"tier": "b"}
    assert [m for m, _ in writes(hub)] == ["POST", "PUT"]


def test_apply_from_stdin_in_an_order_that_works(edgeward: Program, hub: Any) -> None:
    done = edgeward("apply", "-f", "-", "-n", "shop", stdin=f"{WEB}---\n{CONFIG}---\n{NAMESPACE}")
    assert done.stdout == "namespace/shop created\nconfig/settings created\napp/web created\n"
    assert ("App", "shop", "web") in hub.docs


def test_apply_a_directory(edgeward: Program, hub: Any, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.yaml").write_text(WEB)
    (tmp_path / "d" / "2.yaml").write_text(CONFIG)
    assert len(edgeward("apply", "-f", str(tmp_path / "d"), "-o", "name").stdout.splitlines()) == 2


def test_nothing_is_written_when_one_document_is_invalid(edgeward: Program, hub: Any, tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(f"{CONFIG}---\n{WEB.replace('process', 'proces')}")
    err = edgeward("apply", "-f", str(file), code=3).stderr
    assert "all.yaml" in err and "App/web" in err and "proces" in err and "did you mean" in err
    assert hub.requests == []
    file.write_text(f"{WEB}---\n{WEB}")
    assert "twice" in edgeward("apply", "-f", str(file), code=3).stderr


def test_a_missing_file_is_named(edgeward: Program, hub: Any, tmp_path: Path) -> None:
    running = edgeward.start("apply", "-f", str(tmp_path / "gone.yaml"))
    out, err = running.communicate(timeout=120)
    # which code is for core/manifest.py to say
    assert running.returncode in (1, 3, 5) and out == ""
    assert "gone.yaml" in err and "Traceback" not in err


def test_dry_run_writes_nothing(edgeward: Program, hub: Any) -> None:
    done = edgeward("apply", "--dry-run", "-n", "shop", "-f", "-", stdin=f"{NAMESPACE}---\n{WEB}")
    assert done.stdout == "namespace/shop created (dry run)\napp/web created (dry run)\n"
    assert hub.docs == {}
    assert all("dryRun=true" in p for _, p in writes(hub))


def test_a_lost_race_is_tried_once_more_on_what_is_there_now(edgeward: Program, hub: Any) -> None:
    edgeward("apply", "-f", "-", stdin=WEB)
    doc = hub.docs["App", "default", "web"]

    def race(_: Any) -> None:
        hub.before_put = None
        hub.put({**doc, "spec": {"placement": {"site": "shop"}}})

    hub.before_put = race
    assert edgeward("apply", "-f", "-", stdin=WEB.replace("plant", "ship")).stdout == "app/web configured\n"
    assert hub.docs["App", "default", "web"]["spec"]["placement"] == {"site": "ship"}


def test_a_revision_in_the_file_is_insisted_on(edgeward: Program, hub: Any) -> None:
    edgeward("apply", "-f", "-", stdin=WEB)
    stale = WEB.replace("{name: web,", '{name: web, resourceVersion: "1",')
    err = edgeward("apply", "-f", "-", stdin=stale, code=4).stderr
    assert "changed meanwhile" in err
    assert len([m for m, _ in writes(hub) if m == "PUT"]) == 1


def test_one_refusal_does_not_stop_the_others(edgeward: Program, hub: Any) -> None:
    # the server's word decides the exit code
    hub.refuse["settings"] = {
        "status": 422,
        "title": "Invalid",
        "detail": "is too odd",
        "field": "$.spec.data",
        "remedy": "make it even",
    }
    done = edgeward("apply", "-f", "-", stdin=f"{WEB}---\n{CONFIG}", code=3)
    assert done.stdout == "app/web created\n"
    assert "$.spec.data: is too odd (make it even)" in done.stderr


def test_wait_until_running_or_failed(edgeward: Program, hub: Any) -> None:
    file = edgeward.home / "web.yaml"
    file.write_text(WEB)
    for phase, code in (("Running", 0), ("Failed", 1)):
        hub.docs.clear()
        running = edgeward.start("apply", "--wait", "-f", str(file), "--timeout", "100s")
        assert running.stdout.readline() == "app/web created\n"
        hub.set_status("App", "default", "web", {"phase": "Starting"})
        hub.set_status("App", "default", "web", {"phase": phase})
        _, err = running.communicate(timeout=120)
        assert running.returncode == code, err
        assert phase in err
    hub.docs.clear()
    err = edgeward("apply", "--wait", "-f", str(file), "--timeout", "1s", code=1).stderr
    assert "in time" in err and "edgeward describe app web" in err


def test_wait_for_an_export_to_flow(edgeward: Program, hub: Any) -> None:
    file = edgeward.home / "line.yaml"
    file.write_text(
        "apiVersion: edgeward/v1\nkind: Export\nmetadata: {name: line1}\nspec:\n  from: {mqtt: sensors/#}\n"
        "  to: {hub: {stream: line1}}\n"
    )
    for phase, code in (("Flowing", 0), ("Failed", 1)):
        hub.docs.clear()
        running = edgeward.start("apply", "--wait", "-f", str(file), "--timeout", "100s")
        assert running.stdout.readline() == "export/line1 created\n"
        hub.set_status("Export", "default", "line1", {"phase": "Pending", "message": "not heard from: plant-1"})
        hub.set_status("Export", "default", "line1", {"phase": phase, "message": "plant-1: no room"})
        _, err = running.communicate(timeout=120)
        assert running.returncode == code, err
        assert phase in err
    assert "edgeward describe export line1" in err


def test_wait_of_an_update_does_not_believe_the_old_status(edgeward: Program, hub: Any) -> None:
    file = edgeward.home / "web.yaml"
    file.write_text(WEB)
    edgeward("apply", "-f", str(file))
    hub.set_status("App", "default", "web", {"phase": "Running", "observedGeneration": 1})
    file.write_text(WEB.replace("sleep", "sleeq"))
    running = edgeward.start("apply", "--wait", "-f", str(file), "--timeout", "100s")
    assert running.stdout.readline() == "app/web configured\n"
    time.sleep(0.5)
    assert running.poll() is None
    hub.set_status("App", "default", "web", {"phase": "Running", "observedGeneration": 2})
    _, err = running.communicate(timeout=120)
    assert running.returncode == 0, err


def test_delete(edgeward: Program, hub: Any, tmp_path: Path) -> None:
    edgeward("apply", "-f", "-", stdin=f"{WEB}---\n{CONFIG}")
    assert edgeward("delete", "app", "web", "--dry-run").stdout == "app/web deleted (dry run)\n"
    assert edgeward("delete", "app", "web", "--wait").stdout == "app/web deleted\n"
    edgeward("delete", "app", "web", code=5)
    edgeward("delete", "app", "web", "--ignore-not-found")
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert edgeward("delete", "-f", str(tmp_path / "c.yaml")).stdout == "config/settings deleted\n"
    edgeward("apply", "-f", "-", stdin=WEB)
    assert edgeward("delete", "apps", "-l", "tier=a", "-o", "name").stdout == "app/web\n"


def test_label(edgeward: Program, hub: Any) -> None:
    edgeward("apply", "-f", "-", stdin=WEB)
    assert edgeward("label", "app", "web", "zone=north", "tier-").stdout == "app/web labeled\n"
    assert hub.docs["App", "default", "web"]["metadata"]["labels"] == {"zone": "north"}
    edgeward("label", "app", "web", code=2)


def test_diff(edgeward: Program, hub: Any) -> None:
    out = edgeward("diff", "-f", "-", stdin=WEB, code=1).stdout
    assert "+kind: App" in out
    edgeward("apply", "-f", "-", stdin=WEB)
    assert edgeward("diff", "-f", "-", stdin=WEB).stdout == ""
    out = edgeward("diff", "-f", "-", stdin=WEB.replace("plant", "ship"), code=1).stdout
    assert "-    site: plant" in out and "+    site: ship" in out and "\x1b" not in out
    spec = {
        "target": {"kind": "App", "name": "web", "namespace": "default"},
        "site": "plant",
        "patch": {"replicas": 3},
    }
    hub.put({"kind": "Override", "metadata": {"name": "app-web-plant"}, "spec": spec})
    out = edgeward("diff", "-f", "-", stdin=WEB).stdout
    assert "app-web-plant" in out and "replicas: 3" in out


def test_diff_of_a_secret_shows_that_but_not_what(edgeward: Program, hub: Any) -> None:
    edgeward("apply", "-f", "-", stdin=SECRET)
    assert edgeward("diff", "-f", "-", stdin=SECRET).stdout == ""
    done = edgeward("diff", "-f", "-", stdin=SECRET.replace("hunter2", "hunter3"), code=1)
    assert "hunter" not in done.stdout + done.stderr and "joe" not in done.stdout
    assert "+    password: '*** (changed)'" in done.stdout


def _editor(tmp_path: Path, code: str) -> str:
    script = tmp_path / "editor.sh"
    script.write_text(f"#!/bin/sh\n{code}\n")
    script.chmod(0o755)
    return str(script)


def test_edit(edgeward: Program, hub: Any, tmp_path: Path) -> None:
    edgeward("apply", "-f", "-", stdin=WEB)
    assert edgeward("edit", "app", "web", EDITOR="true").stdout == "app/web unchanged\n"
    change = _editor(tmp_path, "sed -i.bak s/plant/ship/ $1")
    assert edgeward("edit", "app/web", EDITOR=change, TMPDIR=str(tmp_path)).stdout == "app/web edited\n"
    assert not list(tmp_path.glob("edgeward-*")), "nor the editor's backup is left"
    assert hub.docs["App", "default", "web"]["spec"]["placement"]["site"] == "ship"
    assert "editor" in edgeward("edit", "app/web", EDITOR="false", code=3).stderr


def test_edit_keeps_what_was_typed(edgeward: Program, hub: Any, tmp_path: Path) -> None:
    edgeward("apply", "-f", "-", stdin=WEB)
    broken = _editor(tmp_path, "sed -i.bak s/placement/placment/ $1")
    err = edgeward("edit", "app/web", EDITOR=broken, TMPDIR=str(tmp_path), code=3).stderr
    kept = next(tmp_path.glob("edgeward-web-*/web.yaml"))
    assert str(kept) in err and "placment" in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0 and kept.parent.stat().st_mode & 0o077 == 0
    shutil.rmtree(kept.parent)

    doc = hub.docs["App", "default", "web"]
    hub.before_put = lambda _: hub.put(doc)
    change = _editor(tmp_path, "sed -i.bak s/plant/ship/ $1")
    err = edgeward("edit", "app/web", EDITOR=change, TMPDIR=str(tmp_path), code=4).stderr
    kept = next(tmp_path.glob("edgeward-web-*/web.yaml"))
    assert str(kept) in err and yaml.safe_load(kept.read_text())["spec"]["placement"]["site"] == "ship"


def test_apply_prints_no_secret(edgeward: Program, hub: Any) -> None:
    done = edgeward("apply", "-o", "json", "-f", "-", stdin=SECRET)
    assert json.loads(done.stdout)["items"][0]["spec"]["data"]["password"] == "***"
    assert hub.docs["Secret", "default", "db"]["spec"]["data"]["password"] == "hunter2"
