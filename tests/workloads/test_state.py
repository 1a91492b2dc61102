"""What an agent remembers of apps after it was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edgeward.workloads.plan import State
from edgeward.workloads.state import InstanceRow, Snapshot, WorkloadState

ROW = InstanceRow("i1", "default", "web", "v1", 2, "12/34", {"http": 20001}, 1.5, ["memory"], [{"what": "cpu"}])


def test_all_of_it_comes_back(tmp_path: Path) -> None:
    db = WorkloadState(tmp_path / "w.db")
    state = State(current="v1")
    db.save_app("default", "web", state)
    db.save_instance(ROW)
    db.save_instance(InstanceRow("i2", "default", "web", "v1", 0))
    db.save_instance(InstanceRow("i2", "default", "web", "v1", 0, "9/9"))
    snapshot = Snapshot({"replicas": 1}, {"A": "é\n"}, {"f/x": "text"})
    db.save_version("default", "web", "v1", snapshot)
    db.save_version("default", "web", "v1", Snapshot({"replicas": 9}))
    db.close()
    again = WorkloadState(tmp_path / "w.db")
    assert again.apps() == {("default", "web"): state}
    assert {r.id: r for r in again.instances()} == {
        "i1": ROW,
        "i2": InstanceRow("i2", "default", "web", "v1", 0, "9/9"),
    }
    assert again.version("default", "web", "v1") == snapshot, "a version never changes"
    assert again.version("default", "web", "v2") is None
    again.remove_instance("i1")
    again.remove_instance("never there")
    assert [r.id for r in again.instances()] == ["i2"]


def test_an_app_goes_with_all_it_had_and_leaves_the_others() -> None:
    db = WorkloadState(":memory:")
    apps = [("default", "web"), ("default", "web2"), ("other", "web")]
    for n, (ns, name) in enumerate(apps):
        db.save_app(ns, name, State())
        db.save_version(ns, name, "v1", Snapshot({}))
        db.save_instance(InstanceRow(f"i{n}", ns, name, "v1", 0))
    db.remove_app("default", "web")
    db.remove_app("default", "web")
    assert set(db.apps()) == set(apps[1:])
    assert db.version("default", "web", "v1") is None
    assert all(db.version(ns, name, "v1") for ns, name in apps[1:])
    assert [r.id for r in db.instances()] == ["i1", "i2"]


def test_versions_are_trimmed_to_what_is_kept() -> None:
    db = WorkloadState(":memory:")
    for digest in ("a", "b", "c"):
        db.save_version("default", "web", digest, Snapshot({}))
        db.save_version("default", "other", digest, Snapshot({}))
    db.trim_versions("default", "web", {"b", "unknown"})
    assert [bool(db.version("default", "web", d)) for d in "abc"] == [False, True, False]
    assert [bool(db.version("default", "other", d)) for d in "abc"] == [True, True, True]
    db.trim_versions("default", "web", set())
    assert db.version("default", "web", "b") is None


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from edgeward.workloads.state import InstanceRow, WorkloadState\n"
        "db = WorkloadState(sys.argv[1])\n"
        "for n in range(50): db.save_instance(InstanceRow(f'i{n:02}', 'default', 'web', 'v', n))\n"
        "db._db.execute('BEGIN IMMEDIATE'); db.remove_instance('i00')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "w.db"
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    assert [r.slot for r in WorkloadState(path).instances()] == list(range(50)), "and what was not finished never was"
