"""Units that systemd understands, with few rights."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeward.cli.service import Wanted, await_ready, hub_config, lingers, quoted, unit
from edgeward.core import proc
from edgeward.core.errors import EdgewardError, Invalid

ANALYZE = shutil.which("systemd-analyze")
needs_analyze = pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze here")
HARD = 'a b/%h/$HOME/"q"\\x'


def wanted(role: str, data: str = "/var/lib/edgeward", *, system: bool = True, **more: object) -> Wanted:
    return Wanted(role=role, data=data, python=sys.executable, system=system, **more)  # type: ignore[arg-type]


def values(text: str, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", text, re.M)


@needs_analyze
@pytest.mark.parametrize("role", ["hub", "agent"])
@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("data", ["/var/lib/edgeward", "/srv/" + HARD])
@pytest.mark.parametrize("low_port", [True, False])
def test_systemd_takes_the_unit(role: str, system: bool, data: str, low_port: bool, tmp_path: Path) -> None:
    file = tmp_path / f"edgeward-{role}.service"
    user = "daemon" if system else ""
    file.write_text(unit(wanted(role, data, system=system, user=user, group="daemon", low_port=low_port)))
    argv = [str(ANALYZE), *([] if system else ["--user"]), "verify", "--man=no", "--recursive-errors=no", str(file)]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=env)
    said = [line for line in done.stderr.splitlines() if file.name in line]
    assert said == [], done.stderr
    assert done.returncode == 0, done.stderr


@needs_analyze
@pytest.mark.parametrize(("role", "user", "most"), [("hub", "daemon", 30), ("agent", "daemon", 55), ("agent", "", 80)])
def test_few_rights_are_left(role: str, user: str, most: int, tmp_path: Path) -> None:
    """systemd's own score of exposure, 100 is everything: an agent that runs as root must be able to start apps."""
    file = tmp_path / f"edgeward-{role}.service"
    file.write_text(unit(wanted(role, user=user)))
    argv = [str(ANALYZE), "security", "--offline=true", f"--threshold={most}", "--no-pager", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_path_stays_one_word_and_expands_nothing() -> None:
    assert quoted('a b%h$HOME"x\\') == '"a b%%h$$HOME\\"x\\\\"'
    with pytest.raises(Invalid):
        quoted("a\nExecStartPre=/bin/evil")
    text = unit(wanted("hub", "/srv/x y"))
    assert values(text, "ExecStart") == [f'"{sys.executable}" -m edgeward.hub --data "/srv/x y"']


def test_what_the_roles_need() -> None:
    hub, agent = unit(wanted("hub", user="edge", low_port=True)), unit(wanted("agent", user="edge"))
    # apps outlive their agent; a hub takes its children along
    assert values(hub, "KillMode") == ["mixed"]
    assert values(agent, "KillMode") == ["process"]
    # which runs whatever release of the agent has proven itself
    assert " -m edgeward.agent.launcher --data " in values(agent, "ExecStart")[0]
    assert values(hub, "AmbientCapabilities") == ["CAP_NET_BIND_SERVICE"]
    assert values(unit(wanted("hub", user="edge")), "CapabilityBoundingSet") == [""]
    for text in (hub, agent):
        assert values(text, "User") == ["edge"]
        assert values(text, "NoNewPrivileges") == ["yes"]
        assert values(text, "ProtectSystem") == ["strict"]
        assert values(text, "ReadWritePaths")[0] == '"/var/lib/edgeward"'
    assert values(hub, "ReadWritePaths")[1:] == []
    mine = unit(wanted("agent", system=False))
    assert "User=" not in mine and "Capability" not in mine
    assert values(mine, "WantedBy") == ["default.target"]
    credential = unit(wanted("hub", credential="/etc/key"))
    assert values(credential, "LoadCredential") == ["edgeward-vault:/etc/key"]


def test_what_outlives_the_agent_keeps_what_it_has() -> None:
    """A private /tmp and the user's IPC objects are taken away when a unit ends; the agent's apps go on."""
    for user in ("", "edge"):
        text = unit(wanted("agent", user=user))
        assert values(text, "PrivateTmp") == values(text, "RemoveIPC") == []
        # nothing else would let them write there, nor a node whose folder's name is too long have its socket
        assert {"-/tmp", "-/var/tmp"} <= set(values(text, "ReadWritePaths"))
    assert values(unit(wanted("hub")), "PrivateTmp") == ["yes"]


@pytest.mark.parametrize("data", ["/tmp/hub", "/var/tmp/x/hub"])
def test_a_hubs_folder_in_tmp_is_not_hidden_from_it(data: str) -> None:
    assert values(unit(wanted("hub", data)), "PrivateTmp") == []


def test_an_agent_without_root_limits_its_apps_in_its_units_group() -> None:
    for mine in (unit(wanted("agent", user="edge")), unit(wanted("agent", system=False))):
        assert values(mine, "Delegate") == ["yes"]
        assert values(mine, "Environment") == ["EDGEWARD_DELEGATED=1"]
        # without it systemd could start no second agent: the group governs others, and takes no process then
        assert values(mine, "ExecStopPost") == [f'-"{sys.executable}" -m edgeward.core.cgroup']
    assert "-/sys/fs/cgroup" in values(unit(wanted("agent", user="edge")), "ReadWritePaths")
    assert "EDGEWARD_DELEGATED" not in unit(wanted("agent")) + unit(wanted("hub", user="edge"))


def test_a_function_may_keep_the_right_to_read_python() -> None:
    """functions/sandbox.py keeps CAP_DAC_READ_SEARCH where Python lies in a closed folder, as install.sh's does."""
    assert "CAP_DAC_READ_SEARCH" in values(unit(wanted("agent")), "CapabilityBoundingSet")[0].split()


def test_a_roots_agent_may_close_services() -> None:
    assert "CAP_NET_ADMIN" in values(unit(wanted("agent", user="root")), "CapabilityBoundingSet")[0].split()


def test_a_node_that_left_is_not_started_again() -> None:
    """`leave` ends the agent; systemd starts it anew, and finds nothing to start it for."""
    assert values(unit(wanted("agent", "/srv/a b%h")), "ConditionPathExists") == ["/srv/a b%%h/identity/node.creds"]
    assert values(unit(wanted("hub")), "ConditionPathExists") == []


def test_running_means_ready(tmp_path: Path) -> None:
    """That systemd executed a program says nothing of whether it can work: its port may be taken."""
    me = proc.identify(os.getpid())
    assert me is not None
    with pytest.raises(EdgewardError, match="port 443 is in use"):
        await_ready(tmp_path, lambda late: "port 443 is in use")
    for run in ({"pid": me.pid, "start": me.start}, {"ready": True, "pid": me.pid, "start": "1.other"}):
        (tmp_path / "run.json").write_text(json.dumps(run))
        with pytest.raises(EdgewardError, match="not ready"):
            await_ready(tmp_path, lambda late: "", patience=0.0)
    (tmp_path / "run.json").write_text(json.dumps({"ready": True, "pid": me.pid, "start": me.start}))
    await_ready(tmp_path, lambda late: "")


def test_whether_a_users_units_live_on(tmp_path: Path) -> None:
    assert not lingers(tmp_path)
    (tmp_path / pwd.getpwuid(os.geteuid()).pw_name).touch()
    assert lingers(tmp_path)


def run(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "XDG_CONFIG_HOME": str(home), "XDG_RUNTIME_DIR": "", "EDGEWARD_CONTEXT": str(home / "no")}
    argv = [sys.executable, "-m", "edgeward", "install-service", *args]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=env)


