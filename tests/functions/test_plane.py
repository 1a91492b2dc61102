"""The functions' part of a plane: what the agent writes is what runs, and a bad start goes back to what ran well."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.core.pair import until
from tests.functions.node import HELLO, looped

from edgeward.core.errors import EdgewardError, TooLarge
from edgeward.core.invocation import Call, CallFailed, Event
from edgeward.core.resource import Resource, decode
from edgeward.core.vault import Vault
from edgeward.functions.cloud import fold
from edgeward.functions.edge import Sections, read_logs
from edgeward.functions.logs import Line, wanted
from edgeward.functions.plane import FunctionsPart
from edgeward.functions.relay import call_args
from edgeward.functions.stats import HELP


def resource(name: str, code: str = HELLO, **spec: Any) -> Resource:
    doc = {"apiVersion": "edgeward/v1", "kind": "Function", "metadata": {"name": name}}
    return decode(doc | {"spec": {"runtime": "python", "source": {"inline": code}} | spec})


class Voice:
    def __init__(self) -> None:
        self.statuses: dict[str, dict[str, Any] | None] = {}
        self.events: list[str] = []

    def report(self, kind: str, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        assert kind == "Function"
        self.statuses[f"{namespace}/{name}"] = status

    def event(self, type: str, reason: str, message: str, namespace: str, name: str, kind: str) -> None:
        self.events.append(f"{reason} {name}: {message}")


@contextlib.asynccontextmanager
async def running(data: Path) -> AsyncIterator[tuple[FunctionsPart, Voice]]:
    voice = Voice()
    part = FunctionsPart(data=data, node="n1", site="s1", voice=voice)
    task = asyncio.create_task(part.run())
    try:
        yield part, voice
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def take(part: FunctionsPart, section: dict[str, Any]) -> None:
    part.commit(await part.provision(json.loads(json.dumps(section))))


async def invoke(part: FunctionsPart, name: str, data: bytes = b"") -> tuple[dict[str, Any], bytes]:
    args = {"name": name, "data": base64.b64encode(data).decode(), "within": 20}
    docs = [d async for d in part.verbs["invoke"](args)]
    return docs[0]["head"], b"".join(base64.b64decode(d["data"]) for d in docs[1:])


def nothing(namespace: str, name: str) -> None:
    return None


@looped
async def test_what_the_agent_declares_is_what_answers_and_secrets_are_sealed_on_the_way(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "identity")
    revision = "7"

    def secret(namespace: str, name: str) -> tuple[dict[str, str], str] | None:
        return ({"PASSWORD": f"treasure-{revision}"}, revision) if name == "db" else None

    def config(namespace: str, name: str) -> tuple[dict[str, str], str] | None:
        return ({"MODE": "fast"}, "1") if name == "settings" else None

    code = "import os\ndef handler(e, c):\n    return [os.environ['PASSWORD'], os.environ['MODE'], c.version]"
    sections = Sections(config, secret, vault)
    wanted = [resource("f", code, envFrom=[{"secret": "db"}, {"config": "settings"}]), resource("hello")]
    section = sections.section(wanted)
    assert section == sections.section(wanted), "the same bytes: nothing is written anew"
    assert "treasure" not in json.dumps(section)
    async with running(tmp_path) as (part, voice):
        await take(part, section)
        head, body = await invoke(part, "f")
        assert json.loads(body)[:2] == ["treasure-7", "fast"]
        assert (head["status"], head["version"], head["node"]) == (200, json.loads(body)[2], "n1")
        await until(lambda: (voice.statuses.get("default/f") or {}).get("phase") == "Running", 20)
        await until((tmp_path / "functions/good.json").exists, 20)
        for file in ("functions/good.json", "functions/logs/default/f.log"):
            if (tmp_path / file).exists():
                assert "treasure" not in (tmp_path / file).read_text()
        revision = "8"
        await take(part, sections.section(wanted))
        await until(lambda: (voice.statuses.get("default/f") or {}).get("version") != head["version"], 20)
        assert json.loads((await invoke(part, "f"))[1])[0] == "treasure-8"
        numbers = (await anext(part.verbs["functions.stats"]({})))["metrics"]
        assert numbers['edgeward_function_calls_total{function="default/f"}'] >= 2
        assert numbers['edgeward_function_latency_total{function="default/f",le="+Inf"}'] >= 2
        assert {n.partition("{")[0] for n in numbers} <= set(HELP)
        failed, problem = await invoke(part, "nobody")
        assert failed["status"] == 404
        assert json.loads(problem)["kind"] == "unknown"


@looped
async def test_a_plane_that_starts_with_a_bad_version_goes_back_to_the_one_that_ran_well(tmp_path: Path) -> None:
    sections = Sections(nothing, nothing, Vault.open(tmp_path / "identity"))
    async with running(tmp_path) as (part, _):
        await take(part, sections.section([resource("f")]))
        head, _body = await invoke(part, "f", b"a")
        await until((tmp_path / "functions/good.json").exists, 20)
    bad = sections.section([resource("f", "raise SystemExit(1)")])
    async with running(tmp_path) as (part, voice):
        await take(part, bad)
        again, body = await invoke(part, "f", b"a")
        assert again["version"] == head["version"]
        assert json.loads(body)["hello"] == "a"
        await until(lambda: (voice.statuses.get("default/f") or {}).get("phase") == "Degraded", 20)
    # one that loads and then fails its calls goes back to it as well, and stays away over the next start
    failing = sections.section([resource("f", "def handler(e, c):\n    raise ValueError")])
    for _ in range(2):
        async with running(tmp_path) as (part, voice):
            await take(part, failing)
            for _ in range(5):
                await invoke(part, "f", b"a")
            await until(lambda: "takenBack" in (voice.statuses.get("default/f") or {}), 20)
            assert (await invoke(part, "f", b"a"))[0]["version"] == head["version"]
            await until(lambda: "verdicts" in json.loads((tmp_path / "functions/good.json").read_text()), 20)
    async with running(tmp_path) as (part, voice):
        await take(part, bad)
        await until(lambda: (voice.statuses.get("default/f") or {}).get("phase") == "Degraded", 20)
        await take(part, {"functions": []})
        assert voice.statuses["default/f"] is None
        await until(lambda: json.loads((tmp_path / "functions/good.json").read_text()) == {}, 20)


@looped
async def test_a_restart_in_the_middle_of_a_canary_keeps_its_share_and_what_was_found(tmp_path: Path) -> None:
    sections = Sections(nothing, nothing, Vault.open(tmp_path / "identity"))
    code = "def handler(e, c):\n    if e.data == b'bad':\n        raise ValueError\n    return c.version"
    old = sections.section([resource("f", "def handler(e, c):\n    return c.version")])
    new = sections.section([resource("f", code, canary={"weight": 30})])
    digests = [s["functions"][0]["digest"] for s in (old, new)]
    keys = [f"user-{n}" for n in range(40)]

    async def answers(part: FunctionsPart) -> list[str]:
        calls = [Call("default/f", Event("1", "/t", "t"), key=key) for key in keys]
        return [(await part.invoke(call)).version for call in calls]

    def status(voice: Voice) -> dict[str, Any]:
        return voice.statuses.get("default/f") or {}

    async with running(tmp_path) as (part, voice):
        await take(part, old)
        await invoke(part, "f")
        await take(part, new)
        await until(lambda: "canary" in status(voice), 30)
        before = await answers(part)
        assert set(before) == set(digests)
        await until((tmp_path / "functions/good.json").exists, 20)
    async with running(tmp_path) as (part, voice):
        await take(part, new)
        await until(lambda: "canary" in status(voice), 30)
        assert await answers(part) == before
        for _ in range(30):
            with contextlib.suppress(CallFailed):
                await part.invoke(Call("default/f", Event("1", "/t", "t", b"bad"), version="canary"))
        await until(lambda: status(voice).get("takenBack") == digests[1], 30)
        kept = tmp_path / "functions/good.json"
        await until(lambda: "verdicts" in json.loads(kept.read_text()), 30)
    async with running(tmp_path) as (part, voice):
        await take(part, new)
        assert set(await answers(part)) == {digests[0]}
        await until(lambda: status(voice).get("takenBack") == digests[1], 30)
        assert (status(voice)["phase"], status(voice)["version"]) == ("Degraded", digests[0])
        assert status(voice)["message"].startswith(f"version {digests[1]} was taken back: ")


@looped
async def test_what_waits_for_a_config_says_so_and_what_runs_goes_on(tmp_path: Path) -> None:
    there = False

    def config(namespace: str, name: str) -> tuple[dict[str, str], str] | None:
        return ({"A": "1"}, "1") if there else None

    sections = Sections(config, nothing, Vault.open(tmp_path / "identity"))
    wanted = [resource("f", envFrom=[{"config": "late"}])]
    async with running(tmp_path) as (part, voice):
        await take(part, sections.section(wanted))
        assert voice.statuses["default/f"] == {"phase": "Pending", "message": "Config/late is not here yet"}
        there = True
        await take(part, sections.section(wanted))
        assert (await invoke(part, "f"))[0]["status"] == 200
        there = False
        await take(part, sections.section(wanted))
        assert (await invoke(part, "f"))[0]["status"] == 200, "a Config that is away for a moment ends nothing"


@looped
async def test_a_section_that_is_not_understood_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    sections = Sections(nothing, nothing, Vault.open(tmp_path / "identity"))
    async with running(tmp_path) as (part, _):
        await take(part, sections.section([resource("f")]))
        await invoke(part, "f")
        with pytest.raises(EdgewardError, match="not understood"):
            await part.provision({"functions": [{"key": 1}]})
        with pytest.raises(EdgewardError, match="unsealed"):
            await part.provision(
                {"functions": [{**sections.section([resource("f")])["functions"][0], "sealed": "AA=="}]}
            )
        assert (await invoke(part, "f"))[0]["status"] == 200


@looped
async def test_the_log_is_filtered_where_it_lies(tmp_path: Path) -> None:
    code = """
