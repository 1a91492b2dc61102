"""The program against the real API on a real store: what the fake hub of the other tests only promises."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from edgeward.cli.kinds import load_kinds
from edgeward.core.access import record_routes
from edgeward.core.api import build_app
from edgeward.core.audit import Audit
from edgeward.core.authz import Principal, administrator
from edgeward.core.errors import Unauthorized
from edgeward.core.records import SqliteRecords
from edgeward.core.resources import Resources
from edgeward.core.store_sqlite import SqliteStore

Program = Any
TOKEN = "real-token-93kd"

SITE = "apiVersion: edgeward/v1\nkind: Site\nmetadata: {name: plant}\n"
NODE = "apiVersion: edgeward/v1\nkind: Node\nmetadata: {name: plant-1}\nspec: {site: plant}\n"
CONFIG = "apiVersion: edgeward/v1\nkind: Config\nmetadata: {name: settings}\nspec: {data: {a: '1'}}\n"
SECRET = "apiVersion: edgeward/v1\nkind: Secret\nmetadata: {name: db}\nspec: {data: {password: hunter2}}\n"


def _auth(token: str | None, _: Any) -> Principal:
    if token != TOKEN:
        raise Unauthorized("no valid token", remedy="use the context that the hub wrote")
    return administrator("admin")


@pytest.fixture
def real(edgeward: Program, certificate: tuple[Path, Path], tmp_path: Path) -> Iterator[Program]:
    """The program, its context pointing at a real API over TLS."""
    load_kinds()
    started = threading.Event()
    box: dict[str, Any] = {}

    async def serve() -> None:
        store = SqliteStore(tmp_path / "store.db")
        resources = Resources(store, Audit(tmp_path / "audit.db"))
        records = SqliteRecords(tmp_path / "records.db")
        app = build_app(
            resources,
            store,
            auth=_auth,
            extra_routes=record_routes(records),
            health=lambda: (True, {"state": "ready"}),
            metrics=lambda: "",
            info={"version": "7.7"},
        )
        config = uvicorn.Config(
            app,
            port=0,
            lifespan="off",
            log_level="error",
            ssl_certfile=str(certificate[0]),
            ssl_keyfile=str(certificate[1]),
        )
        server = box["server"] = uvicorn.Server(config)
        box["records"], box["loop"] = records, asyncio.get_running_loop()
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        box["port"] = server.servers[0].sockets[0].getsockname()[1]
        started.set()
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(60)
    context = tmp_path / "real.json"
    context.write_text(
        json.dumps({"hub_url": f"https://127.0.0.1:{box['port']}", "ca_file": str(certificate[0]), "token": TOKEN})
    )
    edgeward.env["EDGEWARD_CONTEXT"] = str(context)
    edgeward.box = box
    yield edgeward
    box["server"].should_exit = True
    box["server"].force_exit = True
    thread.join(60)


def test_the_life_of_resources(real: Program, tmp_path: Path) -> None:
    both = f"{NODE}---\n{SECRET}---\n{SITE}---\n{CONFIG}"
    done = real("apply", "-f", "-", stdin=both)
    lines = ["site/plant created", "node/plant-1 created", "config/settings created", "secret/db created"]
    assert done.stdout.splitlines() == lines
    done = real("apply", "-f", "-", stdin=both)
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["unchanged"] * 4
    assert real("diff", "-f", "-", stdin=both).stdout == ""
    changed = CONFIG.replace("'1'", "'2'")
    assert "+    a: '2'" in real("diff", "-f", "-", stdin=changed, code=1).stdout
    assert real("apply", "-f", "-", stdin=changed).stdout == "config/settings configured\n"

    one = json.loads(real("get", "config", "settings", "-o", "json").stdout)
    assert one["spec"] == {"data": {"a": "2"}} and one["metadata"]["generation"] == 2
    listed = json.loads(real("get", "sites,nodes", "-o", "json").stdout)
    assert [i["kind"] for i in listed["items"]] == ["Site", "Node"]
    assert "never seen" in real("get", "nodes").stdout
    assert "hunter2" not in real("get", "secret/db", "-o", "json").stdout
    assert "hunter2" in real("get", "secret/db", "-o", "yaml", "--show-secrets").stdout
    assert "site: plant" in real("describe", "node", "plant-1").stdout

    assert real("label", "node", "plant-1", "zone=north").stdout == "node/plant-1 labeled\n"
    assert real("get", "nodes", "-l", "zone=north", "-o", "name").stdout == "node/plant-1\n"
    assert real("get", "nodes", "-f", "spec.site=ship", "-o", "name").stdout == ""
    err = real("delete", "site", "plant", code=4).stderr
    assert "plant-1" in err
    assert real("delete", "-f", "-", "--wait", stdin=both).stdout.splitlines()[-1] == "site/plant deleted"
    assert real("get", "nodes", "-o", "name").stdout == ""

    audit = json.loads(real("audit", "-o", "json").stdout)["items"]
    assert {a["verb"] for a in audit} >= {"create", "replace", "delete"}
    assert "hunter2" not in json.dumps(audit)
    assert "delete" in real("audit").stdout
    assert "records" in real("audit", "verify").stdout
    export = tmp_path / "audit.jsonl"
    real("audit", "export", str(export))
    assert "are whole" in real("audit", "verify", str(export)).stdout
    real("audit", "export", str(export), code=1)  # nothing is written over
    export.write_text(export.read_text().replace("create", "crea7e", 1))
    assert "record 1 was changed" in real("audit", "verify", str(export), code=3).stderr
    real("audit", "export", code=2)
    real("audit", "sing", code=2)


def test_refusals_of_the_server(real: Program) -> None:
    err = real("apply", "-f", "-", stdin=NODE, code=3).stderr
    assert "$.spec.site" in err and "create the Site first" in err
    dry = real("apply", "--dry-run", "-f", "-", stdin=f"{NODE}---\n{SITE}").stdout
    assert dry.splitlines() == ["site/plant created (dry run)", "node/plant-1 created (dry run)"]
    real("apply", "-f", "-", stdin=CONFIG)
    stale = CONFIG.replace("{name: settings}", '{name: settings, resourceVersion: "999"}').replace("'1'", "'3'")
    assert "999" in real("apply", "-f", "-", stdin=stale, code=4).stderr
    err = real("apply", "-n", "nowhere", "-f", "-", stdin=CONFIG, code=3).stderr
    assert "nowhere" in err
    real("get", "config", "gone", code=5)
    assert "hub 7.7" in real("version").stdout


def test_bad_files_name_line_and_field(real: Program, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(CONFIG + "---\n" + SITE + "spec:\n  displayNam: x\n")
    err = real("apply", "-f", str(file), code=3).stderr
    assert "bad.yaml:" in err and "$.spec.displayNam" in err and "displayName" in err
    file.write_text("a: [")
    assert "bad.yaml:" in real("apply", "-f", str(file), code=3).stderr
    assert "gone.yaml" in real("apply", "-f", str(tmp_path / "gone.yaml"), code=5).stderr


def test_watch_and_events(real: Program) -> None:
    real("apply", "-f", "-", stdin=CONFIG)
    watching = real.start("get", "configs", "-w", "-o", "json")
    assert json.loads(watching.stdout.readline())["type"] == "ADDED"
    real("apply", "-f", "-", stdin=CONFIG.replace("'1'", "'2'"))
    second = json.loads(watching.stdout.readline())
    real("delete", "config", "settings")
    third = json.loads(watching.stdout.readline())
    watching.kill()
    watching.communicate()
    assert (second["type"], second["object"]["spec"]["data"]) == ("MODIFIED", {"a": "2"})
    assert (third["type"], third["object"]["metadata"]["name"]) == ("DELETED", "settings")

    def happen(message: str) -> None:
        event = {"type": "Normal", "reason": "Tested", "resource": "Config/settings", "message": message}
        asyncio.run_coroutine_threadsafe(real.box["records"].append("events", event), real.box["loop"]).result(60)

    happen("first")
    assert "first" in real("events").stdout
    following = real.start("events", "-f", "-o", "json")
    assert json.loads(following.stdout.readline())["message"] == "first"
    happen("second")
    assert json.loads(following.stdout.readline())["message"] == "second"
    following.kill()
    following.communicate()


def test_what_is_going_is_said_to_be_going(real: Program) -> None:
    home = "apiVersion: edgeward/v1\nkind: Namespace\nmetadata: {name: line-3}\n"
    held = CONFIG.replace("settings}", "held, namespace: line-3, finalizers: [ew/clean]}")
    real("apply", "-f", "-", stdin=f"{home}---\n{held}")
    assert real("delete", "ns", "line-3").stdout == "namespace/line-3 deleting (waits for what is in it)\n"
    assert real("delete", "config", "held", "-n", "line-3").stdout == "config/held deleting (waits for ew/clean)\n"
    again = real("apply", "-f", "-", stdin=home).stdout
    assert again == "namespace/line-3 configured (it is being deleted: apply again when it is gone)\n"
    assert real("get", "configs", "-A", "-o=name").stdout == "config/held\n", "still there, so that it can be finished"
    bad = f"{home}---\n" + CONFIG.replace("settings}", "late, namespace: line-3}")
    assert (
        "standard input:7: Config/line-3/late: $.metadata.namespace: "
        in real("apply", "-f", "-", stdin=bad, code=3).stderr
    )
