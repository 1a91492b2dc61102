"""What witnesses say of revocations after a backup."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest

from edgeward.core.audit import Audit
from edgeward.core.chain import FORMAT
from edgeward.core.errors import Invalid
from edgeward.core.resource import CLUSTER, Key
from edgeward.hub.revoked import Revoked, of_file, of_records


def export(*records: tuple[str, str, str, str]) -> bytes:
    audit = Audit()

    async def fill() -> None:
        for verb, kind, name, outcome in records:
            await audit.write(verb, Key(kind, CLUSTER, name), actor="ann", outcome=outcome)

    asyncio.run(fill())
    head = {"format": FORMAT, "since": 0, "head": msgspec.to_builtins(audit.head())}
    return b"\n".join(msgspec.json.encode(x) for x in [head, *(msgspec.to_builtins(k) for k in audit.links())]) + b"\n"


SAID = (
    ("revoke", "Node", "a", "done"),
    ("revoke", "Node", "not-done", "Forbidden: may not"),
    ("delete", "Node", "b", "done"),
    ("leave", "Node", "c", "done"),
    ("enrol", "Node", "d", "done"),
    ("delete", "AccessToken", "ci", "done"),
    ("replace", "AccessToken", "weaker", "done"),
    ("create", "AccessToken", "new", "done"),
    ("delete", "App", "web", "done"),
)


def test_an_export_of_the_audit() -> None:
    raw = export(*SAID)
    assert of_file(raw, "2020-01-01") == Revoked({"a", "b", "c"}, {"ci", "weaker"})
    assert of_file(raw, "2999-01-01") == Revoked(), "before the backup: it has that as it is"
    for cut in (raw.replace(b"revoke", b"rewoke", 1), b"".join(raw.splitlines(keepends=True)[:-1])):
        with pytest.raises(Invalid):
            of_file(cut, "2020-01-01")
    assert of_records([{"kind": "Node"}, {}, {"kind": 1, "name": []}], "") == Revoked()


def test_a_list() -> None:
    text = b"# what ann remembers\n\nnode plant-1\n  token ci  \nnode plant-1\n"
    assert of_file(text, "2999") == Revoked({"plant-1"}, {"ci"})
    for bad, line in itertools.product((b"plant-1", b"node", b"node A B", b"user x", b"node ../x"), (1, 3)):
        with pytest.raises(Invalid) as caught:
            of_file(b"# x\n" * (line - 1) + bad, "")
        assert caught.value.line == line
