"""Which pages of other origins may read a Route's answers (the Fetch standard, section 3.2). Pure.

The gateway answers the browser's question before the request by itself, and says the same at every answer; what the
target says about it is replaced, so that there is one place to declare it. Answers in the cache stay the same for all.
"""

from __future__ import annotations

import msgspec

from edgeward.gateway.http1 import Headers, Request

_PREFIX = "access-control-"


class CorsConfig(msgspec.Struct, frozen=True):
    origins: tuple[str, ...]
    methods: tuple[str, ...] = ()
    #: Lower case; ``*``: any.
    headers: tuple[str, ...] = ()
    expose: tuple[str, ...] = ()
    credentials: bool = False
    max_age: int = 600


def is_preflight(request: Request) -> bool:
    fields = request.fields
    return request.method == "OPTIONS" and "origin" in fields and "access-control-request-method" in fields


def _origin(config: CorsConfig, request: Request) -> Headers:
    """Who may read it; without ``access-control-allow-origin`` the browser lets nobody."""
    if "*" in config.origins:
        return [("access-control-allow-origin", "*")]
    origin = request.fields.get("origin", "")
    vary = [("vary", "origin")]
    if origin not in config.origins:
        return vary
    found = [("access-control-allow-origin", origin), *vary]
    return [*found, ("access-control-allow-credentials", "true")] if config.credentials else found


def preflight(config: CorsConfig, request: Request) -> Headers:
    """The fields of the answer to a preflight request."""
    fields = _origin(config, request)
    if not fields or fields[0][0] != "access-control-allow-origin":
        return fields
    wished = [h.strip().lower() for h in request.fields.get("access-control-request-headers", "").split(",")]
    allowed = [h for h in wished if h and ("*" in config.headers or h in config.headers)]
    fields.append(("access-control-allow-methods", ", ".join(config.methods)))
    if allowed:
        fields.append(("access-control-allow-headers", ", ".join(allowed)))
    fields.append(("access-control-max-age", str(config.max_age)))
    return fields


def with_cors(config: CorsConfig | None, request: Request, headers: Headers) -> Headers:
    """An answer's fields with the Route's word in place of the target's."""
    if config is None:
        return headers
    kept = [h for h in headers if not h[0].startswith(_PREFIX)]
    expose = [("access-control-expose-headers", ", ".join(config.expose))] if config.expose else []
    return [*kept, *_origin(config, request), *expose]
