"""Answers made smaller on their way (gzip, RFC 1952): which, how, and how much of a processor that may take. Pure.

What streams through is compressed piece by piece at the cheapest level and never held back: where the target sends
without saying how long, each piece is flushed. What is kept (cache, small files) is compressed once, well, and that is
kept too. An answer that is compressed is another representation: it varies by ``Accept-Encoding``, its ETag is weak,
and it has no ranges.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import msgspec

from edgeward.gateway.cache import directives
from edgeward.gateway.coding import compressible, ranked
from edgeward.gateway.http1 import Headers, Request

#: Seconds of a processor, of each second, for compression on the way; what may be saved up.
SHARE, BURST = 0.3, 1.0
#: Answers that are compressed on their way at once; each has some 64 KiB for it.
LIVE = 256
#: What is kept is compressed at once up to this size, else in a thread.
INLINE = 16 * 1024
_LIVE_LEVEL, _KEPT_LEVEL = 1, 6
_GZIP = 16
#: They tell of the bytes of a body.
_DIGESTS = frozenset({"content-digest", "repr-digest", "digest", "content-md5"})


class CompressConfig(msgspec.Struct, frozen=True):
    min_size: int = 1024
    #: More media types than those known to shrink.
    types: tuple[str, ...] = ()


def takes(request: Request) -> bool:
    """Whether the client takes gzip; a part of an answer is given as it is."""
    accept = request.fields.get("accept-encoding")
    return accept is not None and "range" not in request.fields and bool(ranked(accept, ("gzip",)))


def eligible(config: CompressConfig, status: int, fields: Mapping[str, str], length: int) -> bool:
    """Whether an answer is given compressed to those who take that. ``length``: negative where not known."""
    if status < 200 or status in (204, 206, 304) or 0 <= length < config.min_size or "content-encoding" in fields:
        return False
    media = fields.get("content-type", "")
    if not (compressible(media) or media.partition(";")[0].strip().lower() in config.types):
        return False
    return "no-transform" not in directives(fields.get("cache-control")) and not _DIGESTS & fields.keys()


def with_vary(headers: Headers) -> Headers:
    """The same, and that it depends on what the client takes."""
    told = [v for n, v in headers if n == "vary"]
    names = {w.strip().lower() for v in told for w in v.split(",")}
    if "*" in names or "accept-encoding" in names:
        return headers
    return [*headers, ("vary", "accept-encoding")]


def pressed(headers: Headers) -> Headers:
    """The fields of the compressed representation, without its length."""
    found: Headers = [("content-encoding", "gzip")]
    for name, value in headers:
        if name == "etag" and not value.startswith("W/"):
            found.append((name, f"W/{value}"))
        elif name not in ("content-length", "accept-ranges"):
            found.append((name, value))
    return with_vary(found)


def press(body: bytes) -> bytes:
    """The whole of what is kept."""
    return zlib.compress(body, _KEPT_LEVEL, zlib.MAX_WBITS | _GZIP)


class Press:
    """One answer on its way. ``flush``: each piece goes out at once."""

    __slots__ = ("_flush", "_made")

    def __init__(self, *, flush: bool) -> None:
        # a small window: some thousand streams that are open for hours must not cost 256 KiB each
        self._made = zlib.compressobj(_LIVE_LEVEL, zlib.DEFLATED, 13 | _GZIP, 6)
        self._flush = flush

    def feed(self, data: bytes) -> bytes:
        out = self._made.compress(data)
        return out + self._made.flush(zlib.Z_SYNC_FLUSH) if self._flush else out

    def end(self) -> bytes:
        return self._made.flush()


class Budget:
    """How much of a processor compression may take: beyond it answers go out as they are."""

    def __init__(self, share: float = SHARE, burst: float = BURST) -> None:
        self._share, self._burst = share, burst
        self._left, self._at = burst, 0.0
        self.live = 0
        self.refused = 0

    def may(self, now: float) -> bool:
        """Whether one more answer may be compressed on its way; then :meth:`spent` tells what that took."""
        self._left = min(self._burst, self._left + max(0.0, now - self._at) * self._share)
        self._at = now
        if self._left > 0.0 and self.live < LIVE:
            return True
        self.refused += 1
        return False

    def spent(self, seconds: float) -> None:
        self._left = max(-self._burst, self._left - seconds)
