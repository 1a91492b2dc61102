"""`sbom`: the software bill of materials, as it was put into the wheel, or of what is installed here."""

from __future__ import annotations

import json
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Annotated

import typer

from edgeward.cli.output import emit
from edgeward.cli.program import client_version
from edgeward.cli.session import Session
from edgeward.core import sbom as core

_PACKAGED = Path(__file__).parents[1] / "sbom.cdx.json"


def sbom(
    session: Session,
    installed: Annotated[
        bool, typer.Option("--installed", help="What is installed here, with licences, instead of what was released.")
    ] = False,
) -> None:
    """Print the software bill of materials: every package with version, hashes and package URL (CycloneDX 1.5)."""
    output = session.output("json", allowed=("json", "yaml"))
    if not installed and _PACKAGED.exists():
        text = _PACKAGED.read_text(encoding="utf-8")
    else:
        if not installed:
            typer.echo("this is no wheel's installation: it shows what is installed here", err=True)
        text = core.text(here())
    if output == "json":
        sys.stdout.write(text)
    else:
        emit(json.loads(text), output)


def here() -> dict[str, object]:
    """The document of this environment: Edgeward and all that it needs, directly or not."""
    known = {core.normal(d.metadata["Name"]): d for d in distributions() if d.metadata["Name"]}
    found: dict[str, core.Package] = {}
    direct = _needs(known["edgeward"]) if "edgeward" in known else ()
    waiting = list(direct)
    while waiting:
        name = core.normal(waiting.pop())
        dist = known.get(name)
        if dist is None or name in found:
            continue  # for another system, or an extra that is not asked for
        needs = _needs(dist)
        found[name] = core.Package(name, dist.version, licence=_licence(dist), needs=needs)
        waiting += needs
    return core.document(client_version(), found.values(), direct)


def _needs(dist: Distribution) -> tuple[str, ...]:
    import re

    wanted = [r for r in dist.requires or () if "extra ==" not in r]
    return tuple(re.split(r"[^A-Za-z0-9._-]", r, maxsplit=1)[0] for r in wanted)


def _licence(dist: Distribution) -> str:
    expression = dist.metadata["License-Expression"]
    if expression:
        return str(expression)
    classifiers = [c for c in dist.metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    return classifiers[0].rsplit(" :: ", 1)[-1] if classifiers else ""
