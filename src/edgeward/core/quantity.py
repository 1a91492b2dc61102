"""Sizes and durations as people write them: ``64Mi``, ``1.5G``, ``24h``, ``500ms``, ``1h30m``.

Pure. A plain number is bytes, or seconds.
"""

from __future__ import annotations

import re
from fractions import Fraction

_BYTES = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LARGEST = 2**62  # bytes; stores count in 64 bits
_LONGEST = 1e12  # seconds; what is longer breaks timers and dates
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)(k|M|G|T|Ki|Mi|Gi|Ti)?B?")
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")

#: Patterns for JSON Schema and for typed fields (Python's ``$`` alone would take a line end too).
BYTES_PATTERN = r"^[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?B?$(?!\n)"
DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+$(?!\n)"


def parse_bytes(value: str | int) -> int:
    """Bytes of ``"64Mi"`` or of a plain number. Raises ValueError with the accepted forms."""
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{value} is negative")
        if value > _LARGEST:
            raise _no_size(value)
        return value
    match = _SIZE.fullmatch(value)
    if match is None or len(value) > 40:
        raise _no_size(value)
    size = int(Fraction(match[1]) * _BYTES[match[2] or ""])
    if size > _LARGEST:
        raise _no_size(value)
    return size


def parse_duration(value: str | int | float) -> float:
    """Seconds of ``"24h"``, ``"1h30m"`` or of a plain number. Raises ValueError with the accepted forms."""
    if isinstance(value, int | float):
        if value < 0:
            raise ValueError(f"{value} is negative")
        if not value <= _LONGEST:
            raise _no_duration(value)
        return float(value)
    total, at = 0.0, 0
    for match in _PART.finditer(value):
        if match.start() != at:
            break
        total += float(match[1]) * _SECONDS[match[2]]
        at = match.end()
    if at == 0 or at != len(value) or total > _LONGEST:
        raise _no_duration(value)
    return total


def _no_size(value: object) -> ValueError:
    return ValueError(f"{str(value)[:40]!r} is no size: write bytes as 65536, 64Ki, 64Mi, 1G")


def _no_duration(value: object) -> ValueError:
    return ValueError(f"{str(value)[:40]!r} is no duration: write seconds as 90, 90s, 15m, 24h, 7d, 500ms")


def format_bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")


def format_age(seconds: float) -> str:
    s = int(max(0, seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if s >= 2 * size:
            return f"{s // size}{unit}"
    return f"{s}s"
