"""Puts the software bill of materials into the wheel (a build hook of hatchling), or prints it: `python scripts/sbom.py`.

It is made of the lock file that installations use, by `edgeward/core/sbom.py`; the build needs no network and nothing
of Edgeward installed.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def made(root: Path = ROOT) -> str:
    spec = importlib.util.spec_from_file_location("edgeward_sbom", root / "src" / "edgeward" / "core" / "sbom.py")
    assert spec is not None and spec.loader is not None
    sbom = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = sbom
    spec.loader.exec_module(sbom)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    direct = [re.split(r"[^A-Za-z0-9._-]", d, maxsplit=1)[0] for d in project["dependencies"]]
    packages = sbom.locked((root / "requirements.lock").read_text())
    text: str = sbom.text(sbom.document(project["version"], packages, direct))
    return text


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # only printing
    pass
else:

    class SbomHook(BuildHookInterface):  # type: ignore[type-arg]
        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            if version == "editable":
                return
            target = Path(self.root) / "build" / "sbom.cdx.json"
            target.parent.mkdir(exist_ok=True)
            target.write_text(made(Path(self.root)))
            build_data["force_include"][str(target)] = "edgeward/sbom.cdx.json"


if __name__ == "__main__":
    sys.stdout.write(made())
