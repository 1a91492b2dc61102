"""Answers of the gateway's own: problem documents (RFC 9457) that say what was refused, by whom, and why. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from edgeward.gateway.http1 import REASONS, Headers, write_response


def problem_parts(
    status: int,
    detail: str,
    *,
    route: str = "",
    target: str = "",
    remedy: str = "",
    close: bool = False,
    head: bool = False,
    headers: Iterable[tuple[str, str]] = (),
) -> tuple[Headers, bytes]:
    """Fields and body of the answer. ``head``: to HEAD, without its body."""
    doc: dict[str, object] = {"title": REASONS.get(status, "Error"), "status": status, "detail": detail}
    doc |= {k: v for k, v in (("route", route), ("target", target), ("remedy", remedy)) if v}
    body = msgspec.json.encode(doc)
    fields = [
        ("content-type", "application/problem+json"),
        ("content-length", str(len(body))),
        ("cache-control", "no-store"),
        *headers,
    ]
    if close:
        fields.append(("connection", "close"))
    return fields, b"" if head else body


def problem(status: int, detail: str, *, close: bool = False, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """The whole answer, as HTTP/1.1 writes it."""
    fields, body = problem_parts(status, detail, close=close, headers=headers)
    return write_response(status, fields) + body
