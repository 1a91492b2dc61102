"""`install-service`: a systemd unit for a hub or an agent, with as few rights as it needs.

In: the role and its folder; out: a unit file, enabled and started where systemd runs. As root it is a system unit that
runs as the folder's owner, else a unit of the user's own manager. The text is made by :func:`unit`, which does no I/O;
nothing here edits a unit that it did not write.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeward.cli.output import emit, write
from edgeward.cli.session import Session, UsageError
from edgeward.core import proc
from edgeward.core.cgroup import DELEGATED_ENV
from edgeward.core.errors import EdgewardError, Invalid, NotFound, Refused
from edgeward.core.files import ensure_dir, read_json, write_json

ROLES = ("hub", "agent")
#: Of a node that is in a fleet, in its ``identity/``.
CREDENTIALS = "node.creds"
_MARK = "# Written by `edgeward install-service`; changes belong into a drop-in: systemctl edit"
#: So often has a service ended before it is called broken.
_TRIES = 2
#: What a private /tmp would hide.
_TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 - compared, nothing is made there


@dataclass(frozen=True)
class Wanted:
    role: str
    data: str
    python: str
    #: A unit of the system's manager; else of the user's.
    system: bool
    user: str = ""
    group: str = ""
    low_port: bool = False
    credential: str = ""


def quoted(text: str) -> str:
    """A word of ExecStart= and the like (systemd.syntax(7), systemd.service(5))."""
    if any(ord(c) < 32 for c in text):
        raise Invalid("a path with a control character cannot stand in a unit", field="--data")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$") + '"'


def path_value(text: str) -> str:
    """A path of ReadWritePaths=; the same quoting but for the dollar."""
    return quoted(text).replace("$$", "$")


def unit(w: Wanted) -> str:
    """The unit's text."""
    hub = w.role == "hub"
    lines = [
        _MARK,
        "[Unit]",
        f"Description=Edgeward {w.role}",
        "Documentation=man:systemd.exec(5)",
        "StartLimitIntervalSec=0",
    ]
    if not hub:
        # a node that left its fleet has nothing to come back for
        lines.append(f"ConditionPathExists={w.data.replace('%', '%%')}/identity/{CREDENTIALS}")
    if w.system:
        lines += ["Wants=network-online.target", "After=network-online.target time-sync.target"]
    lines += [
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={quoted(w.python)} -m edgeward.{'hub' if hub else 'agent.launcher'} --data {quoted(w.data)}"
        + ("" if hub else " --supervised"),
        "Restart=always",
        "RestartSec=1",
        "TimeoutStopSec=30",
        # apps and nats-server outlive the agent, and the next one adopts them
        f"KillMode={'mixed' if hub else 'process'}",
        "LimitNOFILE=65536",
        "OOMScoreAdjust=-500" if w.system else "",
        f"LoadCredential=edgeward-vault:{w.credential}" if w.credential else "",
        "",
        "# as few rights as it needs; see `systemd-analyze security`",
        "UMask=0077",
        "NoNewPrivileges=yes",
        "RestrictSUIDSGID=yes",
        "RestrictRealtime=yes",
        "LockPersonality=yes",
        "SystemCallArchitectures=native",
    ]
    if w.system:
        lines += _system_lines(w, hub)
    if not hub:
        lines += _group_lines(w)
    lines += ["", "[Install]", f"WantedBy={'multi-user' if w.system else 'default'}.target", ""]
    return "\n".join(line for i, line in enumerate(lines) if line or (i and lines[i - 1] != ""))


def _group_lines(w: Wanted) -> list[str]:
    """The control group, in which an agent without root limits its apps (core/cgroup.py)."""
    lines = ["Delegate=yes"]
    if not w.system or w.user not in ("", "root"):
        lines += [
            f"Environment={DELEGATED_ENV}=1",
            # whoever is started next is started in the unit's group, which must not govern others at that moment
            f"ExecStopPost=-{quoted(w.python)} -m edgeward.core.cgroup",
        ]
    return lines


