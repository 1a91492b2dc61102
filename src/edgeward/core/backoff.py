"""How long to wait before the next try: twice as long each time, up to an end. Pure.

One place for it, since the plain formula is a trap: after some thousand tries, which a site without a link reaches in
a day, the power is no number any more that a float can hold, and what tries ends by that.
"""

from __future__ import annotations

#: Doublings after which nothing grows any more.
_MOST = 40


def backoff(failures: int, first: float, most: float) -> float:
    """Seconds to wait after so many ``failures`` in a row: ``first`` after one, ``most`` at the end."""
    return min(most, first * 2.0 ** max(0, min(failures - 1, _MOST)))
