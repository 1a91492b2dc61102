"""Where the code and the packages of functions lie on a node: folders named by digests. Pure.

``functions/code/<64 hex digits>/`` is an archive's content. ``functions/packages/<64 hex digits>-<Python>/`` is what
the wheels of the lock file with this digest install for one Python. A folder is there whole, or not at all; they are
made by ``stock.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

CODE, PACKAGES = "code", "packages"


def code_folder(functions: Path, hex: str) -> Path:
    return functions / CODE / hex


def packages_folder(functions: Path, lock: str) -> Path:
    """A Python that was replaced by another minor version finds none of its own and gets one."""
    return functions / PACKAGES / f"{lock}-cp{sys.version_info[0]}{sys.version_info[1]}"


def shelves(functions: Path, code: str, packages: str) -> list[Path]:
    """The folders of a version, code first; nothing for what is empty."""
    found = [code_folder(functions, code)] if code else []
    return [*found, packages_folder(functions, packages)] if packages else found