def _system_lines(w: Wanted, hub: bool) -> list[str]:
    rights = "CAP_NET_BIND_SERVICE" if w.low_port else ""
    root = w.user in ("", "root")
    lines = [] if root else [f"User={w.user}", f"Group={w.group or w.user}"]
    lines += [
        "ProtectSystem=strict",
        f"ReadWritePaths={path_value(w.data)}",
        "ProtectHome=read-only",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",
    ]
    if hub:
        lines += [
            "ProtectProc=invisible",
            "RemoveIPC=yes" if not root else "",
            "PrivateTmp=yes" if not any(Path(w.data).is_relative_to(t) for t in _TEMPORARY) else "",
            f"CapabilityBoundingSet={rights}",
            f"AmbientCapabilities={rights}" if rights and not root else "",
            "PrivateDevices=yes",
            "ProtectControlGroups=yes",
            "RestrictNamespaces=yes",
            "MemoryDenyWriteExecute=yes",
            "SystemCallFilter=@system-service",
            "SystemCallFilter=~@privileged @resources",
            "SystemCallErrorNumber=EPERM",
        ]
    else:
        lines += [
            # Neither a private /tmp nor RemoveIPC=: systemd empties both when the agent ends, and apps live on in them.
            *(f"ReadWritePaths=-{folder}" for folder in _TEMPORARY),
            # the cgroup file system is what limits are written to
            "ReadWritePaths=-/sys/fs/cgroup",
            # it starts apps as other users, in cgroups and namespaces of their own, and reads devices
            # (CAP_DAC_READ_SEARCH: functions of another user read a Python that lies below the node's closed folder;
            # CAP_NET_ADMIN: nftables keeps Services closed)
            "CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_KILL CAP_NET_ADMIN "
            "CAP_NET_BIND_SERVICE CAP_SETGID CAP_SETUID CAP_SYS_RESOURCE CAP_SYS_ADMIN CAP_SYS_PTRACE"
            if root
            else f"CapabilityBoundingSet={rights}",
            f"AmbientCapabilities={rights}" if rights and not root else "",
        ]
    return [line for line in lines if line]


# --- the command -----------------------------------------------------------------------------------------------------


def install_service(
    session: Session,
    role: Annotated[str, typer.Argument(metavar="hub|agent", show_default=False)],
    data: Annotated[str, typer.Option("--data", metavar="DIR", help="The hub's or the node's folder.")] = "",
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The unit's name; else edgeward-ROLE.")] = "",
    user_unit: Annotated[bool, typer.Option("--user", help="A unit of this user's own manager, also as root.")] = False,
    run_as: Annotated[str, typer.Option("--run-as", metavar="USER", help="Else the folder's owner.")] = "",
    port: Annotated[str, typer.Option("--port", metavar="N", help="A new hub's port.")] = "",
    bind: Annotated[str, typer.Option("--bind", metavar="ADDRESS", help="A new hub's address to listen on.")] = "",
    advertise: Annotated[
        str, typer.Option("--advertise", metavar="HOST", help="The name by which nodes reach a new hub.")
    ] = "",
    credential: Annotated[
        str, typer.Option("--vault-credential", metavar="FILE", help="The vault's key, given by systemd.")
    ] = "",
    show: Annotated[bool, typer.Option("--print", help="Print the unit, change nothing.")] = False,
    no_start: Annotated[bool, typer.Option("--no-start", help="Write the unit, do not enable or start it.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Stop it and take the unit away; its folder stays.")] = False,
) -> None:
    """Run a hub or an agent by systemd: at boot, again when it ends, with few rights."""
    output = session.output(allowed=("table", "json", "yaml"))
    if role not in ROLES:
        raise UsageError(f"install-service {role}: one of {', '.join(ROLES)}")
    unit_name = (name or f"edgeward-{role}").removesuffix(".service") + ".service"
    if not re.fullmatch(r"[A-Za-z0-9:_.@-]{1,200}", unit_name):
        raise UsageError(f"--name {name}: use letters, digits, '-', '_' and '.'")
    system = os.geteuid() == 0 and not user_unit
    path = _unit_folder(system) / unit_name
    if remove:
        _remove(path, system)
        said = [f"{path} is gone; its folder is as it was"]
        if role == "agent":
            said.append(
                "its apps and its nats-server go on; they end with the machine, or are adopted by the next agent"
            )
        _say(output, {"removed": str(path)}, said)
        return
    if not data:
        raise UsageError("--data DIR is missing: the folder of the hub or the node")
    folder = Path(data).expanduser().absolute()
    settings = {"port": port, "bind": bind, "advertise": advertise}
    owner = _owner(folder, run_as) if system else None
    config = hub_config(folder, settings, owner, write_it=not show) if role == "hub" else _node_config(folder)
    wanted = Wanted(
        role=role,
        data=str(folder),
        python=sys.executable,
        system=system,
        user=owner.pw_name if owner else "",
        group=_group(owner.pw_gid) if owner else "",
        low_port=0 < _port(role, config) < 1024,
        credential=str(Path(credential).absolute()) if credential else "",
    )
    text = unit(wanted)
    if show:
        sys.stdout.write(text)
        return
    changed = _write(path, text)
    done, following = [f"{path} is written"], _next(unit_name, system, no_start, changed)
    if role == "hub" and owner is not None and owner.pw_uid == 0:
        done.append("it runs as root, with no right that it does not need; a user of its own is better: --run-as USER")
    if not following:
        await_ready(folder, lambda late: _trouble(unit_name, system, late))
        done.append(f"{unit_name} is enabled and running")
        if not system and not lingers():
            done.append("it ends with your last session, and does not begin at boot, before: loginctl enable-linger")
    else:
        done += ["next:", *(f"  {line}" for line in following)]
    asking = f"get nodes --context {folder}" if role == "hub" else f"get apps --context {folder} --at local"
    done.append(f"to talk to it: edgeward {asking}")
    _say(output, {"unit": str(path), "name": unit_name, "next": following}, done)


