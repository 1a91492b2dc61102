"""What every translation stands on: fields that are read are ticked off, and what nobody read is told. Pure.

In comes a document of another system, out go resources and a list of what was *left*: the field, why, and what to do.
A field that a translation does not know can therefore not vanish in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from edgeward.core.errors import Invalid
from edgeward.core.manifest import Manifest

Doc = dict[str, Any]
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
#: Where Edgeward would replace something in a text that means itself.
_DOLLARS = re.compile(r"\$(?=[${])")


@dataclass(frozen=True, slots=True)
class Left:
    """A field that was not taken over."""

    file: str
    line: int
    field: str
    why: str
    remedy: str = ""

    def __str__(self) -> str:
        do = f" ({self.remedy})" if self.remedy else ""
        return f"{self.file}:{self.line}: {self.field}: not taken over: {self.why}{do}"


@dataclass
class Taken:
    """What came of one or several documents."""

    made: list[Manifest] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def resource(self, source: Manifest, path: str, kind: str, meta: Doc, spec: Doc) -> Manifest:
        """Adds a resource; its errors point to ``path`` of the document that it came from."""
        doc = {"apiVersion": "edgeward/v1", "kind": kind, "metadata": meta, "spec": spec}
        made = Manifest(doc, source.file, source.line_of(path), {"$": source.line_of(path)})
        self.made.append(made)
        return made


class Fields:
    """A mapping of a foreign document: each field is taken, or left with a reason; :meth:`rest` tells of the others."""

    def __init__(self, doc: Any, path: str, source: Manifest, taken: Taken) -> None:
        if not isinstance(doc, dict):
            raise Invalid("is no mapping", field=path, file=source.file, line=source.line_of(path))
        self._doc, self.path, self.source, self.taken = doc, path, source, taken
        self._seen: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._doc.get(name) is not None

    def at(self, name: str) -> str:
        return f"{self.path}.{name}"

    def wrong(self, name: str, message: str, remedy: str = "") -> Invalid:
        path = self.at(name) if name else self.path
        return Invalid(message, field=path, file=self.source.file, line=self.source.line_of(path), remedy=remedy)

    def take(self, name: str) -> Any:
        """The field's value, None when it is not there."""
        self._seen.add(name)
        return self._doc.get(name)

    def text(self, name: str, default: str = "") -> str:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, dict | list):
            raise self.wrong(name, "is no text")
        return plain(value)

    def number(self, name: str, default: int = 0) -> int:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, "is no whole number")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value in (None, "false", "False", "no"):
            return False
        if value in ("true", "True", "yes"):
            return True
        if not isinstance(value, bool):
            raise self.wrong(name, "is neither true nor false")
        return value

    def items(self, name: str) -> list[Any]:
        value = self.take(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(name, "is no list")
        return value

    def texts(self, name: str) -> list[str]:
        return [plain(v) for v in self.items(name)]

    def map(self, name: str) -> Doc:
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, "is no mapping")
        return value

    def inner(self, name: str) -> Fields:
        """The mapping behind a field; an empty one when it is not there."""
        return Fields(self.map(name), self.at(name), self.source, self.taken)

    def each(self, name: str) -> Iterator[Fields]:
        for n, item in enumerate(self.items(name)):
            yield Fields(item, f"{self.at(name)}[{n}]", self.source, self.taken)

    def leave(self, name: str, why: str, remedy: str = "") -> None:
        """The field, if it is there, is left for a reason."""
        if self.take(name) is not None:
            self.left(self.at(name), why, remedy)

    def left(self, path: str, why: str, remedy: str = "") -> None:
        self.taken.left.append(Left(self.source.file, self.source.line_of(path), path, why, remedy))

    def ignore(self, *names: str) -> None:
        """Fields that say nothing about what shall run."""
        self._seen.update(names)

    def rest(self, *, why: str = "it has no counterpart here") -> None:
        """Tells of every field that was not looked at."""
        for name, value in self._doc.items():
            if name not in self._seen and value not in (None, {}, [], "", False):
                self.left(self.at(name), why)
        self._seen.update(self._doc)


def plain(value: Any) -> str:
    """A scalar as its text."""
    return "true" if value is True else "false" if value is False else "" if value is None else str(value)


def name_of(text: str, at: Fields, field: str = "") -> str:
    """A resource's name from a foreign one: `My_App.web` becomes `my-app-web`. ``at``, ``field``: where it stands."""
    made = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")
    if not _NAME.fullmatch(made):
        raise at.wrong(field, f"{text[:80]!r} gives no name", "use letters, digits and '-', at most 63")
    return made


def literal(text: str) -> str:
    """A text in which Edgeward replaces nothing."""
    return _DOLLARS.sub("$$", text)


def seconds(text: str) -> str:
    """A duration as Go writes it (`1m30s`, `1.5s`, `500us`), or a number of seconds, as Edgeward does."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return f"{text}s"
    found = re.fullmatch(r"([0-9]+)(us|µs|ns)", text)
    if found:
        return f"{max(1, round(int(found[1]) / (1e6 if found[2] == 'ns' else 1e3)))}ms"
    return text


def dump(doc: Doc) -> Doc:
    """Without what is empty, so that what is printed is what somebody would write."""
    return {k: v for k, v in doc.items() if v not in (None, "", [], {})}
