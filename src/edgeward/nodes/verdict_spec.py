"""What a Site declares of its verdicts, and what the council is told of it. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from edgeward.core.declared import Declared
from edgeward.core.errors import Invalid
from edgeward.core.quantity import DURATION_PATTERN, parse_duration
from edgeward.core.registry import extensions
from edgeward.nodes.probing import Check
from edgeward.nodes.voting import Settings

Duration = Annotated[str, Meta(pattern=DURATION_PATTERN)] | float | int
_LEAST, _MOST = 6.0, 3600.0


class CheckSpec(Declared):
    """Something that is looked at on each other node of the site, beside what its agent says."""

    type: Annotated[str, Meta(description="`ping`, `tcp` (a connection opens) or `http` (GET / below status 500)")]
    port: Annotated[int, Meta(description="For tcp and http", ge=0, le=65535)] = 0
    weight: Annotated[float, Meta(description="What it counts beside the others and the agent", gt=0, le=1000)] = 1.0
    interval: Annotated[Duration, Meta(description="Between two looks")] = "5s"
    timeout: Annotated[Duration, Meta(description="Of one look")] = "2s"
    retries: Annotated[
        int, Meta(description="Looks in vain after the first until it counts as failed", ge=0, le=100)
    ] = 2


class Verdicts(Declared):
    """How the nodes of the site judge one another."""

    deadAfter: Annotated[
        Duration,
        Meta(
            description="Silence after which a node is missed, 6s or more; sites of many nodes and of two take longer"
        ),
    ] = "10s"
    agent: Annotated[float, Meta(description="What a node's own reports count beside checks", gt=0, le=1000)] = 1.0
    checks: Annotated[
        list[CheckSpec],
        Meta(
            description="A node works when at least half of all weight answers; none: its reports decide", max_length=8
        ),
    ] = []


class Wish(msgspec.Struct, frozen=True):
    """A site's settings as the council takes them. ``agent``: the weight of a node's own reports beside ``checks``."""

    settings: Settings = Settings()
    checks: tuple[Check, ...] = ()
    agent: float = 1.0


def wish_of(verdicts: Verdicts | None) -> Wish:
    if verdicts is None:
        return Wish()
    checks = tuple(
        Check(c.type, c.weight, c.port, parse_duration(c.interval), parse_duration(c.timeout), c.retries)
        for c in verdicts.checks
    )
    return Wish(Settings(dead_after=parse_duration(verdicts.deadAfter)), checks, verdicts.agent)


def check_verdicts(verdicts: Verdicts | None, path: str) -> None:
    """Raises ``Invalid`` for what no node could do."""
    if verdicts is None:
        return
    _seconds(verdicts.deadAfter, f"{path}.deadAfter", _LEAST, _MOST)
    known = extensions.names("check")
    for n, check in enumerate(verdicts.checks):
        at = f"{path}.checks[{n}]"
        if check.type not in known:
            raise Invalid(
                f"there is no check {check.type[:40]!r}", field=f"{at}.type", remedy=f"checks: {', '.join(known)}"
            )
        if check.type in ("tcp", "http") and not check.port:
            raise Invalid("a port is needed", field=f"{at}.port", remedy="a number from 1 to 65535")
        _seconds(check.interval, f"{at}.interval", 1.0, _MOST)
        _seconds(check.timeout, f"{at}.timeout", 0.1, 60.0)


def _seconds(value: str | float, path: str, least: float, most: float) -> None:
    try:
        seconds = parse_duration(value)
    except ValueError as e:
        raise Invalid(str(e), field=path) from None
    if not least <= seconds <= most:
        raise Invalid(f"{value} is out of bounds", field=path, remedy=f"from {least:g}s to {most:g}s")
