"""Another wall clock for a process of a test (lab/skew.py), or a skipped test where the machine forbids that."""

from __future__ import annotations

import pytest

from edgeward.core.errors import Refused
from edgeward.lab.skew import possible, set_skew


def skew(pid: int, seconds: int) -> None:
    if why := possible():
        pytest.skip(why)
    try:
        set_skew(pid, seconds)
    except Refused as e:  # a container without the right, or Yama (ptrace_scope)
        pytest.skip(str(e))
