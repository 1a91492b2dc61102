"""`persite list|promote|drop`: in what single sites differ from an App's one declaration, and what becomes of it.

An entry of ``perSite`` is a canary when it is tried at one site first: promote makes it what all sites have, drop takes
it back. What a site changed for itself while it was cut is an Override instead (``override``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from edgeward.cli.kinds import find_kind
from edgeward.cli.output import cell, emit, print_rows, write
from edgeward.cli.session import Session, command
from edgeward.core.errors import EdgewardError
from edgeward.workloads.persite import dropped, promoted

app = typer.Typer(no_args_is_help=True, add_completion=False, help="In what sites differ from an App's declaration.")

Name = Annotated[str, typer.Argument(metavar="APP", show_default=False)]
Site = Annotated[str, typer.Argument(metavar="SITE", show_default=False)]


def list_sites(session: Session, name: Name) -> None:
    """List the sites of an App: what each has for itself, what is wanted there and runs there."""
    output = session.output(allowed=("table", "json", "yaml"))
    kind = find_kind("app")
    with session.api() as api:
        doc = api.get(kind, session.one(kind), name.removeprefix("app/"))
    spec, status = doc.get("spec") or {}, doc.get("status") or {}
    own: dict[str, Any] = spec.get("perSite") or {}
    seen: dict[str, Any] = status.get("sites") or {}
    items = [{"site": s, "own": own.get(s, {}), **seen.get(s, {})} for s in sorted({*own, *seen})]
    if output in ("json", "yaml"):
        emit({"items": items}, output)
    elif not items:
        typer.echo("the same at all sites", err=True)
    else:
        rows = [
            [i["site"], cell(sorted(i["own"])), f"{i.get('running', 0)}/{i.get('wanted', 0)}", i.get("version", "")]
            for i in items
        ]
        print_rows(["SITE", "DIFFERS IN", "READY", "VERSION"], rows)


def promote(session: Session, name: Name, site: Site) -> None:
    """Make what a site has what all sites have; how many instances there are stays each site's own."""
    _change(session, name, site, promoted, "promoted")


def drop(session: Session, name: Name, site: Site) -> None:
    """Take back what a site has for itself: it gets what all have."""
    _change(session, name, site, dropped, "dropped")


def _change(
    session: Session, name: str, site: str, change: Callable[[dict[str, Any], str], dict[str, Any]], word: str
) -> None:
    session.output(allowed=("table",))
    kind, name = find_kind("app"), name.removeprefix("app/")
    with session.api() as api:
        doc = api.get(kind, session.one(kind), name)
        try:
            spec = change(doc["spec"], site)
        except EdgewardError as e:
            e.resource = f"App/{name}"
            raise
        # with the revision that was read: what somebody else wrote meanwhile is not undone
        api.replace(kind, session.one(kind), name, {k: v for k, v in doc.items() if k != "status"} | {"spec": spec})
    write(f"app/{name}: site {site} {word}")


app.command("list")(command(list_sites))
app.command("promote")(command(promote))
app.command("drop")(command(drop))
