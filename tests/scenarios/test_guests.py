"""East-west: one site asks for another's Service by its name, because that one allows it, and nobody else does."""

from __future__ import annotations

import http.client
import json
import ssl
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

SERVER = """
import http.server, os
class Web(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 65536
    def do_GET(self):
        body = f"{os.environ['EDGEWARD_SITE']} to {self.headers['x-forwarded-host']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Web).serve_forever()
"""
TOPOLOGY = "sites: [{name: plant, nodes: 1}, {name: berlin, nodes: 1}, {name: rome, nodes: 1}]"


def test_a_site_asks_another_one_that_allows_it(lab: Callable[[str], Any]) -> None:
    system = lab(TOPOLOGY)
    gateways = {n["site"]: urlsplit(n["gateway_url"]).netloc for n in system.context["nodes"]}
    app = {
        "placement": {"site": "plant"},
        "process": {"command": [sys.executable, "-c", SERVER]},
        "ports": [{"name": "http", "env": "PORT"}],
        "health": {"http": {"port": "http"}},
    }

    def service(*sites: str) -> dict[str, Any]:
        spec = {"app": "orders", "port": "http", "allowFrom": list(sites)}
        return {"kind": "Service", "metadata": {"name": "orders"}, "spec": spec}

    route = {"path": "/orders", "to": {"service": "orders"}}
    system.apply(
        [
            {"kind": "App", "metadata": {"name": "orders"}, "spec": app},
            service("berlin"),
            {"kind": "Route", "metadata": {"name": "orders"}, "spec": route},
        ],
        "--wait",
    )

    def ask(site: str, **headers: str) -> tuple[int, str, str]:
        connection = http.client.HTTPConnection(gateways[site], timeout=60)
        try:
            connection.request("GET", "/orders", headers={"Host": "shop.example", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers.get("edgeward-place", "")
        except OSError as e:
            return 0, str(e), ""
        finally:
            connection.close()

    system.wait("berlin is answered by plant", lambda: ask("berlin")[:2] == (200, "plant to shop.example"))
    assert ask("berlin")[2].startswith('site; name="plant"')
    assert ask("plant")[:2] == (200, "plant to shop.example")
    status, why, _ = ask("rome")
    assert status == 503
    assert "shop" not in why
    system.run("get", "service", "orders", "--at", "rome-1", code=5)  # it does not even know of it
    shown = json.loads(system.run("get", "service", "orders", "--at", "berlin-1", "-o", "json"))["status"]
    assert shown["guests"] == {"berlin-1": "berlin"}

    # who comes to the door without being allowed
    door = shown["doors"]["plant-1"]
    assert door["site"] == "plant"

    def knock(node: str | None, *, gateway: bool = True) -> tuple[int, str]:
        """At plant's door, with a node's own certificate."""
        context = ssl.create_default_context(cafile=system.context["ca_file"])
        if node is not None:
            context.load_cert_chain(system.data / "nodes" / node / "identity" / "node.pem")
        context.check_hostname = False
        host, _, port = door["address"].rpartition(":")
        connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=60)
        try:
            headers = {"Edgeward-Fallback": "default/orders"} if gateway else {}
            connection.request("GET", "/orders", headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (ssl.SSLError, OSError) as e:
            return 0, type(e).__name__
        finally:
            connection.close()

    assert knock("berlin-1")[0] == 200
    status, why = knock("rome-1")
    assert status == 403
    assert "CN=rome-1 is not among those whom Route/default/orders lets in" in why
    assert knock("berlin-1", gateway=False)[0] == 403, "no back door to the rest"
    assert knock(None)[0] == 0, "without a certificate nothing is heard"
    status, why, _ = ask("plant", **{"Edgeward-Fallback": "default/orders"})
    assert status == 403
    assert "by their nodes' certificates only" in why

    # it needs no hub
    for site in ("plant", "berlin"):
        system.run("lab", "cut", site)
    assert ask("berlin")[0] == 200
    for site in ("plant", "berlin"):
        system.run("lab", "heal", site)
    # what is taken back ends at once, on open connections too
    system.apply(service("rome"))
    system.wait("rome may", lambda: ask("rome")[:2] == (200, "plant to shop.example"))
    system.wait("berlin may not", lambda: ask("berlin")[0] == 503)
    system.wait("nor at the door", lambda: knock("berlin-1")[0] == 403)
    system.run("node", "revoke", "rome-1")
    system.wait("nor one that was revoked", lambda: knock("rome-1")[0] == 403)
