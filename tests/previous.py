"""The previous release, to run beside this one: the wheel in tests/data/previous (``scripts/previous.sh`` makes it)."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / "tests" / "data" / "previous"


def unpacked(folder: Path) -> Path:
    """The wheel's content below ``folder``, for PYTHONPATH; its dependencies are this environment's."""
    (wheel,) = WHEELS.glob("edgeward-*.whl")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(folder)
    return folder


def environment(release: Path, **more: str) -> dict[str, str]:
    """The environment of a process of that release; ``ROOT / "src"`` is this one."""
    return {**os.environ, "PYTHONPATH": str(release), **more}
