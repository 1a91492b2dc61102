"""Time and randomness for shells. Pure modules get ``now`` as an argument and never come here.

Three clocks: :func:`now` for people and records, which somebody may set at any time; :func:`monotonic` for waits within
a process; :func:`steady` for ages and deadlines that outlive a process.
"""

from __future__ import annotations

import secrets
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from edgeward.core.errors import Invalid
from edgeward.core.files import read_json, write_json

#: What was to be added to :func:`boottime` for the wall clock when this process, or one before it, first looked.
_base = [0.0]


def now() -> float:
    """Seconds since 1970, for people and records."""
    return time.time()


def monotonic() -> float:
    """Seconds that never step back, for deadlines and ages."""
    return time.monotonic()


def boottime() -> float:
    """Seconds since the machine was started, its sleep included: they never step."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


def boot() -> str:
    """Which run of the machine this is; empty where that is not known (not Linux)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def steady() -> float:
    """Seconds since 1970 as far as was known when the machine was started: they do not step when the clock is set."""
    if not _base[0]:
        _base[0] = time.time() - boottime()
    return boottime() + _base[0]


def keep_steady(path: Path) -> None:
    """Has :func:`steady` go on where the process before this one was, if the machine was not started anew since."""
    try:
        kept = read_json(path, {})
    except Invalid:
        kept = {}
    here = boot()
    if here and isinstance(kept, dict) and kept.get("boot") == here and isinstance(kept.get("base"), float):
        _base[0] = kept["base"]
    else:
        _base[0] = time.time() - boottime()
        write_json(path, {"boot": here, "base": _base[0]})


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
