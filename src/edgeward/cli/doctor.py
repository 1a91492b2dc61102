"""`doctor`: measures what this machine has, asks `core/diagnose.py` what that means, prints it with the remedies.

It needs no running hub and no context; with a data directory or a context it also looks at the ports, the certificates
and the way to the hub. It changes nothing but a small file that it writes, syncs and deletes in the data directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import typer

from edgeward.cli.output import emit, print_rows
from edgeward.cli.session import Session, UsageError
from edgeward.core import diagnose
from edgeward.core.diagnose import Check
from edgeward.core.errors import EdgewardError

_WAIT = 5.0


class Place(NamedTuple):
    """A hub's or a node's folder."""

    role: str
    path: Path
    config: dict[str, Any]


def doctor(
    session: Session,
    data: Annotated[str, typer.Option("--data", metavar="DIR", help="A hub's, a node's or a system's folder.")] = "",
    hub: Annotated[str, typer.Option("--hub", metavar="HOST:PORT", help="The hub to reach; else the context's.")] = "",
) -> None:
    """Check clock, DNS, ports, proxy, disk and kernel, and say what to do. Exit code 1 when something fails."""
    output = session.output(allowed=("table", "json", "yaml"))
    checks = examine(session.context, data, hub)
    if output == "table":
        shown = [[c.state, c.name, c.message, c.remedy] for c in checks]
        print_rows(["STATE", "WHAT", "FOUND", "REMEDY"], shown)
    else:
        emit({"checks": [{k: v for k, v in c._asdict().items() if v} for c in checks]}, output)
    if any(c.state == "fail" for c in checks):
        raise typer.Exit(1)


def examine(context: str | None, data: str = "", hub: str = "") -> list[Check]:
    """All checks that can be made here."""
    places = find_places(context, data)
    target = _target(context, hub, places)
    ca = _ca_file(context, places)
    checks: list[Check] = []
    offset: float | None = None
    if target is not None:
        found, offset = _hub(target, ca, places)
        checks += found
    checks = [*diagnose.clock(time.time(), synchronised=_synchronised(), hub_offset=offset), *checks]
    joined = any(p.role == "node" for p in places)
    checks.append(diagnose.proxy(_environment_proxy(), _configured_proxy(places), joined=joined))
    for place in places:
        checks += _listeners(place)
        checks += list(_certificates(place))
        if place.role == "hub":
            checks.append(diagnose.recovery_key((place.path / "recovery.key").exists()))
        with contextlib.suppress(OSError):
            # a closed folder above closes this one too
            modes = [p.stat().st_mode for p in (place.path, *place.path.parents)]
            if all(mode & 0o011 for mode in modes[1:]):
                open_to_others = diagnose.private(str(place.path), modes[0])
                checks += [open_to_others] if open_to_others else []
    folder = places[0].path if places else _existing(Path(data).expanduser() if data else _default_folder())
    checks += _disk(folder)
    checks += _kernel()
    checks += _machine()
    return checks


# --- where and whom -------------------------------------------------------------------------------------------------


def _default_folder() -> Path:
    from edgeward.cli.context import default_data_dir

    return default_data_dir()


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def find_places(context: str | None, data: str) -> list[Place]:
    """Folders of a hub and of nodes, in a data directory or beside the context."""
    from edgeward.cli.context import context_path
    from edgeward.core.files import read_json

    root = Path(data).expanduser().absolute() if data else context_path(context).absolute().parent
    if data and not root.is_dir():
        raise UsageError(f"--data {data}: there is no such folder")
    found: list[Place] = []
    nodes = sorted((root / "nodes").iterdir()) if (root / "nodes").is_dir() else []
    for path in [root, root / "hub", *nodes]:
        for role, name in (("hub", "hub.json"), ("node", "node.json")):
            with contextlib.suppress(EdgewardError, OSError):
                doc = read_json(path / name, None)
                if isinstance(doc, dict):
                    found.append(Place(role, path, doc))
    return found


def _target(context: str | None, hub: str, places: list[Place]) -> tuple[str, int] | None:
    from edgeward.cli.context import load_context

    if hub:
        host, _, port = hub.removeprefix("https://").rstrip("/").rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"--hub {hub}: write HOST:PORT")
        return host.strip("[]"), int(port)
    for place in places:
        link = place.config.get("hub") if place.role == "node" else None
        if isinstance(link, dict) and link.get("host"):
            return str(link["host"]), int(link.get("port") or 443)
    with contextlib.suppress(EdgewardError, ValueError):
        parts = urlsplit(load_context(context).hub_url or "")
        if parts.hostname:
            return parts.hostname, parts.port or 443
    return None


def _ca_file(context: str | None, places: list[Place]) -> str | None:
    from edgeward.cli.context import load_context

    for place in places:
        if (place.path / "identity" / "ca.crt").exists():
            return str(place.path / "identity" / "ca.crt")
    with contextlib.suppress(EdgewardError):
        return load_context(context).ca_file
    return None


def _environment_proxy() -> str:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        if value := os.environ.get(name):
            return _without_password(value)
    return ""


def _configured_proxy(places: list[Place]) -> str:
    for place in places:
        link = place.config.get("hub") if place.role == "node" else None
        for doc in (place.config, link):
            if isinstance(doc, dict) and doc.get("proxy"):
                return _without_password(str(doc["proxy"]))
    return ""


def _without_password(url: str) -> str:
    from edgeward.core.scrub import Scrubber

    return Scrubber().text(url)


# --- the way to the hub ---------------------------------------------------------------------------------------------


def _hub(target: tuple[str, int], ca: str | None, places: list[Place]) -> tuple[list[Check], float | None]:
    host, port = target
    begun = time.monotonic()
    addresses: list[str] | None = None
    error = ""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = sorted({str(i[4][0]) for i in infos})
    except OSError as e:
        error = e.strerror or str(e)
    checks = [diagnose.names(host, addresses, error, time.monotonic() - begun)]
    proxy = ""
    for place in places:
        link = place.config.get("hub") if place.role == "node" else None
        proxy = proxy or str((link or {}).get("proxy") or place.config.get("proxy") or "")
    if addresses is None and not proxy:
        return checks, None
    trusted: bool | None = None
    issuer, error, offset = "", "", None
    try:
        with _connect(host, port, proxy) as raw:
            context = ssl.create_default_context(cafile=ca) if ca else _unverified()
            for place in places:  # of a proxy that inspects TLS and that this node was told to trust
                if (place.path / "identity" / "proxy-ca.crt").exists():
                    context.load_verify_locations(place.path / "identity" / "proxy-ca.crt")
            try:
                with context.wrap_socket(raw, server_hostname=host) as tls:
                    trusted = True if ca else None
                    offset = _offset(tls, host)
            except ssl.SSLCertVerificationError as e:
                trusted, issuer = False, e.verify_message
    except (OSError, ValueError) as e:
        error = getattr(e, "strerror", None) or str(e) or type(e).__name__
    checks.append(
        diagnose.reach(host, port, error=error, trusted=trusted, issuer=issuer, proxy=_without_password(proxy))
    )
    return checks, offset


def _unverified() -> ssl.SSLContext:
    """For a look before there is a CA to trust; nothing secret is sent through it."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _connect(host: str, port: int, proxy: str) -> socket.socket:
    if not proxy:
        return socket.create_connection((host, port), timeout=_WAIT)
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    sock = socket.create_connection((parts.hostname or "", parts.port or 3128), timeout=_WAIT)
    try:
        lines = [f"CONNECT {host}:{port} HTTP/1.1", f"Host: {host}:{port}"]
        if parts.username:
            import base64

            pair = f"{parts.username}:{parts.password or ''}"
            lines.append("Proxy-Authorization: Basic " + base64.b64encode(pair.encode()).decode())
        sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        answer = b""
        while b"\r\n\r\n" not in answer and len(answer) < 16384:
            piece = sock.recv(1)  # not a byte of what comes behind the answer
            if not piece:
                break
            answer += piece
        status = answer.split(b"\r\n", 1)[0].decode("latin-1")
        if " 200" not in status:
            raise OSError(f"the proxy refuses: {status or 'no answer'}")
    except BaseException:
        sock.close()
        raise
    return sock


