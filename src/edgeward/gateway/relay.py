"""What `gateway explain` and `gateway purge` ask of a node, the same at the hub and at the node itself. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from edgeward.core.describe import Form
from edgeward.core.errors import Invalid

#: The call of a node (``ew.node.<node>.call.gateway``): ``{verb: explain | purge, args}``.
CALL = "gateway"
BODY = 16 * 1024
EXPLAIN: dict[str, tuple[Form, str]] = {
    "url": ("string", "A URL or a path"),
    "method": ("string", "GET if left out"),
    "header": ("string", "NAME:VALUE; may be given several times"),
}


class Purge(msgspec.Struct):
    """Exactly one of url, prefix, tag; ``host`` narrows it."""

    url: str = ""
    prefix: str = ""
    tag: str = ""
    host: str = ""


class Purged(msgspec.Struct):
    purged: int


def explain_args(url: str, method: str, headers: Sequence[str]) -> dict[str, Any]:
    """Raises ``Invalid``."""
    found = {}
    for text in headers:
        name, colon, value = text.partition(":")
        if not colon:
            raise Invalid(f"{text[:60]!r} is no header field", field="?header", remedy="write NAME:VALUE")
        found[name.strip()] = value.strip()
    if not url:
        raise Invalid("is required", field="?url", remedy="write e.g. /hello or http://host/hello")
    return {"url": url, "method": method or "GET", "headers": found}


def purge_args(doc: object) -> dict[str, Any]:
    """Raises ``Invalid``."""
    if not isinstance(doc, dict) or not all(isinstance(v, str) for v in doc.values()):
        raise Invalid("expected an object of texts", field="$", remedy='send {"prefix": "/news/"}')
    if unknown := sorted(set(doc) - {"url", "prefix", "tag", "host"}):
        raise Invalid("unknown field", field=f"$.{unknown[0][:60]}", remedy="url, prefix, tag, host")
    if sum(bool(doc.get(n)) for n in ("url", "prefix", "tag")) != 1:
        raise Invalid("what is to be purged?", field="$", remedy="give one of url, prefix, tag")
    return dict(doc)
