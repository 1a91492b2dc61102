"""What becomes of an App when nodes of its site are lost, in the words of Nomad's ``disconnect`` block. Pure.

In: the App's policy, and what the site says of its nodes: who is dead and for how long, and for how long this node is
alone. Out: whose share moves to others, and whether this node has to stop. The verdicts are ``nodes/voting.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta

from edgeward.core.declared import Declared
from edgeward.core.errors import Invalid
from edgeward.core.quantity import DURATION_PATTERN, parse_duration

Duration = Annotated[str, Meta(pattern=DURATION_PATTERN)] | float | int
#: Seconds by which others must wait longer than a node that stops by itself: both count from the same silence, each by
#: its own clock, and neither looks more often than once a second.
MARGIN = 10.0


class Disconnect(Declared):
    """When a node of the site is lost."""

    lostAfter: Annotated[
        Duration | None,
        Meta(
            description="How long a node is dead by its site's verdict before its share moves to others of the site "
            "(0s unless stopAfter is given: then as long as that needs)"
        ),
    ] = None
    stopAfter: Annotated[
        Duration | None,
        Meta(
            description="For what must never run twice: a node that has had no majority of its site for so long stops "
            "it, and starts it only when it has one"
        ),
    ] = None

    reconcile: Annotated[
        Literal["keep-original", "keep-replacement", "best-score", "longest-running"],
        Meta(
            description="When the node is back: its own instance goes on (keep-original), what took its place does "
            "(keep-replacement), the one on the node that ranks first for the App (best-score), or the one that has "
            "run longer (longest-running)"
        ),
    ] = "keep-original"


def lost_after(policy: Disconnect, grace: float) -> float:
    """Seconds that a node must be dead. ``grace``: how long the App may take to stop."""
    if policy.lostAfter is not None:
        return parse_duration(policy.lostAfter)
    return least(policy, grace)


def least(policy: Disconnect, grace: float) -> float:
    """The least ``lostAfter`` with which nothing runs twice where ``stopAfter`` is kept."""
    return parse_duration(policy.stopAfter) + grace + MARGIN if policy.stopAfter is not None else 0.0


def gone(spec: Any, dead: Mapping[str, float]) -> frozenset[str]:
    """The nodes whose share of an App moves. ``dead``: node to seconds since it was found dead."""
    if not dead:
        return frozenset()
    after = lost_after(spec.disconnect, parse_duration(spec.stop.grace))
    return frozenset(n for n, seconds in dead.items() if seconds >= after)


def stops(spec: Any, alone: float) -> bool:
    """Whether a node that is ``alone`` for so many seconds has to be without it."""
    after = spec.disconnect.stopAfter
    return after is not None and alone > 0 and alone >= parse_duration(after)


def keeps(spec: Any, original: float, replacement: float) -> bool:
    """Whether what took a node's place stays when the node is back. Seconds that each has run.

    A node that ranked first for an App ranks first again when it is back, so ``best-score`` gives it its share.
    """
    rule = spec.disconnect.reconcile
    return bool(rule == "keep-replacement" or (rule == "longest-running" and replacement > original))


def kept(
    spec: Any,
    what: int,
    holds: Mapping[str, Sequence[tuple[int, int]]],
    tags: Mapping[int, str],
    ran: Callable[[str, int], float],
) -> frozenset[str]:
    """The nodes whose share of an App stays with others though they are back.

    ``holds``: each holder's (what, whose); ``tags``: the names that stand behind ``whose``; ``ran(node, what)``.
    """
    pairs = ((holder, tags[whose]) for holder, said in holds.items() for named, whose in said if named == what
             and whose in tags)  # fmt: skip
    return frozenset(n for holder, n in pairs if holder != n and keeps(spec, ran(n, what), ran(holder, what)))


def takes_over(mine: Callable[[Collection[str]], int], lost: Collection[str]) -> list[str]:
    """Whose share this node has taken. ``mine(gone)``: its share when those are gone."""
    now = mine(lost)
    return sorted(n for n in lost if now > mine({*lost} - {n}))


def check(spec: Any) -> None:
    """Raises ``Invalid`` for a policy that would not keep what it says."""
    policy: Disconnect = spec.disconnect
    for name in ("lostAfter", "stopAfter"):
        value = getattr(policy, name)
        if value is not None:
            try:
                parse_duration(value)
            except ValueError as e:
                raise Invalid(str(e), field=f"$.spec.disconnect.{name}") from None
    needed = least(policy, parse_duration(spec.stop.grace))
    if policy.stopAfter is not None and policy.lostAfter is not None and parse_duration(policy.lostAfter) < needed:
        raise Invalid(
            f"{policy.lostAfter} is too soon: another node would start it before a lost one has stopped it",
            field="$.spec.disconnect.lostAfter",
            remedy=f"at least {needed:g}s (stopAfter, stop.grace and {MARGIN:g}s), or leave it out",
        )
