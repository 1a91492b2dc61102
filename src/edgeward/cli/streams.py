"""`stream list` and `stream read`: the readings that sites delivered to the hub.

`read -o json` passes the hub's lines on as they come, one line a message: `seq, node, topic, payload, time`. Scripts
count them, so nothing is added, reordered or reformatted.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any
from urllib.parse import quote

import typer

from edgeward.cli.observe import Follow, count
from edgeward.cli.output import Grid, emit, print_rows, record_rows, write
from edgeward.cli.session import Session, UsageError, command
from edgeward.core.resource import check_name

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Read what sites delivered.")

_COLUMNS = ("seq", "time", "node", "topic", "payload")
_LIST_COLUMNS = ("name", "messages", "bytes", "nodes")


def list_streams(session: Session) -> None:
    """List the hub's streams."""
    output = session.output(allowed=("table", "wide", "json", "yaml", "name"))
    with session.api() as api:
        items: list[dict[str, Any]] = list(api.request("GET", "/api/v1/streams").get("items") or [])
    if output in ("json", "yaml"):
        emit({"items": items}, output)
    elif output == "name":
        for item in items:
            write(f"stream/{item.get('name')}")
    elif not items:
        typer.echo("no streams", err=True)
    else:
        print_rows(*record_rows(items, _LIST_COLUMNS, everything=output == "wide"))


def read(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="STREAM", show_default=False)],
    start: Annotated[str, typer.Option("--from", metavar="SEQ", help="Begin at this sequence number.")] = "0",
    follow: Follow = False,
    limit: Annotated[str, typer.Option("--limit", metavar="N", help="Stop behind N messages.")] = "",
) -> None:
    """Print the messages of a stream, oldest first; with -o json one line a message."""
    output = session.output(allowed=("table", "wide", "json"))
    check_name(name, "STREAM", "")
    query = {"from": count(start, "--from")}
    if limit:
        query["limit"] = count(limit, "--limit")
        if int(limit) == 0:
            raise UsageError("--limit 0 prints nothing: leave it out for all messages")
    if follow:
        query["follow"] = "true"
    path = f"/api/v1/streams/{quote(name, '')}"
    with session.api() as api:
        if output == "json":
            for chunk in api.stream(path, query=query, accept="application/x-ndjson", follow=follow):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            return
        grid = Grid([c.upper() for c in _COLUMNS], (14, 24, 10, 20, 7))
        block: list[list[object]] = []
        header, seen = True, False
        for line in api.lines(path, query=query, accept="application/x-ndjson", follow=follow):
            if not line.strip():
                continue  # keep-alive
            message, seen = json.loads(line), True
            block.append([_shown(message.get(c)) for c in _COLUMNS])
            if follow or len(block) >= 1000:
                grid.print(block, header=header)
                sys.stdout.flush()
                block, header = [], False
        if block:
            grid.print(block, header=header)
        if not seen and not follow:
            typer.echo(f"no messages in stream {name} from {start} on", err=True)


def _shown(value: object) -> object:
    """A payload as one word: what is JSON stays JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


app.command("list")(command(list_streams))
app.command("read")(command(read))
