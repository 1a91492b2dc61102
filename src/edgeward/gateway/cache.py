"""What a shared cache may do with an answer: RFC 9111 (and RFC 5861, RFC 9211) as decisions. Pure; time is an argument.

A request and what is stored for it come in; out comes whether to answer from the store, to ask first, or to pass on.
Times are Unix seconds. Where the RFC leaves a choice the careful one is taken: what is malformed counts as stale, an
answer that sets a cookie is not kept. What keeps the answers is ``shelf.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate, mktime_tz, parsedate_tz
from typing import TYPE_CHECKING, Literal

from edgeward.gateway.http1 import SAFE, Headers, Request, Response, is_claim

if TYPE_CHECKING:
    from edgeward.gateway.entry import Blob

#: RFC 9110, section 15.1: may be kept without being told so.
_HEURISTIC = frozenset({200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501})
_MOST_HEURISTIC = 86400.0
_MOST = 2**31
#: Not taken over from a 304 (RFC 9111, section 3.2): they are of the body that is kept.
_OF_THE_BODY = frozenset({"content-length", "content-encoding", "content-range", "content-type"})
_DIRECTIVE = re.compile(r'\s*([!#$%&\'*+.^_`|~0-9A-Za-z-]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,;"]*))?\s*(?:,|$)')
_RANGE = re.compile(r"bytes=\s*([0-9]{1,18})?-([0-9]{1,18})?\s*")

Directives = dict[str, str]


def directives(value: str | None) -> Directives:
    """The directives of a ``Cache-Control`` field. Of repeated ones the first holds (RFC 9111, section 4.2.1)."""
    found: Directives = {}
    at = 0
    while value and at < len(value):
        match = _DIRECTIVE.match(value, at)
        if match is None:
            comma = value.find(",", at)  # what cannot be read is left out, what stands behind it is not
            at = len(value) if comma < 0 else comma + 1
            continue
        found.setdefault(match[1].lower(), (match[2] or "").strip('"'))
        at = match.end()
    return found


def seconds(found: Mapping[str, str], name: str) -> float | None:
    """A directive's delta-seconds; None when it is not given, 0 when it is malformed."""
    value = found.get(name)
    if value is None:
        return None
    return float(min(int(value), _MOST)) if value.isascii() and value.isdigit() and len(value) < 20 else 0.0


def date(value: str | None) -> float | None:
    """Unix time of an HTTP date; None when there is none or it cannot be read."""
    if not value or len(value) > 64:
        return None
    parsed = parsedate_tz(value)
    if parsed is None:
        return None
    try:
        return float(mktime_tz(parsed))
    except (ValueError, OverflowError):
        return None


def http_date(at: float) -> str:
    return formatdate(at, usegmt=True)


def lifetime(response_fields: Mapping[str, str], status: int, control: Directives) -> float:
    """Seconds that an answer is fresh (RFC 9111, section 4.2.1)."""
    for name in ("s-maxage", "max-age"):
        given = seconds(control, name)
        if given is not None:
            return given
    sent = date(response_fields.get("date"))
    if "expires" in response_fields:
        expires = date(response_fields["expires"])
        return max(0.0, expires - sent) if expires is not None and sent is not None else 0.0
    modified = date(response_fields.get("last-modified"))
    if modified is not None and sent is not None and (status in _HEURISTIC or "public" in control):
        return min(_MOST_HEURISTIC, max(0.0, (sent - modified) / 10))  # section 4.2.2
    return 0.0


def initial_age(response_fields: Mapping[str, str], asked: float, got: float) -> float:
    """``corrected_initial_age`` of RFC 9111, section 4.2.3."""
    sent = date(response_fields.get("date"))
    apparent = max(0.0, got - sent) if sent is not None else 0.0
    text = response_fields.get("age", "").partition(",")[0].strip()
    told = float(min(int(text), _MOST)) if text.isascii() and text.isdigit() and len(text) < 20 else 0.0
    return max(apparent, told + max(0.0, got - asked))


@dataclass(slots=True)
class Stored:
    """An answer as it is kept."""

    status: int
    reason: str
    #: End-to-end fields without Age, Content-Length and Cache-Status.
    headers: Headers
    fields: dict[str, str]
    body: bytes
    #: The request's values of the fields that Vary names.
    varied: tuple[tuple[str, str], ...]
    control: Directives
    #: Corrected initial age, when it was received, how long it is fresh.
    age0: float
    got: float
    fresh_for: float
    stale_if_error: float = 0.0
    stale_while_revalidate: float = 0.0
    tags: frozenset[str] = frozenset()
    #: Its head as it was written last, and for which second (``shelf.py``).
    written: tuple[int, bytes] = (-1, b"")
    hits: int = 0
    renewing: bool = False
    #: It may be given compressed (``squeeze.py``), and what that is; None: not made yet.
    squeezable: bool = False
    #: A large body lies on the disk (``disk.py``), and ``body`` is empty.
    blob: Blob | None = None
    zipped: Stored | None = None
    #: Which route's target it came from (``rules.Rule.owner``).
    owner: str = ""

    def age(self, now: float) -> float:
        return self.age0 + max(0.0, now - self.got)

    def ttl(self, now: float) -> float:
        return self.fresh_for - self.age(now)

    @property
    def length(self) -> int:
        """Of the body."""
        return len(self.body) if self.blob is None else self.blob.length

    @property
    def size(self) -> int:
        """Bytes of memory."""
        zipped = 0 if self.zipped is None else self.zipped.size
        return len(self.body) + sum(len(n) + len(v) + 64 for n, v in self.headers) + 512 + zipped

    @property
    def validators(self) -> Headers:
        """Fields that ask whether it is still so."""
        found: Headers = []
        if "etag" in self.fields:
            found.append(("if-none-match", self.fields["etag"]))
        if "last-modified" in self.fields:
            found.append(("if-modified-since", self.fields["last-modified"]))
        return found


