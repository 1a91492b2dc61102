"""Kinds and extensions: the one mechanism by which a room adds something to the product.

In comes a description (a kind's struct, its plural, its references; a runtime's class), out come the API's paths, the
validation, the OpenAPI document, the tables of the command line and the reference pages. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from edgeward.core.errors import Invalid, NotFound

if TYPE_CHECKING:
    import msgspec

    from edgeward.core.resource import Resource


@dataclass(frozen=True, slots=True)
class Ref:
    """That a resource names another one. ``path`` is where, for the error that says so. ``must``: a write is refused
    when it is not there."""

    kind: str
    namespace: str
    name: str
    path: str
    must: bool = True


@dataclass(frozen=True, slots=True)
class Column:
    """One column of ``edgeward get``; ``value`` gets the resource as a plain document."""

    title: str
    value: Callable[[dict[str, Any]], object]
    wide: bool = False


#: Which nodes get a resource: every one; those of the site it names; those its placement takes; those that have a
#: resource which refers to it (Secret, Config); those that have one it refers to (Service); those of the sites that its
#: ``spec.sites`` lists (``*``: every site); none.
Scope = Literal["all", "site", "placed", "used", "follows", "sites", "hub"]


def _no_refs(_: Resource) -> list[Ref]:
    return []


def _no_check(_: Resource) -> None:
    return None


def _the_same(resource: Resource, _: str) -> Resource:
    return resource


def _nobody(_: Resource) -> Collection[str]:
    return ()


def whole_status(status: dict[str, Any], _: Collection[str]) -> dict[str, Any]:
    return status


def _no_usage(_: Resource) -> Mapping[str, float | None]:
    return {}


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of one resource kind."""

    name: str
    plural: str
    spec: type[msgspec.Struct]
    doc: str = ""
    namespaced: bool = True
    scope: Scope = "hub"
    short: tuple[str, ...] = ()
    #: Sites have it, but only the hub's API writes it: a node that was broken into must not make itself a king.
    at_hub_only: bool = False
    #: Top-level fields that only the hub's API writes, in what a site may change otherwise: they concern others.
    hub_fields: tuple[str, ...] = ()
    #: Top-level fields that take effect at once, whatever a Rollout says: all others are a version, which it moves.
    at_once: tuple[str, ...] = ()
    #: The level of the sync (``SyncAsk.level``) from which on agents know the kind; older ones do not get it.
    level: int = 0
    #: Fields that the kind got later, by their path in the spec (``health.grpc``), and the level from which on agents
    #: know them; older ones get the object without.
    newer: Mapping[str, int] = field(default_factory=dict)
    #: Version of the stored spec. ``upgrades[n]`` turns the plain spec of version n into version n + 1.
    schema: int = 1
    upgrades: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    #: Resources that must exist when this one is written.
    refs: Callable[[Resource], list[Ref]] = _no_refs
    #: Checks over the whole resource; raises ``Invalid``.
    check: Callable[[Resource], None] = _no_check
    #: The resource as a site has it, where one declaration can differ by site; ``""``: a site that it does not name.
    at: Callable[[Resource, str], Resource] = _the_same
    #: Sites of which it says something of their own, by name.
    sites: Callable[[Resource], Collection[str]] = _nobody
    #: Of scope ``follows``: sites that get it besides, without what it refers to.
    also: Callable[[Resource], Collection[str]] = _nobody
    #: What of its status a site is told, by the names of the site's nodes: what grows with the fleet stays at the hub.
    told: Callable[[dict[str, Any], Collection[str]], dict[str, Any]] = whole_status
    #: What it takes of its namespace's quota (``core/quota.py``), of a resource as one site has it.
    usage: Callable[[Resource], Mapping[str, float | None]] = _no_usage
    columns: tuple[Column, ...] = ()
    #: Its status is made of what nodes report; nobody else writes it.
    reported: bool = False
    #: Top-level spec fields whose values are secret: never listed, printed, logged or diffed.
    secret_fields: tuple[str, ...] = ()
    example: str = ""

    def upgrade(self, spec: dict[str, Any], version: int) -> dict[str, Any]:
        """The plain spec of ``version`` brought to the present schema."""
        if version > self.schema:
            raise Invalid(
                f"stored with schema {version}, this release knows {self.schema}",
                resource=self.name,
                remedy="start the newer release that wrote it",
            )
        for v in range(version, self.schema):
            spec = self.upgrades[v](spec)
        return spec