def _offset(tls: ssl.SSLSocket, host: str) -> float | None:
    """The hub's clock minus ours, to a second or so, by the Date of an answer."""
    before = time.time()
    tls.sendall(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    answer = b""
    with contextlib.suppress(OSError):
        while b"\r\n\r\n" not in answer and len(answer) < 65536:
            piece = tls.recv(4096)
            if not piece:
                break
            answer += piece
    after = time.time()
    for line in answer.decode("latin-1").split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() == "date":
            with contextlib.suppress(ValueError, TypeError):
                return parsedate_to_datetime(value.strip()).timestamp() + 0.5 - (before + after) / 2
    return None


# --- this machine ---------------------------------------------------------------------------------------------------


def _synchronised() -> bool | None:
    """adjtimex(2): whether the kernel thinks that somebody steers its clock."""
    if not sys.platform.startswith("linux"):
        return None
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "adjtimex") or libc.adjtimex(buffer) < 0:
        return None
    word = ctypes.sizeof(ctypes.c_long)
    status = ctypes.c_int.from_buffer(buffer, 5 * word).value  # modes (padded), offset, freq, maxerror, esterror
    return not status & 0x40  # STA_UNSYNC


def _listeners(place: Place) -> list[Check]:
    """The ports that the configuration names, and those that nats-server keeps."""
    from edgeward.core import proc
    from edgeward.core.files import read_json

    state = read_json(place.path / "run.json", {})
    pid, start = state.get("pid"), state.get("start")
    ours = isinstance(pid, int) and start is not None and proc.alive(proc.ProcId(pid, start))
    wanted: list[tuple[str, str, int]] = []
    bind = str(place.config.get("bind", "127.0.0.1"))
    if place.role == "hub" and place.config.get("port"):
        wanted.append(("hub's port", bind, int(place.config["port"])))
    api = place.config.get("api")
    host, _, number = str(api.get("listen", "") if isinstance(api, dict) else "").rpartition(":")
    if place.role == "node" and number.isdigit() and int(number):
        wanted.append((f"{place.path.name}: api", host.strip("[]") or "127.0.0.1", int(number)))
    ports = read_json(place.path / "nats" / "ports.json", {})
    server = str(read_json(place.path / "nats" / "server.json", {}).get("proc", ""))
    # a node's nats-server outlives its agent
    served = "/" in server and proc.alive(proc.ProcId.parse(server))
    own = {f"{place.path.name}: {name}" for name in ports} if served else set()
    wanted += [
        (f"{place.path.name}: {name}", bind if name == "mqtt" else "127.0.0.1", int(port))
        for name, port in sorted(ports.items())
    ]
    checks: list[Check] = []
    for what, host, port in wanted:
        free, privileged = _free(host, port)
        checks += diagnose.listener(
            what, host, port, free=free, ours=(ours or what in own) and not free, privileged=privileged
        )
    return checks


