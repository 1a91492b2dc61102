"""Resources over a real socket: what the API takes, how it refuses, and how it pages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from tests.core.served import CONFIGS, Hub, config, namespace, run

from edgeward.core.resource import MAX_DOCUMENT, Key
from edgeward.core.resource_routes import MAX_PAGE


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
