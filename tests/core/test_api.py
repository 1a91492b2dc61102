"""The HTTP API over a real socket: what it takes, how it refuses, pages, watches, and its description of itself."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.core.access import record_routes
from edgeward.core.api import MAX_PAGE, Principal, build_app, parse_body
from edgeward.core.audit import Audit
from edgeward.core.authz import administrator
from edgeward.core.errors import Invalid, Unauthorized
from edgeward.core.openapi import document
from edgeward.core.records import SqliteRecords
from edgeward.core.registry import kinds
from edgeward.core.resource import MAX_DOCUMENT, Key
from edgeward.core.resources import Resources
from edgeward.core.store_sqlite import SqliteStore
from edgeward.core.streaming import ndjson
from edgeward.hub.kinds import load

load()

CONFIGS = "/api/v1/configs"
Doc = dict[str, Any]


class Hub:
    def __init__(self, http: httpx.AsyncClient, resources: Resources, records: SqliteRecords) -> None:
        self.http, self.resources, self.store, self.records = http, resources, resources.store, records
        self.ready = True

    async def ask(self, method: str, path: str, doc: Any = None, **kw: Any) -> tuple[int, Any]:
        answer = await self.http.request(method, path, **({"json": doc} if doc is not None else {}), **kw)
        assert answer.headers["x-request-id"]
        body = answer.json() if answer.content else None
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json"
            assert body["status"] == answer.status_code
            assert body["title"]
            assert body["detail"]
        return answer.status_code, body

    async def refused(self, method: str, path: str, doc: Any = None, **kw: Any) -> tuple[int, str, str]:
        """(status, field, remedy)"""
        status, body = await self.ask(method, path, doc, **kw)
        assert status >= 400, body
        return status, body.get("field", ""), body.get("remedy", "")


def auth(token: str | None, _: Any) -> Principal:
    if token != "good":
        raise Unauthorized("no valid token", remedy="log in")
    return administrator("eve")


async def broken(_: Request) -> Response:
    raise RuntimeError("s3cret detail of the inside")


async def lines(_: Request) -> Response:
    async def items() -> AsyncIterator[Doc]:
        for n in range(3):
            yield {"n": n, "text": "a\nb"}

    return ndjson(items())


def run(body: Callable[[Hub], Awaitable[None]]) -> None:
    async def main() -> None:
        resources, records = Resources(SqliteStore(), Audit()), SqliteRecords()
        hub = Hub(httpx.AsyncClient(), resources, records)
        app = build_app(
            resources,
            resources.store,
            auth=auth,
            extra_routes=[
                *record_routes(records),
                Route("/api/v1/broken", broken),
                Route("/api/v1/lines", lines),
            ],
            health=lambda: (hub.ready, {"state": "ready" if hub.ready else "starting"}),
            metrics=lambda: "edgeward_up 1\n",
            info={"version": "1.2.3"},
        )
        async with serving(app) as url, asyncio.timeout(240):
            headers = {"authorization": "Bearer good"}
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as hub.http:
                await body(hub)

    asyncio.run(main())


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def config(name: str, value: str = "1", **meta: Any) -> Doc:
    return {
        "apiVersion": "edgeward/v1",
        "kind": "Config",
        "metadata": {"name": name, **meta},
        "spec": {"data": {"k": value}},
    }


def namespace(name: str) -> Doc:
    return {"apiVersion": "edgeward/v1", "kind": "Namespace", "metadata": {"name": name}}


def test_a_resource_from_its_birth_to_its_end() -> None:
    async def body(hub: Hub) -> None:
        status, a = await hub.ask("POST", CONFIGS, config("a"))
        assert (status, a["metadata"]["generation"], a["metadata"]["namespace"]) == (201, 1, "default")
        for path in (f"{CONFIGS}/a", "/api/v1/namespaces/default/configs/a", f"{CONFIGS}/a/status"):
            answer = await hub.http.get(path)
            assert (answer.status_code, answer.json()) == (200, a)
            assert answer.headers["etag"] == f'"{a["metadata"]["resourceVersion"]}"'
        assert (await hub.http.head(f"{CONFIGS}/a")).status_code == 200
        assert (await hub.refused("POST", CONFIGS, config("a")))[0] == 409

        etag = {"if-match": answer.headers["etag"]}
        status, b = await hub.ask("PUT", f"{CONFIGS}/a", config("a", "2"), headers=etag)
        assert (status, b["spec"]) == (200, {"data": {"k": "2"}})
        for method, doc in (("PUT", config("a", "3")), ("PATCH", {"spec": {}}), ("DELETE", None), ("PUT", a)):
            status, field, _ = await hub.refused(method, f"{CONFIGS}/a", doc, headers=etag)
            assert (status, field) == (409, "$.metadata.resourceVersion"), method
        assert (await hub.refused("PUT", f"{CONFIGS}/a", a))[0] == 409, "the document's own revision counts too"
        status, c = await hub.ask("PUT", f"{CONFIGS}/a", {**b, "status": {}}, headers={"if-match": "*"})
        assert status == 200

        status, c = await hub.ask(
            "PATCH", f"{CONFIGS}/a", {"spec": {"data": {"k": None, "l": "x"}}, "status": {"no": 1}}
        )
        assert (status, c["spec"], c["status"]) == (200, {"data": {"l": "x"}}, {})
        status, c = await hub.ask("PUT", f"{CONFIGS}/a/status", {"status": {"phase": "x", "n": {"a": 1}}})
        assert c["status"] == {"phase": "x", "n": {"a": 1}}
        status, d = await hub.ask("PATCH", f"{CONFIGS}/a/status", {"n": {"a": None, "b": 2}})
        assert (d["status"], d["metadata"]) == ({"phase": "x", "n": {"b": 2}}, c["metadata"])

        status, e = await hub.ask("PUT", f"{CONFIGS}/a/status?dryRun=true", {"status": {"phase": "y"}})
        assert (status, e["status"], (await hub.ask("GET", f"{CONFIGS}/a"))[1]) == (200, {"phase": "y"}, d)

        assert (await hub.ask("DELETE", f"{CONFIGS}/a?dryRun=true"))[0] == 200
        assert (await hub.ask("DELETE", f"{CONFIGS}/a?dryRun=All"))[0] == 200
        assert (await hub.ask("DELETE", f"{CONFIGS}/a"))[0] == 200
        for method, doc in (("GET", None), ("DELETE", None), ("PATCH", {}), ("PUT", config("a"))):
            assert (await hub.refused(method, f"{CONFIGS}/a", doc))[0] == 404, method
        _, audit = await hub.ask("GET", "/api/v1/audit")
        assert {(i["actor"], i["source"]) for i in audit["items"]} == {("eve", "127.0.0.1")}
        assert all(i["request"] for i in audit["items"])
        assert [i["verb"] for i in audit["items"]].count("status") == 2, "every write, also of a status"

    run(body)


REFUSED: list[tuple[str, str, Any, int, str, str]] = [
    ("GET", "/api/v1/confgs", None, 404, "", "configs"),
    ("GET", "/api/v1/namespaces/default/sites", None, 404, "", "ask for /api/v1/sites"),
    ("GET", "/nowhere", None, 404, "", "openapi.json"),
    ("GET", f"{CONFIGS}/UPPER", None, 422, "name", "lower-case"),
    ("GET", f"{CONFIGS}/a%0a", None, 422, "name", "lower-case"),
    ("GET", "/api/v1/namespaces/A/configs/a", None, 422, "namespace", "lower-case"),
    ("GET", f"{CONFIGS}?labelSelector=a=b=c", None, 422, "selector", "key=value"),
    ("GET", f"{CONFIGS}?fieldSelector=a", None, 422, "fieldSelector", "status.phase"),
    ("GET", f"{CONFIGS}?limit=0", None, 422, "?limit", "1 to 1000"),
    ("GET", f"{CONFIGS}?limit=x", None, 422, "?limit", "1 to 1000"),
    ("GET", f"{CONFIGS}?limit=" + "9" * 5000, None, 422, "?limit", "1 to 1000"),
    ("GET", f"{CONFIGS}?continue=x", None, 422, "?continue", "again"),
    ("GET", f"{CONFIGS}?continue=%C3%A4", None, 422, "?continue", "again"),
    ("GET", f"{CONFIGS}?continue=e30=", None, 422, "?continue", "again"),
    ("GET", f"{CONFIGS}?watch=1&resourceVersion=x", None, 422, "?resourceVersion", "list"),
    ("GET", f"{CONFIGS}?watch=1&resourceVersion=%C2%B2", None, 422, "?resourceVersion", "list"),
    ("GET", "/api/v1/audit?since=-1", None, 422, "?since", "0 to"),
    ("POST", CONFIGS, {}, 422, "$.apiVersion", "add it"),
    ("POST", CONFIGS, [], 422, "$", ""),
    ("POST", CONFIGS, namespace("x"), 422, "$.kind", ""),
    ("POST", CONFIGS, {**config("b"), "status": {"phase": "x"}}, 422, "$.status", "leave it out"),
    ("POST", CONFIGS, config("b", namespace="gone"), 422, "$.metadata.namespace", "create it first"),
    ("POST", "/api/v1/namespaces/default/configs", config("b", namespace="x"), 422, "$.metadata.namespace", ""),
    ("PUT", f"{CONFIGS}/a", config("b"), 422, "$.metadata.name", ""),
    ("PATCH", f"{CONFIGS}/a", [], 422, "$", "7396"),
    ("PATCH", f"{CONFIGS}/a", {"metadata": {"name": "b"}}, 422, "$.metadata.name", "remove it"),
    ("PATCH", f"{CONFIGS}/a", {"metadata": {"resourceVersion": 3}}, 422, "$.metadata.resourceVersion", ""),
    ("PATCH", f"{CONFIGS}/a", {"spec": {"dat": {}}}, 422, "$.spec.dat", "'data'"),
    ("PATCH", f"{CONFIGS}/a", {"spec": {"data": {"k": 1}}}, 422, "$.spec.data.k", "quotes"),
    ("PUT", f"{CONFIGS}/a/status", [], 422, "$.status", ""),
    # a misspelt parameter must neither write nor list everything
    ("POST", f"{CONFIGS}?dryRun=ture", config("b"), 422, "?dryRun", "write true"),
    ("POST", f"{CONFIGS}?dryRun", config("b"), 422, "?dryRun", "write true"),
    ("POST", f"{CONFIGS}?dryrun=true", config("b"), 422, "?dryrun", "'dryRun'"),
    ("DELETE", f"{CONFIGS}/a?dry_run=true", None, 422, "?dry_run", "'dryRun'"),
    ("PUT", f"{CONFIGS}/a/status?dry=true", {}, 422, "?dry", "dryRun"),
    ("GET", f"{CONFIGS}?labelselector=a", None, 422, "?labelselector", "'labelSelector'"),
    ("GET", f"{CONFIGS}?watch=maybe", None, 422, "?watch", "write true"),
    ("GET", f"{CONFIGS}/a?watch=true", None, 422, "?watch", "none is taken"),
    ("GET", f"{CONFIGS}?watch=true&resourceVersion=999999", None, 410, "", "list again"),
    ("PUT", f"{CONFIGS}/gone/status", {}, 404, "", ""),
    ("PUT", CONFIGS, {}, 405, "", "POST"),
    ("POST", f"{CONFIGS}/a", {}, 405, "", "PATCH"),
]


def test_a_refusal_is_a_problem_that_names_field_and_remedy() -> None:
    async def body(hub: Hub) -> None:
        _, a = await hub.ask("POST", CONFIGS, config("a"))
        for method, path, doc, status, field, remedy in REFUSED:
            got = await hub.refused(method, path, doc)
            assert got[:2] == (status, field), (method, path)
            assert remedy in got[2], (method, path)
        assert [r.document() for r in hub.store.all()] == [a], "a refused call changes nothing"

    run(body)


def test_odd_headers_and_bodies_are_refused_not_failed_on() -> None:
    async def body(hub: Hub) -> None:
        await hub.ask("POST", CONFIGS, config("a"))
        path = f"{CONFIGS}/a"
        for match in (b'"x"', b"\xb2", b"-1", b"9" * 5000):
            assert (await hub.refused("DELETE", path, headers={b"if-match": match}))[:2] == (422, "If-Match")
            status, field, _ = await hub.refused("GET", f"{CONFIGS}?watch=1", headers={b"last-event-id": match})
            assert (status, field) == (422, "?resourceVersion")
        patch = {"content-type": "text/plain"}
        status, field, remedy = await hub.refused("PATCH", path, content=b"{}", headers=patch)
        assert (status, field, remedy) == (422, "Content-Type", "send application/merge-patch+json")
        text = json.dumps(config("b")).encode()
        deep = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
        mild = b'{"a":' * 700 + b"1" + b"}" * 700
        for content in (
            b"", b"{", b"\xff", b"[1,]", deep, text.replace(b'"1"', b"NaN"), text.replace(b'"1"', b'"\\ud800"'),
            text.replace(b"{", b'{"kind": "Config", ', 1), text.replace(b'"1"', b"1" * 5000),
        ):  # fmt: skip
            status, field, _ = await hub.refused("POST", CONFIGS, content=content)
            assert (status, field[:1]) == (422, "$"), content[:60]
        for value in (b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b'{"\\udfff": 1}', mild):
            status, _, _ = await hub.refused("PUT", f"{path}/status", content=b'{"status": {"x": %b}}' % value)
            assert status == 422, value[:60]
        yaml = {"content-type": "application/yaml"}
        assert (await hub.refused("POST", CONFIGS, content=b"a: 1\n---\nb: 2\n", headers=yaml))[0] == 422
        assert (await hub.refused("POST", CONFIGS, content=b"a: &x [*x]\n", headers=yaml))[0] == 422
        for bad in (b'"\\ud800"', b".nan"):
            doc = b"apiVersion: edgeward/v1\nkind: Config\nmetadata: {name: b}\nspec: {data: {k: %b}}\n" % bad
            assert (await hub.refused("POST", CONFIGS, content=doc, headers=yaml))[0] == 422, bad
            status, _, _ = await hub.refused("PUT", f"{path}/status", content=b"status: {x: %b}" % bad, headers=yaml)
            assert status == 422, bad
        for size, stream in ((MAX_DOCUMENT + 1, False), (MAX_DOCUMENT + 1, True)):
            content: Any = pieces(size) if stream else b" " * size
            assert (await hub.refused("POST", CONFIGS, content=content))[0] == 413
        doc = b"apiVersion: edgeward/v1\nkind: Config\nmetadata: {name: b}\n"
        assert (await hub.ask("POST", CONFIGS, content=doc, headers=yaml))[0] == 201
        assert [str(r.key) for r in hub.store.all()] == ["Config/a", "Config/b"]

    run(body)


async def pieces(size: int) -> AsyncIterator[bytes]:
    for at in range(0, size, 65536):
        yield b" " * min(65536, size - at)


def test_a_body_key_given_twice_names_the_key() -> None:
    with pytest.raises(Invalid) as caught:
        parse_body(b'{"spec": {"replicas": 1, "replicas": 2}}', "application/json")
    assert (caught.value.field, caught.value.remedy) == ("$.spec.replicas", "keep one of them")


def test_tokens_request_ids_and_nothing_of_the_inside() -> None:
    async def body(hub: Hub) -> None:
        for header in ("", "Bearer", "Bearer bad", "Basic good", "good", "Bearer good bad"):
            answer = await hub.http.get(CONFIGS, headers={"authorization": header})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["remedy"] == "log in"
        for header in ("bearer good", "BEARER   good"):
            assert (await hub.http.get(CONFIGS, headers={"authorization": header})).status_code == 200
        for path, text in (("/healthz", "alive"), ("/readyz", "ready"), ("/metrics", "edgeward_up 1")):
            answer = await hub.http.get(path, headers={"authorization": ""})
            assert (answer.status_code, text in answer.text) == (200, True)
        assert (await hub.http.get("/openapi.json", headers={"authorization": ""})).status_code == 401
        hub.ready = False
        assert (await hub.http.get("/readyz")).status_code == 503

        for given, kept in (("abc-1", True), ("x" * 64, True), ("x" * 65, False), ("", False), ("a\tb", False)):
            answer = await hub.http.get("/healthz", headers={"x-request-id": given})
            assert (answer.headers["x-request-id"] == given) is kept
        status, problem = await hub.ask("GET", "/api/v1/broken", headers={"x-request-id": "find-me"})
        assert (status, "find-me" in problem["remedy"], "s3cret" in str(problem)) == (500, True, False)
        assert (await hub.ask("GET", "/api/v1/version"))[1] == {"version": "1.2.3"}

    run(body)


def test_lists_select_and_page_by_name() -> None:
    async def body(hub: Hub) -> None:
        await hub.ask("POST", "/api/v1/namespaces", namespace("b"))
        for name in "gacfdbe":
            await hub.ask("POST", CONFIGS, config(name, labels={"odd": "yes" if name in "aceg" else "no"}))
        for name in "az":
            assert (await hub.ask("POST", "/api/v1/namespaces/b/configs", config(name)))[0] == 201

        async def pages(path: str, **params: Any) -> list[list[str]]:
            found, more = [], ""
            while True:
                status, page = await hub.ask("GET", path, params={**params, "continue": more})
                assert (status, page["kind"]) == (200, "ConfigList")
                found.append([f"{i['metadata']['namespace'][0]}/{i['metadata']['name']}" for i in page["items"]])
                more = page["metadata"].get("continue", "")
                if not more:
                    return found

        assert await pages(CONFIGS) == [["b/a", "b/z", *(f"d/{n}" for n in "abcdefg")]]
        assert await pages(CONFIGS, limit=4) == [["b/a", "b/z", "d/a", "d/b"], ["d/c", "d/d", "d/e", "d/f"], ["d/g"]]
        assert await pages("/api/v1/namespaces/b/configs", limit=2) == [["b/a", "b/z"]], "no empty page behind"
        assert await pages(CONFIGS, labelSelector="odd=yes", limit=3) == [["d/a", "d/c", "d/e"], ["d/g"]]
        assert await pages(CONFIGS, fieldSelector="metadata.name!=a,metadata.namespace=b") == [["b/z"]]
        assert await pages("/api/v1/namespaces/gone/configs") == [[]]

        _, first = await hub.ask("GET", CONFIGS, params={"limit": 4})
        await hub.ask("DELETE", f"{CONFIGS}/b")  # the page's last one, and one before and one behind it come
        await hub.ask("POST", "/api/v1/namespaces/b/configs", config("b"))
        await hub.ask("POST", CONFIGS, config("bb"))
        _, rest = await hub.ask("GET", CONFIGS, params={"continue": first["metadata"]["continue"]})
        assert [i["metadata"]["name"] for i in rest["items"]] == ["bb", "c", "d", "e", "f", "g"]
        assert (await hub.refused("GET", CONFIGS, params={"limit": MAX_PAGE + 1}))[0] == 422

        _, sites = await hub.ask("GET", "/api/v1/namespaces", params={"limit": 1})
        assert ([i["metadata"]["name"] for i in sites["items"]], "continue" in sites["metadata"]) == (["b"], False)

    run(body)


def test_patches_that_race_are_all_applied() -> None:
    async def body(hub: Hub) -> None:
        await hub.ask("POST", CONFIGS, config("a"))
        answers = await asyncio.gather(
            *(hub.ask("PATCH", f"{CONFIGS}/a", {"spec": {"data": {f"k{n}": "x"}}}) for n in range(5))
        )
        assert [status for status, _ in answers] == [200] * 5
        assert set(hub.store.get(Key("Config", "default", "a")).spec.data) == {"k", *(f"k{n}" for n in range(5))}

    run(body)


Event = tuple[str, int, Any]


async def events(answer: httpx.Response) -> AsyncIterator[Event]:
    """(event, id, data) of a stream of server-sent events; a comment is ("", 0, its text)."""
    event: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if not line:
            if event:
                yield event.get("event", ""), int(event.get("id", 0)), json.loads(event["data"])
            event = {}
        elif line.startswith(":"):
            yield "", 0, line[2:]
        else:
            name, _, value = line.partition(": ")
            event[name] = value


@asynccontextmanager
async def watch(hub: Hub, path: str, headers: dict[str, str] | None = None, **params: Any) -> AsyncIterator[Any]:
    async with hub.http.stream("GET", path, params={"watch": "true", **params}, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        stream = events(answer)
        assert await anext(stream) == ("", 0, "watching")

        async def take(n: int) -> list[tuple[str, str]]:
            got = [await anext(stream) for _ in range(n)]
            take.last = got[-1][1]  # type: ignore[attr-defined]
            return [(event, doc["metadata"]["name"]) for event, _, doc in got]

        yield take


def test_a_watch_tells_what_comes_into_and_leaves_its_selection() -> None:
    async def body(hub: Hub) -> None:
        async def label(name: str, value: str) -> None:
            await hub.ask("PATCH", f"{CONFIGS}/{name}", {"metadata": {"labels": {"app": value}}})

        await hub.ask("POST", CONFIGS, config("a", labels={"app": "web"}))
        await hub.ask("POST", CONFIGS, config("b", labels={"app": "db"}))
        async with watch(hub, CONFIGS, labelSelector="app=web") as take:
            assert await take(1) == [("ADDED", "a")]
            await label("b", "web")
            await hub.ask("PUT", f"{CONFIGS}/b/status", {"phase": "x"})
            await label("a", "db")
            await label("a", "dc")  # outside, unseen
            await hub.ask("POST", "/api/v1/namespaces", namespace("n"))  # another kind, unseen
            await hub.ask("DELETE", f"{CONFIGS}/b")
            assert await take(4) == [("ADDED", "b"), ("MODIFIED", "b"), ("DELETED", "a"), ("DELETED", "b")]
            last = str(take.last)
        await hub.ask("POST", CONFIGS, config("c", labels={"app": "web"}))
        await hub.ask("DELETE", f"{CONFIGS}/c")
        await hub.ask("POST", CONFIGS, config("d", labels={"app": "web"}))
        for how in ({"resourceVersion": last}, {"headers": {"last-event-id": last}, "resourceVersion": "0"}):
            async with watch(hub, CONFIGS, labelSelector="app=web", **how) as take:
                (gone, there) = await take(2)
                assert gone == ("DELETED", "c")
                assert there[1] == "d"
        async with watch(hub, "/api/v1/namespaces/n/configs") as take:
            await hub.ask("POST", CONFIGS, config("e"))
            await hub.ask("POST", "/api/v1/namespaces/n/configs", config("f"))
            assert await take(1) == [("ADDED", "f")]

    run(body)


def test_a_watch_from_a_forgotten_revision_is_gone_one_from_none_is_not() -> None:
    async def body(hub: Hub) -> None:
        await hub.ask("POST", CONFIGS, config("a"))
        await hub.ask("POST", CONFIGS, config("b"))
        hub.store.compacted = 2  # what a store says that forgot its deletions
        status, _, remedy = await hub.refused("GET", CONFIGS, params={"watch": "1", "resourceVersion": "1"})
        assert (status, "list again" in remedy) == (410, True)
        async with watch(hub, CONFIGS) as take:
            assert await take(2) == [("ADDED", "a"), ("ADDED", "b")]

    run(body)


def test_watchers_that_leave_are_forgotten() -> None:
    async def body(hub: Hub) -> None:
        async with watch(hub, CONFIGS):
            assert hub.store.stats()["watchers"] == 1
        async with asyncio.timeout(120):
            while hub.store.stats()["watchers"]:
                await hub.ask("GET", "/healthz")  # the server takes its turns

    run(body)


def test_records_are_listed_and_followed_and_lines_stay_lines() -> None:
    async def body(hub: Hub) -> None:
        for n in range(4):
            await hub.records.append("events", {"n": n})
        _, listed = await hub.ask("GET", "/api/v1/events", params={"limit": 2, "since": 1})
        assert [i["n"] for i in listed["items"]] == [2, 3]
        assert (await hub.ask("GET", "/api/v1/journal"))[1] == {"items": []}
        assert (await hub.refused("GET", "/api/v1/events?limit=10001"))[:2] == (422, "?limit")
        assert (await hub.refused("POST", "/api/v1/events", {}))[0] == 404
        async with hub.http.stream("GET", "/api/v1/events", params={"follow": "1", "since": 2}) as answer:
            stream = events(answer)
            got = [await anext(stream) for _ in range(3)]
            await hub.records.append("events", {"n": 4})
            got.append(await anext(stream))
        assert [(seq, data if event or not seq else data["n"]) for event, seq, data in got] == [
            (0, "following"), (3, 2), (4, 3), (5, 4),
        ]  # fmt: skip
        answer = await hub.http.get("/api/v1/lines")
        assert [json.loads(line) for line in answer.text.split("\n")[:-1]] == [
            {"n": n, "text": "a\nb"} for n in range(3)
        ]

    run(body)


def test_the_openapi_document_is_whole() -> None:
    """Every reference resolves, every path parameter is declared, every operation has one name, every kind is there."""
    doc = document("1.2.3")
    assert json.loads(json.dumps(doc)) == doc
    assert (doc["openapi"], doc["info"]["version"]) == ("3.1.0", "1.2.3")
    schemas = doc["components"]["schemas"]
    for ref in re.findall(r'"\$ref": "([^"]+)"', json.dumps(doc)):
        assert ref.startswith("#/components/schemas/")
        assert ref.rpartition("/")[2] in schemas, ref
    ids: list[str] = []
    for path, item in doc["paths"].items():
        shared = item.get("parameters", [])
        for method in {"get", "post", "put", "patch", "delete"} & set(item):
            operation = item[method]
            ids.append(operation["operationId"])
            declared = {p["name"] for p in [*shared, *operation.get("parameters", [])] if p["in"] == "path"}
            assert declared == set(re.findall(r"{(\w+)}", path)), path
    assert len(ids) == len(set(ids))
    structs = {k.spec.__name__ for k in kinds} | {"Metadata", "Problem"}
    for kind in kinds:
        assert schemas[kind.name]["properties"]["kind"] == {"const": kind.name}
        assert kind.name not in structs, "a kind's schema would hide a struct's"
        assert schemas[kind.name]["properties"]["spec"]["$ref"].rpartition("/")[2] in schemas
        assert f"/api/v1/{kind.plural}" in doc["paths"]
        assert (f"/api/v1/namespaces/{{namespace}}/{kind.plural}" in doc["paths"]) is kind.namespaced


def test_the_api_serves_what_its_document_says() -> None:
    async def body(hub: Hub) -> None:
        _, doc = await hub.ask("GET", "/openapi.json")
        for path, item in doc["paths"].items():
            real = path.replace("{namespace}", "default").replace("{name}", "x")
            for method in {"get", "post", "put", "patch", "delete"} & set(item):
                answer = await hub.http.request(method, real, content=b"")
                assert answer.status_code in (200, 404, 422), (method, path, answer.text)
                assert answer.status_code != 404 or answer.json()["resource"].endswith("/x"), (method, path)

    run(body)
