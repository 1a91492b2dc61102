"""logs, events, top, journal, audit, streams, overrides: passed on as they come."""

from __future__ import annotations

import json
import re
from typing import Any

Program = Any

EVENT = {
    "seq": 7,
    "time": "2026-01-01T00:00:00.000Z",
    "type": "Warning",
    "node": "plant-1",
    "resource": "App/web",
    "reason": "Unhealthy",
    "message": "GET / gave 500",
}


def test_logs_are_passed_on_byte_by_byte(edgeward: Program, hub: Any) -> None:
    hub.streams["/api/v1/namespaces/default/apps/web/logs"] = [b"plant-1: one\n", "plant-1: zwölf".encode(), b"\n"]
    assert edgeward("logs", "web", "--tail", "5", "--since", "1m30s", "-f").stdout == "plant-1: one\nplant-1: zwölf\n"
    path = hub.requests[-1][1]
    assert "tail=5" in path and "since=1m30s" in path and "follow=true" in path
    edgeward("logs", "other", code=5)


def test_events(edgeward: Program, hub: Any) -> None:
    hub.extra["/api/v1/events"] = {"items": [EVENT]}
    out = edgeward("events").stdout
    assert "Unhealthy" in out and "GET / gave 500" in out
    assert json.loads(edgeward("events", "-o", "json").stdout) == {"items": [EVENT]}
    hub.extra["/api/v1/events"] = {"items": []}
    assert edgeward("events").stdout == ""


def test_events_follow(edgeward: Program, hub: Any) -> None:
    line = f"event: ADDED\ndata: {json.dumps(EVENT)}\n\n".encode()
    hub.streams["/api/v1/events"] = [line[:20], line[20:], b": keep-alive\n\n", line]
    out = edgeward("events", "-f", "-o", "json").stdout
    assert [json.loads(row) for row in out.splitlines()] == [EVENT, EVENT]
    assert "Unhealthy" in edgeward("events", "-f").stdout


def test_top_journal_audit(edgeward: Program, hub: Any) -> None:
    hub.extra["/api/v1/top"] = {
        "nodes": [{"name": "plant-1", "agentMB": 31.5, "temperature": 40}],
        "apps": [{"namespace": "default", "name": "web", "memory": 5 * 2**20}, {"namespace": "other", "name": "far"}],
    }
    out = edgeward("top").stdout
    assert "AGENT MB" in out and "31.5" in out and "TEMPERATURE" in out
    out = edgeward("top", "apps").stdout
    assert "5.0 MiB" in out and "far" not in out
    assert "far" in edgeward("top", "apps", "-A").stdout
    hub.extra["/api/v1/journal"] = {
        "items": [{"resource": "App/web", "loser": "edge", "why": "changed at the hub too"}]
    }
    assert "changed at the hub too" in edgeward("journal").stdout
    hub.extra["/api/v1/audit"] = {"items": [{"actor": "admin", "verb": "create", "resource": "App/web"}]}
    assert "admin" in edgeward("audit").stdout


def test_top_shows_what_the_link_carries(edgeward: Program, hub: Any) -> None:
    wan = {"sent": 2048, "received": 100, "kbitUp": 0.112, "kbitDown": 0.098, "rttMs": 35.2, "connections": 2}
    plain = {"name": "plant-1", "site": "plant", "online": True, "agentMB": 31.5}
    hub.extra["/api/v1/top"] = {"nodes": [plain | {"wan": wan}, {"name": "away", "online": False}], "apps": []}
    out = edgeward("top", "nodes", "--wan").stdout
    assert "KBIT UP" in out and "0.112" in out and "35.2" in out and "AGENT MB" not in out
    assert "away" in out
    first = json.loads(edgeward("top", "nodes", "--wan", "-o", "json").stdout)["items"][0]
    assert first == {"name": "plant-1", "site": "plant", "online": True} | wan
    assert "KBIT" not in edgeward("top").stdout
    assert json.loads(edgeward("top", "-o", "json").stdout)["items"][0] == plain
    edgeward("top", "apps", "--wan", code=2)


def test_stream_list(edgeward: Program, hub: Any) -> None:
    hub.extra["/api/v1/streams"] = {"items": [{"name": "line1", "messages": 3, "bytes": 2048, "nodes": ["plant-1"]}]}
    out = edgeward("stream", "list").stdout
    assert "line1" in out and "2.0 KiB" in out
    assert edgeward("stream", "list", "-o", "name").stdout == "stream/line1\n"


def test_stream_read_is_passed_on_line_by_line(edgeward: Program, hub: Any) -> None:
    rows = [
        {"seq": 4096 * i, "node": "plant-1", "topic": "sensors/a", "payload": {"id": i}, "time": "t"} for i in range(3)
    ]
    body = "".join(json.dumps(r) + "\n" for r in rows).encode()
    hub.streams["/api/v1/streams/line1"] = [body[:30], body[30:]]
    done = edgeward("stream", "read", "line1", "--from", "0", "--limit", "3", "-o", "json")
    assert done.stdout.encode() == body
    assert "from=0" in hub.requests[-1][1] and "limit=3" in hub.requests[-1][1]
    out = edgeward("stream", "read", "line1").stdout.splitlines()
    assert out[0].split() == ["SEQ", "TIME", "NODE", "TOPIC", "PAYLOAD"]
    assert len(out) == 4 and '{"id": 2}' in out[3]
    edgeward("stream", "read", "gone", code=5)
    edgeward("stream", "read", "line1", "--from", "-1", code=2)


def test_overrides(edgeward: Program, hub: Any) -> None:
    spec = {"target": {"kind": "App", "name": "web"}, "site": "plant", "patch": {"replicas": 2}, "reason": "by hand"}
    for name in ("one", "two"):
        hub.put({"kind": "Override", "metadata": {"name": name}, "spec": spec})
    out = edgeward("override", "list").stdout
    assert "app/web" in out and "replicas" in out and "by hand" in out
    hub.extra["/api/v1/namespaces/default/overrides/one/promote"] = {}
    assert edgeward("override", "promote", "one").stdout == "override/one promoted\n"
    assert hub.requests[-1][0] == "POST"
    assert edgeward("override", "drop", "two").stdout == "override/two dropped\n"
    edgeward("override", "drop", "two", code=5)


def test_in_what_sites_differ(edgeward: Program, hub: Any) -> None:
    spec = {"process": {"command": ["v1"]}, "perSite": {"berlin": {"replicas": 2, "process": {"command": ["v2"]}}}}
    status = {"sites": {"berlin": {"wanted": 2, "running": 1, "version": "b"}, "bonn": {"wanted": 1, "running": 1}}}
    hub.put({"kind": "App", "metadata": {"name": "web"}, "spec": spec}, status=status)
    out = edgeward("persite", "list", "web").stdout
    assert re.search(r"berlin +process,? ?replicas +1/2 +b\n", out), out
    assert re.search(r"bonn +- +1/1", out), out
    assert edgeward("persite", "promote", "web", "berlin").stdout == "app/web: site berlin promoted\n"
    now = hub.docs["App", "default", "web"]["spec"]
    assert now == {"process": {"command": ["v2"]}, "perSite": {"berlin": {"replicas": 2}}}
    assert edgeward("persite", "drop", "app/web", "berlin").stdout == "app/web: site berlin dropped\n"
    assert "perSite" not in hub.docs["App", "default", "web"]["spec"]
    assert "says nothing of site 'berlin' alone" in edgeward("persite", "drop", "web", "berlin", code=5).stderr
