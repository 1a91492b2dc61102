"""`--wait`: until what was written runs, or what was deleted is gone.

In come the resources, out come the errors of those that did not make it. A watch from the revision that was written
wakes the reader at each change; a link that breaks meanwhile is tried again until the time is up.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeward.cli.output import full_name
from edgeward.cli.plain import plain
from edgeward.core.errors import EdgewardError, NotFound, Unreachable

if TYPE_CHECKING:
    from edgeward.cli.client import Api
    from edgeward.core.registry import Kind

Doc = dict[str, Any]

#: Looks again at least this often: a change that the watch missed costs no more than this. Seconds.
_LOOK = 1.0
_RETRY = 0.5
#: A status without a generation is believed this long after an update: a link's round trip and a plan of the node.
_SETTLE = 2.0


def app_state(doc: Mapping[str, Any], generation: int, *, fresh: bool) -> tuple[str, str]:
    """('done' | 'failed' | 'waiting', what to show) of an app. Pure.

    A status that speaks of an older generation does not count. One that does not say of which it speaks counts only
    when ``fresh``: right after an update it may still be the old version's.
    """
    status = doc.get("status") or {}
    phase = str(status.get("phase") or "Pending")
    reason = str(status.get("message") or status.get("reason") or "")
    observed = status.get("observedGeneration")
    instances = [i for i in status.get("instances") or [] if isinstance(i, Mapping)]
    if observed < generation if isinstance(observed, int) else not fresh:
        return "waiting", "waits for its nodes to take it over"
    running = sum(i.get("phase") == "Running" for i in instances)
    shown = phase + (f" {running}/{len(instances)}" if instances else "") + (f": {reason}" if reason else "")
    if phase == "Failed":
        return "failed", shown
    if phase == "Elsewhere":  # a node's own API knows of its own instances only
        return "failed", f"{shown} (ask there, or the hub)"
    stale = sorted({str(i.get("node")) for i in instances if i.get("stale")})
    if stale:
        return "waiting", f"{phase}, but not heard from: {', '.join(stale)}"
    if any(len(v) > 1 for v in _versions(instances).values()):
        return "waiting", f"{phase}, updating"
    if phase == "Degraded" and running and running == len(instances):
        reports: Mapping[str, Any] = status.get("nodes") or {}
        if any(isinstance(r, Mapping) and r.get("phase") == "Degraded" for r in reports.values()):
            # all that runs is well, and yet the node calls it degraded: it went back to the version before
            return "failed", shown
    told = [status, *(r for r in (status.get("nodes") or {}).values() if isinstance(r, Mapping))]
    if any(r.get("wanted") for r in told):  # an older version serves while this one's image comes, say
        return "waiting", shown
    return ("done" if phase == "Running" else "waiting"), shown


def function_state(doc: Mapping[str, Any], generation: int) -> tuple[str, str]:
    """As :func:`app_state`, of a function: it is done when every node that was heard of answers with it. Pure."""
    status = doc.get("status") or {}
    phase = str(status.get("phase") or "Pending")
    message = str(status.get("message") or "")
    told = [status, *(r for r in (status.get("nodes") or {}).values() if isinstance(r, Mapping))]
    if phase == "Degraded" and any(int(r.get("refusedGeneration") or 0) >= generation for r in told):
        return "failed", f"{phase}: {message}"  # a node says that it will not get what it takes
    if int(status.get("observedGeneration") or 0) < generation or phase == "Pending":
        return "waiting", "waits for its nodes to take it over" + (f": {message}" if message else "")
    shown = phase + (f": {message}" if message else "")
    if phase in ("Failed", "Refused", "Degraded"):
        return "failed", shown
    return ("done" if phase == "Running" else "waiting"), shown


def export_state(doc: Mapping[str, Any], generation: int, *, fresh: bool) -> tuple[str, str]:
    """The same of an Export, from the hub's status or a node's own: done when every node that takes part captures or,
    being full, refuses. Pure."""
    status = doc.get("status") or {}
    words = {"capturing": "Flowing", "refusing": "Refusing", "failed": "Failed"}
    phase = str(status.get("phase") or words.get(str(status.get("state")), "Pending"))
    reason = str(status.get("message") or "")
    observed = status.get("observedGeneration")
    if observed < generation if isinstance(observed, int) else not fresh:
        return "waiting", "waits for its nodes to take it over"
    shown = phase + (f": {reason}" if reason and phase != "Flowing" else "")
    if phase == "Failed":
        return "failed", shown
    nodes: Mapping[str, Any] = status.get("nodes") or {}
    stale = sorted(n for n, r in nodes.items() if isinstance(r, Mapping) and r.get("stale"))
    if stale:
        return "waiting", f"{phase}, but not heard from: {', '.join(stale)}"
    return ("done" if phase in ("Flowing", "Refusing") else "waiting"), shown


#: Kinds that have something to wait for, and where a failure is explained.
_STATES: dict[str, tuple[Callable[..., tuple[str, str]], str]] = {
    "App": (app_state, "logs"),
    "Function": (lambda doc, generation, fresh: function_state(doc, generation), "functions logs"),
    "Export": (export_state, "describe export"),
}


def _versions(instances: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """The versions that each node runs; what it is about to end does not count."""
    found: dict[str, set[str]] = {}
    for i in instances:
        if i.get("version") and i.get("phase") not in ("Stopping", "Stopped"):
            found.setdefault(str(i.get("node")), set()).add(str(i["version"]))
    return found


class Progress:
    """Says on stderr what is waited for: one line that changes on a terminal, one line a change elsewhere."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._shown: dict[str, str] = {}
        self._status: Any = None

    def __enter__(self) -> Progress:
        if self._tty:
            from rich.console import Console

            self._status = Console(stderr=True, markup=False).status("waiting")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, name: str, text: str) -> None:
        if self._shown.get(name) == text:
            return
        self._shown[name] = text
        if self._status is not None:
            self._status.update(plain(", ".join(f"{n}: {t}" for n, t in self._shown.items() if t)))
        else:
            print(plain(f"{name}: {text}"), file=sys.stderr, flush=True)


