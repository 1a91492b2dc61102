"""examples/03-canary as a user goes through it, the last step at a site that is cut off."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgeward.functions.canary import gets_canary

EXAMPLE = Path(__file__).parents[2] / "examples" / "03-canary"
SAMPLES = ("functions", "samples", "price", "-o", "jsonl")
CUSTOMERS = [f"customer-{n}" for n in range(24)]


def ask(url: str, customer: str) -> tuple[int, dict[str, Any]]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/price", b'{"pieces": 20}', {"X-Customer": customer})
        got = connection.getresponse()
        return got.status, json.load(got)


def test_a_canary_is_promoted_and_a_bad_one_goes_back_at_a_cut_site(lab: Callable[[str], Any]) -> None:
    system = lab("sites: [{name: plant, nodes: 1, link: lan}]")

    def apply(name: str) -> None:
        system.run("apply", "-f", str(EXAMPLE / name), "--wait")

    def versions(*at: str) -> dict[str, str]:
        rows = system.run(*at, "functions", "versions", "price").splitlines()[1:]
        return {row.split()[1]: row.split()[0] for row in rows}

    apply("1-stable.yaml")
    url = system.wait("the gateway", lambda: system.context["nodes"][0].get("gateway_url"))
    first = system.get("function", "price")["status"]["version"]
    system.wait("the route", lambda: ask(url, "x") == (200, {"total": 100, "version": first}))

    apply("2-canary.yaml")
    status = system.get("function", "price")["status"]
    second = status["canary"]["version"]
    assert (status["version"], status["phase"]) == (first, "Running")
    for customer in CUSTOMERS:
        mine = (200, {"total": 96, "version": second}) if gets_canary(customer, "default/price", 25) else None
        assert {json.dumps(ask(url, customer)) for _ in range(2)} == {
            json.dumps(mine or (200, {"total": 100, "version": first}))
        }
    assert json.loads(system.run("invoke", "price@canary", "-d", '{"pieces": 10}'))["total"] == 48
    assert json.loads(system.run("invoke", "price@stable", "-d", '{"pieces": 10}'))["total"] == 50
    system.run("invoke", "price@blue", code=2)
    system.wait("the digests", lambda: versions() == {"stable": first, "canary": second})
    system.run("functions", "promote", "price", "--wait")
    assert system.get("function", "price")["status"]["version"] == second
    assert {ask(url, c)[1]["version"] for c in CUSTOMERS} == {second}
    system.run("functions", "promote", "price", code=1)  # there is none

    apply("3-careless.yaml")
    third = system.get("function", "price")["status"]["canary"]["version"]
    system.run("lab", "cut", "plant", "--data", str(system.data))
    got = Counter(ask(url, customer)[0] for customer in CUSTOMERS * 3)
    assert 3 <= got[500] <= 5, "the node took it back by itself"
    assert got[200] == len(CUSTOMERS) * 3 - got[500]
    system.wait("the event", lambda: "CanaryTakenBack" in system.run("events", "--at", "plant-1"))
    system.wait("the digest", lambda: third in versions("--at", "plant-1").values())
    at_site = system.get("function", "price", "--at", "plant-1")
    assert at_site["spec"]["canary"], "what is declared stays what is declared"

    failed = [json.loads(line) for line in system.run(*SAMPLES, "--at", "plant-1").splitlines()]
    assert len(failed) == got[500], "what it could not answer is kept, for those who mend it"
    assert {(s["why"], s["version"], s["input"], s["error"]) for s in failed} == {
        ("error", third, '{"pieces": 20}', "error")
    }

    out = system.run("--at", "plant-1", "functions", "rollback", "price")
    assert out == f"function/price rolled back to {second}\n"
    assert "canary" not in system.get("function", "price", "--at", "plant-1")["spec"]
    assert [ask(url, c)[1]["version"] for c in CUSTOMERS[:3]] == [second] * 3
    system.run("--at", "plant-1", "functions", "rollback", "price", "--to", "0123", code=5)
    system.run("lab", "heal", "plant", "--data", str(system.data))
    system.wait("the site's change at the hub", lambda: "canary" not in system.get("function", "price")["spec"])

    def at_hub() -> list[dict[str, Any]]:
        return [json.loads(line) for line in system.run(*SAMPLES).splitlines()]

    system.wait("the samples, read from the node that is there again", lambda: at_hub() == failed)
    assert system.run("functions", "samples", "price", "--limit", "2").count("plant-1") == 2
    head, row, *more = system.run("functions", "metrics", "price").splitlines()
    assert (head.split()[:3], row.split()[0], row.split()[2]) == (["NODE", "CALLS", "FAILED"], "plant-1", str(got[500]))
    assert f"plant-1: failed: error {got[500]}" in more
    numbers = json.loads(system.run("--at", "plant-1", "functions", "metrics", "price", "-o", "json"))["nodes"][0]
    assert sum(numbers["latency"]) == numbers["calls"] >= len(CUSTOMERS) * 3

    # what was before is kept at the hub as well
    kept = json.loads(system.run("functions", "versions", "price", "-o", "json"))["items"]
    assert [i["version"] for i in kept] == [first, third, second]
    system.run("functions", "rollback", "price", "--wait")
    assert system.get("function", "price")["status"]["version"] == first
    assert ask(url, "x") == (200, {"total": 100, "version": first})
