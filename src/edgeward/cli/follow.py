"""Following a list for as long as the user likes: what changes behind it, over restarts of the server.

In comes a list, out go (event, resource) pairs. A connection that breaks is made again, waiting a little longer each
time, and goes on behind the last revision that was told, so nothing is missed and nothing comes twice. Where the server
has that revision no more, the list is read anew and compared. What happens to the connection is said, never printed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from edgeward.core.backoff import backoff
from edgeward.core.errors import Gone, Unreachable

if TYPE_CHECKING:
    from edgeward.cli.client import Api
    from edgeward.core.registry import Kind

Doc = dict[str, Any]
Name = tuple[str, str]

#: Seconds before the first and at most before any further try.
_FIRST, _MOST = 0.5, 10.0


def name_of(doc: Doc) -> Name:
    meta = doc.get("metadata") or {}
    return str(meta.get("namespace") or ""), str(meta.get("name") or "")


def differences(known: dict[Name, Doc], now: list[Doc]) -> Iterator[tuple[str, Doc]]:
    """What turns one list into another, as a watch would have told it. Pure."""
    there = {name_of(d): d for d in now}
    for name, doc in known.items():
        if name not in there:
            yield "DELETED", doc
    for name, doc in there.items():
        if name not in known:
            yield "ADDED", doc
        elif doc != known[name]:
            yield "MODIFIED", doc


class Follower:
    """The changes behind ``listing``, which :meth:`Api.list` gave for the same arguments. ``say`` gets what a person
    should know of the connection."""

    def __init__(
        self,
        api: Api,
        kind: Kind,
        namespace: str | None,
        listing: Doc,
        *,
        labels: str,
        fields: str,
        say: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        from edgeward.cli.client import revision

        self._api, self._kind, self._namespace = api, kind, namespace
        self._labels, self._fields, self._say, self._sleep = labels, fields, say, sleep
        self._since = revision(listing)
        self._known: dict[Name, Doc] = {name_of(d): d for d in listing["items"]}
        self._tries = 0
        self._stale = False

    def changes(self) -> Iterator[tuple[str, Doc]]:
        """Without end, but for errors that another try would not mend (a token that ended, a right that was taken)."""
        while True:
            try:
                if self._stale:
                    yield from self._anew()
                for event, doc in self._api.watch(
                    self._kind,
                    self._namespace,
                    since=self._since,
                    labels=self._labels,
                    fields=self._fields,
                    note=self._noted,
                ):
                    yield self._told(event, doc), doc
                why = f"{self._api.who} ended the connection"
            except Gone:
                self._stale = True
                continue
            except Unreachable as e:
                why = e.message
            self._wait(why)

    def _told(self, event: str, doc: Doc) -> str:
        """The event's name: the server does not know what was told before the connection broke."""
        if event == "DELETED":
            self._known.pop(name_of(doc), None)
        elif event in ("ADDED", "MODIFIED"):
            event = "MODIFIED" if name_of(doc) in self._known else "ADDED"
            self._known[name_of(doc)] = doc
        return event

    def _noted(self, what: str, value: str) -> None:
        if what == "id":
            self._since = value
        elif self._tries:
            self._tries = 0
            self._say("connected again")

    def _wait(self, why: str) -> None:
        delay = backoff(self._tries + 1, _FIRST, _MOST) * random.uniform(0.8, 1.2)  # noqa: S311 - many may have lost the same hub
        if not self._tries:
            self._say(f"{why}; trying again until Ctrl-C")
        self._tries += 1
        self._sleep(delay)

    def _anew(self) -> Iterator[tuple[str, Doc]]:
        from edgeward.cli.client import revision

        listing = self._api.list(self._kind, self._namespace, labels=self._labels, fields=self._fields)
        self._say("what changed meanwhile is not kept there any more: listed anew")
        before, self._known = self._known, {name_of(d): d for d in listing["items"]}
        self._since, self._stale = revision(listing), False
        yield from differences(before, listing["items"])
