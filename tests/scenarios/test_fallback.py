"""What a site cannot answer the nearest one does, also while both are cut from the hub; then the cloud does."""

from __future__ import annotations

import http.client
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

SOURCE = """
def handler(event, context):
    return {"at": context.site, "got": event.data.decode()}
"""


class Cloud(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.dumps({"at": "cloud", "got": self.rfile.read(int(self.headers["content-length"])).decode()})
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def cloud() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cloud)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_the_nearest_site_and_then_the_cloud(lab: Callable[[str], Any], cloud: int) -> None:
    system = lab("sites: [{name: plant, nodes: 1, link: lan}, {name: berlin, nodes: 1, link: lan}]")
    urls = {n["site"]: n["gateway_url"] for n in system.context["nodes"]}
    places = {"plant": {"lat": 48.1, "lon": 11.6}, "berlin": {"lat": 52.5, "lon": 13.4}}
    for site, at in places.items():
        spec = {"addresses": [urlsplit(urls[site]).netloc], "coordinates": at}
        system.apply({"kind": "Site", "metadata": {"name": site}, "spec": spec})
    function = {"runtime": "python", "source": {"inline": SOURCE}, "placement": {"site": "berlin"}}
    route = {
        "path": "/f", "to": {"function": "f"}, "fallback": ["nearest", "cloud"], "cloud": f"http://127.0.0.1:{cloud}"
    }  # fmt: skip
    system.apply(
        [
            {"kind": "Function", "metadata": {"name": "f"}, "spec": function},
            {"kind": "Route", "metadata": {"name": "f"}, "spec": route},
        ]
    )

    def ask() -> tuple[str, str]:
        connection = http.client.HTTPConnection(urlsplit(urls["plant"]).netloc, timeout=60)
        try:
            connection.request("POST", "/f", b"event")
            answer = connection.getresponse()
            body = answer.read()
        except OSError:
            return "", ""
        finally:
            connection.close()
        doc = json.loads(body)
        assert answer.status != 200 or doc["got"] == "event"
        return str(doc.get("at", "")), str(answer.headers["edgeward-place"])

    system.wait("the nearest site answers", lambda: ask()[0] == "berlin")
    assert ask()[1] == 'site; name="berlin"; because="Function/f is not on this node"'
    status = system.wait(
        "the Route says so", lambda: (s := system.get("route", "f")["status"]["nodes"])["plant-1"]["places"][1:] and s
    )
    assert status["plant-1"]["phase"] == "Fallback" and status["berlin-1"]["phase"] == "Ready"
    assert status["plant-1"]["places"] == ["here", "site berlin", route["cloud"]]
    shown = system.run("gateway", "explain", f"{urls['plant']}/f", "-X", "POST")
    assert "place     here: is not on this node\nplace     site berlin\nplace     cloud" in shown

    for site in ("plant", "berlin"):
        system.run("lab", "cut", site)
    assert ask()[0] == "berlin", "it needs no hub"
    system.run("lab", "kill", "berlin-1")
    system.wait("the cloud answers", lambda: ask()[0] == "cloud", 60)
    place = ask()[1]
    assert place.startswith('cloud; name="http://127.0.0.1:') and "Function/f is not on this node; " in place