def vary(response_fields: Mapping[str, str]) -> tuple[str, ...] | None:
    """The fields of the request that an answer depends on; None when on everything (``*``)."""
    names = [n.strip().lower() for n in response_fields.get("vary", "").split(",")]
    return None if "*" in names else tuple(sorted({n for n in names if n}))


def varied(request: Request, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((n, ",".join(p.strip() for p in request.fields.get(n, "").split(","))) for n in names)


def why_not_stored(request: Request, response: Response) -> str:
    """Empty when a shared cache may keep the answer (RFC 9111, section 3), else the reason."""
    control = directives(response.fields.get("cache-control"))
    if request.method != "GET" or request.length != 0:
        return "only GET without a body is kept"
    if response.status < 200 or response.status in (206, 304):
        return "a part, or no answer of its own"
    if "no-store" in control or "no-store" in directives(request.fields.get("cache-control")):
        return "no-store"
    if "private" in control:
        return "private"
    if request.authorised and not {"public", "s-maxage", "must-revalidate"} & control.keys():
        return "the request was authorised"
    if "set-cookie" in response.fields:
        return "it sets a cookie"
    names = vary(response.fields)
    if names is None:
        return "Vary: *"
    if any(is_claim(n) for n in names):
        return "it varies by what the gateway itself says of the client"
    explicit = {"public", "max-age", "s-maxage"} & control.keys() or "expires" in response.fields
    if not explicit and response.status not in _HEURISTIC:
        return f"status {response.status} without an explicit lifetime"
    useful = (
        lifetime(response.fields, response.status, control) > 0 or {"etag", "last-modified"} & response.fields.keys()
    )
    return "" if useful else "neither fresh for a while nor with a validator"


def store(
    request: Request, response: Response, headers: Headers, body: bytes, asked: float, got: float,
    *, if_error: float = 0.0, while_revalidate: float = 0.0,
) -> Stored:  # fmt: skip
    """What is kept of an answer that may be. The durations are the route's, where the answer says nothing."""
    control = directives(response.fields.get("cache-control"))
    fields = dict(response.fields)
    kept = [h for h in headers if h[0] not in ("age", "content-length", "cache-status")]
    if "date" not in fields:
        fields["date"] = http_date(got)
        kept.append(("date", fields["date"]))
    unsafe = {"must-revalidate", "proxy-revalidate", "s-maxage", "no-cache"} & control.keys()
    error, renew = seconds(control, "stale-if-error"), seconds(control, "stale-while-revalidate")
    tags = frozenset(t for t in re.split(r"[,\s]+", fields.get("cache-tag", "")) if t)
    return Stored(
        response.status, response.reason, kept, fields, body, varied(request, vary(fields) or ()), control,
        initial_age(fields, asked, got), got,
        0.0 if "no-cache" in control else lifetime(fields, response.status, control),
        0.0 if unsafe else (if_error if error is None else error),
        0.0 if unsafe else (while_revalidate if renew is None else renew),
        frozenset(sorted(tags)[:64]),
    )  # fmt: skip


def refreshed(old: Stored, response: Response, headers: Headers, asked: float, got: float) -> Stored:
    """What is kept after a 304 (RFC 9111, section 4.3.4): the body stays, the fields are the newer."""
    new = {n for n, _ in headers} - _OF_THE_BODY - {"age", "cache-status"}
    kept = [h for h in old.headers if h[0] not in new] + [h for h in headers if h[0] in new]
    fields = dict(old.fields) | {n: v for n, v in response.fields.items() if n in new or n == "age"}
    if "age" not in response.fields:
        fields.pop("age", None)
    if "date" not in response.fields:
        fields["date"] = http_date(got)
        kept = [h for h in kept if h[0] != "date"] + [("date", fields["date"])]
    control = directives(fields.get("cache-control"))
    unsafe = {"must-revalidate", "proxy-revalidate", "s-maxage", "no-cache"} & control.keys()
    error, renew = seconds(control, "stale-if-error"), seconds(control, "stale-while-revalidate")
    return Stored(
        old.status, old.reason, kept, fields, old.body, old.varied, control, initial_age(fields, asked, got), got,
        0.0 if "no-cache" in control else lifetime(fields, old.status, control),
        0.0 if unsafe else (old.stale_if_error if error is None else error),
        0.0 if unsafe else (old.stale_while_revalidate if renew is None else renew),
        old.tags, hits=old.hits, owner=old.owner, blob=old.blob,
    )  # fmt: skip


def why_not_refreshed(request: Request, made: Stored, response: Response) -> str:
    """Empty when what a 304 made of a stored answer may be kept for others, else the reason: it may have become
    private, or say something to this client only."""
    whole = Response(made.status, made.reason, made.headers)
    whole.fields = made.fields
    return why_not_stored(request, whole)


Way = Literal["hit", "stale", "renew", "miss", "validate", "bypass", "refuse"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do. ``hit``: answer; ``renew``: answer and renew behind it; ``validate``: ask with the validators;
    ``miss``: ask and keep; ``bypass``: ask and keep nothing; ``refuse``: 504 (only-if-cached)."""

    way: Way
    #: RFC 9211, section 2.2: why it goes on.
    fwd: str = ""


def choose(request: Request, stored: Stored | None, now: float, *, other_variant: bool = False) -> Choice:
    """RFC 9111, section 4. ``stored`` is the entry whose Vary fits the request."""
    if request.method not in ("GET", "HEAD"):
        return Choice("bypass", "method")
    if request.length != 0:
        return Choice("bypass", "bypass")
    text = request.fields.get("cache-control")
    if text is None and stored is not None and "pragma" not in request.fields:
        control: Directives = {}
    else:
        control = directives(text)
        if text is None and "no-cache" in request.fields.get("pragma", "").lower():
            control = {"no-cache": ""}  # section 5.4
    if "no-store" in control:
        return Choice("bypass", "request")
    if stored is None:
        if "only-if-cached" in control:
            return Choice("refuse")
        return Choice("miss", "vary-miss" if other_variant else "uri-miss")
    if request.authorised and not {"public", "s-maxage", "must-revalidate"} & stored.control.keys():
        return Choice("bypass", "request")
    age = stored.age(now)
    ttl = stored.fresh_for - age
    wished = seconds(control, "max-age")
    young = wished is None or age <= wished
    if "no-cache" not in control and young and ttl > (seconds(control, "min-fresh") or 0.0):
        return Choice("hit")
    if "only-if-cached" in control:
        return Choice("refuse")
    if "no-cache" in control or not young:
        return Choice("validate", "request")
    if "min-fresh" not in control:
        strict = {"must-revalidate", "proxy-revalidate", "s-maxage", "no-cache"} & stored.control.keys()
        if "max-stale" in control and not strict:
            most = seconds(control, "max-stale") if control["max-stale"] else float(_MOST)
            if -ttl <= (most or 0.0):
                return Choice("stale")
        if -ttl < stored.stale_while_revalidate:
            return Choice("renew", "stale")
    return Choice("validate", "stale")


def serve_on_error(stored: Stored, request: Request, now: float) -> bool:
    """RFC 5861, section 4: whether the stale answer stands in for a target that failed."""
    strict = {"must-revalidate", "proxy-revalidate", "s-maxage", "no-cache"} & stored.control.keys()
    if strict:
        return False
    wished = seconds(directives(request.fields.get("cache-control")), "stale-if-error")
    return -stored.ttl(now) < max(stored.stale_if_error, wished or 0.0)


def invalidates(method: str, status: int) -> bool:
    """RFC 9111, section 4.4."""
    return method not in SAFE and 200 <= status < 400


# -- what the client asked of what is stored ------------------------------------------------------------------------


def _weak(tag: str) -> str:
    return tag.strip().removeprefix("W/")


def not_modified(request: Request, stored: Stored) -> bool:
    """Whether the client has it already (RFC 9110, section 13.2.2, steps 3 and 4)."""
    asked = request.fields.get("if-none-match")
    if asked is not None:
        mine = stored.fields.get("etag")
        return stored.status == 200 and (
            asked.strip() == "*" or (mine is not None and _weak(mine) in [_weak(t) for t in asked.split(",")])
        )
    since = date(request.fields.get("if-modified-since"))
    modified = date(stored.fields.get("last-modified"))
    return stored.status == 200 and since is not None and modified is not None and modified <= since


def part_of(request: Request, stored: Stored) -> tuple[int, int] | Literal["unsatisfiable"] | None:
    """The bytes ``[start, end)`` that the client asked for; None: all of it (RFC 9110, section 14).

    One range only; several are answered by the whole, which a server may always do.
    """
    asked = request.fields.get("range")
    if asked is None or stored.status != 200 or request.method != "GET":
        return None
    condition = request.fields.get("if-range")
    if condition is not None:
        mine = stored.fields.get("etag" if condition.startswith(('"', "W/")) else "last-modified")
        if mine is None or condition != mine or condition.startswith("W/"):
            return None
    match = _RANGE.fullmatch(asked)
    if match is None or (match[1] is None and match[2] is None):
        return None
    size = stored.length
    if match[1] is None:
        n = int(match[2])
        return (max(0, size - n), size) if n and size else "unsatisfiable"
    start = int(match[1])
    if match[2] is not None and int(match[2]) < start:
        return None
    if start >= size:
        return "unsatisfiable"
    return start, min(size, int(match[2]) + 1) if match[2] is not None else size
