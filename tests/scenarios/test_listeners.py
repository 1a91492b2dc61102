"""TLS at the gateway of a running system: a Secret's certificate and the platform's, changed under open connections."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.gateway.acme_authority import AcmeAuthority
from tests.gateway.papers import Authority
from tests.gateway.rig import free_port

FUNCTION = {
    "kind": "Function",
    "metadata": {"name": "hello"},
    "spec": {"runtime": "python", "source": {"inline": "def handler(event, context):\n    return 'hello'\n"}},
}
ROUTE = {"kind": "Route", "metadata": {"name": "hello"}, "spec": {"path": "/hello", "to": {"function": "hello"}}}


class Https(http.client.HTTPConnection):
    """A connection to a port of this machine by the name of a host."""

    def __init__(self, port: int, name: str, ca: str) -> None:
        super().__init__(name, timeout=60)
        self._at, self._context = port, ssl.create_default_context(cadata=ca)

    def connect(self) -> None:
        raw = socket.create_connection(("127.0.0.1", self._at), timeout=60)
        try:
            self.sock = self._context.wrap_socket(raw, server_hostname=self.host)
        except BaseException:
            raw.close()
            raise

    def get(self) -> tuple[int, bytes]:
        self.request("GET", "/hello")
        got = self.getresponse()
        return got.status, got.read()

    @property
    def serial(self) -> str:
        shown: Any = self.sock
        return str(shown.getpeercert()["serialNumber"])


def attempt(port: int, name: str, ca: str) -> tuple[int, str] | None:
    """``(status, serial number)``; None while there is no such door."""
    connection = Https(port, name, ca)
    try:
        connection.connect()
        return connection.get()[0], connection.serial
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_certificates_of_a_secret_the_platform_and_an_authority(systems: Callable[..., Any], tmp_path: Path) -> None:
    system = systems("t", "up")
    ca, port = Authority("shop"), free_port()
    hub_ca = Path(system.context["ca_file"]).read_text()

    def secret() -> dict[str, Any]:
        chain, key = ca.issue("shop.example.org")
        return {"kind": "Secret", "metadata": {"name": "shop"}, "spec": {"data": {"tls.crt": chain, "tls.key": key}}}

    first = secret()
    certificates = [
        {"hosts": ["shop.example.org"], "secret": "shop"},
        {"hosts": ["plant.example.org"], "platform": True},
    ]
    listener = {
        "kind": "Listener",
        "metadata": {"name": "l"},
        "spec": {"port": port, "tls": {"certificates": certificates}},
    }
    outside = {"kind": "Listener", "metadata": {"name": "out"}, "spec": {"port": port, "address": "192.0.2.77"}}
    system.apply([first, FUNCTION, ROUTE, listener, outside])
    got = system.wait("the Secret's", lambda: attempt(port, "shop.example.org", ca.pem))
    kept = Https(port, "shop.example.org", ca.pem)
    system.wait("the function", lambda: kept.get() == (200, b"hello"))
    # the hub hears of the name, has the node renew and signs for it; nobody else's name
    system.wait("the platform's", lambda: attempt(port, "plant.example.org", hub_ca))
    status = system.wait("status", lambda: (s := system.get("listener", "l")["status"]) and s["phase"] == "Ready" and s)
    shown = next(iter(status["nodes"].values()))
    assert [c["source"] for c in shown["certificates"]] == ["Secret/shop", "platform"]
    assert system.get("listener", "out")["status"]["phase"] == "Refused"
    assert "node.json" in system.run("get", "listeners", "-o", "wide")
    # a new certificate: who is connected stays, who comes sees it
    system.apply(secret())
    system.wait("the new one", lambda: (now := attempt(port, "shop.example.org", ca.pem)) and now[1] != got[1])
    assert kept.get() == (200, b"hello")
    # without its agent, and with a plane that starts anew without one
    pids = system.context["nodes"][0]["pids"]
    # of a plane that is just started anew nothing is said yet; it keeps its ports
    plain = urlsplit(system.context["nodes"][0]["gateway_url"]).port or 0
    os.kill(pids["agent"], signal.SIGSTOP)
    try:
        assert attempt(port, "plant.example.org", hub_ca)
        assert kept.get() == (200, b"hello")
    finally:
        os.kill(pids["agent"], signal.SIGCONT)
    os.kill(pids["plane"], signal.SIGKILL)
    system.wait("the next plane", lambda: attempt(port, "plant.example.org", hub_ca))
    kept.close()
    # an ACME authority finds its proof at the plain port; its certificate is shown at a port of its own
    authority, acme_port = AcmeAuthority(tmp_path, plain), free_port()
    try:
        acme = {"directory": authority.directory, "termsAgreed": True, "ca": {"config": "acme"}}
        tls = {"certificates": [{"hosts": ["public.example.org"], "acme": acme}], "minVersion": "1.3"}
        own = {"kind": "Config", "metadata": {"name": "acme"}, "spec": {"data": {"ca.crt": authority.ca}}}
        public = {"kind": "Listener", "metadata": {"name": "public"}, "spec": {"port": acme_port, "tls": tls}}
        system.apply([own, public])
        system.wait("ACME's", lambda: attempt(acme_port, "public.example.org", authority.signer.pem))
        system.wait("the event", lambda: "CertificateIssued" in system.run("events"))
    finally:
        authority.close()
    # no key lies anywhere in plain
    keys = {line for line in first["spec"]["data"]["tls.key"].splitlines() if not line.startswith("---")}
    for path, _, content in system.contents(system.data):
        for line in keys:
            assert line.encode() not in content, path
    system.run("delete", "listener", "l")
    system.wait("its end", lambda: attempt(port, "shop.example.org", ca.pem) is None)
