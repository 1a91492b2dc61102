"""Texts and documents that leave the house: what may be a secret is taken out. Pure.

In: text, or a document, and the secrets that are known; out: the same with ``(hidden)`` in their place. Known values go
wherever they stand. What only looks like a secret goes too: keys, tokens, passwords in addresses, values whose name
says so, and all values of Secrets, Configs and environments. It rather hides too much: names and shapes are what a
supporter needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "(hidden)"
#: A known value shorter than this would blank half of every text.
KNOWN_LEAST = 6
_WORDS = r"pass(?:word|wd|phrase)?|secret|token|api[-_]?key|private[-_]?key|access[-_]?key|seed|credential|jwt|bearer"
_NAMED = re.compile(rf"(?:^|[-_.a-z0-9]*)(?:{_WORDS})s?$", re.IGNORECASE)
_FLAG = re.compile(rf"^--?[\w-]*(?:{_WORDS})s?$", re.IGNORECASE)
#: Members whose values are the user's own, whatever they are called.
_OPAQUE = ("env", "data", "stringData", "environment")
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.S), HIDDEN),
    (re.compile(r"-----BEGIN USER NKEY SEED-----.*?(?:------?END USER NKEY SEED------?|\Z)", re.S), HIDDEN),
    (re.compile(r"\bew[a-z]?_[A-Za-z0-9_-]{8,}"), HIDDEN),
    (re.compile(r"\bS[ACNOUX][A-Z2-7]{56}\b"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?"), HIDDEN),
    (re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"), HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{6,}"), rf"\1 {HIDDEN}"),
    (
        # name=value, name: value, "name": "value", "name": [ ... ] stays with its own values
        re.compile(rf"""(?i)((?:{_WORDS})s?["']?\s*[:=]\s*)("(?:[^"\\]|\\.)*"|'[^']*'|[^\s,;\[\]{{}}"']+)"""),
        rf"\1{HIDDEN}",
    ),
)


class Scrubber:
    def __init__(self, known: Iterable[str] = ()) -> None:
        values = sorted({v for v in known if len(v) >= KNOWN_LEAST}, key=len, reverse=True)
        self._known = re.compile("|".join(re.escape(v) for v in values)) if values else None

    def text(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        for pattern, put in _PATTERNS:
            text = pattern.sub(put, text)
        return text

    def document(self, doc: Any) -> Any:
        """JSON-like data; mappings keep their keys, lists their length."""
        if isinstance(doc, Mapping):
            return {self.text(str(k)): self._member(str(k), v) for k, v in doc.items()}
        if isinstance(doc, list | tuple):
            return self._items(list(doc))
        return self.text(doc) if isinstance(doc, str) else doc

    def _member(self, name: str, value: Any) -> Any:
        if _NAMED.search(name) and not isinstance(value, Mapping | list | bool) and value is not None:
            return HIDDEN
        if name in _OPAQUE:
            return _blank(value)
        return self.document(value)

    def _items(self, items: list[Any]) -> list[Any]:
        found: list[Any] = []
        hide_next = False
        for item in items:
            if isinstance(item, str):
                found.append(HIDDEN if hide_next else self.text(item))
                hide_next = bool(_FLAG.match(item))
            else:
                found.append(self.document(item))
                hide_next = False
        return found


def _blank(value: Any) -> Any:
    """The same shape without a value in it; ``{name, value}`` pairs keep the name."""
    if isinstance(value, Mapping):
        return {k: v if k == "name" and isinstance(v, str) else _blank(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_blank(v) for v in value]
    return value if value is None or isinstance(value, bool) or value == "" else HIDDEN