#: Stands for a secret's value wherever a document is shown or kept for people.
HIDDEN = "***"


class Kinds:
    """All kinds, by name, plural and short name."""

    def __init__(self) -> None:
        self._kinds: dict[str, Kind] = {}
        self._alias: dict[str, str] = {}

    def add(self, kind: Kind) -> Kind:
        if kind.name in self._kinds:
            raise ValueError(f"kind {kind.name} is registered twice")
        aliases = (kind.name.lower(), kind.plural, *kind.short)
        for alias in aliases:
            if alias in self._alias:
                raise ValueError(f"{kind.name}: {alias!r} already means {self._alias[alias]}")
        self._kinds[kind.name] = kind
        self._alias.update(dict.fromkeys(aliases, kind.name))
        return kind

    def get(self, name: str) -> Kind:
        """The kind called exactly so; raises ``Invalid`` with the known ones."""
        kind = self._kinds.get(name)
        if kind is None:
            raise Invalid(
                f"there is no kind {name!r}", field="$.kind", remedy=f"known kinds: {', '.join(self.names())}"
            )
        return kind

    def named(self, name: str) -> Kind | None:
        """The kind called exactly so, if there is one."""
        return self._kinds.get(name)

    def find(self, word: str) -> Kind:
        """The kind a person means by ``app``, ``apps``, ``App`` or a short name."""
        name = self._alias.get(word.lower())
        if name is None:
            raise NotFound(f"there is no kind {word!r}", remedy=f"known kinds: {', '.join(self.names())}")
        return self._kinds[name]

    def by_plural(self, plural: str) -> Kind | None:
        name = self._alias.get(plural)
        kind = self._kinds[name] if name else None
        return kind if kind is not None and kind.plural == plural else None

    def names(self) -> list[str]:
        return sorted(self._kinds)

    def __iter__(self) -> Iterator[Kind]:
        return iter([self._kinds[n] for n in self.names()])


class Extensions:
    """Named implementations of one role: ``runtime/process``, later ``driver/modbus``, ``sink/http`` ..."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, str], Any] = {}

    def add(self, role: str, name: str, item: Any) -> None:
        if (role, name) in self._items:
            raise ValueError(f"extension {role}/{name} is registered twice")
        self._items[role, name] = item

    def get(self, role: str, name: str) -> Any:
        item = self._items.get((role, name))
        if item is None:
            known = ", ".join(self.names(role)) or "none"
            raise Invalid(f"there is no {role} {name!r}", remedy=f"this release has: {known}")
        return item

    def names(self, role: str) -> list[str]:
        return sorted(n for r, n in self._items if r == role)


kinds = Kinds()
extensions = Extensions()


def secret_paths(kind: str, spec: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Where in a plain spec secret values are; only those that are there.

    An Override carries a patch of another kind's spec, so that kind's secrets are in it.
    """
    fields = {k.name: k.secret_fields for k in kinds}
    paths: list[tuple[str, ...]] = [(name,) for name in fields.get(kind, ()) if spec.get(name)]
    patch, target = spec.get("patch"), spec.get("target")
    if kind == "Override" and isinstance(patch, Mapping) and isinstance(target, Mapping):
        paths += [("patch", name) for name in fields.get(str(target.get("kind")), ()) if patch.get(name)]
    return paths


def replace_at(spec: Mapping[str, Any], path: tuple[str, ...], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of ``spec`` with the value at ``path`` changed."""
    inner = spec[path[0]]
    return {**spec, path[0]: change(inner) if len(path) == 1 else replace_at(inner, path[1:], change)}


def redact(doc: dict[str, Any]) -> dict[str, Any]:
    """The document with its secret values hidden; their keys stay."""
    spec = doc.get("spec")
    if not isinstance(spec, Mapping):
        return doc
    hidden = dict(spec)
    for path in secret_paths(str(doc.get("kind")), spec):
        hidden = replace_at(hidden, path, lambda v: dict.fromkeys(v, HIDDEN) if isinstance(v, Mapping) else HIDDEN)
    return {**doc, "spec": hidden}