def handler(event, context):
    context.logger.info("quiet %s", event.data.decode())
    context.logger.error("loud %s", event.data.decode())
"""
    sections = Sections(nothing, nothing, Vault.open(tmp_path / "identity"))
    async with running(tmp_path) as (part, _):
        await take(part, sections.section([resource("f", code)]))
        heads = [(await invoke(part, "f", b"%d" % n))[0] for n in range(3)]

        async def lines(**args: Any) -> list[str]:
            pieces = read_logs(tmp_path / "functions", {"namespace": "default", "name": "f"} | args, "n1")
            return b"".join([p async for p in pieces]).decode().splitlines()

        async def all_there() -> bool:
            return len(await lines()) == 6

        await until((tmp_path / "functions/logs/default/f.log").exists, 20)
        await until(all_there, 20)
        assert [line.split()[-2:] for line in await lines(level="error", tail=2)] == [["loud", "1"], ["loud", "2"]]
        assert [line.split()[-2:] for line in await lines(grep="quiet 1")] == [["quiet", "1"]]
        assert [line.split()[-2:] for line in await lines(regex="^(loud|quiet) [12]$", tail=3)] == [
            ["loud", "1"], ["quiet", "2"], ["loud", "2"],
        ]  # fmt: skip
        assert await lines(regex="^never$") == []
        mine = await lines(invocation=heads[1]["invocation"], json=True)
        records = [json.loads(line) for line in mine]
        assert [(r["node"], r["message"]) for r in records] == [("n1", "quiet 1"), ("n1", "loud 1")]
        assert len(await lines(since="1h")) == 6
        assert not wanted(since="9999")(Line("2026-11-25T00:00:00.000Z", "info", "m"))
        for bad in (
            {"level": "shout"},
            {"since": "soon"},
            {"grep": "x" * 201},
            {"regex": "("},
            {"regex": "x" * 201},
            {"name": "../f"},
            {"name": "other"},
        ):
            with pytest.raises(EdgewardError):
                await lines(**bad)
        following = read_logs(
            tmp_path / "functions", {"namespace": "default", "name": "f", "follow": True, "tail": 1}, "n1"
        )
        assert b"loud 2" in await anext(following)
        coming = asyncio.ensure_future(anext(following))
        await invoke(part, "f", b"new")
        async with asyncio.timeout(20):
            assert b"quiet new" in await coming
        await following.aclose()  # type: ignore[attr-defined]
        sifted = read_logs(
            tmp_path / "functions",
            {"namespace": "default", "name": "f", "follow": True, "tail": 1, "regex": "^loud"},
            "n1",
        )
        assert b"loud" in await anext(sifted)
        coming = asyncio.ensure_future(anext(sifted))
        await invoke(part, "f", b"newest")
        async with asyncio.timeout(20):
            assert (await coming).splitlines()[0].endswith(b"loud newest")
        await sifted.aclose()  # type: ignore[attr-defined]


def test_arguments_from_outside_are_bounded() -> None:
    args = call_args("default", "f", b"x", {"timeout": "2.5"}, {"content-type": "text/plain"})
    assert (args["within"], args["type"], args["datacontenttype"]) == (2.5, "edgeward.invoke", "text/plain")
    for query in ({"timeout": "soon"}, {"timeout": "0"}, {"timeout": "1e9"}, {"timeout": "nan"}, {"key": "x" * 257}):
        with pytest.raises(EdgewardError):
            call_args("default", "f", b"", query, {})
    with pytest.raises(TooLarge):
        call_args("default", "f", b"x" * (7 << 20), {}, {})


def node(name: str, site: str, *, online: bool = True) -> Resource:
    doc = {"apiVersion": "edgeward/v1", "kind": "Node", "metadata": {"name": name}, "spec": {"site": site}}
    found = decode(doc)
    found.status = {"online": online}
    return found


def test_a_function_is_as_well_as_its_worst_node() -> None:
    import edgeward.nodes.spec  # noqa: F401 - the kind Node

    nodes = [node("a1", "a"), node("a2", "a", online=False), node("b1", "b")]
    fine = {"phase": "Running", "version": "v1", "instances": 2, "observedGeneration": 3, "enforced": ["exec", "files"]}
    worse = {**fine, "phase": "Degraded", "observedGeneration": 2, "enforced": ["exec"], "message": "why"}
    status = fold(resource("f"), nodes, {"a1": fine, "a2": worse})
    assert (status["phase"], status["version"], status["instances"]) == ("Degraded", "v1", 4)
    assert (status["observedGeneration"], status["enforced"]) == (2, ["exec"])
    assert status["message"] == "a2: why; not heard from: b1"
    assert status["nodes"]["a2"]["stale"]
    assert "stale" not in status["nodes"]["a1"]
    trial = {**fine, "canary": {"version": "v2", "weight": 10}}
    status = fold(resource("f"), nodes, {"a1": trial, "a2": fine, "b1": {**worse, "takenBack": "v2"}})
    assert (status["canary"], status["takenBack"]) == ({"version": "v2", "nodes": 1}, "v2")
    away = fold(resource("f", placement={"site": "c"}), nodes, {"a1": fine})
    assert (away["phase"], away["nodes"]) == ("Pending", {})
    assert "no node of site c" in away["message"]


@looped
async def test_secrets_by_name_are_sealed_on_the_way_and_state_goes_with_its_function(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "identity")
    code = """
def handler(event, context):
    context.state.set("seen", "1")
    return context.secrets
"""
    sections = Sections(nothing, lambda ns, name: ({"a/b": "treasure"}, "7"), vault)
    async with running(tmp_path) as (part, _):
        section = sections.section([resource("f", code, secrets=["db"]), resource("g", code)])
        assert "treasure" not in json.dumps(section)
        await take(part, section)
        assert json.loads((await invoke(part, "f"))[1]) == {"db": {"a/b": "treasure"}}
        assert json.loads((await invoke(part, "g"))[1]) == {}
        memory = part.dispatcher.asks.memory
        await take(part, {})  # nothing is said of functions: nothing is forgotten
        assert await memory.keys("default/f") == await memory.keys("default/g") == ["seen"]
        await take(part, sections.section([resource("f", code, secrets=["db"])]))

        async def forgotten() -> bool:
            return await memory.keys("default/g") == []

        await until(forgotten, 30)
        assert await memory.keys("default/f") == ["seen"]
    waiting = Sections(nothing, nothing, vault).section([resource("f", code, secrets=["db"])])
    assert waiting == {"functions": [{"key": "default/f", "waiting": "Secret/db is not here yet"}]}
