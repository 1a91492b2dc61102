"""`site hold|release|status`: whether a site takes what the hub changes. The site says so, by any of its nodes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgeward.cli.output import emit, write
from edgeward.cli.session import Session, UsageError, command

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Whether a site takes the hub's changes.")

Name = Annotated[str, typer.Argument(metavar="SITE", show_default=False)]


def _ask(session: Session, method: str, site: str, what: str) -> dict[str, Any]:
    if session.at is None:
        raise UsageError("it is the site that holds: name one of its nodes with --at NODE")
    with session.api() as api:
        return api.request(method, f"/api/v1/sites/{site}/{what}")


def hold(session: Session, site: Name) -> None:
    """Have the hub's changes wait, and the site's own, until `site release`: at all nodes of the site."""
    session.output(allowed=("table",))
    _ask(session, "POST", site.removeprefix("site/"), "hold")
    write(f"site/{site.removeprefix('site/')} held")


def release(session: Session, site: Name) -> None:
    """Take the hub's changes again, and send the site's."""
    session.output(allowed=("table",))
    _ask(session, "POST", site.removeprefix("site/"), "release")
    write(f"site/{site.removeprefix('site/')} released")


def status(session: Session, site: Name) -> None:
    """Whether the site holds, and what waits."""
    output = session.output(allowed=("table", "json", "yaml"))
    said = _ask(session, "GET", site.removeprefix("site/"), "hold")
    if output != "table":
        emit(said, output)
    elif not said:
        write("not held")
    else:
        write(f"held since {said['since']} by {said['by']}, {said['waiting']} changes of the hub wait")
        for name in said.get("changes", []):
            write(name)


for _command in (hold, release, status):
    app.command(_command.__name__)(command(_command))
