"""Files as answers: a path becomes a file's name, a file's facts and a request become an answer. Pure.

Names cannot leave their place: a path has one spelling already (``match.clean``), here it is decoded and what is hidden
(``.git``) or was never a name is not found. Conditions and ranges are answered as RFC 9110 says (sections 13 and 14),
several ranges as ``multipart/byteranges``, unless they ask for more than the file has. Opening is ``files.py``'s.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec

from edgeward.gateway.cache import date, http_date
from edgeward.gateway.http1 import Headers, Request

#: Ranges of one request.
RANGES = 16
_RANGE = re.compile(r"\s*([0-9]{1,18})?\s*-\s*([0-9]{1,18})?\s*")
_TYPES = {
    "html": "text/html; charset=utf-8", "htm": "text/html; charset=utf-8", "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8", "mjs": "text/javascript; charset=utf-8", "txt": "text/plain; charset=utf-8",
    "md": "text/markdown; charset=utf-8", "csv": "text/csv; charset=utf-8", "xml": "application/xml",
    "json": "application/json", "map": "application/json", "webmanifest": "application/manifest+json",
    "geojson": "application/geo+json",
    "yaml": "application/yaml", "yml": "application/yaml", "wasm": "application/wasm",
    "pdf": "application/pdf", "zip": "application/zip", "gz": "application/gzip", "tar": "application/x-tar",
    "zst": "application/zstd", "svg": "image/svg+xml", "png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg",
    "gif": "image/gif", "webp": "image/webp", "avif": "image/avif", "ico": "image/x-icon", "bmp": "image/bmp",
    "mp4": "video/mp4", "webm": "video/webm", "mov": "video/quicktime", "m3u8": "application/vnd.apple.mpegurl",
    "ts": "video/mp2t", "mp3": "audio/mpeg", "ogg": "audio/ogg", "wav": "audio/wav", "flac": "audio/flac",
    "woff": "font/woff",
    "woff2": "font/woff2", "ttf": "font/ttf", "otf": "font/otf", "onnx": "application/octet-stream",
}  # fmt: skip
#: Of an answer, in a 304 (RFC 9110, section 15.4.5).
_IN_304 = frozenset({"cache-control", "etag", "last-modified", "vary"})


class StaticConfig(msgspec.Struct, frozen=True):
    """``to.static`` of one route in ``plane.json``: texts by name, or a folder of this machine."""

    files: dict[str, str] | None = None
    folder: str = ""
    index: str = "index.html"
    cache_control: str = ""
    #: Why there are no files here.
    problem: str = ""


class Facts(NamedTuple):
    """What is to be known of a file."""

    size: int
    etag: str
    #: Unix time; 0: not known.
    modified: float
    type: str
    #: ``gzip`` or ``br`` where it lies compressed.
    coding: str = ""
    #: It depends on what the client takes.
    varies: bool = False


class Plan(NamedTuple):
    """An answer: ``parts`` of the file, each with the bytes that come before it, and ``tail``."""

    status: int
    headers: Headers
    parts: list[tuple[bytes, int, int]]
    tail: bytes = b""

    @property
    def length(self) -> int:
        return sum(len(before) + end - start for before, start, end in self.parts) + len(self.tail)


def name_of(prefix: str, path: str) -> str | None:
    """The file that a path names below a route's own; ends in ``/`` (or is empty) for a folder. None: there is none."""
    rest = path[len(prefix) :] if prefix.endswith("/") else path.rpartition("/")[2]
    if "%" in rest:
        try:
            rest = unquote_to_bytes(rest).decode()
        except UnicodeDecodeError:
            return None
    if "\0" in rest or "\\" in rest or rest.startswith("/"):
        return None
    for segment in rest.split("/"):
        if segment.startswith(".") and segment != ".well-known":
            return None
    return rest


def type_of(name: str) -> str:
    return _TYPES.get(name.rpartition(".")[2].lower(), "application/octet-stream")


