"""A secret reaches the app that uses it, and lies in plain nowhere but in that app's own files."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FIRST, LOCAL = "planted-secret-0f7c2d", "planted-secret-at-the-edge-91ab"
PROOF = (
    "import hashlib, os, pathlib, time\n"
    "told = os.environ['password'] + pathlib.Path('keys/p.txt').read_text()\n"
    "print('proof', hashlib.sha256(told.encode()).hexdigest(), flush=True)\n"
    "time.sleep(600)\n"
)


def secret(value: str) -> dict[str, Any]:
    return {"kind": "Secret", "metadata": {"name": "db", "conflict": "edge"}, "spec": {"data": {"password": value}}}


APP = {
    "kind": "App",
    "metadata": {"name": "user"},
    "spec": {
        "placement": {"site": "plant"},
        "process": {"command": ["python3", "-c", PROOF]},
        "envFrom": [{"secret": "db"}],
        "files": [{"path": "keys/p.txt", "secret": "db", "key": "password"}],
    },
}


def holders(system: Any, root: Path, value: str) -> dict[str, int]:
    """Files below ``root`` that hold ``value`` as text, and their modes."""
    found = ((path, mode) for path, mode, content in system.contents(root) if value.encode() in content)
    return {str(path.relative_to(root)): mode for path, mode in found}


def proven(system: Any, value: str, *where: str) -> bool:
    return hashlib.sha256((value * 2).encode()).hexdigest() in system.run("logs", "user", *where)


def test_a_secret_is_in_no_store_log_or_dump(systems: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEWARD_LOG", "DEBUG")
    up = systems("a", "up")
    up.apply([secret(FIRST), APP], "--wait")
    up.wait("the app has the secret", lambda: proven(up, FIRST))
    up.apply(secret(LOCAL), "--at", "plant-1")  # changed at the site, decided by the hub, an update of the app
    up.wait("the app has the new one", lambda: proven(up, LOCAL))
    up.wait(
        "the hub has taken it over",
        lambda: (
            json.loads(up.run("get", "secret/db", "-o", "json", "--show-secrets"))["spec"]["data"]["password"] == LOCAL
        ),
    )
    shown = "".join(
        up.run(*args)
        for args in (
            ("get", "secrets", "-o", "json"),
            ("get", "secrets", "-o", "yaml", "--at", "plant-1"),
            ("describe", "secret", "db"),
            ("events",),
            ("journal", "-o", "json"),
            ("journal", "-o", "json", "--at", "plant-1"),
            ("top",),
        )
    )
    for pid in (*up.processes(), up.context["pids"]["hub"]):
        with contextlib.suppress(OSError):  # the old version's is just going
            shown += Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    for value in (FIRST, LOCAL):
        assert value not in shown
        found = holders(up, up.data.parent, value)
        working = [f for f in found if "/apps/" in f and f.endswith("keys/p.txt")]
        assert list(found) == working, "beside the app's own file it is in no file at all"
        assert all(mode & 0o077 == 0 for mode in found.values())
    up.stop()
    again = systems("a", "up")
    again.wait("after a restart too", lambda: proven(again, LOCAL))
    assert json.loads(again.run("get", "node/plant-1", "-o", "json"))["status"]["secrets"] == {
        "sealed": True,
        "key": "file",
    }
