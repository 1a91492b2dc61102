"""Every call is decided: over a real socket, with tokens of several roles."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from tests.core.served import events, serving

from edgeward.core import clock
from edgeward.core.access import record_routes
from edgeward.core.api import build_app
from edgeward.core.audit import Audit
from edgeward.core.authz import BUILT_IN, Principal, administrator
from edgeward.core.errors import Unauthorized
from edgeward.core.records import SqliteRecords
from edgeward.core.resource import Key, Resource, decode
from edgeward.core.resources import Resources
from edgeward.core.roles import built_in_roles
from edgeward.core.store_sqlite import SqliteStore
from edgeward.core.tokens import AccessTokens
from edgeward.hub.kinds import load

load()

Doc = dict[str, Any]
CONFIGS = "/api/v1/configs"
ROLES: dict[str, list[Doc]] = {
    "web": [
        {"verbs": ["*"], "kinds": ["App", "Config", "Secret", "Service"], "namespaces": ["web"]},
        {"verbs": ["get"], "kinds": ["Namespace"], "namespaces": ["_"]},
    ],
    "red": [{"verbs": ["*"], "kinds": ["Config"], "labelSelector": "team=red"}],
    "keeper": [
        {"verbs": ["get", "list", "create", "update", "patch", "delete"], "kinds": ["Secret", "Override", "Config"]}
    ],
    "granter": [
        {"verbs": ["create", "update", "patch", "get", "issue"], "kinds": ["Role", "AccessToken"]},
        {"verbs": ["get", "list"], "kinds": ["Config"]},
    ],
    "nothing": [],
}


def doc(kind: str, name: str, spec: Doc | None = None, **meta: Any) -> Doc:
    return {"apiVersion": "edgeward/v1", "kind": kind, "metadata": {"name": name, **meta}, "spec": spec or {}}


def config(name: str, **meta: Any) -> Doc:
    return doc("Config", name, {"data": {"k": "1"}}, **meta)


class Caller:
    """One token's way to the API."""

    def __init__(self, http: httpx.AsyncClient, token: str) -> None:
        self.http, self.token = http, token

    async def ask(self, method: str, path: str, body: Doc | None = None, **kw: Any) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {self.token}", **kw.pop("headers", {})}
        answer = await self.http.request(method, path, json=body, headers=headers, **kw)
        return answer.status_code, answer.json()

    async def names(self, path: str, **kw: Any) -> list[str]:
        status, answer = await self.ask("GET", path, **kw)
        assert status == 200, answer
        return [i["metadata"]["name"] for i in answer["items"]]


class World:
    def __init__(self, http: httpx.AsyncClient, resources: Resources, records: SqliteRecords) -> None:
        self.http, self.resources, self.store, self.records = http, resources, resources.store, records
        self.tokens = AccessTokens(self.store)
        self.root = Caller(http, "root")
        self.app: Any = None

    async def put(self, d: Doc) -> Resource:
        return await self.store.put(decode(d))

    async def bearer(self, role: str, **more: Any) -> Caller:
        status, made = await self.root.ask("POST", "/api/v1/issue/accesstoken", {"role": role, "ttl": "1h", **more})
        assert status == 201, made
        return Caller(self.http, made["token"])


