"""A watch: the changes of a kind, as they happen, by server-sent events.

In: the store's changes, and which resources the caller chose and may see. Out: ADDED, MODIFIED and DELETED as seen
from that choice, from the revision that the caller names; what cannot be told any more is refused as gone, never left
out. Who may ask is decided in ``resource_routes.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from edgeward.core.access import principal, shown
from edgeward.core.authz import Ask, perhaps
from edgeward.core.errors import EdgewardError, Gone, Invalid
from edgeward.core.registry import Kind
from edgeward.core.resource import CLUSTER, Key, Resource, parse_revision
from edgeward.core.store import Change, Store

_HEARTBEAT = 15.0


def watch(
    request: Request,
    store: Store,
    kind: Kind,
    namespace: str | None,
    chosen: Callable[[Resource], bool],
    allowed: Callable[[Resource], bool],
) -> Response:
    """Changes of a kind by server-sent events. ``chosen``: what is asked for and may be seen; ``allowed``: what may be.
    ``Gone``: what happened since the given revision cannot be told."""
    since_text = request.headers.get("last-event-id") or request.query_params.get("resourceVersion")
    since = parse_revision(since_text) if since_text else None
    if since_text and since is None:
        raise Invalid(f"{since_text[:40]!r} is no revision", field="?resourceVersion", remedy="list first")
    if since and since > store.revision:
        # of a store that was since restored, or of another system: what comes below it would never be told
        raise Gone(
            f"revision {since} is not reached yet (the newest is {store.revision})",
            remedy="list again and watch from the list's revision",
        )
    shown_keys = {r.key for r in store.items(kind.name, namespace) if chosen(r)} if since else set()
    changes = store.watch(since)
    if since is None:
        changes.close()
        changes = store.watch(0)
    who = principal(request)

    def known(key: Key) -> bool:
        """Whether the caller may hear of an object that is gone: its labels are gone with it."""
        return who.may(Ask("watch", key.kind, key.namespace, key.name))

    def untold(c: Change) -> bool:
        """A deletion that the caller may have to hear of, and cannot be told."""
        if c.resource is not None or not _in(c.key, kind, namespace) or known(c.key):
            return False
        return perhaps(who.rules, "watch", kind.name, c.key.namespace)

    if since and any(untold(c) for c in changes.backlog()):
        changes.close()
        raise Gone("what was deleted since then cannot be told by its labels", remedy="list again and watch on")

    async def events() -> AsyncIterator[bytes]:
        with changes:
            iterator = aiter(changes)
            following = asyncio.ensure_future(anext(iterator))
            try:
                yield b": watching\n\n"
                while True:
                    done, _ = await asyncio.wait({following}, timeout=_HEARTBEAT)
                    if not done:
                        yield b": still here\n\n"
                        continue
                    try:
                        change = following.result()
                    except StopAsyncIteration:
                        return
                    except EdgewardError as e:
                        yield b"event: ERROR\ndata: %b\n\n" % msgspec.json.encode(e.problem())
                        return
                    event = _event(request, change, kind, namespace, chosen, allowed, known, shown_keys)
                    if event is not None:
                        yield event
                    following = asyncio.ensure_future(anext(iterator))
            finally:
                following.cancel()

    return StreamingResponse(
        events(), media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
    )


def _in(key: Key, kind: Kind, namespace: str | None) -> bool:
    return key.kind == kind.name and (namespace is None or key.namespace == namespace)


def _event(
    request: Request,
    change: Change,
    kind: Kind,
    namespace: str | None,
    chosen: Callable[[Resource], bool],
    allowed: Callable[[Resource], bool],
    known: Callable[[Key], bool],
    shown_keys: set[Key],
) -> bytes | None:
    key = change.key
    if not _in(key, kind, namespace):
        return None
    was = key in shown_keys
    if change.resource is not None and chosen(change.resource):
        name, doc = ("MODIFIED" if was else "ADDED"), shown(request, change.resource)
        shown_keys.add(key)
    elif was or (change.resource is None and known(key)):
        meta = {"name": key.name, "namespace": "" if key.namespace == CLUSTER else key.namespace}
        name = "DELETED"
        doc = {"kind": key.kind, "metadata": meta}
        if change.resource is not None and allowed(change.resource):
            doc = shown(request, change.resource)
        shown_keys.discard(key)
    else:
        return None
    return b"event: %b\nid: %d\ndata: %b\n\n" % (name.encode(), change.revision, msgspec.json.encode(doc))