def ranges(value: str, size: int) -> list[tuple[int, int]] | Literal["unsatisfiable"] | None:
    """``[start, end)`` of each range that can be given. None: the field is to be ignored."""
    unit, equals, text = value.partition("=")
    if unit.strip().lower() != "bytes" or not equals:
        return None
    found = []
    asked = text.split(",")
    if len(asked) > RANGES:
        return None
    for one in asked:
        match = _RANGE.fullmatch(one)
        if match is None or (match[1] is None and match[2] is None):
            return None
        if match[1] is None:
            start, end = max(0, size - int(match[2])), size
        else:
            start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] is not None else size
            if match[2] is not None and int(match[2]) < int(match[1]):
                return None
        if start < end:
            found.append((start, end))
    if not found:
        return "unsatisfiable"
    # more than all of it is nobody's need, but a cheap way to make much of little
    return found if sum(e - s for s, e in found) <= size else None


def _listed(field: str, etag: str, *, weak: bool) -> bool:
    if field.strip() == "*":
        return True
    plain = etag.removeprefix("W/") if weak else etag
    tags = [t.strip() for t in field.split(",")]
    return plain in ([t.removeprefix("W/") for t in tags] if weak else tags) and (weak or not etag.startswith("W/"))


def failed(request: Request, facts: Facts) -> Literal[0, 304, 412]:
    """What the request's conditions make of it (RFC 9110, section 13.2.2); 0: they hold."""
    fields = request.fields
    whole = float(int(facts.modified))
    if (match := fields.get("if-match")) is not None:
        if not _listed(match, facts.etag, weak=False):
            return 412
    elif (since := date(fields.get("if-unmodified-since"))) is not None and whole > since:
        return 412
    if (match := fields.get("if-none-match")) is not None:
        if _listed(match, facts.etag, weak=True):
            return 304
    elif whole and (since := date(fields.get("if-modified-since"))) is not None and whole <= since:
        return 304
    return 0


def _asked(request: Request, facts: Facts) -> list[tuple[int, int]] | Literal["unsatisfiable"] | None:
    value = request.fields.get("range")
    if value is None or request.method != "GET":
        return None
    condition = request.fields.get("if-range")
    if condition is not None and condition != (
        facts.etag if condition.startswith(('"', "W/")) else http_date(facts.modified)
    ):
        return None
    if condition is not None and condition.startswith("W/"):
        return None
    return ranges(value, facts.size)


def headers_of(facts: Facts, cache_control: str) -> Headers:
    """The fields of the file itself."""
    found: Headers = [
        ("content-type", facts.type), ("etag", facts.etag), ("accept-ranges", "bytes"),
        ("x-content-type-options", "nosniff"),
    ]  # fmt: skip
    if facts.modified:
        found.append(("last-modified", http_date(facts.modified)))
    if facts.coding:
        found.append(("content-encoding", facts.coding))
    if facts.varies:
        found.append(("vary", "accept-encoding"))
    if cache_control:
        found.append(("cache-control", cache_control))
    return found


def plan(request: Request, facts: Facts, cache_control: str, boundary: str) -> Plan:
    """The answer to GET or HEAD. ``boundary``: a word that is in no file."""
    headers = headers_of(facts, cache_control)
    bad = failed(request, facts)
    if bad == 304:
        return Plan(304, [h for h in headers if h[0] in _IN_304], [])
    if bad:
        return Plan(412, [("content-length", "0")], [])
    wanted = _asked(request, facts)
    if wanted == "unsatisfiable":
        return Plan(416, [("content-range", f"bytes */{facts.size}"), ("content-length", "0")], [])
    if wanted is None:
        whole = [(b"", 0, facts.size)]
        return Plan(200, [*headers, ("content-length", str(facts.size))], whole)
    if len(wanted) == 1:
        ((start, end),) = wanted
        range_ = ("content-range", f"bytes {start}-{end - 1}/{facts.size}")
        return Plan(206, [*headers, range_, ("content-length", str(end - start))], [(b"", start, end)])
    parts = []
    for n, (start, end) in enumerate(wanted):
        head = (
            f"{'' if n == 0 else chr(13) + chr(10)}--{boundary}\r\ncontent-type: {facts.type}\r\n"
            f"content-range: bytes {start}-{end - 1}/{facts.size}\r\n\r\n"
        )
        parts.append((head.encode(), start, end))
    made = Plan(206, [], parts, f"\r\n--{boundary}--\r\n".encode())
    headers = [("content-type", f"multipart/byteranges; boundary={boundary}"), *headers[1:]]
    return made._replace(headers=[*headers, ("content-length", str(made.length))])
