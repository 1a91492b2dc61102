"""Who may do what: rules and one call in, yes or no out. Pure.

A *rule* allows verbs on kinds, in namespaces, of objects whose labels a selector takes. Rules only ever allow; what no
rule allows is refused. A *role* is a list of rules, three are built in. Nobody can give away more than they have:
:func:`beyond` says what of a wished set of rules is not covered by the giver's own. Where the rules come from is in
``roles.py``; where every call passes this decision, in ``access.py`` and ``gate.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgeward.core import passage
from edgeward.core.errors import EdgewardError, Forbidden
from edgeward.core.passage import Passage
from edgeward.core.selectors import parse_labels

#: Every verb that a call can need, and what it stands for.
VERBS: Mapping[str, str] = {
    "get": "read one object",
    "list": "list objects",
    "watch": "follow changes of objects",
    "create": "create an object",
    "update": "replace an object",
    "patch": "change parts of an object",
    "delete": "delete an object",
    "status": "write an object's status: for controllers",
    "reveal": "see the values of secret fields",
    "logs": "read what an app or a function wrote",
    "invoke": "call a function",
    "events": "read events about objects",
    "journal": "read how conflicting changes were decided",
    "top": "see what nodes and apps use",
    "streams": "read what exports delivered",
    "audit": "read who wrote what",
    "promote": "make a site's override everybody's",
    "issue": "make a token",
    "revoke": "cut a node off, end a token",
    "rotate": "replace the hub's certificate authority",
    "metrics": "read the process's metrics from another machine",
    "backup": "make a backup, or a support bundle",
    "exec": "run something on a node or inside an app, copy files",
    "tunnel": "reach a node through its tunnel; `tunnel:tcp:22`, `tunnel:exec` and the like for a part of it",
}
#: In a rule: every verb, kind or namespace, those of later releases too.
ANY = "*"
#: In a rule: every kind but those that say who may do what.
WORK = "@work"
#: Not among :data:`WORK`. ``Hub`` is no kind: it stands for the process and the system as a whole.
SENSITIVE = frozenset({"Role", "AccessToken", "JoinToken", "Node", "Hub"})
HUB = "Hub"

#: What stands before a part of the verb ``tunnel`` (``core/passage.py``).
TUNNEL = "tunnel"
_PART = TUNNEL + ":"
#: Uses of a tunnel that run something at the node or read its files: the verb ``exec`` on Node, or a part that names
#: them, not ``tunnel`` as a whole.
PROGRAMS = frozenset({"exec", "shell", "copy"})

_MOST = 32
Words = Annotated[list[str], Meta(max_length=_MOST)]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Allows the verbs on the kinds, in the namespaces, of objects that the selector takes."""

    verbs: Annotated[Words, Meta(description="Verbs, e.g. get, list, logs, `tunnel:tcp:22`; `*` is every verb")]
    kinds: Annotated[
        Words, Meta(description="Kinds, e.g. App; `*` is every kind, `@work` all but those about access; `Hub`")
    ]
    namespaces: Annotated[
        Words,
        Meta(description="Namespaces; `*` (if left out) is all, and kinds without one; `_` is kinds without one"),
    ] = msgspec.field(default_factory=lambda: [ANY])
    labelSelector: Annotated[str, Meta(description="Only objects with such labels, e.g. `team=a`", max_length=1024)] = (
        ""
    )


@dataclass(frozen=True, slots=True)
class Ask:
    """What a call needs. ``namespace``: ``_`` for kinds without one, None for all. ``labels``: None when unknown."""

    verb: str
    kind: str
    namespace: str | None = None
    name: str = ""
    labels: Mapping[str, str] | None = None
    #: Of the verb ``tunnel``: what for. None: for anything at all.
    use: Passage | None = None

    def __str__(self) -> str:
        where = f" in namespace {self.namespace}" if self.namespace not in (None, "_", "default") else ""
        use = f" for {self.use}" if self.use is not None else ""
        return f"{self.verb} {self.kind}" + (f" {self.name}" if self.name else "") + where + use


@lru_cache(maxsize=1024)
def _selector(text: str) -> Callable[[Mapping[str, str]], bool]:
    try:
        return parse_labels(text)
    except EdgewardError:
        return lambda _: False  # a newer release's selector: what is not understood allows nothing


def _has_verb(rule: Rule, verb: str, use: Passage | None = None) -> bool:
    return ANY in rule.verbs or (verb in rule.verbs and (use is None or use.protocol not in PROGRAMS))


def _parts_of_tunnel(rule: Rule) -> list[str]:
    return [v.removeprefix(_PART) for v in rule.verbs if v.startswith(_PART)]


def _may_use(rule: Rule, ask: Ask) -> bool:
    """Whether the verb ``exec`` or a part of the verb ``tunnel`` is enough."""
    if ask.use is not None and ask.use.protocol in PROGRAMS and "exec" in rule.verbs and ask.verb == TUNNEL:
        return True
    parts = _parts_of_tunnel(rule) if ask.verb == TUNNEL else []
    return bool(parts) and (ask.use is None or passage.allowed(parts, ask.use))


def _covers_verb(rule: Rule, verb: str) -> bool:
    """Whether the rule has all of a verb, which may be a part of ``tunnel``."""
    if ANY in rule.verbs or verb == ANY:
        return ANY in rule.verbs
    if verb in rule.verbs:
        return True
    if not verb.startswith(_PART):
        return False
    part = verb.removeprefix(_PART)
    protocol = part.partition(":")[0]
    if protocol in PROGRAMS:
        return "exec" in rule.verbs or passage.covered(_parts_of_tunnel(rule), part)
    return (TUNNEL in rule.verbs and protocol != ANY) or passage.covered(_parts_of_tunnel(rule), part)