def run(body: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        resources, records = Resources(SqliteStore(), Audit()), SqliteRecords()

        def auth(token: str | None, _: Any) -> Principal:
            if token == "root":
                return administrator("root")
            if not token:
                raise Unauthorized("no token")
            return world.tokens.verify(token)

        app = build_app(
            resources, resources.store, auth=auth, extra_routes=record_routes(records),
            health=lambda: (True, {}), metrics=lambda: "up 1\n", info={"version": "1"},
        )  # fmt: skip
        async with serving(app) as url, asyncio.timeout(60), httpx.AsyncClient(base_url=url, timeout=30) as http:
            world = World(http, resources, records)
            world.app = app
            for role in built_in_roles():
                await resources.store.put(role)
            for name, rules in ROLES.items():
                await world.put(doc("Role", name, {"rules": rules}))
            for namespace in ("default", "web"):
                await world.put(doc("Namespace", namespace))
            await body(world)

    asyncio.run(main())


def test_a_role_does_what_it_may_and_nothing_else() -> None:
    async def body(w: World) -> None:
        viewer, operator, web = await w.bearer("viewer"), await w.bearer("operator"), await w.bearer("web")
        await w.put(config("a"))
        await w.put(config("b", namespace="web"))
        for who in (viewer, operator):
            assert await who.names(CONFIGS) == ["a", "b"]
        assert await web.names(CONFIGS) == ["b"], "a list has what may be seen"
        assert (await web.ask("GET", "/api/v1/namespaces/default/configs"))[0] == 403
        assert (await web.ask("GET", "/api/v1/sites"))[0] == 403

        refusals = [
            (viewer, "DELETE", f"{CONFIGS}/a", None, "delete", "Config", "a"),
            (viewer, "POST", CONFIGS, config("c"), "create", "Config", ""),
            (viewer, "PUT", f"{CONFIGS}/a", config("a"), "update", "Config", "a"),
            (viewer, "PATCH", f"{CONFIGS}/a", {}, "patch", "Config", "a"),
            (viewer, "PUT", f"{CONFIGS}/a/status", {}, "status", "Config", "a"),
            (operator, "PUT", f"{CONFIGS}/a/status", {}, "status", "Config", "a"),
            (viewer, "GET", "/api/v1/accesstokens", None, "list", "AccessToken", ""),
            (viewer, "GET", "/api/v1/audit", None, "audit", "Hub", ""),
            (viewer, "GET", "/metrics", None, "metrics", "Hub", ""),
            (operator, "POST", "/api/v1/roles", doc("Role", "x"), "create", "Role", ""),
            (operator, "POST", "/api/v1/issue/accesstoken", {"role": "viewer"}, "issue", "AccessToken", ""),
            (web, "GET", f"{CONFIGS}/a", None, "get", "Config", "a"),
            (web, "GET", f"{CONFIGS}/not-there", None, "get", "Config", "not-there"),
            (web, "DELETE", f"{CONFIGS}/a", None, "delete", "Config", "a"),
            (web, "POST", CONFIGS, config("c", namespace="default"), "create", "Config", ""),
        ]  # fmt: skip
        for who, method, path, sent, verb, kind, name in refusals:
            if path == "/metrics":
                continue  # this machine's own scraper needs no token
            status, problem = await who.ask(method, path, sent)
            assert status == 403, (method, path, problem)
            got = (problem["title"], problem["verb"], problem["kind"], problem.get("name", ""))
            assert got == ("Forbidden", verb, kind, name), (method, path)
            assert verb in problem["detail"] and kind in problem["detail"] and name in problem["detail"]
        assert (await operator.ask("DELETE", f"{CONFIGS}/a"))[0] == 200
        assert (await web.ask("POST", "/api/v1/namespaces/web/configs", config("c")))[0] == 201
        assert (await web.ask("GET", "/api/v1/namespaces/web/configs/none"))[0] == 404
        nobody = await w.bearer("nothing")
        for path in (CONFIGS, f"{CONFIGS}/b", "/api/v1/events", "/api/v1/journal", "/api/v1/audit", "/api/v1/roles"):
            assert (await nobody.ask("GET", path))[0] == 403, path
        assert (await nobody.ask("GET", "/api/v1/whoami"))[1]["role"] == "nothing"

    run(body)


def test_labels_decide_by_what_is_there_and_by_what_would_be() -> None:
    async def body(w: World) -> None:
        red = await w.bearer("red")
        mine, other = config("mine", labels={"team": "red"}), config("other", labels={"team": "blue"})
        await w.put(other)
        assert (await red.ask("POST", CONFIGS, config("plain")))[0] == 403
        assert (await red.ask("POST", CONFIGS, mine))[0] == 201
        assert await red.names(CONFIGS) == ["mine"]
        for method, sent in (("GET", None), ("DELETE", None), ("PATCH", {"metadata": {"labels": {"team": "red"}}}),
                             ("PUT", config("other", labels={"team": "red"}))):  # fmt: skip
            assert (await red.ask(method, f"{CONFIGS}/other", sent))[0] == 403, method
        # giving it away would take it out of one's own sight, and into another team's
        assert (await red.ask("PATCH", f"{CONFIGS}/mine", {"metadata": {"labels": {"team": "blue"}}}))[0] == 403
        assert (await red.ask("PUT", f"{CONFIGS}/mine", config("mine")))[0] == 403
        status, got = await red.ask("PATCH", f"{CONFIGS}/mine", {"spec": {"data": {"k": "2"}}})
        assert (status, got["spec"]) == (200, {"data": {"k": "2"}})
        assert (await red.ask("PUT", f"{CONFIGS}/mine", mine))[0] == 200
        missing = await red.ask("GET", f"{CONFIGS}/none")
        assert missing[0] == 403, "there or not: the same answer"
        assert (await red.ask("DELETE", f"{CONFIGS}/mine"))[0] == 200

    run(body)


def test_a_watch_tells_only_what_may_be_seen_and_never_the_rest_of_what_left() -> None:
    async def body(w: World) -> None:
        red = await w.bearer("red")
        await w.put(config("mine", labels={"team": "red"}))
        await w.put(config("other", labels={"team": "blue"}))
        headers = {"authorization": f"Bearer {red.token}"}
        start = w.store.revision
        async with w.http.stream("GET", f"{CONFIGS}?watch=1", headers=headers) as answer:
            stream = events(answer)
            assert await anext(stream) == ("", 0, "watching")
            assert (await anext(stream))[2]["metadata"]["name"] == "mine"
            await w.store.remove(Key("Config", "default", "other"))  # unseen
            await w.put(doc("Config", "mine", {"data": {"k": "now blue"}}, labels={"team": "blue"}))
            await w.put(config("last", labels={"team": "red"}))
            event, _, left = await anext(stream)
            assert (event, left["metadata"]["name"], "blue" in str(left)) == ("DELETED", "mine", False)
            assert (await anext(stream))[2]["metadata"]["name"] == "last"
        # what was deleted has no labels any more: the watcher is told to list again
        async with w.http.stream("GET", f"{CONFIGS}?watch=1&resourceVersion={start}", headers=headers) as answer:
            assert answer.status_code == 410
        assert (await w.root.ask("GET", f"{CONFIGS}/last"))[0] == 200

    run(body)


async def rest(stream: Any) -> int:
    return len([1 async for _ in stream])


def test_a_watch_of_some_namespaces_goes_on_behind_deletions_in_others() -> None:
    async def body(w: World) -> None:
        web = await w.bearer("web")
        await w.put(config("other"))
        await w.put(config("mine", namespace="web"))
        start = w.store.revision
        await w.store.remove(Key("Config", "default", "other"))
        await w.store.remove(Key("Config", "web", "mine"))
        headers = {"authorization": f"Bearer {web.token}"}
        async with w.http.stream("GET", f"{CONFIGS}?watch=1&resourceVersion={start}", headers=headers) as answer:
            stream = events(answer)
            assert await anext(stream) == ("", 0, "watching")
            event, _, gone = await anext(stream)
            assert (event, gone["metadata"]) == ("DELETED", {"name": "mine", "namespace": "web"})

    run(body)


def test_a_nodes_credentials_open_no_door_of_the_api() -> None:
    async def body(w: World) -> None:
        for token in ("eyJhbGciOiJlZDI1NTE5LW5rZXkifQ.eyJuYW1lIjoicGxhbnQtMSJ9.c2ln", "ewj_YWJj", "SUAxx", "local"):
            for path in (CONFIGS, "/api/v1/secrets", "/api/v1/nodes/plant-1/status"):
                assert (await Caller(w.http, token).ask("GET", path))[0] in (401, 429)

    run(body)


def test_a_stream_ends_with_the_token() -> None:
    async def body(w: World) -> None:
        viewer = await w.bearer("viewer", name="v")
        for n in range(3):
            await w.records.append("events", {"n": n, "resource": "Config/a"})
        headers = {"authorization": f"Bearer {viewer.token}"}
        async with w.http.stream("GET", "/api/v1/events?follow=1", headers=headers) as answer:
            stream = events(answer)
            for _ in range(4):
                await anext(stream)
            await w.store.remove(Key("AccessToken", "_", "v"))
            heard = asyncio.create_task(rest(stream))
            async with asyncio.timeout(20):
                while not heard.done():
                    await w.records.append("events", {"n": 9, "resource": "Config/a"})
                    await asyncio.sleep(0.05)  # the pace of events
            assert await heard < 100
        assert (await viewer.ask("GET", CONFIGS))[0] == 401

    run(body)


def test_secret_values_need_the_verb_reveal() -> None:
    async def body(w: World) -> None:
        await w.put(doc("Secret", "db", {"data": {"password": "hunter2", "user": "u"}}))
        keeper, viewer = await w.bearer("keeper"), await w.bearer("viewer")
        path = "/api/v1/secrets"
        for who in (keeper, viewer):
            for p in (f"{path}/db", path, f"{path}?watch=1"):
                if "watch" in p:
                    if who is keeper:
                        continue
                    async with w.http.stream("GET", p, headers={"authorization": f"Bearer {who.token}"}) as answer:
                        stream = events(answer)
                        text = str([await anext(stream) for _ in range(2)])
                else:
                    text = str(await who.ask("GET", p))
                assert "hunter2" not in text and "'password': '***'" in text
            # nor felt for, value by value
            found = [
                await who.names(path, params={"fieldSelector": f"spec.data.password={v}"}) for v in ("hunter2", "no")
            ]
            assert found == [[], []]
        assert await w.root.names(path, params={"fieldSelector": "spec.data.password=hunter2"}) == ["db"]
        assert (await w.root.ask("GET", f"{path}/db"))[1]["spec"]["data"]["password"] == "hunter2"

        # who was not shown a value gives back what was shown, and nothing is lost
        _, read = await keeper.ask("GET", f"{path}/db")
        read["spec"]["data"]["user"] = "v"
        status, answer = await keeper.ask("PUT", f"{path}/db", read)
        assert (status, answer["spec"]["data"]) == (200, {"password": "***", "user": "***"})
        assert w.store.get(Key("Secret", "default", "db")).spec.data == {"password": "hunter2", "user": "v"}
        status, _ = await keeper.ask("PATCH", f"{path}/db", {"spec": {"data": {"user": "***", "more": "x"}}})
        assert status == 200
        assert w.store.get(Key("Secret", "default", "db")).spec.data == {
            "password": "hunter2",
            "user": "v",
            "more": "x",
        }
        status, problem = await keeper.ask("PATCH", f"{path}/db", {"spec": {"data": {"new": "***"}}})
        assert (status, problem["field"]) == (422, "$.spec.data.new")
        assert (await keeper.ask("POST", path, doc("Secret", "n", {"data": {"a": "***"}})))[0] == 422

    run(body)


def test_an_override_is_as_good_as_a_change_of_its_target() -> None:
    async def body(w: World) -> None:
        await w.put(doc("Site", "plant"))
        await w.put(doc("Secret", "db", {"data": {"password": "hunter2"}}))
        await w.put(config("a"))
        await w.put(doc("App", "web", {"process": {"command": ["true"]}}))
        keeper = await w.bearer("keeper")

        def override(kind: str, name: str, patch: Doc) -> Doc:
            return doc("Override", f"o-{kind.lower()}", {"target": {"kind": kind, "name": name, "namespace": "default"},
                                                         "site": "plant", "patch": patch})  # fmt: skip

        path = "/api/v1/overrides"
        assert (await keeper.ask("POST", path, override("Config", "a", {"data": {"k": "2"}})))[0] == 201
        status, problem = await keeper.ask("POST", path, override("App", "web", {"replicas": 0}))
        assert (status, problem["kind"], problem["verb"]) == (403, "App", "update")
        status, made = await keeper.ask("POST", path, override("Secret", "db", {"data": {"password": "geheim"}}))
        assert (status, "geheim" in str(made)) == (201, False)
        for kind, name in (("Role", "viewer"), ("AccessToken", "x"), ("Override", "o-config")):
            status, problem = await w.root.ask("POST", path, override(kind, name, {"rules": []}))
            assert (status, problem["field"]) == (422, "$.spec.target.kind"), kind

    run(body)


def test_nobody_gives_away_more_than_they_have() -> None:
    async def body(w: World) -> None:
        granter = await w.bearer("granter")
        within = [{"verbs": ["get"], "kinds": ["Config"], "namespaces": ["web"]}]
        beyond = [{"verbs": ["get"], "kinds": ["Secret"]}]
        assert (await granter.ask("POST", "/api/v1/roles", doc("Role", "fine", {"rules": within})))[0] == 201
        for method, path, sent in (
            ("POST", "/api/v1/roles", doc("Role", "more", {"rules": beyond})),
            ("PUT", "/api/v1/roles/fine", doc("Role", "fine", {"rules": beyond})),
            ("PATCH", "/api/v1/roles/fine", {"spec": {"rules": [*within, *beyond]}}),
            ("PATCH", "/api/v1/roles/granter", {"spec": {"rules": [{"verbs": ["*"], "kinds": ["*"]}]}}),
            ("POST", "/api/v1/issue/accesstoken", {"role": "admin"}),
            ("POST", "/api/v1/issue/accesstoken", {"role": "viewer"}),
        ):
            status, problem = await granter.ask(method, path, sent)
            assert (status, "beyond your own" in problem["detail"]) == (403, True), (method, path, problem)
        status, made = await granter.ask(
            "POST", "/api/v1/issue/accesstoken", {"role": "fine", "name": "t", "ttl": "1h"}
        )
        assert status == 201
        # a token that is there cannot be given a better role, nor a hash that somebody chose
        for patch in ({"role": "admin"}, {"hash": "0" * 64}):
            assert (await granter.ask("PATCH", "/api/v1/accesstokens/t", {"spec": patch}))[0] == 403, patch
        chosen = doc("AccessToken", "own", {"role": "admin", "hash": "0" * 64, "expires": "2099-01-01T00:00:00Z"})
        for who in (granter, w.root):
            assert (await who.ask("POST", "/api/v1/accesstokens", chosen))[0] == 403
        # the built-in ones stay what they are, even for administrators
        status, problem = await w.root.ask("PATCH", "/api/v1/roles/viewer", {"spec": {"rules": beyond}})
        assert (status, problem["field"]) == (422, "$.spec.rules")
        fine = Caller(w.http, made["token"])
        assert (await fine.ask("GET", "/api/v1/namespaces/web/configs/x"))[0] == 404
        assert (await fine.ask("GET", CONFIGS + "/a"))[0] == 403

    run(body)


def test_the_life_of_a_token() -> None:
    async def body(w: World) -> None:
        status, made = await w.root.ask(
            "POST", "/api/v1/issue/accesstoken", {"role": "viewer", "ttl": "90d", "name": "ci", "description": "the CI"}
        )
        assert (status, made["name"], made["token"].startswith("ew_ci_"), len(made["token"])) == (201, "ci", True, 49)
        stored = w.store.get(Key("AccessToken", "_", "ci"))
        assert made["token"] not in str(stored) and stored.spec.expires == made["expires"]
        _, read = await w.root.ask("GET", "/api/v1/accesstokens/ci")
        assert read["spec"]["role"] == "viewer"
        ci = Caller(w.http, made["token"])
        assert (await ci.ask("GET", "/api/v1/whoami"))[1] | {"rules": 0} == {
            "name": "ci", "kind": "person", "role": "viewer", "rules": 0, "expires": made["expires"],
        }  # fmt: skip
        uses = asyncio.create_task(w.tokens.run(w.store.put_status))
        while "lastUsed" not in w.store.get(stored.key).status:
            await ci.ask("GET", CONFIGS)
        first = w.store.get(stored.key).status["lastUsed"]
        for _ in range(20):
            await ci.ask("GET", CONFIGS)
        assert w.store.get(stored.key).status["lastUsed"] == first, "written rarely"
        uses.cancel()
        for wrong in (
            made["token"][:-1] + "-",
            f"ew_ci_{'a' * 43}",
            f"ew_cj_{made['token'][6:]}",
            "ew_ci",
            "x",
            "ewj_x",
        ):
            assert (await Caller(w.http, wrong).ask("GET", CONFIGS))[0] == 401, wrong

        # a role that changes changes its tokens; one that goes takes them along; expiry ends them
        await w.put(doc("Role", "brief", {"rules": [{"verbs": ["list"], "kinds": ["Config"]}]}))
        brief = await w.bearer("brief", name="b")
        assert await brief.names(CONFIGS) == []
        await w.put(doc("Role", "brief", {"rules": []}))
        assert (await brief.ask("GET", CONFIGS))[0] == 403
        await w.store.remove(Key("Role", "_", "brief"))
        assert (await brief.ask("GET", CONFIGS))[0] == 401
        old = w.store.get(stored.key)
        old.spec.expires = clock.timestamp(clock.now() - 1)
        await w.store.put(old)
        status, problem = await ci.ask("GET", CONFIGS)
        assert (status, "expired" in problem["detail"]) == (401, True)

    run(body)


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ({}, "$.role"),
        ({"role": "none"}, "$.role"),
        ({"role": 3}, "$.role"),
        ({"role": "viewer", "ttl": "soon"}, "$.ttl"),
        ({"role": "viewer", "ttl": "0s"}, "$.ttl"),
        ({"role": "viewer", "ttl": "99999d"}, "$.ttl"),
        ({"role": "viewer", "ttl": True}, "$.ttl"),
        ({"role": "viewer", "ttl": []}, "$"),
        ({"role": "viewer", "name": "UP"}, "$.name"),
        ({"role": "viewer", "name": "admin"}, "$.metadata.name"),
        ({"role": "viewer", "sites": "plant"}, "$.sites"),
        ({"role": "viewer", "sites": ["none"]}, "$.spec.sites[0]"),
        ({"role": "viewer", "hash": "0" * 64}, "$.hash"),
    ],
)
def test_a_token_asked_for_badly_is_refused_with_the_field(sent: Doc, field: str) -> None:
    async def body(w: World) -> None:
        status, problem = await w.root.ask("POST", "/api/v1/issue/accesstoken", sent)
        if sent.get("ttl") == []:
            assert status == 201, "an empty one is none: the default life"
            return
        assert (status, problem["field"]) == (422, field), problem

    run(body)


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ({"verbs": ["gett"], "kinds": ["App"]}, "$.spec.rules[0].verbs"),
        ({"verbs": ["get"], "kinds": ["Appp"]}, "$.spec.rules[0].kinds"),
        ({"verbs": ["get"], "kinds": ["App"], "namespaces": ["A b"]}, "$.spec.rules[0].namespaces"),
        ({"verbs": ["get"], "kinds": ["App"], "labelSelector": "a=b=c"}, "$.spec.rules[0].labelSelector"),
        ({"verbs": ["get"] * 33, "kinds": ["App"]}, "$.spec.rules[0].verbs"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(rule: Doc, field: str) -> None:
    async def body(w: World) -> None:
        status, problem = await w.root.ask("POST", "/api/v1/roles", doc("Role", "r", {"rules": [rule]}))
        assert (status, problem["field"].replace("[...]", "[0]")) == (422, field), problem

    run(body)


def test_records_are_seen_by_who_may_see_what_they_are_about() -> None:
    async def body(w: World) -> None:
        for resource in ("Config/a", "Config/web/b", "Node/n", "nonsense", ""):
            await w.records.append("events", {"resource": resource, "reason": "x"})
        for namespace in ("default", "web"):
            await w.records.append("journal", {"kind": "Config", "namespace": namespace, "name": "c"})
        web, viewer = await w.bearer("web"), await w.bearer("viewer")
        _, got = await web.ask("GET", "/api/v1/events")
        assert [i["resource"] for i in got["items"]] == ["Config/web/b"]
        _, got = await viewer.ask("GET", "/api/v1/events?limit=2")
        assert [i["resource"] for i in got["items"]] == ["Config/web/b", "Node/n"]
        _, got = await w.root.ask("GET", "/api/v1/events")
        assert len(got["items"]) == 5
        _, got = await web.ask("GET", "/api/v1/journal")
        assert [i["namespace"] for i in got["items"]] == ["web"]
        await w.root.ask("POST", CONFIGS, config("a"))
        await web.ask("POST", "/api/v1/namespaces/web/configs", config("b"))
        _, got = await web.ask("GET", "/api/v1/audit")
        assert {(i["namespace"], i["name"]) for i in got["items"]} == {("web", "b")}

    run(body)


def test_refusals_are_audited_and_a_storm_of_them_does_not_flood() -> None:
    async def body(w: World) -> None:
        viewer = await w.bearer("viewer", name="v")
        for _ in range(200):
            assert (await viewer.ask("DELETE", f"{CONFIGS}/x"))[0] == 403
        noted = [i for i in w.resources.audit.items(limit=1000) if i["actor"] == "v"]
        assert 25 <= len(noted) <= 60
        assert {(i["verb"], i["kind"], i["name"], i["source"]) for i in noted} == {
            ("delete", "Config", "x", "127.0.0.1")
        }
        assert all(i["outcome"].startswith("Forbidden: v (role viewer) may not delete Config x") for i in noted)
        w.app._refused._left.clear()  # a minute later
        await viewer.ask("DELETE", f"{CONFIGS}/y")
        last = w.resources.audit.items(limit=1)[0]["outcome"]
        assert last.endswith(f"(and {200 - len(noted)} refused calls before, not kept)")

    run(body)


def test_ten_thousand_bad_log_ins_hurt_nobody_else() -> None:
    async def body(w: World) -> None:
        viewer = await w.bearer("viewer")
        answers: list[int] = []
        port = w.http.base_url.port

        async def storm(n: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for batch in range(0, n, 50):
                for i in range(batch, batch + 50):
                    head = f"GET {CONFIGS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ew_v_{i:043d}\r\n\r\n"
                    writer.write(head.encode())
                for _ in range(50):
                    answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                    answers.append(int(answer.split()[1]))
                    await reader.readexactly(int(answer.partition("content-length: ")[2].split("\r\n")[0]))
            writer.close()

        storms = [asyncio.create_task(storm(1250)) for _ in range(8)]
        good = 0
        while not all(s.done() for s in storms):
            assert (await viewer.ask("GET", CONFIGS))[0] == 200, "the same address, and a good token: it goes on"
            good += 1
            await asyncio.sleep(0.01)  # the pace of somebody who works
        await asyncio.gather(*storms)
        assert len(answers) == 10_000
        assert good > 20
        assert set(answers) == {401, 429}
        assert answers.count(401) < 500
        answer = await w.http.get(CONFIGS, headers={"authorization": "Bearer wrong"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        # forgetting a token is no guess
        assert (await w.http.get(CONFIGS)).status_code == 401

    run(body)


def test_what_one_can() -> None:
    async def body(w: World) -> None:
        await w.put(config("mine", labels={"team": "red"}))
        red = await w.bearer("red")

        async def can(verb: str, kind: str, **more: str) -> tuple[bool, bool]:
            status, got = await red.ask("GET", "/api/v1/can", params={"verb": verb, "kind": kind, **more})
            assert status == 200, got
            return got["allowed"], got["some"]

        assert await can("get", "Config") == (False, True)
        assert await can("get", "Config", name="mine", namespace="default") == (True, True)
        assert await can("get", "Config", name="none", namespace="default") == (False, False)
        assert await can("get", "Site") == (False, False)
        assert await can("audit", "Hub") == (False, False)
        for bad in ({"verb": "gett", "kind": "Config"}, {"verb": "get", "kind": "Confg"}):
            assert (await red.ask("GET", "/api/v1/can", params=bad))[0] == 422

    run(body)


def test_built_in_roles_are_never_what_a_store_says() -> None:
    async def body(w: World) -> None:
        viewer = await w.bearer("viewer")
        everything = built_in_roles()[0]
        everything.metadata.name = "viewer"
        await w.store.put(everything)  # as somebody would who writes into the store by other ways
        assert (await viewer.ask("DELETE", f"{CONFIGS}/a"))[0] == 403
        _, me = await viewer.ask("GET", "/api/v1/whoami")
        assert len(me["rules"]) == len(BUILT_IN["viewer"])

    run(body)
