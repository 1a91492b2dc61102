"""Time and randomness for shells. Pure modules get ``now`` as an argument and never come here."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime


def now() -> float:
    """Seconds since 1970, for people and records."""
    return time.time()


def monotonic() -> float:
    """Seconds that never step back, for deadlines and ages."""
    return time.monotonic()


def timestamp(at: float | None = None) -> str:
    """RFC 3339 in UTC with milliseconds, e.g. ``2026-11-24T10:00:00.000Z``."""
    t = datetime.fromtimestamp(time.time() if at is None else at, UTC)
    return t.strftime("%Y-%m-%dT%H:%M:%S.") + f"{t.microsecond // 1000:03d}Z"


def parse_timestamp(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def new_id(n: int = 8) -> str:
    """A random id of ``n`` letters and digits (no vowels, so no words)."""
    alphabet = "bcdfghjklmnpqrstvwxz0123456789"
    return "".join(secrets.choice(alphabet) for _ in range(n))
