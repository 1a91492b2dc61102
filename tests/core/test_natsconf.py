"""The server's configuration: what it must say, and that nats-server itself reads what we wrote."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgeward.core.identity import HubIdentity
from edgeward.core.natsconf import AGENT_USER, HubSpec, NodeSpec, Spec, node_domain, render
from edgeward.core.natsserver import NatsServer, find_binary

PORTS = {"client": 4001, "leaf": 4002, "websocket": 4003, "mqtt": 4004}


def hub(folder: Path, **changes: Any) -> HubSpec:
    identity = HubIdentity.open(folder / "identity")
    return HubSpec(identity.operator_jwt, identity.system_account, identity.accounts, **changes)


def check(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    file = folder / "nats.conf"
    file.write_text(text, encoding="utf-8")
    return subprocess.run([str(find_binary()), "-t", "-c", str(file)], capture_output=True, text=True, timeout=60)


def parsed(spec: Spec, folder: Path) -> dict[str, Any]:
    """What the text says, read back line by line and compared with what was meant."""
    text = render(spec, folder, PORTS, "s3cret")
    head, *rest = text.splitlines()
    assert head.startswith("# Written by Edgeward")
    found, decoder, body = {}, json.JSONDecoder(), "\n".join(rest)
    while body.strip():
        key, _, body = body.lstrip().partition(": ")
        found[key], end = decoder.raw_decode(body)
        body = body[end:]
    assert found == spec.settings(folder, PORTS, "s3cret")
    return found


def test_the_hub_listens_on_loopback_only_and_shares_nothing(tmp_path: Path) -> None:
    said = parsed(hub(tmp_path), tmp_path)
    assert {said["host"], said["leafnodes"]["host"], said["websocket"]["host"]} == {"127.0.0.1"}
    assert (said["port"], said["leafnodes"]["port"], said["websocket"]["port"]) == (4001, 4002, 4003)
    assert said["leafnodes"]["no_advertise"] is True
    assert said["leafnodes"]["isolate_leafnode_interest"] is True
    assert said["jetstream"]["sync_interval"] == "always", "what is acknowledged survives a power cut"
    assert "max_file_store" not in said["jetstream"]
    assert parsed(hub(tmp_path, max_file_store=1 << 30), tmp_path)["jetstream"]["max_file_store"] == 1 << 30
    assert "s3cret" not in json.dumps(said), "at the hub nobody has a password"


def test_a_node_keeps_its_devices_away_from_the_agent(tmp_path: Path) -> None:
    spec = NodeSpec("plant-1", mqtt_users={"b": "pb", "a": "pa"}, mqtt_anonymous="a", mqtt_host="0.0.0.0")  # noqa: S104
    said = parsed(spec, tmp_path)
    assert said["server_name"] == said["jetstream"]["domain"] == node_domain("plant-1") == "n-plant-1"
    assert (said["host"], said["mqtt"]) == ("127.0.0.1", {"host": "0.0.0.0", "port": 4004, "no_auth_user": "a"})  # noqa: S104
    agent, *devices = said["accounts"]["EDGE"]["users"]
    assert (agent["user"], agent["password"], agent["allowed_connection_types"]) == (AGENT_USER, "s3cret", ["STANDARD"])
    assert [d["user"] for d in devices] == ["a", "b"]
    for device in devices:
        assert device["allowed_connection_types"] == ["MQTT"]
        assert device["password"] != "s3cret"
        for way in ("publish", "subscribe"):
            assert {"ew.>", "$SYS.>", "$JS.>", "_INBOX_plant-1.>"} <= set(device["permissions"][way]["deny"])
    assert "leafnodes" not in said
    assert "no_auth_user" not in parsed(NodeSpec("plant-1"), tmp_path)["mqtt"], "a stranger is refused"


def test_a_leaf_dials_the_hub_it_was_given_with_what_it_was_given(tmp_path: Path) -> None:
    bare = parsed(NodeSpec("n", hub_url="wss://hub:8443"), tmp_path)["leafnodes"]["remotes"][0]
    assert (bare["urls"], bare["account"]) == (["wss://hub:8443"], "EDGE")
    assert bare["ignore_discovered_servers"] is True
    assert "credentials" not in bare
    assert "tls" not in bare
    spec = NodeSpec("n", hub_url="wss://hub:8443", creds_file=tmp_path / "c", ca_file=tmp_path / "ca")
    (full,) = parsed(spec, tmp_path)["leafnodes"]["remotes"]
    assert (full["credentials"], full["tls"]["ca_file"]) == (str(tmp_path / "c"), str(tmp_path / "ca"))


def test_the_same_spec_gives_the_same_text_whatever_the_order_of_the_users(tmp_path: Path) -> None:
    """An agent compares texts to know whether a running server is still the right one."""
    one = NodeSpec("n", mqtt_users={"a": "1", "b": "2"})
    two = NodeSpec("n", mqtt_users={"b": "2", "a": "1"})
    assert render(one, tmp_path, PORTS, "s") == render(two, tmp_path, PORTS, "s")
    assert render(one, tmp_path, PORTS, "s") != render(one, tmp_path, PORTS, "t")


def test_nats_server_takes_the_hub(tmp_path: Path) -> None:
    done = check(tmp_path, render(hub(tmp_path, max_file_store=1 << 30), tmp_path, PORTS, "s"))
    assert done.returncode == 0, done.stderr


NASTY = ["plain", 'a"b', "a\\b", "$HOME", "$2a", "a\nb: c", "tab\there", "ä€", "{}[]#;//", " a ", "0x10", "\\x41", "a'b", "1k", "\x01\x7f", "", "\b\f"]  # noqa: E501  # fmt: skip


@pytest.mark.parametrize("password", NASTY)
def test_no_value_breaks_out_of_its_quotes(tmp_path: Path, password: str) -> None:
    """A key that the server does not know would fail its check."""
    HubIdentity.open(tmp_path / "identity")
    ca, creds = tmp_path / "identity" / "ca.crt", tmp_path / "n.creds"
    creds.touch()
    spec = NodeSpec("n", "wss://hub:8443", creds_file=creds, ca_file=ca, mqtt_users={f"u{password}": password})
    done = check(tmp_path, render(spec, tmp_path, PORTS, "s"))
    assert done.returncode == 0, done.stderr


def test_the_server_takes_each_password_as_it_was_meant(tmp_path: Path) -> None:
    async def main() -> None:
        users = {f"user-{n}": password for n, password in enumerate(NASTY) if password}
        server = NatsServer(tmp_path, NodeSpec("solo", mqtt_users=users))
        await server.start()
        try:
            async with asyncio.timeout(240):
                for user, password in users.items():
                    assert await mqtt_connect(server.ports["mqtt"], user, password) == 0, password
                    assert await mqtt_connect(server.ports["mqtt"], user, password + "x") != 0, password
        finally:
            await server.stop()

    asyncio.run(main())


async def mqtt_connect(port: int, user: str, password: str) -> int:
    """The return code of MQTT 3.1.1's CONNACK."""

    def field(text: str) -> bytes:
        return len(text.encode()).to_bytes(2, "big") + text.encode()

    body = field("MQTT") + b"\x04\xc2\x00\x3c" + field("c") + field(user) + field(password)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(bytes([0x10, len(body)]) + body)
        return (await reader.readexactly(4))[3]
    finally:
        writer.close()


