"""The program as a whole: exit codes, where messages go, what it imports, signals, pipes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgeward.cli.main import spread

#: A pytest fixture's type, by its shape (conftest is not importable under importlib mode).
Program = Any

WEB = {"kind": "App", "metadata": {"name": "web"}, "spec": {"placement": {"site": "plant"}}}


def test_version_needs_no_system(edgeward: Program, tmp_path: Path) -> None:
    out = edgeward("version", EDGEWARD_CONTEXT=str(tmp_path / "none.json")).stdout
    assert out.startswith("edgeward ")
    assert json.loads(edgeward("version", "-o", "json").stdout)["client"]


def test_version_tells_the_hub(edgeward: Program, hub: Any) -> None:
    hub.extra["/api/v1/version"] = {"version": "9.9"}
    assert "hub 9.9" in edgeward("version").stdout
    assert json.loads(edgeward("-o", "json", "version").stdout)["hub"] == "9.9"


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("get",),
        ("get", "apps", "-o", "xml"),
        ("get", "--nonsense"),
        ("get", "apps,nodes", "web"),
        ("apply",),
        ("top", "cars"),
        ("logs", "web", "--tail", "many"),
        ("delete", "apps"),
        ("completion", "tcsh"),
        ("get", "apps", "web", "-A"),
    ],
)
def test_usage_errors_are_2_and_on_stderr(edgeward: Program, args: tuple[str, ...]) -> None:
    done = edgeward(*args, code=2)
    assert done.stdout == ""
    assert done.stderr


def test_help_lists_all_and_imports_little(edgeward: Program) -> None:
    out = edgeward("--help").stdout
    for name in ("up", "demo", "lab", "apply", "get", "stream", "override", "completion"):
        assert f" {name} " in out
    for words in (("get",), ("apply",), ("stream", "read"), ("override", "promote")):
        assert "--context" in edgeward(*words, "--help").stdout


def test_colours_on_a_terminal_only(edgeward: Program, hub: Any) -> None:
    hub.put(WEB, status={"phase": "Running"})

    def on_a_terminal(**env: str) -> str:
        main, side = pty.openpty()
        subprocess.run(
            edgeward.command("get", "apps"), stdout=side, env={**edgeward.env, "TERM": "xterm", **env}, timeout=120
        )
        os.close(side)
        data = b""
        with contextlib.suppress(OSError):  # the end of a terminal that nobody holds open
            while more := os.read(main, 65536):
                data += more
        os.close(main)
        got = data.decode()
        assert "web" in got
        return got

    assert "\x1b[" in on_a_terminal()
    assert "\x1b[" not in on_a_terminal(NO_COLOR="1")
    assert "\x1b[" not in on_a_terminal(TERM="dumb")


def test_no_room_of_the_server_is_imported_by_get(edgeward: Program, hub: Any) -> None:
    hub.put(WEB)
    code = (
        "import sys\nfrom edgeward.cli.main import main\n"
        "try: main(['get', 'apps'])\nexcept SystemExit: pass\n"
        "print(*sorted(m for m in sys.modules if m in ('pydantic', 'asyncio', 'nats', 'starlette', 'uvicorn', 'yaml')"
        " or m.startswith('edgeward.lab')), file=sys.stderr)"
    )
    done = subprocess.run(
        [*edgeward.command()[:1], "-c", code], env=edgeward.env, capture_output=True, text=True, timeout=120
    )
    assert "web" in done.stdout
    # typer may import pydantic one day by another way; that costs time, but breaks nothing
    assert set(done.stderr.split()) <= {"pydantic"}, done.stderr


def test_unreachable_is_6_and_says_what_was_tried(edgeward: Program, tmp_path: Path, dead_port: int) -> None:
    doc = json.loads(Path(edgeward.context).read_text())
    url = f"https://127.0.0.1:{dead_port}"
    other = tmp_path / "dead.json"
    other.write_text(json.dumps({**doc, "hub_url": url}))
    err = edgeward("get", "apps", "--context", str(other), code=6).stderr
    assert url in err and "edgeward up" in err
    err = edgeward("--context", str(tmp_path / "none.json"), "get", "apps", code=6).stderr
    assert "none.json" in err and "edgeward up" in err
    other.write_text(json.dumps({**doc, "nodes": [{"name": "plant-1", "api": str(tmp_path / "gone.sock")}]}))
    err = edgeward("get", "apps", "--at", "plant-1", "--context", str(other), code=6).stderr
    assert "gone.sock" in err
    other.write_text(json.dumps({**doc, "ca_file": str(tmp_path / "gone.pem")}))
    assert "gone.pem" in edgeward("get", "apps", "--context", str(other), code=6).stderr


def test_a_foreign_certificate_is_not_trusted(edgeward: Program, tmp_path: Path) -> None:
    doc = json.loads(Path(edgeward.context).read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**doc, "ca_file": None}))
    assert "certificate" in edgeward("get", "apps", "--context", str(other), code=6).stderr


def test_wrong_token_is_refused(edgeward: Program, tmp_path: Path) -> None:
    doc = json.loads(Path(edgeward.context).read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**doc, "token": "wrong-token"}))
    err = edgeward("get", "apps", "--context", str(other), code=3).stderr
    assert "token" in err and "wrong-token" not in err


def test_not_found_and_unknown_kind_are_5(edgeward: Program) -> None:
    assert "web" in edgeward("get", "app", "web", code=5).stderr
    assert "known kinds" in edgeward("get", "cars", code=5).stderr
    assert "plant-1" in edgeward("get", "apps", "--at", "plant-9", code=5).stderr


def test_bad_names_never_reach_the_server(edgeward: Program, hub: Any) -> None:
    for name in ("../../etc/passwd", "A", "a b", "x" * 64):
        edgeward("get", "app", name, code=2 if "/" in name else 3)
    assert hub.requests == []


def test_the_nodes_own_api(edgeward: Program, hub: Any, context: Path) -> None:
    hub.put(WEB)
    for args in (("--at", "plant-1", "get", "apps"), ("get", "apps", "--at", "local")):
        assert "web" in edgeward(*args).stdout
    socket_path = json.loads(context.read_text())["nodes"][0]["api"]
    out = edgeward("get", "apps", "--at", "local", EDGEWARD_CONTEXT="/none", EDGEWARD_AGENT_SOCKET=socket_path).stdout
    assert "web" in out


def test_long_socket_paths(edgeward: Program, hub: Any, context: Path, tmp_path: Path) -> None:
    hub.put(WEB)
    deep = tmp_path / ("d" * 90) / ("e" * 90)
    deep.mkdir(parents=True)
    doc = json.loads(context.read_text())
    Path(doc["nodes"][0]["api"]).rename(deep / "api.sock")
    doc["nodes"][0]["api"] = str(deep / "api.sock")
    context.write_text(json.dumps(doc))
    assert "web" in edgeward("get", "apps", "--at", "plant-1").stdout


def test_interrupt_is_130_without_a_traceback(edgeward: Program, hub: Any) -> None:
    hub.put(WEB)
    running = edgeward.start("get", "apps", "-w")
    assert running.stdout.readline().startswith("NAME")
    assert running.stdout.readline().startswith("web")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "Traceback" not in err


def test_a_broken_pipe_is_silent(edgeward: Program, hub: Any) -> None:
    for i in range(2000):
        hub.docs["App", "default", f"web-{i}"] = {**WEB, "metadata": {"name": f"web-{i}", "namespace": "default"}}
    read, write = os.pipe()
    running = subprocess.Popen(
        edgeward.command("get", "apps"), stdout=write, stderr=subprocess.PIPE, text=True, env=edgeward.env
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    _, err = running.communicate(timeout=120)
    assert err == ""


def test_completion(edgeward: Program) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "edgeward" in edgeward("completion", shell).stdout
    done = edgeward(_EDGEWARD_COMPLETE="complete_bash", COMP_WORDS="edgeward stream r", COMP_CWORD="2")
    assert done.stdout.split() == ["read"]


def test_short_options_with_an_equals_sign() -> None:
    assert spread(["get", "app", "-o=json", "-n=a=b", "--x=y"]) == ["get", "app", "-o", "json", "-n", "a=b", "--x=y"]
    plain = ["label", "app", "web", "a=b", "c-", "--", "-o=x"]
    assert spread(plain) == plain
