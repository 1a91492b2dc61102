"""The operator's tools on a real system: what is sent to a supporter, and what `doctor` finds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgeward.core.files import ensure_dir, write_json
from edgeward.core.identity import HubIdentity

PLANTED = {
    "secret": "planted-secret-4471aa",
    "config": "planted-config-90b2cc",
    "env": "planted-env-0c51dd",
    "flag": "planted-flag-77e0ee",
    "log": "ew_planted-in-the-log-5512ff",
}
OBJECTS: list[dict[str, Any]] = [
    {"kind": "Secret", "metadata": {"name": "db"}, "spec": {"data": {"password": PLANTED["secret"]}}},
    {"kind": "Config", "metadata": {"name": "c"}, "spec": {"data": {"dsn": PLANTED["config"]}}},
    {
        "kind": "App",
        "metadata": {"name": "web"},
        "spec": {
            "placement": {"site": "plant"},
            "process": {
                "command": ["python3", "-c", "import time; time.sleep(600)", "--db-password", PLANTED["flag"]],
                "env": {"DSN": PLANTED["env"]},
            },
            "envFrom": [{"secret": "db"}, {"config": "c"}],
        },
    },
]


def keys_of(data: Path) -> dict[str, str]:
    """Lines of private files of the system: all that would open something."""
    found = {}
    for path in data.rglob("*"):
        private = path.name in ("secret", "recovery.key", "vault.key", "admin.token", "node.seed", "node.creds")
        if not path.is_file() or not (private or path.suffix in (".key", ".seed", ".pem") or path.name == "nats.json"):
            continue
        public = False
        for i, line in enumerate(path.read_text().splitlines()):
            text = line.strip().rstrip(",")
            public = ("CERTIFICATE" in text and "BEGIN" in text) or (public and "BEGIN" not in text)
            if '": "' in text:
                text = text.split('": "')[1].rstrip('"')
            if not public and len(text) >= 20 and not text.startswith(("#", "-----", "*", "IMPORTANT", "NKEYs")):
                found[f"{path.relative_to(data)}:{i}"] = text
    return found


def read(bundle: Path) -> dict[str, str]:
    with tarfile.open(bundle) as tar:
        return {
            m.name.removeprefix("edgeward-support/"): (tar.extractfile(m) or sys.stdin).read().decode()  # type: ignore[attr-defined,union-attr]
            for m in tar.getmembers()
        }


def leaks(entries: dict[str, str], needles: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, what) for name, text in entries.items() for what, needle in needles.items() if needle in text]


def test_a_support_bundle_shows_the_system_and_no_secret(systems: Callable[..., Any], tmp_path: Path) -> None:
    up = systems("a", "up")
    up.apply(OBJECTS, "--wait")
    person = up.run("token", "create", "--name", "ci", "--role", "viewer", "--ttl", "1h").split()[-1]
    with (up.data / "hub" / "hub.log").open("a") as f:
        f.write(json.dumps({"message": f"somebody pasted {PLANTED['log']} here, password={PLANTED['flag']}"}) + "\n")
    node = up.context["nodes"][0]
    needles = {**PLANTED, **keys_of(up.data), "admin": up.context["token"], "person": person}
    needles["mqtt"] = node["mqtt_password"]
    assert len(needles) > 20
    assert {"hub/identity/admin.token:0", "hub/nats/secret:0"} <= set(needles) or len(keys_of(up.data)) > 10

    bundle = tmp_path / "b.tar.gz"
    up.run("support-bundle", str(bundle))
    assert bundle.stat().st_mode & 0o777 == 0o600
    entries = read(bundle)
    assert leaks(entries, needles) == []
    # and it is of use: names, states, events, logs, checks
    assert '"web"' in entries["hub/apps.json"] and '"Running"' in entries["hub/apps.json"]
    assert "dsn" in entries["hub/configs.json"] and "db" in entries["hub/secrets.json"]
    assert "somebody pasted" in entries["hub/files/hub.log"]
    assert "NodeOnline" in entries["hub/events.json"]
    assert json.loads(entries["nodes/plant-1/version.json"])["role"] == "agent"
    assert "agent" in entries["nodes/plant-1/files/agent.log"]
    assert "plane" in entries["nodes/plant-1/files/plane.log"]
    assert "edgeward_hub_resources" in entries["hub/metrics.txt"]
    assert {c["name"] for c in json.loads(entries["doctor.json"])["checks"]} >= {"clock", "disk", "cgroups"}
    assert "identity/ca.key" in entries["hub/files/listing.txt"]
    assert json.loads(entries["summary.json"])["packages"]["cryptography"]

    # when nothing runs any more it is needed most
    up.stop()
    told = json.loads(up.run("support-bundle", str(bundle), "--data", str(up.data), "-o", "json"))
    entries = read(bundle)
    assert leaks(entries, needles) == []
    assert "hub/files/hub.log" in entries and "nodes/plant-1/files/nats/nats.log" in entries
    assert any("cannot be reached" in missing for missing in told["notThere"])


def doctor(up: Any, *args: str, code: int = 0) -> dict[str, dict[str, str]]:
    """Checks by name; of several with one name the worst."""
    rank = ["ok", "unknown", "warn", "fail"]
    found: dict[str, dict[str, str]] = {}
    for check in json.loads(up.run("doctor", *args, "-o", "json", code=code))["checks"]:
        old = found.get(check["name"])
        if old is None or rank.index(check["state"]) > rank.index(old["state"]):
            found[check["name"]] = check
    return found


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server on loopback, one connection after the other."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    conn, _ = server.accept()
                    with conn, contextlib.suppress(OSError):
                        serve(conn)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_doctor_finds_what_is_wrong(systems: Callable[..., Any], tmp_path: Path) -> None:
    up = systems("a", "up")
    well = doctor(up)
    assert {well[n]["state"] for n in ("clock", "DNS", "hub", "hub's port", "disk writes", "nats-server")} == {"ok"}
    # the hub's own, and what the node got when it joined
    assert {well[n]["state"] for n in ("hub: ca.crt", "hub: tls.pem", "plant-1: node.pem")} == {"ok"}
    assert well["recovery key"]["state"] == "warn"  # it lies where it was made
    (up.data / "hub" / "recovery.key").unlink()
    assert doctor(up)["recovery key"]["state"] == "ok"

    port = int(up.context["hub_url"].rsplit(":", 1)[1])
    assert doctor(up, "--hub", "127.0.0.1:1", code=1)["hub"]["state"] == "fail"
    assert doctor(up, "--hub", "no-such-host.invalid:443", code=1)["DNS"]["state"] == "fail"
    up.run("doctor", "--hub", "nonsense", code=2)
    up.run("doctor", "--data", str(tmp_path / "none"), code=2)

    # a box between us and the hub that speaks for it with a certificate of its own
    between = HubIdentity.open(tmp_path / "between").server_context()
    with listening(lambda conn: between.wrap_socket(conn, server_side=True).close()) as inspector:
        found = doctor(up, "--hub", f"127.0.0.1:{inspector}", code=1)["hub"]
    assert "--proxy-ca" in found["remedy"]

    # the hub's clock is two hours ahead
    ahead = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ahead.load_cert_chain(up.data / "hub" / "identity" / "tls.pem")
    from email.utils import formatdate
    from time import time

    def answer(conn: socket.socket) -> None:
        with ahead.wrap_socket(conn, server_side=True) as tls:
            tls.recv(4096)
            tls.sendall(f"HTTP/1.1 200 OK\r\nDate: {formatdate(time() + 7200, usegmt=True)}\r\n\r\n".encode())

    with listening(answer) as future:
        clock = doctor(up, "--hub", f"127.0.0.1:{future}", code=1)["clock"]
    assert "ahead" in clock["message"] and "chrony" in clock["remedy"]

    # a proxy that refuses, and says so
    node = up.data / "nodes" / "plant-1"

    def refuse(conn: socket.socket) -> None:
        conn.recv(4096)
        conn.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")

    with listening(refuse) as proxy:
        config = json.loads((node / "node.json").read_text())
        config["hub"]["proxy"] = f"http://me:pa55word@127.0.0.1:{proxy}"
        with socket.create_server(("127.0.0.1", 0)) as free:
            config["api"] = {"listen": f"0.0.0.0:{free.getsockname()[1]}"}
        write_json(ensure_dir(tmp_path / "box") / "node.json", config)
        asked = doctor(up, "--data", str(tmp_path / "box"), code=1)
    assert "407" in asked["hub"]["message"]
    assert "pa55word" not in json.dumps(asked)
    assert "all interfaces" in asked["box: api"]["message"]

    # the hub is gone, and somebody else has its port
    up.stop()
    with socket.create_server(("127.0.0.1", port)):
        found_all = doctor(up, code=1)
    assert found_all["hub's port"]["state"] == "fail" and str(port) in found_all["hub's port"]["remedy"]


def test_doctor_sees_a_folder_that_others_can_enter() -> None:
    def states(mode: int, above: int) -> list[str]:
        folder.chmod(mode)
        root.chmod(above)
        argv = [sys.executable, "-m", "edgeward", "doctor", "--data", str(folder), "-o", "json"]
        done = subprocess.run(argv, capture_output=True, text=True)
        return [c["state"] for c in json.loads(done.stdout)["checks"] if c["name"] == "permissions"]

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # pytest's own folders are closed further up
        root, folder = Path(name), Path(name) / "box"
        write_json(ensure_dir(folder) / "node.json", {"node": "n", "site": "s"})
        assert states(0o755, 0o755) == ["fail"]
        assert states(0o755, 0o700) == []
        assert states(0o700, 0o755) == []


def test_doctor_works_where_there_is_nothing_yet(tmp_path: Path) -> None:
    env = {**os.environ, "EDGEWARD_CONTEXT": str(tmp_path / "none.json"), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-m", "edgeward", "doctor"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "time service" in done.stdout and "Landlock" in done.stdout
