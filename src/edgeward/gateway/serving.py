"""What is written for a request: the head that goes to a target, and the answer that is made of a stored one. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from edgeward.gateway.cache import Stored, not_modified, part_of
from edgeward.gateway.cors import CorsConfig, with_cors
from edgeward.gateway.http1 import (
    CONDITIONS,
    FALLBACK,
    PLACE,
    Headers,
    Request,
    end_to_end,
    is_claim,
)
from edgeward.gateway.rules import Place, Rule
from edgeward.gateway.shelf import NAME

#: Of a stored answer, in a 304 (RFC 9110, section 15.4.5).
_IN_304 = frozenset({"cache-control", "content-location", "date", "etag", "expires", "vary", "last-modified"})
_DROPPED = frozenset({"host", "content-length", "expect"})


def forwarded(
    request: Request,
    rule: Rule,
    place: Place,
    authority: str,
    client: str,
    via: str,
    *,
    validators: Headers | None = None,
) -> Headers:
    """The fields of the request as the target gets them. ``validators``: the gateway asks for itself, in place of the
    client's conditions."""
    mine = _DROPPED if validators is None else _DROPPED | CONDITIONS
    near = place.kind == "site"  # asks for itself who the client is
    if rule.guard is not None and not near:
        mine = mine | rule.guard.dropped
    passed = [h for h in end_to_end(request.headers) if h[0] not in mine and not is_claim(h[0]) and h[0] != "via"]
    told = request.fields.get("via")
    host = place.send_host or request.authority or authority
    headers: Headers = [
        ("host", host),
        *passed,
        *(validators or []),
        *(request.identity.fields if request.identity is not None and not near else ()),
        ("x-forwarded-for", client),
        ("x-forwarded-host", request.authority or authority),
        ("x-forwarded-proto", request.scheme),
        ("via", f"{told}, {via}" if told else via),
    ]
    if near:
        headers.append((FALLBACK, rule.key))
    if request.upgrade:
        headers += [("connection", "upgrade"), ("upgrade", request.upgrade)]
    return headers


def said_place(place: Place, because: Sequence[str]) -> tuple[str, str]:
    """The field that says which place answered, and why not one before it: a structured field (RFC 8941)."""
    text = place.kind + (f'; name="{_quoted(place.name)}"' if place.name else "")
    return PLACE, text + (f'; because="{_quoted("; ".join(because))}"' if because else "")


def _quoted(text: str) -> str:
    return "".join(c for c in text if " " <= c <= "~" and c not in '"\\')[:240]


def asked_of(
    request: Request, stored: Stored, now: float, detail: str = "", fwd: str = "", *, cors: CorsConfig | None = None
) -> tuple[int, Headers, tuple[int, int] | None]:
    """``(status, fields, part of the body)`` for what the client asked of a stored answer: whole, part, 304 or 416.

    ``fwd``: the answer was just fetched or validated (RFC 9211), so it is no hit.
    """
    said = f"{NAME}; {fwd or 'hit'}; ttl={int(stored.ttl(now))}" + (f"; detail={detail}" if detail else "")
    more: Headers = [("age", str(int(stored.age(now)))), ("cache-status", said)]
    if not request.keep:
        more.append(("connection", "close"))
    elif request.minor == 0:
        more.append(("connection", "keep-alive"))
    headers = stored.headers if cors is None else with_cors(cors, request, stored.headers)
    if not_modified(request, stored):
        kept = [h for h in headers if h[0] in _IN_304 or h[0].startswith("access-control-")]
        return 304, [*kept, *more], None
    part = part_of(request, stored)
    size = stored.length
    if part == "unsatisfiable":
        return 416, [("content-range", f"bytes */{size}"), ("content-length", "0"), *more], None
    if part is not None:
        start, end = part
        fields = [("content-range", f"bytes {start}-{end - 1}/{size}"), ("content-length", str(end - start)), *more]
        return 206, [*headers, *fields], part
    length = [] if stored.status in (204, 304) else [("content-length", str(size))]
    return stored.status, [*headers, *length, *more], None if request.method == "HEAD" else (0, size)


def from_store(
    request: Request, stored: Stored, now: float, detail: str = "", fwd: str = "", *, cors: CorsConfig | None = None
) -> tuple[int, Headers, bytes]:
    """The same of one whose body is in memory: ``(status, fields, body)``."""
    status, fields, part = asked_of(request, stored, now, detail, fwd, cors=cors)
    if part is None:
        return status, fields, b""
    return status, fields, stored.body if part == (0, len(stored.body)) else stored.body[part[0] : part[1]]
