"""Kind Export: readings of a node that are delivered to a stream of the hub. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeward.core.declared import Declared, Placement
from edgeward.core.errors import Invalid
from edgeward.core.quantity import BYTES_PATTERN, DURATION_PATTERN, parse_bytes, parse_duration
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import Resource
from edgeward.core.topics import check_filter, filters
from edgeward.streams.refusal import closable

#: Bytes of a hub's stream beyond which it takes no more.
HARD_CAP = 8 * 1024**3
_PATH = re.compile(r"^\$(\.[A-Za-z_][A-Za-z0-9_-]*)+$")


class From(Declared):
    mqtt: Annotated[str, Meta(description="MQTT topic filter (+ and # allowed)", min_length=1, max_length=1024)]


class HubTarget(Declared):
    stream: Annotated[str, Meta(description="The hub's stream", pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$(?!\n)")]

    keep: Annotated[
        Annotated[str, Meta(pattern=BYTES_PATTERN)] | int,
        Meta(description="What the hub keeps of the stream, at least 1Mi; the oldest goes first"),
    ] = "4Gi"


class To(Declared):
    hub: Annotated[HubTarget, Meta(description="A stream at the hub")]


class Bounds(Declared):
    """What the node keeps while the link is down."""

    bytes: Annotated[Annotated[str, Meta(pattern=BYTES_PATTERN)] | int, Meta(description="On disk, e.g. 64Mi")] = "64Mi"
    age: Annotated[
        Annotated[str, Meta(pattern=DURATION_PATTERN)] | float | int,
        Meta(description="Older readings are dropped; 0: none"),
    ] = 0
    onFull: Annotated[
        Literal["dropOldest", "dropNewest", "refuse"],
        Meta(
            description="refuse: nothing is dropped; the node's broker takes no more on these topics until half is "
            "free: QoS 1 gets no PUBACK and is cut off after 5 s, QoS 0 is dropped, QoS 2 refused on all topics"
        ),
    ] = "dropOldest"


class ExportSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, rename={"source": "from"}):
    """Readings from the node's broker, delivered to the hub: ordered, and exactly once where they have an identity."""

    source: Annotated[From, Meta(description="What is exported")]
    to: Annotated[To, Meta(description="Where to")]
    identity: Annotated[
        str, Meta(description="JSON path of what makes a reading itself, e.g. $.id: a publisher's repeats are dropped")
    ] = ""
    identityWindow: Annotated[int, Meta(description="How many readings back a repeat is known", ge=1, le=1_000_000)] = (
        10_000
    )
    priority: Annotated[int, Meta(description="9 goes first, 0 last", ge=0, le=9)] = 5
    rate: Annotated[
        Annotated[str, Meta(pattern=BYTES_PATTERN)] | int, Meta(description="Bytes per second on the link; 0: no limit")
    ] = 0
    bounds: Annotated[Bounds, Meta(description="What is kept while cut off")] = msgspec.field(default_factory=Bounds)
    placement: Annotated[Placement, Meta(description="Which nodes export; empty: all")] = msgspec.field(
        default_factory=Placement
    )


def _bytes(value: str | int, field: str) -> int:
    try:
        return parse_bytes(value)
    except ValueError as e:
        raise Invalid(str(e), field=f"$.spec.{field}") from None


def _check(r: Resource) -> None:
    spec: ExportSpec = r.spec
    check_filter(spec.source.mqtt, "$.spec.from.mqtt")
    if spec.identity and not _PATH.fullmatch(spec.identity):
        raise Invalid(
            f"{spec.identity[:60]!r} is no path", field="$.spec.identity", remedy="write it as $.id or $.meta.id"
        )
    size, keep = _bytes(spec.bounds.bytes, "bounds.bytes"), _bytes(spec.to.hub.keep, "to.hub.keep")
    _bytes(spec.rate, "rate")
    try:
        parse_duration(spec.bounds.age)
    except ValueError as e:
        raise Invalid(str(e), field="$.spec.bounds.age") from None
    if not 1024**2 <= keep <= HARD_CAP // 2:
        raise Invalid(f"{keep} bytes", field="$.spec.to.hub.keep", remedy="from 1Mi to 4Gi")
    if spec.bounds.onFull == "refuse" and not closable(filters(spec.source.mqtt)):
        raise Invalid(
            f"the broker cannot refuse {spec.source.mqtt[:60]!r}: only names, and # at the end",
            field="$.spec.bounds.onFull",
            remedy="name a whole branch, e.g. sensors/#, or use dropNewest",
        )
    if size < 64 * 1024:
        raise Invalid(f"{size} bytes are too few", field="$.spec.bounds.bytes", remedy="at least 64Ki")


def _refs(r: Resource) -> list[Ref]:
    site = r.spec.placement.site
    return [Ref("Site", "_", site, "$.spec.placement.site")] if site else []


def _usage(r: Resource) -> dict[str, float | None]:
    return {"bytes": parse_bytes(r.spec.bounds.bytes)}


#: What a node's own API says of it, in the hub's words.
_PHASES = {"capturing": "Flowing", "refusing": "Refusing", "failed": "Failed"}


def _phase(d: dict[str, Any]) -> str:
    status = d.get("status", {})
    return str(status.get("phase") or _PHASES.get(status.get("state", ""), "Pending"))


def _pending(d: dict[str, Any]) -> int:
    status = d.get("status", {})
    return sum(int(n.get("pending", 0)) for n in (status.get("nodes") or {"here": status}).values())


kinds.add(
    Kind(
        "Export",
        "exports",
        ExportSpec,
        reported=True,
        doc="Readings of nodes, delivered to a stream of the hub.",
        scope="placed",
        check=_check,
        refs=_refs,
        usage=_usage,
        columns=(
            Column("PHASE", _phase),
            Column("FROM", lambda d: d["spec"]["from"]["mqtt"]),
            Column("STREAM", lambda d: d["spec"]["to"]["hub"]["stream"]),
            Column("PRIORITY", lambda d: d["spec"].get("priority", 5), wide=True),
            Column("NODES", lambda d: len(d.get("status", {}).get("nodes", {}))),
            Column("PENDING", _pending),
        ),
        example=(
            "apiVersion: edgeward/v1\nkind: Export\nmetadata: {name: line1}\nspec:\n  from: {mqtt: sensors/#}\n"
            "  to: {hub: {stream: line1}}\n  identity: $.id\n"
        ),
    )
)