def test_each_node_dials_in_its_own_time(tmp_path: Path) -> None:
    def period(node: str) -> int:
        spec = NodeSpec(node, hub_url="wss://hub:443")
        return int(parsed(spec, tmp_path)["leafnodes"]["reconnect"].removesuffix("ms"))

    periods = [period(f"node-{n}") for n in range(200)]
    assert periods == [period(f"node-{n}") for n in range(200)], "the same after a restart: no new configuration"
    assert min(periods) >= 700 and max(periods) < 1400, "and within the time that a backlog may take to flow again"
    assert len(set(periods)) > 150


def test_closed_subjects_are_mapped_to_nowhere(tmp_path: Path) -> None:
    spec = NodeSpec("plant-1", closed=("sensors.>", "sensors", "a.b//c.größe.x@y:1=~+-"))
    said = parsed(spec, tmp_path)["accounts"]["EDGE"]["mappings"]
    assert said["sensors.>"] == [{"destination": "sensors.>", "weight": 0}]
    assert set(said) == set(spec.closed)
    result = check(tmp_path, render(spec, tmp_path, PORTS, "s3cret"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "mappings" not in parsed(NodeSpec("plant-1"), tmp_path)["accounts"]["EDGE"]
    with pytest.raises(ValueError, match="cannot be closed"):
        NodeSpec("plant-1", closed=("sensors.*",)).settings(tmp_path, PORTS, "s3cret")
