"""Content codings: what a client takes (RFC 9110, section 12.5.3). Pure."""

from __future__ import annotations

from functools import lru_cache

#: Media types whose bytes shrink; others are compressed by their own format.
_TEXTS = frozenset(
    {"application/json", "application/javascript", "application/xml", "application/xhtml+xml", "application/wasm",
     "application/manifest+json", "application/rss+xml", "application/atom+xml", "application/ld+json",
     "application/geo+json", "application/x-ndjson", "application/problem+json", "application/graphql-response+json",
     "image/svg+xml", "image/bmp", "image/x-icon", "font/ttf", "font/otf"}
)  # fmt: skip


def compressible(media_type: str) -> bool:
    """Whether answers of a ``Content-Type`` are worth it."""
    name = media_type.partition(";")[0].strip().lower()
    return name.startswith("text/") or name in _TEXTS or name.endswith(("+json", "+xml"))


@lru_cache(256)
def weights(accept: str) -> dict[str, float]:
    """The codings of an ``Accept-Encoding`` field with their q values; what cannot be read counts as refused."""
    found: dict[str, float] = {}
    for part in accept.lower().split(","):
        name, *parameters = [p.strip() for p in part.split(";")]
        q = 1.0
        for p in parameters:
            key, _, value = p.partition("=")
            if key.strip() == "q":
                try:
                    q = float(value)
                except ValueError:
                    q = 0.0
        if name:
            found[name] = q if 0.0 <= q <= 1.0 else 0.0
    return found


def ranked(accept: str | None, offered: tuple[str, ...]) -> tuple[str, ...]:
    """The offered codings that the client takes no less gladly than none, the best first; in our own order where it
    likes several alike."""
    if not accept or len(accept) > 1024:
        return ()
    asked = weights(accept)
    anything = asked.get("*", 0.0)
    rated = [(-asked.get(name, anything), n, name) for n, name in enumerate(offered)]
    least = asked.get("identity", 0.0)
    return tuple(name for q, _, name in sorted(rated) if -q > 0.0 and -q >= least)


def best(accept: str | None, offered: tuple[str, ...]) -> str:
    """The first of :func:`ranked`; empty: none."""
    found = ranked(accept, offered)
    return found[0] if found else ""