def test_a_users_unit_is_written_kept_and_removed(tmp_path: Path) -> None:
    data = tmp_path / "hub"
    file = tmp_path / "systemd" / "user" / "edgeward-hub.service"
    assert run(tmp_path, "hub", "--user").returncode == 2
    assert "--port" in run(tmp_path, "hub", "--user", "--data", str(data)).stderr
    shown = run(tmp_path, "hub", "--user", "--data", str(data), "--port", "8443", "--print")
    assert "ExecStart=" in shown.stdout
    assert not file.exists() and not data.exists()

    done = run(tmp_path, "hub", "--user", "--data", str(data), "--port", "8443", "--bind", "10.1.1.1", "-o", "json")
    assert done.returncode == 0, done.stderr
    doc = json.loads(done.stdout)
    assert doc["unit"] == str(file)
    assert any("enable --now" in line for line in doc["next"])  # no manager runs there, and it is not pretended
    config = json.loads((data / "hub.json").read_text())
    assert config == {"port": 8443, "bind": "10.1.1.1", "advertise": "10.1.1.1", "names": ["10.1.1.1"]}
    assert data.stat().st_mode & 0o777 == 0o700

    # again is no harm, but what is configured stays
    assert run(tmp_path, "hub", "--user", "--data", str(data)).returncode == 0
    assert run(tmp_path, "hub", "--user", "--data", str(data), "--port", "9").returncode == 3
    file.write_text("[Service]\nExecStart=/bin/true\n")
    for args in (("--data", str(data)), ("--remove",)):
        refused = run(tmp_path, "hub", "--user", *args)
        assert refused.returncode == 3 and "not written by this command" in refused.stderr
    file.unlink()
    assert run(tmp_path, "hub", "--user", "--data", str(data)).returncode == 0
    assert run(tmp_path, "hub", "--user", "--remove").returncode == 0
    assert not file.exists() and (data / "hub.json").exists()
    assert run(tmp_path, "hub", "--user", "--remove").returncode == 5


def test_an_agent_needs_a_node(tmp_path: Path) -> None:
    done = run(tmp_path, "agent", "--user", "--data", str(tmp_path))
    assert done.returncode == 5 and "edgeward join" in done.stderr
    (tmp_path / "node.json").write_text('{"node": "n", "site": "s"}')
    assert run(tmp_path, "agent", "--user", "--data", str(tmp_path)).returncode == 5  # it left its fleet
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "node.creds").write_text("x")
    assert run(tmp_path, "agent", "--user", "--data", str(tmp_path)).returncode == 0
    assert run(tmp_path, "pilot", "--user", "--data", str(tmp_path)).returncode == 2
    assert run(tmp_path, "agent", "--user", "--data", str(tmp_path), "--name", "../x").returncode == 2


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_new_hubs_folder_belongs_to_whom_it_runs_as(tmp_path: Path) -> None:
    owner = pwd.getpwnam("daemon")
    hub_config(tmp_path / "hub", {"port": "443", "bind": "", "advertise": ""}, owner, write_it=True)
    for made in (tmp_path / "hub", tmp_path / "hub" / "hub.json"):
        assert made.stat().st_uid == owner.pw_uid
        assert made.stat().st_mode & 0o077 == 0
