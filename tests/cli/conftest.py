"""A hub for the command line's tests: a real HTTP server that speaks the API's wire form, and the real program.

The server keeps plain documents and knows revisions, selectors of one term, watches and problem documents: what the
client can see. What the real API decides is tested with the real API, in tests/core and tests/scenarios.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

Doc = dict[str, Any]
TOKEN = "test-token-fjw83"
PLURALS = {
    "namespaces": "Namespace",
    "sites": "Site",
    "nodes": "Node",
    "configs": "Config",
    "secrets": "Secret",
    "apps": "App",
    "services": "Service",
    "exports": "Export",
    "overrides": "Override",
}
CLUSTER = {"Namespace", "Site", "Node"}


class Problem(Exception):
    def __init__(self, status: int, title: str, detail: str, **more: Any) -> None:
        self.status = status
        self.doc = {"title": title, "status": status, "detail": detail, **more}


class FakeHub:
    """The state behind the server; tests read and write it directly."""

    def __init__(self) -> None:
        self.docs: dict[tuple[str, str, str], Doc] = {}
        self.revision = 100
        self.page = 1000
        self.requests: list[tuple[str, str, Doc | None]] = []
        self.extra: dict[str, Any] = {}
        #: path -> chunks of a streamed answer; None ends it
        self.streams: dict[str, list[bytes]] = {}
        #: name -> the problem document that a write of it gets
        self.refuse: dict[str, Doc] = {}
        #: While it is set every connection is cut off: the server is away.
        self.down = threading.Event()
        #: A watch from before this revision is refused.
        self.compacted = 0
        self.token = TOKEN
        self.before_put: Callable[[Doc], None] | None = None
        self.watchers: list[queue.Queue[tuple[int, str, Doc]]] = []
        self.history: list[tuple[int, str, Doc]] = []
        #: Held by whoever changes the state, and by a watch that begins: it misses nothing and gets nothing twice.
        self.lock = threading.RLock()

    def put(self, doc: Doc, *, status: Doc | None = None) -> Doc:
        with self.lock:
            return self._put(doc, status)

    def _put(self, doc: Doc, status: Doc | None) -> Doc:
        ns = "_" if doc["kind"] in CLUSTER else doc["metadata"].get("namespace") or "default"
        key = (doc["kind"], ns, doc["metadata"]["name"])
        old = self.docs.get(key)
        self.revision += 1
        meta = {
            **doc["metadata"],
            "resourceVersion": str(self.revision),
            "generation": (old["metadata"]["generation"] if old else 0) + 1,
            "creationTimestamp": "2026-01-01T00:00:00.000Z",
            "uid": "u",
        }
        if ns != "_":
            meta["namespace"] = ns
        kept = status if status is not None else (old or {}).get("status", {})
        new = {"apiVersion": "edgeward/v1", "kind": doc["kind"], "metadata": meta, "spec": doc.get("spec") or {}}
        new["status"] = kept
        self.docs[key] = new
        self.tell("MODIFIED" if old else "ADDED", new)
        return new

    def tell(self, event: str, doc: Doc) -> None:
        self.history.append((self.revision, event, doc))
        for w in list(self.watchers):
            w.put((self.revision, event, doc))

    def set_status(self, kind: str, ns: str, name: str, status: Doc) -> None:
        with self.lock:
            self.revision += 1
            doc = {**self.docs[kind, ns, name], "status": status}
            self.docs[kind, ns, name] = doc
            self.tell("MODIFIED", doc)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def address_string(self) -> str:
        return "local"

    def _answer(self, status: int, doc: object, content_type: str = "application/json") -> None:
        body = json.dumps(doc).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _do(self) -> None:
        if self.hub.down.is_set():
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.hub.requests.append((self.command, self.path, body))
        try:
            if self.server.wants_token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":  # type: ignore[attr-defined]
                raise Problem(401, "Unauthorized", "no valid token")
            self._route(parts.path, query, body)
        except Problem as p:
            self._answer(p.status, p.doc, "application/problem+json")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _do

    def _route(self, path: str, query: dict[str, str], body: Any) -> None:
        hub = self.hub
        if path in hub.streams:
            self._stream(hub.streams[path])
            return
        if path in hub.extra:
            self._answer(200, hub.extra[path])
            return
        words = path.removeprefix("/api/v1/").split("/")
        ns = None
        if words[0] == "namespaces" and len(words) > 2:
            ns, words = words[1], words[2:]
        kind = PLURALS.get(words[0])
        if kind is None:
            raise Problem(404, "NotFound", f"no such path {path}")
        if kind in CLUSTER:
            ns = "_"
        name = words[1] if len(words) > 1 else None
        if name is None:
            self._collection(kind, ns, query, body)
        else:
            self._item(kind, ns or "default", name, query, body)

    def _collection(self, kind: str, ns: str | None, query: dict[str, str], body: Any) -> None:
        hub = self.hub
        if self.command == "POST":
            key = (kind, ns or "default", body["metadata"]["name"])
            if key in hub.docs:
                raise Problem(409, "Conflict", "exists already", resource=f"{kind}/{key[2]}")
            self._write(kind, body, query)
            return
        if query.get("watch") == "true":
            self._watch(kind, query.get("resourceVersion"))
            return
        with hub.lock:  # a list and the revision that it is of
            revision = hub.revision
            docs = [d for k, d in sorted(hub.docs.items()) if k[0] == kind and ns in (None, k[1])]
        if "labelSelector" in query:
            key_, _, value = query["labelSelector"].partition("=")
            docs = [d for d in docs if d["metadata"].get("labels", {}).get(key_) == value]
        if query.get("fieldSelector", "").startswith("metadata.name="):
            docs = [d for d in docs if d["metadata"]["name"] == query["fieldSelector"].partition("=")[2]]
        at = int(query.get("continue") or 0)
        size = min(hub.page, int(query.get("limit") or 1000))
        doc: Doc = {"items": docs[at : at + size], "metadata": {"resourceVersion": str(revision)}}
        if at + size < len(docs):
            doc["metadata"]["continue"] = str(at + size)
        self._answer(200, doc)

    def _write(self, kind: str, body: Doc, query: dict[str, str]) -> None:
        name = body["metadata"]["name"]
        if name in self.hub.refuse:
            raise Problem(**self.hub.refuse[name])
        dry = query.get("dryRun") == "true"
        self._answer(201 if self.command == "POST" else 200, {**body, "kind": kind} if dry else self.hub.put(body))

    def _item(self, kind: str, ns: str, name: str, query: dict[str, str], body: Any) -> None:
        hub, key = self.hub, (kind, ns, name)
        doc = hub.docs.get(key)
        if doc is None:
            raise Problem(404, "NotFound", "not found", resource=f"{kind}/{name}", remedy=f"see: edgeward get {kind}")
        if self.command == "GET":
            self._answer(200, doc)
        elif self.command == "PUT":
            if hub.before_put:
                hub.before_put(doc)
                doc = hub.docs[key]
            if body["metadata"].get("resourceVersion") != doc["metadata"]["resourceVersion"]:
                raise Problem(409, "Conflict", "changed meanwhile", resource=f"{kind}/{name}", remedy="read it again")
            self._write(kind, body, query)
        elif self.command == "PATCH":
            labels = {**doc["metadata"].get("labels", {}), **body["metadata"]["labels"]}
            labels = {k: v for k, v in labels.items() if v is not None}
            self._answer(200, hub.put({**doc, "metadata": {**doc["metadata"], "labels": labels}}))
        elif self.command == "DELETE":
            if query.get("dryRun") != "true":
                with hub.lock:
                    hub.revision += 1
                    del hub.docs[key]
                    hub.tell("DELETED", doc)
            self._answer(200, doc)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _stream(self, chunks: list[bytes]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self._chunk(chunk)
        self._chunk(b"")

    def _watch(self, kind: str, revision: str | None) -> None:
        mine: queue.Queue[tuple[int, str, Doc]] = queue.Queue()
        with self.hub.lock:
            since = int(revision or self.hub.revision)
            if since < self.hub.compacted:
                raise Problem(410, "Gone", f"revision {since} was compacted")
            backlog = [(r, e, d) for r, e, d in self.hub.history if r > since]
            self.hub.watchers.append(mine)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._chunk(b": watching\n\n")
            for number, event, doc in backlog:
                self._event(kind, number, event, doc)
            while not self.hub.down.is_set():
                try:
                    self._event(kind, *mine.get(timeout=0.2))
                except queue.Empty:
                    self._chunk(b": keep-alive\n\n")
        except OSError:
            pass
        finally:
            self.close_connection = True
            self.hub.watchers.remove(mine)

    def _event(self, kind: str, number: int, event: str, doc: Doc) -> None:
        if doc["kind"] == kind:
            self._chunk(f"event: {event}\nid: {number}\ndata: {json.dumps(doc)}\n\n".encode())


class TcpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    wants_token = True


class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    wants_token = False


class Program:
    """The real program, in its own process, in a world of its own."""

    def __init__(self, home: Path, context: Path) -> None:
        self.home = home
        self.context = context
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "EDGEWARD_CONTEXT": str(context),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "LANG": "C.UTF-8",
        }

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "edgeward.cli.main", *args]

    def __call__(self, *args: str, stdin: str = "", code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*args), input=stdin, capture_output=True, text=True, env={**self.env, **env}, timeout=120
        )
        assert done.returncode == code, (
            f"{args}: {done.returncode}, not {code}\n--out\n{done.stdout}\n--err\n{done.stderr}"
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*args),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.env, "PYTHONUNBUFFERED": "1", **env},
        )


def _certificate(folder: Path) -> tuple[Path, Path]:
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hub")])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "ca.pem", folder / "key.pem"
    cert_file.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return _certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def context(tmp_path: Path, hub: FakeHub, certificate: tuple[Path, Path]) -> Iterator[Path]:
    """The context file of a hub over TLS and of one node's unix socket, both running."""
    handler = type("Bound", (Handler,), {"hub": hub})
    tcp = TcpServer(("127.0.0.1", 0), handler)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    tcp.socket = tls.wrap_socket(tcp.socket, server_side=True)
    api = tmp_path / "api.sock"
    unix = UnixServer(str(api), handler)
    for server in (tcp, unix):
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    path = tmp_path / "context.json"
    doc = {
        "hub_url": f"https://127.0.0.1:{tcp.server_address[1]}",
        "ca_file": str(certificate[0]),
        "token": TOKEN,
        "pids": {"hub": 1, "nats": None},
        "nodes": [{"name": "plant-1", "site": "plant", "api": str(api), "mqtt_url": None, "pids": {"agent": 2}}],
    }
    path.write_text(json.dumps(doc))
    yield path
    for server in (tcp, unix):
        server.shutdown()
        server.server_close()


@pytest.fixture
def edgeward(tmp_path: Path, context: Path) -> Program:
    return Program(tmp_path, context)


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port where nobody listens, and nobody else can: it is bound."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield int(s.getsockname()[1])
