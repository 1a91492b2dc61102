"""What was revoked after a backup was made, so that a restore does not let it in again. Pure.

Two witnesses: the audit of the hub that was lost (its ``audit.db``, or a file of `edgeward audit export`), of which
only what happened after the backup counts; or a list that a person wrote, a line each: ``node NAME``, ``token NAME``.
A witness only ever takes away: a wrong one keeps somebody out, it lets nobody in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from edgeward.core.chain import FORMAT, Link, check_export
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.resource import check_name

#: Verbs of the audit after which a node's key, or a token, must not be good as it was before.
_VERBS = {
    "Node": frozenset({"revoke", "delete", "leave"}),
    "AccessToken": frozenset({"delete", "update", "patch", "replace"}),
}


class Revoked(msgspec.Struct):
    nodes: set[str] = msgspec.field(default_factory=set)
    tokens: set[str] = msgspec.field(default_factory=set)

    def add(self, other: Revoked) -> None:
        self.nodes |= other.nodes
        self.tokens |= other.tokens


def of_records(records: Iterable[Mapping[str, Any]], since: str) -> Revoked:
    """``since``: RFC 3339; what is older was in the backup as it is."""
    found = Revoked()
    for r in records:
        kind, name = r.get("kind"), r.get("name")
        if not isinstance(name, str) or r.get("outcome") != "done" or str(r.get("time", "")) < since:
            continue
        if kind in _VERBS and r.get("verb") in _VERBS[kind]:
            (found.nodes if kind == "Node" else found.tokens).add(name)
    return found


def of_file(data: bytes, since: str) -> Revoked:
    """A list, or an export of the audit. Raises ``Invalid`` with the line; also of an export that was changed."""
    if FORMAT.encode() in data.partition(b"\n")[0]:
        lines = data.splitlines()
        verdict = check_export(lines)
        if verdict.broken:
            raise Invalid(f"record {verdict.broken} {verdict.why}", remedy="write a list: node NAME, token NAME")
        links = (msgspec.json.decode(line, type=Link) for line in lines[1:] if line.strip())
        return of_records((_record(one.body) for one in links), since)
    return _listed(data)


def _record(body: str) -> Mapping[str, Any]:
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _listed(data: bytes) -> Revoked:
    found = Revoked()
    for n, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] not in ("node", "token"):
            raise Invalid(f"{line[:60]!r} is not understood", line=n, remedy="write: node NAME, or: token NAME")
        try:
            check_name(words[1], "name")
        except EdgewardError as e:
            e.line = n
            raise
        (found.nodes if words[0] == "node" else found.tokens).add(words[1])
    return found
