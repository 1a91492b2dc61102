"""`override list|promote|drop`: what sites changed for themselves, and what the operator makes of it.

A local change of something that other sites share stays that site's own until somebody decides here: promote makes it
everybody's, drop takes it back.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgeward.cli.kinds import find_kind
from edgeward.cli.output import age, cell, emit, print_rows, write
from edgeward.cli.session import Failures, Session, command
from edgeward.core.errors import EdgewardError
from edgeward.core.registry import redact

app = typer.Typer(no_args_is_help=True, add_completion=False, help="What sites changed for themselves.")

Names = Annotated[list[str], typer.Argument(metavar="NAME...", show_default=False)]


def list_overrides(session: Session) -> None:
    """List the overrides of sites."""
    output = session.output()
    kind = find_kind("override")
    with session.api() as api:
        items: list[dict[str, Any]] = api.list(kind, session.scope(kind))["items"]
    if output in ("json", "yaml"):
        emit({"items": [redact(i) for i in items]}, output)
    elif output == "name":
        for item in items:
            write(f"override/{item['metadata']['name']}")
    elif not items:
        typer.echo("no overrides", err=True)
    else:
        titles = ["NAME", "SITE", "OF", "CHANGES", "REASON", "AGE"]
        rows = [_row(i) for i in items]
        if session.all_namespaces:
            titles.insert(0, "NAMESPACE")
            rows = [[i["metadata"].get("namespace"), *row] for i, row in zip(items, rows, strict=True)]
        print_rows(titles, rows)


def _row(item: dict[str, Any]) -> list[object]:
    meta, spec = item["metadata"], item.get("spec") or {}
    target = spec.get("target") or {}
    of = f"{str(target.get('kind', '')).lower()}/{target.get('name', '')}"
    # names only: the values may be of a secret, and describe shows them in full where they are not
    changes = cell(sorted(spec.get("patch") or {}))
    return [meta["name"], spec.get("site"), of, changes, spec.get("reason"), age(meta.get("creationTimestamp"))]


def promote(session: Session, names: Names) -> None:
    """Make a site's change everybody's, and end the override."""
    session.output(allowed=("table",))
    kind = find_kind("override")
    failures = Failures()
    with session.api() as api:
        for name in names:
            try:
                api.request("POST", api.path(kind, session.one(kind), name.removeprefix("override/")) + "/promote")
            except EdgewardError as e:
                failures.add(e)
                continue
            write(f"override/{name.removeprefix('override/')} promoted")
    failures.finish()


def drop(session: Session, names: Names) -> None:
    """Take a site's change back: the site gets what all have."""
    session.output(allowed=("table",))
    kind = find_kind("override")
    failures = Failures()
    with session.api() as api:
        for name in names:
            try:
                api.delete(kind, session.one(kind), name.removeprefix("override/"))
            except EdgewardError as e:
                failures.add(e)
                continue
            write(f"override/{name.removeprefix('override/')} dropped")
    failures.finish()


app.command("list")(command(list_overrides))
app.command("promote")(command(promote))
app.command("drop")(command(drop))
