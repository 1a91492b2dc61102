"""Kind Rollout: how new versions of Apps, Functions and the agent go from group to group. Pure.

It is a policy, no order: each change of a target's version is a run of its own. What a run does is decided in
``rollout.py``, what a node runs meanwhile in ``release.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeward.core.cron import check_zone
from edgeward.core.declared import Declared
from edgeward.core.errors import Invalid
from edgeward.core.quantity import DURATION_PATTERN, parse_duration
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import Metadata, Resource, check_name
from edgeward.workloads.outcome import Node
from edgeward.workloads.release import for_site, read_status
from edgeward.workloads.rollout import REST, Amount, GroupRules, Rules
from edgeward.workloads.windows import DAYS, Window, minutes, opens

Duration = Annotated[str, Meta(pattern=DURATION_PATTERN)] | float | int
Count = Annotated[int, Meta(ge=0, le=1_000_000)] | Annotated[str, Meta(pattern=r"^([0-9]|[1-9][0-9]|100)%$(?!\n)")]
_TIME = r"^([01][0-9]|2[0-3]):[0-5][0-9]$(?!\n)"


class RolloutTarget(Declared):
    """What it moves."""

    kind: Annotated[Literal["App", "Function", "Release"], Meta(description="Its kind")]
    name: Annotated[str, Meta(description="Its name, in the Rollout's namespace", min_length=1, max_length=63)]


class Maintenance(Declared):
    """A time in which nodes may take a new version."""

    begin: Annotated[str, Meta(description="Time of day, e.g. 22:00", pattern=_TIME)]
    end: Annotated[str, Meta(description="Time of day; at or before begin: of the next day", pattern=_TIME)]
    days: Annotated[
        list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]],
        Meta(description="Days on which it begins; none: every day", max_length=7),
    ] = []
    zone: Annotated[str, Meta(description="Time zone, e.g. Europe/Berlin", max_length=64)] = "UTC"


class Group(Declared):
    """Nodes that get a new version together, after those before them have proven it."""

    name: Annotated[str, Meta(description="Its name; `rest` is that of what no group takes", max_length=63)]
    sites: Annotated[list[str], Meta(description="Nodes of these sites; none: of all", max_length=1000)] = []
    nodeSelector: Annotated[dict[str, str], Meta(description="Nodes with these labels")] = {}
    size: Annotated[
        Count | None, Meta(description="So many nodes at most, a number or a share of all (10%); the others come later")
    ] = None
    batch: Annotated[
        Count | None, Meta(description="So many of its nodes at once, a number or a share of them; unset: all")
    ] = None
    success: Annotated[Count, Meta(description="So many must have proven it before the next group begins")] = 1
    healthWindow: Annotated[Duration | None, Meta(description="In place of the Rollout's")] = None
    approval: Annotated[bool, Meta(description="Waits for `edgeward rollout approve`")] = False
    maintenance: Annotated[list[Maintenance], Meta(description="In place of the Rollout's", max_length=16)] = []


class RolloutSpec(Declared):
    """New versions of its targets go from group to group; a bad one stops and goes back."""

    targets: Annotated[list[RolloutTarget], Meta(description="What it moves", max_length=16)] = []
    groups: Annotated[
        list[Group],
        Meta(description="In their order; what none of them takes comes last, as group `rest`", max_length=64),
    ] = []
    failures: Annotated[
        Count, Meta(description="So many nodes may fail, a number or a share of all; one more ends the run")
    ] = 0
    healthWindow: Annotated[
        Duration, Meta(description="How long a node must be well on the new version until it has proven it")
    ] = "30s"
    timeout: Annotated[Duration, Meta(description="A node that is not well within this has failed")] = "10m"
    silentAfter: Annotated[
        Duration,
        Meta(description="Silent for so long: failed, if it was let on; if not, passed over until it is heard again"),
    ] = "10m"
    maintenance: Annotated[
        list[Maintenance], Meta(description="When nodes may take a new version; none: at any time", max_length=16)
    ] = []
    prefetch: Annotated[
        bool, Meta(description="Nodes fetch code, packages and container images as soon as they hear of them")
    ] = True
    paused: Annotated[bool, Meta(description="Lets nobody on (`edgeward rollout pause`, `resume`)")] = False
    approved: Annotated[
        list[str], Meta(description="RUN/GROUP: what may begin (`edgeward rollout approve`)", max_length=64)
    ] = []
    cancelled: Annotated[str, Meta(description="The run that goes back (`edgeward rollout cancel`)", max_length=64)] = (
        ""
    )
    hold: Annotated[
        bool | None, Meta(description="Changes wait; a site may say so for itself (`edgeward rollout hold`, `release`)")
    ] = None


def _amount(count: int | str) -> Amount:
    return Amount(float(count.removesuffix("%")), percent=True) if isinstance(count, str) else Amount(float(count))


def _windows(declared: list[Maintenance]) -> list[Window]:
    return [
        Window(
            frozenset(DAYS.index(d) for d in m.days) or frozenset(range(7)), minutes(m.begin), minutes(m.end), m.zone
        )
        for m in declared
    ]


def _group(g: Group, spec: RolloutSpec) -> GroupRules:
    def takes(node: Node) -> bool:
        inside = not g.sites or node.site in g.sites
        return inside and all(node.labels.get(k) == v for k, v in g.nodeSelector.items())

    windows = _windows(g.maintenance or spec.maintenance)
    return GroupRules(
        g.name,
        takes,
        size=None if g.size is None else _amount(g.size),
        batch=None if g.batch is None else _amount(g.batch),
        success=_amount(g.success),
        window=parse_duration(spec.healthWindow if g.healthWindow is None else g.healthWindow),
        approval=g.approval,
        opens=lambda now: opens(windows, now),
    )


def rules_of(spec: RolloutSpec) -> Rules:
    """The numbers that a step goes by."""
    return Rules(
        tuple(_group(g, spec) for g in spec.groups),
        failures=_amount(spec.failures),
        silent_after=parse_duration(spec.silentAfter),
        timeout=parse_duration(spec.timeout),
        paused=spec.paused,
        approved=frozenset(spec.approved),
        cancelled=spec.cancelled,
        rest=_group(Group(REST), spec),
    )


def _check(r: Resource) -> None:
    spec: RolloutSpec = r.spec
    if not spec.targets:
        raise Invalid("is required", field="$.spec.targets", remedy="name what it moves: [{kind: App, name: web}]")
    named = [(t.kind, t.name) for t in spec.targets]
    if len(set(named)) < len(named):
        raise Invalid("names one target twice", field="$.spec.targets", remedy="name it once")
    seen: set[str] = set()
    for n, g in enumerate(spec.groups):
        at = f"$.spec.groups[{n}]"
        check_name(g.name, f"{at}.name")
        if g.name == REST or g.name in seen:
            why = "is the name of what no group takes" if g.name == REST else "is another group's name"
            raise Invalid(f"{g.name!r} {why}", field=f"{at}.name", remedy="take another name")
        seen.add(g.name)
        for name in ("size", "batch", "success"):
            if getattr(g, name) in (0, "0%"):
                raise Invalid("lets nobody on", field=f"{at}.{name}", remedy="1 or more, or leave it out")
        _check_times(g, at)
    for name in ("healthWindow", "timeout", "silentAfter"):
        _check_duration(getattr(spec, name), f"$.spec.{name}")
    _check_zones(spec.maintenance, "$.spec.maintenance")


def _check_times(g: Group, at: str) -> None:
    if g.healthWindow is not None:
        _check_duration(g.healthWindow, f"{at}.healthWindow")
    _check_zones(g.maintenance, f"{at}.maintenance")


def _check_duration(value: str | float, at: str) -> None:
    try:
        parse_duration(value)
    except ValueError as e:
        raise Invalid(str(e), field=at) from None


def _check_zones(declared: list[Maintenance], at: str) -> None:
    for n, m in enumerate(declared):
        check_zone(m.zone, f"{at}[{n}].zone")


def _refs(r: Resource) -> list[Ref]:
    """Its targets, which may come later, and what their baselines use: nodes that go back need it still."""
    ns = r.metadata.namespace
    found = [Ref(t.kind, ns, t.name, f"$.spec.targets[{n}].name", must=False) for n, t in enumerate(r.spec.targets)]
    for handled in read_status(r.status).targets:
        kind = kinds.named(handled.kind)
        if kind is None or handled.baseline is None or not handled.baseline.parts:
            continue
        try:
            spec = msgspec.convert(handled.baseline.parts, kind.spec)
        except msgspec.ValidationError:
            continue  # of a release that had other fields
        was = Resource(kind=handled.kind, metadata=Metadata(name=handled.name, namespace=ns), spec=spec)
        found += [
            Ref(ref.kind, ref.namespace, ref.name, "$.status.targets", must=False)
            for ref in kind.refs(was)
            if ref.kind in ("Config", "Secret")
        ]
    return found


def _progress(d: dict[str, Any]) -> str:
    groups = d.get("status", {}).get("groups", [])
    done = sum(int(g.get("done", 0)) for g in groups)
    return f"{done}/{sum(int(g.get('total', 0)) for g in groups)}" if groups else ""


def _now_at(d: dict[str, Any]) -> str:
    groups = d.get("status", {}).get("groups", [])
    return next((str(g["name"]) for g in groups if g.get("phase") in ("Running", "Waiting", "Failed")), "")


kinds.add(
    Kind(
        "Rollout",
        "rollouts",
        RolloutSpec,
        doc="How new versions of Apps, Functions and the agent go from group to group, and back when they are bad.",
        scope="follows",
        level=2,
        reported=True,
        hub_fields=tuple(f for f in RolloutSpec.__struct_fields__ if f != "hold"),
        check=_check,
        refs=_refs,
        told=for_site,
        columns=(
            Column("PHASE", lambda d: d.get("status", {}).get("phase", "Pending")),
            Column("TARGETS", lambda d: ",".join(f"{t['kind']}/{t['name']}" for t in d["spec"].get("targets", []))),
            Column("GROUP", _now_at),
            Column("DONE", _progress),
            Column("RUN", lambda d: d.get("status", {}).get("run", ""), wide=True),
            Column("MESSAGE", lambda d: d.get("status", {}).get("message", "")),
        ),
        example=(
            "apiVersion: edgeward/v1\nkind: Rollout\nmetadata: {name: web}\nspec:\n"
            "  targets: [{kind: App, name: web}]\n"
            "  groups:\n    - {name: canary, size: 1}\n    - {name: north, sites: [plant-north]}\n"
            "    - {name: fleet, batch: 10%, approval: true}\n  healthWindow: 5m\n"
        ),
    )
)
