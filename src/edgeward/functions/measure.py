"""What the instances of a function take, asked of the kernel when somebody wants to know."""

from __future__ import annotations

from typing import Any

from edgeward.core.proc import usage


def with_memory(numbers: dict[str, Any]) -> dict[str, Any]:
    """Adds ``memory`` to each running instance: bytes, shared pages by their share (PSS) where the kernel tells it."""
    for one in numbers.get("running", []):
        found = usage(one["pid"]) if one["pid"] else None
        one["memory"] = found.memory if found is not None else 0
    return numbers
