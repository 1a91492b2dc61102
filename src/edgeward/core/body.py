"""A request's body as a document: JSON or YAML in, what the store can hold out.

Pure. A key that is given twice, half a character, a number that is none and a document that is nested too deep are
refused with their place. Reading the body off the wire is in ``streaming.py``; what a document means, in
``resource.py``.
"""

from __future__ import annotations

import json as stdjson
import math
from dataclasses import dataclass
from typing import Any

from edgeward.core.errors import (
    Invalid,
)
from edgeward.core.manifest import MAX_DEPTH, load


@dataclass(frozen=True, slots=True)
class _Twice:
    """Stands for an object that has a key twice, until it is known where it is."""

    key: str


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Twice:
    doc: dict[str, Any] = {}
    for key, value in pairs:
        if key in doc:
            return _Twice(key)
        doc[key] = value
    return doc


def parse_body(data: bytes, content_type: str) -> Any:
    if "yaml" in content_type:
        documents = load(data, "body")
        if len(documents) != 1:
            raise Invalid(f"the body has {len(documents)} documents", field="$", remedy="send one")
        doc = documents[0].doc
    else:
        try:
            doc = stdjson.loads(data, object_pairs_hook=_pairs)
        except (ValueError, RecursionError) as e:
            raise Invalid(f"the body is no valid JSON: {e}", field="$", remedy="or send application/yaml") from None
    _check_storable(doc, "$", 0)
    return doc


def _check_storable(value: Any, path: str, depth: int) -> None:
    """Refuses what a parser takes and the store's JSON cannot hold."""
    if depth > MAX_DEPTH:
        raise Invalid(f"is nested deeper than {MAX_DEPTH} levels", field=path[:200], remedy="flatten it")
    if isinstance(value, _Twice):
        raise Invalid("is given twice", field=f"{path}.{value.key}"[:200], remedy="keep one of them")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_storable(key, path, depth + 1)
            _check_storable(inner, f"{path}.{key}", depth + 1)
    elif isinstance(value, list):
        for n, inner in enumerate(value):
            _check_storable(inner, f"{path}[{n}]", depth + 1)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Invalid("holds half a character", field=path, remedy="write surrogates in pairs") from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise Invalid(f"{value} is no number", field=path, remedy="write a finite one")
