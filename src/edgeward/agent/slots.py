"""Which release of the agent runs next, and what becomes of one that is tried: pure, and whole after a power cut.

In: what is on the disk (the launcher's state, and the order that an agent left) and which releases are whole there.
Out: the state to write before anything is started, and the release to start. A release is named by the digest of its
archive; ``""`` is the one that the launcher itself came with, which is always there. Only the standard library is used
here and in ``launcher.py``: these two run whatever the releases hold, so they change rarely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

#: So often is a release started that did not prove itself: a power cut is no fault of its own.
TRIES = 3


@dataclass(frozen=True)
class Order:
    """What an agent asks for. ``id``: one order is obeyed once; ``window``: seconds for which it must be ready;
    ``startup``: within which it must be; ``link``: within which it must have reached the hub (0: need not)."""

    id: str = ""
    release: str = ""
    window: float = 60.0
    startup: float = 180.0
    link: float = 0.0


@dataclass(frozen=True)
class State:
    """``current``: what has proven itself; ``previous``: what ran before it; ``trying``: what is being tried;
    ``starts``: how often that was started; ``why``: how it ended last; ``obeyed``: the last order;
    ``failed``: the last order that came to nothing, and ``failedWhy``."""

    current: str = ""
    previous: str = ""
    trying: Order | None = None
    starts: int = 0
    why: str = ""
    obeyed: str = ""
    failed: str = ""
    failedWhy: str = ""
    #: Members of a later launcher's state, kept as they are.
    more: Mapping[str, Any] = field(default_factory=dict)


Whole = Callable[[str], bool]


def next_start(state: State, order: Order | None, whole: Whole) -> tuple[State, str]:
    """The state to be on the disk before the release is started, and the release."""
    if order is not None and order.id != state.obeyed:
        # to what runs anyway there is nothing to go; what was being tried is given up for the newer order
        trying = order if order.release != state.current else None
        state = replace(state, obeyed=order.id, trying=trying, starts=0, why="")
    if (tried := state.trying) is not None:
        if not whole(tried.release):
            state = give_up(state, "it is not whole on this disk")
        elif state.starts >= TRIES:
            state = give_up(state, state.why or "the machine stopped while it was tried")
        else:
            return replace(state, starts=state.starts + 1), tried.release
    if not whole(state.current):
        back = state.previous if whole(state.previous) else ""
        state = replace(state, current=back, previous="")
    return state, state.current


def give_up(state: State, why: str) -> State:
    """What was tried has failed; what ran before is next."""
    if state.trying is None:
        return state
    return replace(state, trying=None, starts=0, why="", failed=state.trying.id, failedWhy=why)


def ended(state: State, why: str) -> State:
    """A release ended before it had proven itself."""
    return replace(state, why=why) if state.trying is not None else state


def stopped(state: State) -> State:
    """Somebody stopped the service: that start counts for nothing."""
    return replace(state, starts=max(0, state.starts - 1)) if state.trying is not None else state


def proven(state: State) -> State:
    """What was tried is what runs from now on."""
    if state.trying is None:
        return state
    return replace(
        state,
        current=state.trying.release,
        previous=state.current,
        trying=None,
        starts=0,
        why="",
        failed="",
        failedWhy="",
    )


def judge(order: Order, since: float, ready: float | None, linked: bool) -> tuple[str, str]:
    """Of a release that is being tried: ``wait``, ``proven``, or ``failed`` and why.

    ``since``: seconds since it was started; ``ready``: seconds for which it is ready now (None: it is not); ``linked``:
    it has reached the hub.
    """
    if ready is None:
        # one that was ready and is not any more has its start-up time anew: it says so itself only at its end
        late = since > order.startup
        return ("failed", f"it was not ready within {order.startup:g} s") if late else ("wait", "")
    if ready < order.window:
        return "wait", ""
    if linked or not order.link:
        return "proven", ""
    late = since > order.link
    return ("failed", f"it did not reach the hub within {order.link:g} s") if late else ("wait", "")


# -- as files ------------------------------------------------------------------------------------------------------


def order_of(doc: Any) -> Order | None:
    """What ``order.json`` says; None for nothing that is understood."""
    if not isinstance(doc, Mapping) or not isinstance(doc.get("id"), str) or not doc["id"]:
        return None
    release = doc.get("release")
    if not isinstance(release, str):
        return None
    numbers: dict[str, float] = {}
    for name in ("window", "startup", "link"):
        value = doc.get(name, getattr(Order, name))
        if not isinstance(value, int | float) or value < 0:
            return None
        numbers[name] = float(value)
    return Order(doc["id"], release, **numbers)


def state_of(doc: Any) -> State:
    """What ``state.json`` says; a fresh one for nothing that is understood: then the installed release runs."""
    if not isinstance(doc, Mapping):
        return State()
    texts = ("current", "previous", "why", "obeyed", "failed", "failedWhy")
    given = {n: doc[n] for n in texts if isinstance(doc.get(n), str)}
    starts = doc.get("starts")
    known = {*texts, "trying", "starts"}
    return State(
        **given,
        trying=order_of(doc.get("trying")),
        starts=starts if isinstance(starts, int) else TRIES,
        more={k: v for k, v in doc.items() if k not in known},
    )


def plain(state: State) -> dict[str, Any]:
    doc = asdict(state)
    return {**doc.pop("more"), **doc}
