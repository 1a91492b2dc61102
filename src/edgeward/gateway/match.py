"""Which route answers a request: host, path, method and header fields in, one rule or a refusal out. Pure.

Before anything is compared the path gets its one spelling (RFC 3986, section 6.2.2); a path that a server behind us
could read as another one (dot segments, encoded slashes, empty segments) is refused, not repaired. Rules are ordered by
how exact they are: a named host before ``*.host`` before any host; an exact path before a prefix, a longer prefix
before a shorter; then rules that name methods, then those with more header fields, then by name. So adding a route
never changes the meaning of a more exact one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from edgeward.gateway.cors import is_preflight
from edgeward.gateway.http1 import Bad, Request

_PLAIN = re.compile(r"(?:/[A-Za-z0-9_~!$&'()*+,=:@;.-]*)+")
_QUERY = re.compile(r"[\x21\x22\x24-\x7e]*")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_DOTS = re.compile(r"/\.{1,2}(?:;[^/]*)?(?:/|$)")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_FORBIDDEN = {0x2F: "an encoded slash", 0x5C: "an encoded backslash", 0x25: "a doubly encoded character"}


def clean(target: str) -> tuple[str, str]:
    """``(path, query)`` of an origin-form target in its one spelling; the query begins with ``?`` or is empty.

    Raises ``Bad`` for what could be read in two ways.
    """
    path, mark, query = target.partition("?")
    if query and not _QUERY.fullmatch(query):
        raise Bad(400, "a query with characters that must be encoded")
    if not _PLAIN.fullmatch(path):
        path = _decoded(path)
    if "//" in path:
        raise Bad(400, "a path with an empty segment")
    if "/." in path and _DOTS.search(path):
        raise Bad(400, "a path with dot segments")
    return path, mark + query if query else ""


def _decoded(path: str) -> str:
    """Unreserved characters as themselves, other escapes in upper case."""

    def one(match: re.Match[str]) -> str:
        value = int(match[1], 16)
        if value in _UNRESERVED:
            return chr(value)
        if value < 0x20 or value == 0x7F:
            raise Bad(400, "a path with an encoded control character")
        if value in _FORBIDDEN:
            raise Bad(400, f"a path with {_FORBIDDEN[value]}")
        return match[0].upper()

    got = _ESCAPE.sub(one, path)
    if not _PLAIN.fullmatch(_ESCAPE.sub("", got)):
        raise Bad(400, "a path with characters that must be encoded")
    return got


class Named(Protocol):
    """What a rule must say of itself to be found."""

    @property
    def key(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def methods(self) -> Sequence[str]: ...
    @property
    def match_headers(self) -> Sequence[tuple[str, str]]: ...
    @property
    def preflight(self) -> bool: ...


R = TypeVar("R", bound=Named)


@dataclass(slots=True)
class _Host(Generic[R]):
    exact: dict[str, list[R]] = field(default_factory=dict)
    prefix: dict[str, list[R]] = field(default_factory=dict)


def allowed(rule: Named) -> frozenset[str]:
    """The methods that a rule takes. Who takes GET takes HEAD, and OPTIONS tells about the others."""
    methods = frozenset(rule.methods)
    return methods | {"HEAD"} if "GET" in methods else methods


class Table(Generic[R]):
    """All rules of a node, ready to be asked."""

    def __init__(self, rules: Iterable[R]) -> None:
        self.rules = sorted(rules, key=self._order)
        self._hosts: dict[str, _Host[R]] = {}
        self._wild: list[tuple[str, _Host[R]]] = []
        for rule in self.rules:
            host = self._hosts.setdefault(rule.host, _Host())
            side = host.prefix if rule.path.endswith("/") else host.exact
            side.setdefault(rule.path, []).append(rule)
        self._wild = sorted(
            ((h[1:], v) for h, v in self._hosts.items() if h.startswith("*.")), key=lambda w: -len(w[0])
        )
        self._any = self._hosts.get("")

    @staticmethod
    def _order(rule: Named) -> tuple[int, int, str]:
        return (not rule.methods, -len(rule.match_headers), rule.key)

    def find(self, request: Request) -> R:
        """The rule for a request whose path is clean. Raises ``Bad``: 404, or 405 with the methods that there are."""
        others: set[str] = set()
        for host in self._candidates(request.host):
            for rule in self._paths(host, request.path):
                if not all(request.fields.get(n) == v for n, v in rule.match_headers):
                    continue
                if not rule.methods or request.method in allowed(rule) or (rule.preflight and is_preflight(request)):
                    return rule
                others |= allowed(rule)
        if others:
            raise NotAllowed(sorted(others))
        raise Bad(404, "no route matches")

    def ordered(self, host: str, path: str) -> Iterable[R]:
        """The rules for a host and a path, in the order in which they are looked at, whatever else they ask for."""
        for found in self._candidates(host):
            yield from self._paths(found, path)

    def _candidates(self, name: str) -> Iterable[_Host[R]]:
        named = self._hosts.get(name) if name else None
        if named is not None:
            yield named
        for suffix, host in self._wild:
            if name.endswith(suffix) and len(name) > len(suffix):
                yield host
        if self._any is not None:
            yield self._any

    @staticmethod
    def _paths(host: _Host[R], path: str) -> Iterable[R]:
        yield from host.exact.get(path, ())
        end = len(path)
        while (end := path.rfind("/", 0, end)) >= 0:
            yield from host.prefix.get(path[: end + 1], ())

    def shadowed(self) -> dict[str, str]:
        """Rules that are never reached, each with the one before it that matches the same."""
        found: dict[str, str] = {}
        first: dict[tuple[object, ...], str] = {}
        for rule in self.rules:
            same = (rule.host, rule.path, tuple(rule.methods), tuple(rule.match_headers))
            if same in first:
                found[rule.key] = first[same]
            else:
                first[same] = rule.key
        return found


class NotAllowed(Bad):
    """The path is there, the method is not."""

    def __init__(self, methods: Sequence[str]) -> None:
        super().__init__(405, "the method is not allowed here")
        self.methods = methods