def _has_kind(rule: Rule, kind: str) -> bool:
    if kind in (ANY, WORK):
        return ANY in rule.kinds or (kind == WORK and WORK in rule.kinds)
    return kind in rule.kinds or ANY in rule.kinds or (WORK in rule.kinds and kind not in SENSITIVE)


def _has_namespace(rule: Rule, namespace: str | None) -> bool:
    return ANY in rule.namespaces or (namespace is not None and namespace in rule.namespaces)


def allows(rule: Rule, ask: Ask) -> bool:
    """Whether this rule allows the call. Unknown labels are taken by no selector."""
    if not (
        (_has_verb(rule, ask.verb, ask.use) or _may_use(rule, ask))
        and _has_kind(rule, ask.kind)
        and _has_namespace(rule, ask.namespace)
    ):
        return False
    if not rule.labelSelector.strip():
        return True
    return ask.labels is not None and _selector(rule.labelSelector)(ask.labels)


def decide(rules: Iterable[Rule], ask: Ask) -> bool:
    """Whether any rule allows the call."""
    return any(allows(rule, ask) for rule in rules)


def perhaps(rules: Iterable[Rule], verb: str, kind: str, namespace: str | None = None) -> bool:
    """Whether some object of that sort may be touched so: else a list is refused, not empty."""
    return any(
        (_has_verb(rule, verb) or _may_use(rule, Ask(verb, kind)))
        and _has_kind(rule, kind)
        and (bool(rule.namespaces) if namespace is None else _has_namespace(rule, namespace))
        for rule in rules
    )


def _parts(selector: str) -> frozenset[str]:
    """A selector's terms; more terms take fewer objects. One with a set is a single term: commas are in it, too."""
    text = "".join(selector.split())
    if "(" in text:
        return frozenset({text})
    return frozenset(text.replace("==", "=").split(",")) - {""}


def _within(have: Rule, want: Rule) -> bool:
    """Whether ``have`` takes every object that ``want`` takes. May say no where a cleverer look would say yes."""
    return _parts(have.labelSelector) <= _parts(want.labelSelector)


def beyond(have: Iterable[Rule], want: Iterable[Rule]) -> Ask | None:
    """Something that ``want`` allows and ``have`` does not; None when there is nothing such. Errs towards an answer."""
    mine = tuple(have)
    for rule in want:
        near = [h for h in mine if _within(h, rule)]
        if any(
            all(_covers_verb(h, v) for v in rule.verbs)
            and all(_has_kind(h, k) for k in rule.kinds)
            and all(ANY in h.namespaces or n in h.namespaces for n in rule.namespaces)
            for h in near
        ):
            continue
        for verb in dict.fromkeys(rule.verbs):
            able = [h for h in near if _covers_verb(h, verb)]
            for kind in dict.fromkeys(rule.kinds):
                fit = [h for h in able if _has_kind(h, kind)]
                for namespace in dict.fromkeys(rule.namespaces):
                    if not any(ANY in h.namespaces or namespace in h.namespaces for h in fit):
                        return Ask(verb, kind, namespace)
    return None


_READ = ["get", "list", "watch", "logs", "events", "journal", "top", "streams"]
#: The roles that are always there and cannot be changed.
BUILT_IN: Mapping[str, tuple[Rule, ...]] = {
    "admin": (Rule(verbs=[ANY], kinds=[ANY]),),
    "operator": (
        Rule(
            verbs=[*_READ, "create", "update", "patch", "delete", "audit", "promote", "exec", "invoke"],
            kinds=[WORK],
        ),
        Rule(verbs=["get", "list", "watch", "update", "patch", "events", "journal", "top"], kinds=["Node"]),
        Rule(verbs=["get", "list", "watch"], kinds=["Role"]),
        Rule(verbs=["metrics", "audit"], kinds=[HUB]),
    ),
    "viewer": (
        Rule(verbs=_READ, kinds=[WORK]),
        Rule(verbs=["get", "list", "watch", "events", "journal", "top"], kinds=["Node"]),
        Rule(verbs=["get", "list", "watch"], kinds=["Role"]),
    ),
}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, and what they may do. Without rules: nothing."""

    name: str
    kind: Literal["person", "node", "local"] = "person"
    role: str = ""
    rules: tuple[Rule, ...] = ()
    #: RFC 3339; empty: it does not end.
    expires: str = ""

    def may(self, ask: Ask) -> bool:
        return decide(self.rules, ask)

    def require(self, ask: Ask) -> None:
        """Raises ``Forbidden`` that names verb, kind and name."""
        if not decide(self.rules, ask):
            raise self.refusal(ask)

    def refusal(self, ask: Ask, why: str = "", remedy: str = "") -> Forbidden:
        who = self.name + (f" (role {self.role})" if self.role and self.role != self.name else "")
        return Forbidden(
            f"{who} may not {ask}" + (f": {why}" if why else ""),
            resource=f"{ask.kind}/{ask.name}" if ask.name else ask.kind,
            remedy=remedy or "use a token whose role allows it; `edgeward whoami` shows your rules",
            members={
                "verb": ask.verb,
                "kind": ask.kind,
                "name": ask.name,
                "namespace": "" if ask.namespace in (None, "_") else str(ask.namespace),
            },
        )


_TOKEN = re.compile(r"ew_([a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?)_([A-Za-z0-9_-]{43})")


def token_name(text: str) -> str:
    """The name of the AccessToken that a token's text says it belongs to; empty when it has not such a form."""
    match = _TOKEN.fullmatch(text)
    return match[1] if match else ""


def is_access_token(text: str) -> bool:
    return bool(token_name(text))


def administrator(name: str, kind: Literal["person", "node", "local"] = "person") -> Principal:
    return Principal(name, kind, "admin", BUILT_IN["admin"])
