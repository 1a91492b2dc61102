"""What a site says of its own nodes, as the hub keeps it: apart from what each node says of itself.

One node speaks for its site, the first that has a majority and a link, so the others need none. Its word stands until
another one speaks, for as long as the hub hears any node of the site; of one of which it hears nothing, the hub says
that it does not know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any

from nats.aio.client import Client

from edgeward.core.errors import EdgewardError
from edgeward.nodes.calls import call

#: Nodes that are asked at once for one that cannot hear them, and seconds for their answers.
_MOST, _WAIT = 8, 3.0
_STATES = ("healthy", "wan-cut", "dead", "unknown")
#: Bytes of evidence that are kept for one node.
_FIELDS = ("heard", "group", "link", "lost", "failing", "why", "since")


class SiteWord:
    def __init__(self, online: Callable[[str], bool]) -> None:
        self._online = online
        #: site -> who spoke last, and what it said of each node
        self._said: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {}

    def take(self, site: str, by: str, said: Mapping[str, Any], nodes: Collection[str]) -> list[str]:
        """The site's word; gives the nodes of which it says something new."""
        word = {n: clean for n in nodes if (clean := _clean(said.get(n)))}
        _, before = self._said.get(site, ("", {}))
        self._said[site] = (by, word)
        return [n for n in nodes if word.get(n) != before.get(n)]

    def forget(self, site: str, node: str) -> None:
        """The node is gone: one that gets its name is another."""
        _, word = self._said.get(site, ("", {}))
        word.pop(node, None)
        if not word:
            self._said.pop(site, None)

    def concerned(self, node: str, nodes: Collection[str]) -> list[str]:
        """Whose status may be another one since the hub hears ``node``, or hears it no more: all others' of its site,
        where it was the only one that was heard."""
        others = [n for n in nodes if n != node]
        return [] if any(map(self._online, others)) else others

    def of(self, site: str, node: str, old: Mapping[str, Any], nodes: Collection[str]) -> dict[str, Any]:
        """``verdict`` and ``evidence`` of a Node's status; ``old``: the status before."""
        by, word = self._said.get(site, ("", {}))
        if not by:
            found = {k: old[k] for k in ("verdict", "evidence") if k in old}  # this process has not heard it yet
        elif node not in word:
            return {}
        else:
            found = {**word[node], "evidence": {**word[node]["evidence"], "by": by}}
        if found and not any(self._online(n) for n in nodes):
            why = "the hub hears no node of the site"
            return {"verdict": "unknown", "evidence": {"why": why, "before": old_verdict(old, found)}}
        return found


def old_verdict(old: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    """What the site said last, kept while the hub does not know."""
    before = old.get("evidence", {})
    return before.get("before") if isinstance(before, Mapping) and "before" in before else found.get("verdict")


def _clean(said: Any) -> dict[str, Any]:
    """A node's word as it may stand in a status: known fields, of a bounded size."""
    if not isinstance(said, Mapping) or said.get("verdict") not in _STATES:
        return {}
    evidence = said.get("evidence")
    given = evidence if isinstance(evidence, Mapping) else {}
    kept: dict[str, Any] = {}
    for name in _FIELDS:
        value = given.get(name)
        if isinstance(value, str) and value:
            kept[name] = value[:300]
        elif isinstance(value, list | tuple) and value:
            kept[name] = [str(v)[:64] for v in value[:128]]
    return {"verdict": said["verdict"], "evidence": kept}


async def ask_nodes(client: Client, nodes: list[str]) -> dict[str, bytes]:
    """What each of these nodes says of itself now (``call.verdict``); those that do not answer are not in it."""
    told: dict[str, bytes] = {}

    async def one(node: str) -> None:
        try:
            async with asyncio.timeout(_WAIT):
                async for piece in call(client, node, "verdict", {}, timeout=_WAIT):
                    told[node] = bytes(piece)
        except (EdgewardError, TimeoutError):
            return

    await asyncio.gather(*(one(n) for n in nodes[:_MOST]))
    return told