def wait_ready(
    api: Api, written: Sequence[tuple[Kind, str | None, Doc, str]], patience: float
) -> Iterator[EdgewardError]:
    """Waits until all Apps and Functions run and all Exports flow; yields the error of each that does not. Other kinds
    need no wait.

    The last of each tuple is what apply did: created, configured, unchanged.
    """
    began = time.monotonic()
    deadline = began + patience
    with Progress() as progress:
        for kind, namespace, doc, verb in written:
            if kind.name not in _STATES:
                continue
            state_of, explained = _STATES[kind.name]
            name = doc["metadata"]["name"]
            generation = int(doc["metadata"].get("generation") or 0)

            label = full_name(doc)
            settled = began + (_SETTLE if verb == "configured" else 0.0)

            def judge(
                now: Doc | None,
                name: str = label,
                generation: int = generation,
                settled: float = settled,
                state_of: Callable[..., tuple[str, str]] = state_of,
                explained: str = explained,
            ) -> EdgewardError | bool:
                if now is None:
                    return NotFound("was deleted while waited for", resource=name)
                state, text = state_of(now, generation, fresh=time.monotonic() >= settled)
                progress.show(name, text)
                if state == "failed":
                    return EdgewardError(
                        f"is {text}", resource=name, remedy=f"see: edgeward {explained} {name.partition('/')[2]}"
                    )
                return state == "done"

            since = str(doc["metadata"].get("resourceVersion") or "")
            error = _wait(api, kind, namespace, name, judge, deadline, since)
            if error is not None:
                yield error


def wait_gone(api: Api, going: Sequence[tuple[Kind, str | None, str]], patience: float) -> Iterator[EdgewardError]:
    """Waits until all are deleted for good; yields the error of each that stays."""
    deadline = time.monotonic() + patience
    with Progress() as progress:
        for kind, namespace, name in going:

            def judge(now: Doc | None, label: str = f"{kind.name.lower()}/{name}") -> bool:
                if now is None:
                    progress.show(label, "gone")
                    return True
                waits = ", ".join((now.get("metadata") or {}).get("finalizers") or ()) or "what is in it"
                progress.show(label, f"waits for {waits}")
                return False

            error = _wait(api, kind, namespace, name, judge, deadline)
            if error is not None:
                yield error


def _wait(
    api: Api,
    kind: Kind,
    namespace: str | None,
    name: str,
    judge: Callable[[Doc | None], EdgewardError | bool],
    deadline: float,
    since: str = "",
) -> EdgewardError | None:
    wake: queue.Queue[None] = queue.Queue()
    stop = threading.Event()
    # The watch only rings; what counts is read. It blocks in a thread of its own, which ends with the process.
    threading.Thread(target=_ring, args=(api, kind, namespace, name, since, wake, stop), daemon=True).start()
    trouble: EdgewardError | None = None
    try:
        while True:
            try:
                now: Doc | None = api.get(kind, namespace, name)
                trouble = None
            except NotFound:
                now = None
            except Unreachable as e:
                trouble = e
            if trouble is None:
                verdict = judge(now)
                if isinstance(verdict, EdgewardError):
                    return verdict
                if verdict:
                    return None
            left = deadline - time.monotonic()
            if left <= 0:
                return trouble or EdgewardError(
                    "did not get there in time",
                    resource=f"{kind.name.lower()}/{name}",
                    remedy=f"see: edgeward describe {kind.name.lower()} {name}; wait longer by --timeout",
                )
            try:
                wake.get(timeout=min(left, _LOOK if trouble is None else _RETRY))
            except queue.Empty:
                pass
    finally:
        stop.set()


def _ring(
    api: Api,
    kind: Kind,
    namespace: str | None,
    name: str,
    since: str,
    wake: queue.Queue[None],
    stop: threading.Event,
) -> None:
    while not stop.is_set():
        try:
            for _event, doc in api.watch(kind, namespace, since=since, fields=f"metadata.name={name}"):
                if stop.is_set():
                    return
                if (doc.get("metadata") or {}).get("name", name) == name:
                    wake.put(None)
        except EdgewardError:
            # the reader meets the same trouble and reports it; a revision may have been compacted away
            since = ""
        stop.wait(_RETRY)
