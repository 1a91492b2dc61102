"""A client finds its edge: by DNS, by the hub's answer and by its redirect, up to the gateway itself."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dns.message
import dns.query
from tests.scenarios.conftest import System

from edgeward.lab.cluster import free_port

ZONE = "edge.example.org"


def test_a_client_finds_its_edge(tmp_path: Path, systems: Callable[..., System]) -> None:
    data, port = tmp_path / "a", free_port()
    (data / "hub").mkdir(parents=True, mode=0o700)
    steering = {"zone": ZONE, "dns": f"127.0.0.1:{port}", "redirect": True, "load": "200ms"}
    (data / "hub" / "hub.json").write_text(json.dumps({"steering": steering}))
    system = systems("a", "up")
    context = system.context
    gateway = urlsplit(context["nodes"][0]["gateway_url"]).netloc
    site = {"kind": "Site", "metadata": {"name": context["nodes"][0].get("site", "plant")}}
    system.apply({**site, "spec": {"prefixes": ["127.0.0.0/8"], "addresses": [gateway]}})

    def told() -> Any:
        got = json.loads(system.run("steer", "127.0.0.1", "-o", "json"))
        return got if got["site"] else None

    got = system.wait("the site serves", told)
    name = site["metadata"]["name"]  # type: ignore[index]
    assert (got["site"], got["addresses"]) == (name, [gateway])
    shown = system.run("steer").splitlines()
    assert shown[0].split() == ["client", "127.0.0.1"] and shown[1].split() == ["site", name]
    assert shown[-1] == f"because   {name} is its own site"

    query = dns.message.make_query(ZONE, "A", use_edns=0)
    answer = dns.query.udp(query, "127.0.0.1", port=port, timeout=30)
    assert [str(r) for s in answer.answer for r in s] == ["127.0.0.1"]

    # without a token, and by urllib that follows: the answer is the gateway's own
    trust = ssl.create_default_context(cafile=context["ca_file"])
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=trust))
    try:
        opener.open(f"{context['hub_url']}/steer?path=/nobody", timeout=60)
        raise AssertionError("nobody has declared a Route")
    except urllib.error.HTTPError as e:
        assert e.code == 404 and e.url == f"http://{gateway}/nobody"
        e.close()

    def metrics() -> str:
        text: str = opener.open(f"{context['hub_url']}/metrics", timeout=60).read().decode()
        return text

    system.wait("the node's load is known", lambda: "edgeward_hub_site_load{" in metrics())
    assert 'edgeward_hub_dns_queries_total{outcome="udp"} 1' in metrics()