def _say(output: str, doc: dict[str, object], lines: list[str]) -> None:
    if output == "table":
        for line in lines:
            write(line)
    else:
        emit(doc, output)


def _unit_folder(system: bool) -> Path:
    if system:
        return Path("/etc/systemd/system")
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "systemd" / "user"


def hub_config(
    folder: Path, given: dict[str, str], owner: pwd.struct_passwd | None, *, write_it: bool
) -> dict[str, Any]:
    """The hub's configuration; made here for a new hub, its folder too, and never changed for one that is there."""
    path = folder / "hub.json"
    known = read_json(path, None)
    if known is not None:
        if any(given.values()):
            raise Refused("has a configuration", file=str(path), remedy="leave --port, --bind and --advertise out")
        return dict(known)
    if not given["port"].isdigit() or not 0 < int(given["port"]) < 65536:
        raise UsageError("a new hub needs --port N (443 is what nodes reach through most networks)")
    bind = given["bind"] or "127.0.0.1"
    config: dict[str, Any] = {"port": int(given["port"]), "bind": bind, "advertise": given["advertise"] or bind}
    config["names"] = sorted({str(config["advertise"]), bind} - {"0.0.0.0", "::"})  # noqa: S104 - compared
    if write_it:
        ensure_dir(folder)
        write_json(path, config)
        if owner is not None and owner.pw_uid != os.geteuid():
            for made in (folder, path):
                os.chown(made, owner.pw_uid, owner.pw_gid)
    return config


def _node_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "node.json", None)
    if config is None or not (folder / "identity" / CREDENTIALS).exists():
        raise NotFound(
            "is not the folder of a node that has joined",
            resource=str(folder),
            remedy=f"edgeward join TOKEN --data {folder}",
        )
    return dict(config)


def _owner(folder: Path, run_as: str) -> pwd.struct_passwd:
    try:
        if run_as:
            owner = pwd.getpwnam(run_as)
        else:
            at = folder
            while not at.exists():
                at = at.parent
            owner = pwd.getpwuid(at.stat().st_uid)
    except KeyError:
        raise NotFound(f"there is no user {run_as or 'that owns the folder'}", remedy="useradd --system NAME") from None
    if folder.exists() and run_as and folder.stat().st_uid != owner.pw_uid:
        raise Refused(
            f"belongs to another user than {run_as}",
            resource=str(folder),
            remedy=f"chown -R {run_as}: {folder}",
        )
    return owner


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _port(role: str, config: dict[str, Any]) -> int:
    """The port that it listens on for others; 0 for none."""
    if role == "hub":
        return int(config.get("port", 0))
    api = config.get("api")
    number = str(api.get("listen", "") if isinstance(api, dict) else "").rpartition(":")[2]
    return int(number) if number.isdigit() else 0


