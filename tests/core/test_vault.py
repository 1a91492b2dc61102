"""Secrets at rest: sealed on every disk, for their place and by this key only; what lay there in plain is read."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core import kinds as _kinds
from edgeward.core.bus import Bus
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.natsserver import AGENT_USER, NatsServer, NodeSpec
from edgeward.core.resource import Key, Resource, decode, encode_stored, read_stored, write_stored
from edgeward.core.store_nats import NatsStore
from edgeward.core.vault import Vault

assert _kinds
VALUE = "correct horse battery staple"
KEY = bytes(range(32))


def secret(name: str = "db", value: str = VALUE) -> Resource:
    return decode(
        {
            "apiVersion": "edgeward/v1",
            "kind": "Secret",
            "metadata": {"name": name},
            "spec": {"data": {"password": value}},
        }
    )


def override() -> Resource:
    target = {"kind": "Secret", "name": "db", "namespace": "default"}
    spec = {"target": target, "site": "plant", "patch": {"data": {"password": VALUE, "old": None}}}
    doc = {"apiVersion": "edgeward/v1", "kind": "Override", "metadata": {"name": "o"}, "spec": spec}
    return decode(doc)


def sealed_text(data: bytes) -> str:
    text: str = read_stored(data).spec["data"]["$sealed"]
    return text


@pytest.mark.parametrize("made", [secret, override])
def test_what_is_stored_holds_no_secret_and_gives_it_back(made: object) -> None:
    vault, resource = Vault(KEY), made()  # type: ignore[operator]
    data = vault.encode(resource)
    assert VALUE.encode() not in data
    assert b"password" not in data, "its keys are sealed too"
    assert vault.decode(data) == resource
    assert not vault.is_plain(data)
    assert vault.encode(resource) != data, "a nonce is used once"
    plain = encode_stored(resource)
    assert vault.is_plain(plain)
    assert vault.decode(plain) == resource, "an earlier release's is read"


def test_other_kinds_are_as_ever_and_an_empty_secret_is_one() -> None:
    vault = Vault(KEY)
    config = decode(
        {"apiVersion": "edgeward/v1", "kind": "Config", "metadata": {"name": "c"}, "spec": {"data": {"a": "b"}}}
    )
    assert vault.encode(config) == encode_stored(config)
    empty = decode({"apiVersion": "edgeward/v1", "kind": "Secret", "metadata": {"name": "e"}, "spec": {}})
    assert vault.decode(vault.encode(empty)) == empty
    assert not vault.is_plain(vault.encode(empty))


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.text(max_size=50)))
def test_any_values_come_back(data: dict[str, str]) -> None:
    vault = Vault(KEY)
    resource = secret()
    resource.spec.data = data
    assert vault.decode(vault.encode(resource)).spec.data == data


def test_another_key_another_place_or_a_flipped_bit_is_refused() -> None:
    vault, data = Vault(KEY), Vault(KEY).encode(secret())
    with pytest.raises(EdgewardError, match=r"Secret/default/db/data: cannot be unsealed"):
        Vault(bytes(32)).decode(data)
    moved = read_stored(data)
    moved.metadata.name = "other"
    with pytest.raises(EdgewardError, match="Secret/default/other/data"):
        vault.decode(write_stored(moved, "x"))
    raw = bytearray(base64.b64decode(sealed_text(data)))
    for at in range(len(raw)):
        broken = bytearray(raw)
        broken[at] ^= 1
        stored = read_stored(data)
        stored.spec = {"data": {"$sealed": base64.b64encode(broken).decode()}}
        with pytest.raises(EdgewardError, match="cannot be unsealed"):
            vault.decode(write_stored(stored, "x"))
    for text in ("", "AAAA", "no base64!"):
        stored.spec = {"data": {"$sealed": text}}
        with pytest.raises(EdgewardError, match="cannot be unsealed"):
            vault.decode(write_stored(stored, "x"))


def test_the_key_file_is_made_once_and_never_replaced(tmp_path: Path) -> None:
    first = Vault.open(tmp_path)
    assert first.source == "file"
    assert stat.S_IMODE((tmp_path / "vault.key").stat().st_mode) == 0o600
    assert Vault.open(tmp_path).id == first.id
    assert first.export() == (tmp_path / "vault.key").read_text().strip()
    assert first.export() not in repr(first)
    (tmp_path / "vault.key").rename(tmp_path / "away")
    with pytest.raises(Invalid, match=r"vault\.key: the key that this store was sealed with is gone \(restore it"):
        Vault.open(tmp_path)
    (tmp_path / "vault.key").write_text(base64.b64encode(bytes(32)).decode())
    with pytest.raises(Invalid, match="not the one that this store was sealed with"):
        Vault.open(tmp_path)
    (tmp_path / "vault.key").write_text("short")
    with pytest.raises(Invalid, match="is no vault key"):
        Vault.open(tmp_path)


def test_a_credential_of_systemd_goes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = tmp_path / "credentials"
    held.mkdir()
    (held / "edgeward-vault").write_text(base64.b64encode(KEY).decode() + "\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(held))
    vault = Vault.open(tmp_path / "store")
    assert (vault.source, vault.id) == ("systemd credential", Vault(KEY).id)
    assert not (tmp_path / "store" / "vault.key").exists(), "the key lies nowhere beside the store"
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(Invalid, match="is gone"):
        Vault.open(tmp_path / "store")


def test_the_hubs_stream_holds_no_secret_and_what_lay_there_in_plain_is_sealed(tmp_path: Path) -> None:
    async def main() -> None:
        server = NatsServer(tmp_path / "nats", NodeSpec("solo"))
        await server.start()
        try:
            bus = await Bus.connect(
                server.url, name="t", username=AGENT_USER, password=server.secret, inbox="_INBOX_solo"
            )
            before = NatsStore(bus.client)  # an earlier release
            await before.open()
            await before.put(secret("old"))
            store = NatsStore(bus.client, vault=Vault(KEY))
            await store.open()
            assert store.get(Key("Secret", "default", "old")).spec.data == {"password": VALUE}
            assert await store.seal() == 1
            assert await store.seal() == 0
            await store.put(secret("new"))
            for name in ("old", "new"):
                got = await bus.jetstream().get_last_msg("KV_resources", f"$KV.resources.r.Secret.default.{name}")
                assert got.data
                assert b"sealed" in got.data
                assert VALUE.encode() not in got.data
            again = NatsStore(bus.client, vault=Vault(KEY))
            await again.open()
            assert [r.spec.data for r in again.items("Secret")] == [{"password": VALUE}] * 2
            wrong = NatsStore(bus.client, vault=Vault(bytes(32)))
            await wrong.open()
            assert wrong.items("Secret") == [], "what cannot be unsealed is not there, and takes nothing else down"
            assert wrong.epoch == store.epoch
            await bus.close()
        finally:
            await server.stop()

    asyncio.run(main())


def test_the_sealed_form_is_json_that_other_tools_can_carry() -> None:
    doc = json.loads(Vault(KEY).encode(secret()))
    assert doc["kind"] == "Secret"
    assert set(doc["spec"]["data"]) == {"$sealed"}
    assert msgspec.json.decode(Vault(KEY).encode(secret()))
