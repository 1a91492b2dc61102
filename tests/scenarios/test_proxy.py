"""A device's web page behind a node, through the hub's path: a real device, a real hub."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.scenarios.conftest import System

NODE = "plant-1"
LONG = 60.0
PAGE = b'<!doctype html><html><head><title>PLC</title></head><body><a href="/next">next</a></body></html>'


class Device(BaseHTTPRequestHandler):
    """A device's web server, not a friendly one."""

    protocol_version = "HTTP/1.1"
    seen: list[dict[str, Any]] = []  # noqa: RUF012 - of the server, as one runs at a time

    def log_message(self, *_: object) -> None:
        pass

    def _say(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Type": "text/plain", "Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.seen.append({"path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
        match self.path.partition("?")[0]:
            case "/":
                self._say(PAGE, Content_Type="text/html", Set_Cookie="sid=7; Path=/", Clear_Site_Data='"*"')
            case "/packed":
                page = gzip.compress(PAGE)
                self._say(page, Content_Type="text/html; charset=utf-8", Content_Encoding="gzip")
            case "/next":
                self._say(b"", 302, Location=f"http://{self.headers['Host']}/after")
            case "/close":  # no length: the end of the connection is the end
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(b"data: 1\n\n")
            case "/quiet":  # events, one and then none
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                self.wfile.write(b"data: 1\n\n")
                self.connection.recv(1)
                self.close_connection = True
            case "/same":  # the length of what would have come
                self._say(b"", 304, Content_Length="1234", Etag='"x"')
            case "/odd":
                self._say(b"x", 799)
            case "/ws":
                self._websocket()
            case "/garbage":
                self.wfile.write(b"\x00\x01\x02 nonsense\r\n\r\n")
                self.close_connection = True
            case "/big":
                self._say(bytes(5_000_000))
            case _:
                self._say(self.path.encode())

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "123")
        self.end_headers()

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self._say(body[::-1], 201)

    do_PUT = do_POST

    def _websocket(self) -> None:
        self.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", "yes")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"hello")
        with contextlib.suppress(OSError):
            while data := self.connection.recv(65536):
                self.connection.sendall(data.upper())
        self.close_connection = True


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("proxy")
    (folder / "lab.yaml").write_text("sites: [{name: plant, nodes: 1}]")
    made = System(folder / "lab", "lab", "up", "-f", str(folder / "lab.yaml"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def device() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Device)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


class Client:
    def __init__(self, system: System, token: str | None = None) -> None:
        self.context = system.context
        self.token = self.context["token"] if token is None else token

    def connection(self) -> http.client.HTTPSConnection:
        parts = urlsplit(self.context["hub_url"])
        tls = ssl.create_default_context(cafile=self.context["ca_file"])
        return http.client.HTTPSConnection(parts.hostname or "", parts.port, context=tls, timeout=LONG)

    def ask(
        self, path: str, method: str = "GET", body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        given = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with contextlib.closing(self.connection()) as c:
            c.request(method, path, body, {**given, **{k.replace("_", "-"): v for k, v in headers.items()}})
            answer = c.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def test_a_script_reaches_a_device_by_its_token(system: System, device: int) -> None:
    client, base = Client(system), f"/nodes/{NODE}/proxy/{device}"
    Device.seen.clear()
    status, headers, body = client.ask(f"{base}/", Cookie="console=secret")
    assert status == 200
    assert f'href="{base}/next"'.encode() in body
    assert "sandbox" in headers["content-security-policy"]
    assert "set-cookie" not in headers and "clear-site-data" not in headers
    assert client.ask(f"{base}/a%2Fb/%C3%BC?x=%20y")[2] == b"/a%2Fb/%C3%BC?x=%20y"
    assert Device.seen[1]["cookie"] == "sid=7"  # the hub kept it
    assert client.token not in json.dumps(Device.seen) and "console" not in json.dumps(Device.seen)
    status, headers, _ = client.ask(f"{base}/next")
    assert (status, headers["location"]) == (302, f"{base}/after")
    assert client.ask(f"{base}/packed", Accept_Encoding="gzip")[2].startswith(b"<!doctype html><html><head><script>")
    assert client.ask(f"{base}/close")[2] == b"data: 1\n\n"
    assert client.ask(f"{base}/big")[2] == bytes(5_000_000)
    status, headers, _ = client.ask(f"{base}/x", "HEAD")
    assert (status, headers["content-length"]) == (200, "123")
    data = os.urandom(700_000)
    assert client.ask(f"{base}/post", "POST", data)[::2] == (201, data[::-1])
    assert client.ask(f"{base}/put", "PUT", iter([b"ab", b"cd"]))[::2] == (201, b"dcba")
    assert client.ask(base)[0] in (307, 308)


def test_what_cannot_be_reached_says_so(system: System, device: int) -> None:
    client = Client(system)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert client.ask(f"/nodes/{NODE}/proxy/{port}/")[0] == 503
    assert client.ask(f"/nodes/{NODE}/proxy/{device}/garbage")[0] == 503
    assert client.ask(f"/nodes/nobody/proxy/{device}/")[0] == 404
    assert client.ask(f"/nodes/{NODE}/proxy/0/")[0] == 422
    status, _, body = client.ask(f"/nodes/{NODE}/proxy/192.0.2.1:80/")
    assert status == 403 and b"own policy" in body
    assert Client(system, "").ask(f"/nodes/{NODE}/proxy/{device}/")[0] == 401
    viewer = json.loads(system.run("token", "create", "--role", "viewer", "--ttl", "1h", "-o", "json"))["token"]
    assert Client(system, viewer).ask(f"/nodes/{NODE}/proxy/{device}/")[0] == 403


def test_a_browser_is_let_in_by_a_link_and_has_no_other_way(system: System, device: int) -> None:
    url = urlsplit(system.run("tunnel", "url", NODE, str(device)).strip())
    browser, base = Client(system, ""), url.path.rstrip("/")
    status, headers, body = browser.ask(url.path, Origin="null")
    assert status == 200
    assert f'href="{base}/next"'.encode() in body
    assert headers["access-control-allow-origin"] == "null"
    assert "allow-same-origin" not in headers["content-security-policy"]
    assert browser.ask(f"{base}/next")[1]["location"] == f"{base}/after"
    status, headers, _ = browser.ask(
        f"{base}/x", "OPTIONS", Origin="null", Access_Control_Request_Method="PUT", Access_Control_Request_Headers="x-y"
    )
    assert (status, headers["access-control-allow-headers"]) == (204, "x-y")
    # another port, another node, the API: not by this link
    assert browser.ask(url.path.replace(f"/{device}/", f"/{device - 1}/"))[0] == 401
    assert browser.ask(url.path.replace(NODE, "plant-2"))[0] == 401
    assert browser.ask(f"/api/v1/nodes?x={base}")[0] == 401
    assert browser.ask(base[:-4] + "AAAA/")[0] == 401


def test_a_websocket_passes_and_ends_with_its_caller_s_right(system: System, device: int) -> None:
    rules = [{"verbs": [f"tunnel:http:{device}"], "kinds": ["Node"]}]
    system.apply({"kind": "Role", "metadata": {"name": "watcher"}, "spec": {"rules": rules}})
    out = system.run("token", "create", "--role", "watcher", "--ttl", "1h", "-o", "json")
    token = json.loads(out)["token"]
    connection = Client(system, token).connection()
    connection.connect()
    sock = connection.sock
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [f"GET /nodes/{NODE}/proxy/{device}/ws HTTP/1.1", "Host: hub", f"Authorization: Bearer {token}"]
    lines += ["Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13"]
    sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    got = b""
    while not got.endswith(b"hello"):
        got += sock.recv(4096)
    assert got.startswith(b"HTTP/1.1 101 ") and b"Sec-WebSocket-Accept: yes" in got
    data = b"abc" * 100_000
    sock.sendall(data)
    back = b""
    while len(back) < len(data):
        back += sock.recv(65536)
    assert back == data.upper()
    system.run("delete", "role", "watcher")
    with contextlib.suppress(ConnectionResetError, ssl.SSLError):
        while sock.recv(4096):  # until it is cut
            pass
    sock.close()


def test_a_page_that_is_quiet_ends_with_its_caller_s_right_too(system: System, device: int) -> None:
    rules = [{"verbs": [f"tunnel:http:{device}"], "kinds": ["Node"]}]
    system.apply({"kind": "Role", "metadata": {"name": "looker"}, "spec": {"rules": rules}})
    token = json.loads(system.run("token", "create", "--role", "looker", "--ttl", "1h", "-o", "json"))["token"]
    connection = Client(system, token).connection()
    connection.request("GET", f"/nodes/{NODE}/proxy/{device}/quiet", headers={"Authorization": f"Bearer {token}"})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.readline() == b"data: 1\n"
    system.run("delete", "role", "looker")
    with contextlib.suppress(http.client.IncompleteRead, ConnectionResetError, ssl.SSLError):
        answer.read()  # until it is cut
    connection.close()


def test_a_node_s_own_api_shows_its_pages_as_well(system: System, device: int) -> None:
    run = json.loads((system.data / "nodes" / NODE / "run.json").read_text())
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LONG)
        sock.connect(run["api"])
        sock.sendall(f"GET /nodes/{NODE}/proxy/{device}/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        got = b""
        while data := sock.recv(65536):
            got += data
    assert got.startswith(b"HTTP/1.1 200 ")
    assert f'href="/nodes/{NODE}/proxy/{device}/next"'.encode() in got
    system.run("--at", NODE, "tunnel", "url", NODE, str(device), code=3)


def test_what_was_looked_at_is_in_the_audit(system: System, device: int) -> None:
    items = json.loads(system.run("audit", "-o", "json"))["items"]
    mine = [r for r in items if r.get("detail", {}).get("use") == f"http:{device}"]
    assert mine and mine[0]["outcome"] == "opened" and mine[0]["actor"] == "admin"
    assert len(mine) < 10  # not one of each request


def test_no_device_has_the_hub_write_a_link_down(system: System, device: int) -> None:
    url = urlsplit(system.run("tunnel", "url", NODE, str(device)).strip())
    browser, ticket = Client(system, ""), url.path.strip("/").split("~")[1]
    status, headers, _ = browser.ask(url.path + "same")
    assert (status, headers["etag"]) == (304, '"x"')
    assert browser.ask(url.path + "odd")[0] == 503
    logs = [p for p in system.data.rglob("*.log") if ticket in p.read_text(errors="replace")]
    assert not logs
    assert not [line for line in (system.data / "hub" / "hub.log").read_text().splitlines() if "Traceback" in line]
