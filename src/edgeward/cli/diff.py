"""`diff`: what `apply` would change, and what sites already have otherwise.

Both sides are brought to the same form first (all defaults filled in, secrets hidden), so only what matters shows.
Exit code 0 when nothing differs, 1 when something does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

from edgeward.cli.output import console, to_yaml, write
from edgeward.cli.read import overrides_of
from edgeward.cli.session import Session
from edgeward.cli.write import Files
from edgeward.core.errors import NotFound
from edgeward.core.registry import HIDDEN, Kind, redact

if TYPE_CHECKING:
    from edgeward.cli.client import Api
    from edgeward.cli.manifests import Declared

Doc = dict[str, Any]
_COLOURS = {"-": "red", "+": "green", "@": "cyan"}


def diff(session: Session, filename: Files = None) -> None:
    """Show what apply would change, as a unified diff; exit code 1 if anything.

    Overrides of sites (what they changed for themselves) are shown behind the resource; they do not count.
    """
    from edgeward.cli.manifests import read_declared

    session.output(allowed=("table",))
    differs = False
    with session.api() as api:
        for d in read_declared(session, filename or []):
            lines = list(_against(api, d))
            differs = differs or bool(lines)
            _show(lines)
    if differs:
        raise typer.Exit(1)


def _against(api: Api, d: Declared) -> Iterator[str]:
    from edgeward.cli.manifests import intent, intent_of

    try:
        current: Doc | None = api.get(d.kind, d.namespace, d.name)
    except NotFound:
        current = None
    new = intent(d.resource)
    old = intent_of(current) if current is not None else None
    shown = mask(d.kind, old, new)
    yield from unified(str(d.key), shown[0], shown[1])
    for override in overrides_of(api, current) if current is not None else ():
        spec = override.get("spec") or {}
        write(f"# {d.key}: site {spec.get('site')} has it otherwise (override/{override['metadata']['name']}):")
        for line in to_yaml(redact_patch(d.kind, spec.get("patch"))).splitlines():
            write(f"#   {line}")


def mask(kind: Kind, old: Doc | None, new: Doc) -> tuple[Doc | None, Doc]:
    """Both sides with secrets hidden; a secret that differs is still seen to differ."""
    was = redact(old) if old is not None else None
    now = redact(new)
    for name in kind.secret_fields:
        mine = (new.get("spec") or {}).get(name)
        before = ((old or {}).get("spec") or {}).get(name)
        if mine == before or old is None:
            continue
        if isinstance(mine, Mapping) and isinstance(before, Mapping):
            hidden = {k: HIDDEN if before.get(k) == v else f"{HIDDEN} (changed)" for k, v in mine.items()}
            now["spec"][name] = hidden
        elif mine:
            now["spec"][name] = f"{HIDDEN} (changed)"
    return was, now


def redact_patch(kind: Kind, patch: object) -> object:
    """An override's patch of the spec, without secrets."""
    if not isinstance(patch, Mapping):
        return patch
    return redact({"kind": kind.name, "spec": dict(patch)})["spec"]


def unified(name: str, old: Doc | None, new: Doc) -> list[str]:
    """The unified diff of two documents; empty when they are equal."""
    before = to_yaml(old).splitlines() if old is not None else []
    label = f"{name} (now)" if old is not None else "(none)"
    lines = difflib.unified_diff(before, to_yaml(new).splitlines(), label, f"{name} (file)", lineterm="")
    return list(lines)


def _show(lines: list[str]) -> None:
    if not lines:
        return
    if console().no_color:
        for line in lines:
            write(line)
        return
    from rich.text import Text

    for line in lines:
        style = "bold" if line.startswith(("---", "+++")) else _COLOURS.get(line[:1], "")
        console().print(Text(line, style=style), soft_wrap=True)
