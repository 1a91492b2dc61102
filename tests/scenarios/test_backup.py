"""A hub is lost and comes back from a backup that is older than what its nodes have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeward.core.seal import Sealer, SealingKey
from edgeward.lab.publisher import Publisher

TOPOLOGY = "sites: [{name: plant, nodes: 1, link: lan}, {name: shop, nodes: 1, link: lan}]"
SLEEP = ["python3", "-c", "import time; time.sleep(600)"]


def app(name: str, backoff: str, site: str = "", **more: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {"process": {"command": SLEEP}, "restart": {"backoff": backoff}, **more}
    if site:
        spec["placement"] = {"site": site}
    return {"kind": "App", "metadata": {"name": name}, "spec": spec}


def config(value: str, name: str = "c") -> dict[str, Any]:
    return {"kind": "Config", "metadata": {"name": name}, "spec": {"data": {"k": value}}}


EXPORT = {
    "kind": "Export",
    "metadata": {"name": "line1"},
    "spec": {"from": {"mqtt": "sensors/#"}, "to": {"hub": {"stream": "line1"}}, "identity": "$.id"},
}


def backoff(system: Any, name: str, *at: str) -> str:
    found: str = system.get("app", name, *at)["spec"]["restart"]["backoff"]
    return found


def revisions(system: Any, *at: str) -> list[int]:
    kinds = ("apps", "configs", "sites", "nodes", "exports")
    return [int(o["metadata"]["resourceVersion"]) for k in kinds for o in system.get(k, *at)["items"]]


def records(system: Any, what: str, *at: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(system.run(what, "-o", "json", *at))["items"]
    return found


def publish(system: Any, first: int, count: int) -> set[int]:
    node = next(n for n in system.context["nodes"] if n["name"] == "plant-1")
    publisher = Publisher(node["mqtt_url"], node["mqtt_user"], node["mqtt_password"], rate=200)
    publisher.next_id = first
    publisher.start()
    system.wait("readings", lambda: publisher.acked_count() >= count)
    publisher.end()
    return publisher.acked()


def ids(system: Any) -> list[int]:
    lines = system.run("stream", "read", "line1", "--from", "0", "-o", "json").splitlines()
    return [json.loads(line)["payload"]["id"] for line in lines]


def test_nodes_that_are_ahead_of_a_restored_hub_keep_what_is_newer(
    lab: Callable[[str], Any], systems: Callable[..., Any], tmp_path: Path
) -> None:
    old = lab(TOPOLOGY)
    uses = {"envFrom": [{"config": "c"}]}
    old.apply([config("1"), app("mine", "1s", "plant", **uses), app("shared", "1s"), app("both", "1s", "plant")])
    old.apply([app("doomed", "1s", "shop"), EXPORT])
    old.wait("the capture", lambda: "plant-1" in old.get("export", "line1")["status"].get("nodes", {}))
    before = publish(old, 1, 50)
    old.wait("delivery", lambda: before <= set(ids(old)))

    backup, key = tmp_path / "hub.backup", tmp_path / "safe" / "key"
    old.run("backup", "create", str(backup), "--with-streams")
    assert backup.stat().st_mode & 0o777 == 0o600
    key.parent.mkdir()
    shutil.move(old.data / "hub" / "recovery.key", key)  # as the operator shall
    old.run("backup", "verify", str(backup))
    old.run("backup", "verify", str(backup), "--key", str(key))

    # life goes on at the hub, and at a site that is then cut
    old.apply([config("2"), app("mine", "2s", "plant", **uses), app("shared", "2s"), app("new", "2s", "shop")])
    late = {"envFrom": [{"config": "late"}, {"secret": "late"}]}
    secret = {"kind": "Secret", "metadata": {"name": "late"}, "spec": {"data": {"S": "planted-late-33"}}}
    old.apply([config("1", "late"), secret, app("late", "2s", "plant", **late)])
    old.run("delete", "app", "doomed")
    old.wait("shop has it", lambda: backoff(old, "new", "--at", "shop-1") == "2s")
    old.wait("plant has it", lambda: backoff(old, "mine", "--at", "plant-1") == "2s")
    old.wait("plant has the latest", lambda: backoff(old, "late", "--at", "plant-1") == "2s")
    old.wait("both have it", lambda: {backoff(old, "shared", "--at", n) for n in ("plant-1", "shop-1")} == {"2s"})
    old.run("lab", "cut", "plant", "--data", str(old.data))
    old.apply(app("mine", "3s", "plant", **uses), "--at", "plant-1")
    old.apply(app("both", "3s", "plant"), "--at", "plant-1")
    old.apply(app("local", "3s", "plant"), "--at", "plant-1")
    lost = publish(old, 1000, 50)  # waits at the node
    seen = max(revisions(old))
    assert old.run("backup", "restore", str(backup), "--data", str(old.data), "--key", str(key), code=3) == ""
    assert "running" in old.stderr
    assert old.stop() == 0

    # another machine: the hub from the backup, the nodes as they are
    machine = tmp_path / "machine" / "lab"
    old.run("backup", "restore", str(backup), "--data", str(machine), code=3)
    assert "--key" in old.stderr
    old.run("backup", "restore", str(backup), "--data", str(machine), "--key", str(key))

    def pipes(folder: str, names: list[str]) -> list[str]:
        return [n for n in names if (Path(folder) / n).is_fifo()]

    shutil.copytree(old.data / "nodes", machine / "nodes", ignore=pipes)
    new = systems("machine/lab", "lab", "up", "-f", str(tmp_path / "lab.yaml"))

    def settled() -> bool:
        return (
            backoff(new, "mine") == backoff(new, "both") == backoff(new, "local") == "3s"
            and backoff(new, "new") == backoff(new, "late") == "2s"
            and new.get("config", "c")["spec"]["data"]["k"] == "2"
        )

    def exists(name: str) -> bool:
        return any(a["metadata"]["name"] == name for a in new.get("apps")["items"])

    new.wait("what was newer is back at the hub", lambda: all(map(exists, ("local", "new", "late"))) and settled(), 60)
    new.wait("and decided", lambda: {backoff(new, "shared", "--at", n) for n in ("plant-1", "shop-1")} == {"2s"})
    # what several sites share is each site's own until somebody promotes it
    new.wait("overrides", lambda: len(new.get("overrides")["items"]) == 2)
    assert backoff(new, "shared") == "1s"
    assert min(revisions(new)) > seen
    for node in ("plant-1", "shop-1"):
        assert backoff(new, "shared", "--at", node) == "2s"
    # a deletion after the backup is known to nobody any more, and is not guessed
    assert exists("doomed")

    shown = json.loads(new.run("get", "secret", "late", "-o", "json", "--show-secrets"))
    assert shown["spec"]["data"] == {"S": "planted-late-33"}

    new.run("audit", "verify")
    reasons = {e["reason"] for e in records(new, "events")}
    new.wait("the nodes say so", lambda: "NewerThanHub" in {e["reason"] for e in records(new, "events")})
    assert "HubRestored" in reasons
    kept = {(j["resource"], j["outcome"]) for j in records(new, "journal")}
    assert {("App/mine", "accept"), ("App/new", "accept"), ("App/shared", "override")} <= kept

    # readings that waited arrive, those of the backup are there, none twice, and new ones come
    after = publish(new, 2000, 20)
    new.wait("all readings", lambda: before | lost | after <= set(ids(new)), 60)
    got = ids(new)
    assert len(got) == len(set(got))


def test_a_backup_alone_brings_a_system_back_and_damage_changes_nothing(
    systems: Callable[..., Any], tmp_path: Path
) -> None:
    up = systems("a", "up")
    secret = {"kind": "Secret", "metadata": {"name": "db"}, "spec": {"data": {"password": "planted-6d1f"}}}
    up.apply([secret, app("web", "1s", "plant")], "--wait")
    for name in ("ci", "ended"):
        up.run("token", "create", "--name", name, "--role", "viewer", "--ttl", "1h")
    backup = tmp_path / "hub.backup"
    up.run("backup", "create", str(backup))
    up.run("token", "revoke", "ended")
    raw = backup.read_bytes()
    assert b"planted-6d1f" not in raw
    up.stop()
    offline = tmp_path / "offline"
    up.run("backup", "create", str(offline), "--data", str(up.data))
    token = up.context["token"]
    assert token.encode() not in raw

    # a damaged file, or a wrong key, and the target stays as it is
    bad = tmp_path / "bad"
    before = sorted(p.relative_to(up.data) for p in up.data.rglob("*"))
    for damaged in (raw[:-1], raw[: len(raw) // 2], raw[:2000] + bytes([raw[2000] ^ 1]) + raw[2001:], b"", raw + b"x"):
        bad.write_bytes(damaged)
        up.run("backup", "verify", str(bad), code=3)
        up.run("backup", "restore", str(bad), "--data", str(up.data), code=3)
    other = systems("b", "up")
    up.run("backup", "restore", str(backup), "--data", str(up.data), "--key", f"{other.data}/hub/recovery.key", code=3)
    assert "needs the recovery key" in up.stderr
    assert sorted(p.relative_to(up.data) for p in up.data.rglob("*")) == before

    # in place: what was there is kept aside; the key that lay in the hub's folder lies there again
    told = json.loads(up.run("backup", "restore", str(offline), "--data", str(up.data), "-o", "json"))
    assert Path(told["movedAside"]).is_dir()
    assert (told["tokens"], told["tokensLeftOut"]) == ([], ["ci"])
    listed = tmp_path / "revoked"
    listed.write_text("token CI\n")
    again = ("backup", "restore", str(backup), "--data", str(up.data), "--with-tokens")
    up.run(*again, "--revoked", str(listed), code=3)
    assert "revoked:1" in up.stderr
    listed.write_text("token nobody\n")
    told_people = up.run(*again, "--revoked", str(listed))
    # the audit of the folder that is replaced knew that one was ended
    for part in ("left out", "ended", "let in as they were", "plant-1", "good again", "ci", "who knows", str(listed)):
        assert part in told_people, told_people
    up.ready_file.unlink()
    again = systems("a", "up")
    assert again.context["token"] == token
    assert [t["metadata"]["name"] for t in again.get("accesstokens")["items"]] == ["ci"]
    shown = json.loads(again.run("get", "secret", "db", "-o", "json", "--show-secrets"))
    assert shown["spec"]["data"] == {"password": "planted-6d1f"}
    again.wait("the app runs", lambda: again.get("app", "web")["status"].get("phase") == "Running")
    again.run("backup", "create", str(tmp_path / "second"))
    again.run("backup", "verify", str(tmp_path / "second"))
    # whole, and to the right key, but not by this hub: anybody can write such a file
    own = SealingKey.parse(json.loads((again.data / "hub" / "recovery" / "seal.json").read_text()))
    sealer = Sealer(SealingKey(own.recipient, bytes(32)), {"made": "now"})
    forged = tmp_path / "forged"
    forged.write_bytes(sealer.update(b"x") + sealer.finish())
    (again.data / "hub" / "recovery.key").rename(tmp_path / "away.key")
    again.run("backup", "verify", str(forged), code=3)
    assert "not written by the hub" in again.stderr


def test_no_half_a_backup_is_left_behind(systems: Callable[..., Any], tmp_path: Path) -> None:
    up = systems("a", "up")
    (tmp_path / "wrong.json").write_text(json.dumps(up.context | {"token": "ew_wrong"}))
    target = tmp_path / "out" / "b"
    target.parent.mkdir()
    up.run("backup", "create", str(target), "--context", str(tmp_path / "wrong.json"), code=3)
    (tmp_path / "away.json").write_text(json.dumps(up.context | {"hub_url": "https://127.0.0.1:1"}))
    up.run("backup", "create", str(target), "--context", str(tmp_path / "away.json"), code=6)
    up.run("backup", "create", str(target.parent), code=3)
    assert not list(target.parent.iterdir())
    up.run("backup", "verify", str(target), code=5)