def _write(path: Path, text: str) -> bool:
    """Whether that changed anything."""
    before = path.read_text(errors="replace") if path.exists() else ""
    if path.exists() and _MARK not in before:
        raise Refused("was not written by this command", file=str(path), remedy="choose another --name, or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text)
    scratch.chmod(0o644)
    scratch.replace(path)
    return text != before


def _systemctl(system: bool, *args: str) -> None:
    argv = ["systemctl", *([] if system else ["--user"]), *args]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=90, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise EdgewardError(f"{' '.join(argv)}: {e}") from e
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[:500]
        raise EdgewardError(f"{' '.join(argv)}: {said}", remedy=f"see: journalctl -u {args[-1]}")


def _runs(system: bool) -> bool:
    """Whether the manager is there to be asked."""
    if shutil.which("systemctl") is None:
        return False
    if system:
        return Path("/run/systemd/system").is_dir()
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return bool(runtime) and (Path(runtime) / "systemd" / "private").exists()


def lingers(folder: Path = Path("/var/lib/systemd/linger")) -> bool:
    """Whether this user's units live on without a session."""
    return (folder / pwd.getpwuid(os.geteuid()).pw_name).exists()


def _next(name: str, system: bool, no_start: bool, changed: bool) -> list[str]:
    """Starts it, anew when its unit changed; or what is left for the user to do."""
    if not no_start and _runs(system):
        _systemctl(system, "daemon-reload")
        _systemctl(system, "enable", name)
        _systemctl(system, "restart" if changed else "start", name)
        return []
    control = "systemctl" if system else "systemctl --user"
    lines = [f"{control} daemon-reload", f"{control} enable --now {name}"]
    # without this a user's units end with the last session
    return lines if system else [*lines, "loginctl enable-linger"]


def await_ready(folder: Path, trouble: Callable[[bool], str], patience: float = 120.0) -> None:
    """Returns when what runs in the folder says that it is ready; raises ``EdgewardError`` with what ``trouble`` tells.

    systemd calls a service started when its program was executed, which says nothing of whether it can do its work.
    """
    deadline = time.monotonic() + patience
    while True:
        run = read_json(folder / "run.json", {})
        if run.get("ready") and proc.alive(proc.ProcId(int(run.get("pid", 0)), str(run.get("start", "")))):
            return
        late = time.monotonic() > deadline
        why = trouble(late)
        if why or late:
            remedy = "look at its journal (journalctl), mend it, and it comes up by itself; or --remove"
            raise EdgewardError(
                f"does not come up: {why or 'it is not ready yet'}", resource=str(folder), remedy=remedy
            )
        time.sleep(0.2)  # another user's file, which only its folder's owner can watch


def _trouble(name: str, system: bool, late: bool) -> str:
    """The last words of a service that has ended again and again since it was started, or at all when it is late; ''
    while it may come up."""
    user = [] if system else ["--user"]
    asked = ["systemctl", *user, "show", "--value", "--property=NRestarts", name]
    log = ["journalctl", *user, "--no-pager", "-q", "-o", "cat", "-n", "20", "-u", name]
    try:
        count = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
        if not count.isdigit() or int(count) < (1 if late else _TRIES):
            return ""
        said = subprocess.run(log, capture_output=True, text=True, timeout=30, check=False).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # systemd's own lines begin with the unit's name, and a traceback's last line is what says it
    own = [line for line in said if line.strip() and not line.startswith((name, "Start", "Stop"))]
    return (own or said or ["it ends again and again"])[-1][:500]


def _remove(path: Path, system: bool) -> None:
    if not path.exists():
        raise NotFound("there is no such unit", file=str(path))
    if _MARK not in path.read_text(errors="replace"):
        raise Refused("was not written by this command", file=str(path), remedy="take it away by hand")
    if _runs(system):
        _systemctl(system, "disable", "--now", path.name)
    path.unlink()
    if _runs(system):
        _systemctl(system, "daemon-reload")
