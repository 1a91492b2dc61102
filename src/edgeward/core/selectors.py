"""Label and field selectors as kubectl writes them: ``app=web,tier!=db,env in (a,b)``; ``status.phase=Running``.

Pure, and the same at hub and edge, so that a list gives the same answer on both sides of a cut link.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from edgeward.core.errors import Invalid

_SET = re.compile(r"^\s*([^\s!=,()]+)\s+(in|notin)\s+\(([^()]*)\)\s*$")
_EQUAL = re.compile(r"^\s*([^\s!=,()]+)\s*(==|=|!=)\s*([^\s=,()]*)\s*$")
_EXISTS = re.compile(r"^\s*(!?)\s*([^\s!=,()]+)\s*$")

Test = Callable[[Mapping[str, str]], bool]


def _split(text: str) -> list[str]:
    parts, depth, at = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            parts.append(text[at:i])
            at = i + 1
    parts.append(text[at:])
    return parts


def _one(part: str) -> Test:
    if match := _SET.match(part):
        key, negate = match[1], match[2] == "notin"
        values = {v.strip() for v in match[3].split(",")}
        return lambda labels: (labels.get(key) in values) != negate
    if match := _EQUAL.match(part):
        key, value = match[1], match[3]
        if match[2] == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if match := _EXISTS.match(part):
        key, negate = match[2], bool(match[1])
        return lambda labels: (key in labels) != negate
    raise Invalid(
        f"{part.strip()[:80]!r} is no selector",
        field="selector",
        remedy="write key=value, key!=value, key in (a,b), key, !key",
    )


def parse_labels(text: str) -> Test:
    """The test that a label selector stands for; an empty one takes all."""
    tests = [_one(p) for p in _split(text)] if text.strip() else []
    return lambda labels: all(t(labels) for t in tests)


def lookup(doc: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    for part in path.split("."):
        if isinstance(doc, Mapping):
            doc = doc.get(part)
        elif isinstance(doc, list) and part.isdecimal() and len(part) < 10 and int(part) < len(doc):
            doc = doc[int(part)]
        else:
            return None
    return doc


def _text(value: Any) -> str:
    if value is True:
        return "true"
    if value is False:
        return "false"
    return "" if value is None else str(value)


def parse_fields(text: str) -> Callable[[Mapping[str, Any]], bool]:
    """The test that a field selector (``=``, ``==``, ``!=`` on dotted paths) stands for."""
    tests: list[tuple[str, bool, str]] = []
    for part in _split(text) if text.strip() else []:
        match = _EQUAL.match(part)
        if match is None:
            raise Invalid(
                f"{part.strip()[:80]!r} is no field selector",
                field="fieldSelector",
                remedy="write path=value or path!=value, e.g. status.phase=Running",
            )
        tests.append((match[1], match[2] != "!=", match[3]))
    return lambda doc: all((_text(lookup(doc, path)) == value) == equal for path, equal, value in tests)
