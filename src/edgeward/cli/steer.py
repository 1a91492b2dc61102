"""`steer`: which site serves a client, and why."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from edgeward.cli.output import emit, write
from edgeward.cli.session import Session, UsageError


def steer(
    session: Session,
    client: Annotated[
        str, typer.Argument(metavar="[IP]", help="The client's address; yours as the hub sees it if left out.")
    ] = "",
) -> None:
    """Say which site serves a client, where it is told to go, and why."""
    output = session.output(allowed=("table", "json", "yaml"))
    if session.at is not None:
        raise UsageError("the hub steers: ask it without --at")
    with session.api() as api:
        query = f"?{urlencode({'client': client})}" if client else ""
        got: dict[str, Any] = api.request("GET", f"/api/v1/steer{query}")
    if output != "table":
        emit(got, output)
        return
    write(f"client    {got['client']}")
    write(f"site      {got['site'] or 'none'}")
    for address in got["addresses"]:
        write(f"address   {address}")
    for why in got["why"]:
        write(f"because   {why}")