def _free(host: str, port: int) -> tuple[bool, bool]:
    """(nobody listens there, we may not)"""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except PermissionError:
            return False, True
        except OSError:
            return False, False
    return True, False


def _certificates(place: Place) -> Iterator[Check]:
    from cryptography import x509

    names = ("ca.crt", "tls.pem", "node.pem")
    for path in [place.path / "identity" / n for n in names]:
        with contextlib.suppress(OSError, ValueError):
            cert = x509.load_pem_x509_certificate(path.read_bytes())
            begin, end = cert.not_valid_before_utc.timestamp(), cert.not_valid_after_utc.timestamp()
            made = path.stat().st_mtime
            yield diagnose.certificate(f"{place.path.name}: {path.name}", begin, end, time.time(), made)


def _disk(folder: Path) -> list[Check]:
    stat = os.statvfs(folder)
    inodes = stat.f_favail if stat.f_files else None
    return diagnose.disk(
        str(folder),
        free=stat.f_bavail * stat.f_frsize,
        total=stat.f_blocks * stat.f_frsize,
        inodes=inodes,
        filesystem=_filesystem(folder),
        sync=_sync_time(folder),
    )


def _filesystem(folder: Path) -> str:
    """Its type by /proc/mounts: the longest mount point above the folder; the last one mounted there counts."""
    best, found = "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, point, sort, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            if (folder == Path(point) or Path(point) in folder.parents) and len(point) >= len(best):
                best, found = point, sort
    return found


def _sync_time(folder: Path) -> float | None:
    """Seconds for a durable write of 4 kB: the middle one of nine."""
    took = []
    try:
        with tempfile.NamedTemporaryFile(prefix=".doctor-", suffix=".tmp", dir=folder) as f:
            for _ in range(9):
                begun = time.perf_counter()
                f.seek(0)
                f.write(os.urandom(4096))
                f.flush()
                os.fsync(f.fileno())
                took.append(time.perf_counter() - begun)
    except OSError:
        return None
    return sorted(took)[4]


def _kernel() -> list[Check]:
    from edgeward.core import cgroup
    from edgeward.gateway import nft

    host = cgroup.host()
    features: dict[str, bool | None] = {
        "Landlock": _syscall_there(444, lambda libc: libc.syscall(444, None, 0, 1)),  # landlock_create_ruleset version
        "seccomp": _seccomp(),
        "pidfd": _pidfd(),
        "user namespaces": _user_namespaces(),
        "TUN": Path("/dev/net/tun").exists(),
        "nftables": not nft.unusable(),
    }
    if not sys.platform.startswith("linux"):
        features = dict.fromkeys(features, None)
    return diagnose.kernel(features, cgroups=list(cgroup.available()), why_not=host.why)


def _syscall_there(number: int, call: Callable[[Any], int]) -> bool | None:
    """Linux numbers new system calls alike on all machines from 424 on."""
    if not sys.platform.startswith("linux"):
        return None
    return call(ctypes.CDLL(None, use_errno=True)) >= 0


def _seccomp() -> bool | None:
    with contextlib.suppress(OSError):
        return "\nSeccomp:" in Path("/proc/self/status").read_text()
    return None


def _pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError):
        return False
    return True


def _user_namespaces() -> bool | None:
    for name in ("kernel/unprivileged_userns_clone", "user/max_user_namespaces"):
        with contextlib.suppress(OSError, ValueError):
            if int(Path("/proc/sys", name).read_text()) == 0:
                return False
    return Path("/proc/self/ns/user").exists()


def _machine() -> list[Check]:
    import resource
    import subprocess

    from edgeward.core.natsserver import find_binary

    memory = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        memory = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    nats, error = "", ""
    try:
        done = subprocess.run([find_binary(), "--version"], capture_output=True, text=True, timeout=10, check=False)
        nats = done.stdout.strip()
        error = "" if done.returncode == 0 else f"nats-server does not run here: {done.stderr.strip()[:200]}"
    except (EdgewardError, OSError, subprocess.TimeoutExpired) as e:
        error = str(e)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return diagnose.machine(memory=memory, files=files if files >= 0 else None, nats=nats, nats_error=error)
