"""`logs`, `events`, `top`, `journal`, `audit`: what happens and what happened.

In come streams and records of the API, out goes text line by line as it comes. A log line is passed on as the app wrote
it; control characters are shown as such on a terminal only, a pipe gets the bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from edgeward.cli.output import Grid, emit, print_rows, record_rows, write
from edgeward.cli.session import Session, UsageError
from edgeward.cli.write import since_of
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.resource import check_name

Record = dict[str, Any]
_RECORD_FORMATS = ("table", "wide", "json", "yaml")

Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on printing what comes, until Ctrl-C.")]
Limit = Annotated[str, typer.Option("--limit", metavar="N", help="At most the last N.")]

EVENT_COLUMNS = ("time", "type", "node", "resource", "reason", "message")
JOURNAL_COLUMNS = ("time", "resource", "site", "node", "rule", "outcome", "loser", "why")
AUDIT_COLUMNS = ("time", "actor", "verb", "kind", "namespace", "name", "revision", "outcome", "source")
NODE_COLUMNS = ("name", "site", "online", "load1", "agentMB", "planeMB", "natsMB")
WAN_COLUMNS = ("name", "site", "online", "sent", "received", "kbitUp", "kbitDown", "rttMs", "connections")
APP_COLUMNS = ("namespace", "name", "node", "instance", "cpu", "memory")


def count(text: str, option: str) -> str:
    """A number of the command line, as the query takes it."""
    if not text.isdigit():
        raise UsageError(f"{option} {text}: write a number, e.g. {option} 100")
    return text


def logs(
    session: Session,
    app: Annotated[str, typer.Argument(metavar="APP", help="The app's name.", show_default=False)],
    follow: Follow = False,
    tail: Annotated[str, typer.Option("--tail", metavar="N", help="Begin with the last N lines.")] = "",
    since: Annotated[str, typer.Option("--since", metavar="DURATION", help="Only what is younger, e.g. 10m.")] = "",
    node: Annotated[str, typer.Option("--node", metavar="NODE", help="Only of this node.")] = "",
    instance: Annotated[str, typer.Option("--instance", metavar="ID", help="Only of this instance.")] = "",
) -> None:
    """Print what an app wrote, of all its instances."""
    from edgeward.cli.kinds import find_kind

    session.output(allowed=("table",))
    kind = find_kind("app")
    name = check_name(app.removeprefix("app/"), "APP", "")
    query = {"node": node, "instance": instance}
    if tail:
        query["tail"] = count(tail, "--tail")
    if since:
        query["since"] = since_of(since)
    if follow:
        query["follow"] = "true"
    with session.api() as api:
        path = api.path(kind, session.one(kind), name) + "/logs"
        asked = {k: v for k, v in query.items() if v}
        if sys.stdout.isatty():
            for line in api.lines(path, query=asked, accept="text/plain", follow=follow):
                write(harmless(line))
                sys.stdout.flush()
        else:
            for chunk in api.stream(path, query=asked, accept="text/plain", follow=follow):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()


#: An escape that does not begin a colour (ESC [ ... m).
_ESCAPE = re.compile(r"\x1b(?!\[[0-9;]*m)")


def harmless(line: str) -> str:
    """A log line for a terminal: colours work, anything else that would drive the terminal is shown, not obeyed."""
    line = _ESCAPE.sub(r"\\x1b", line)
    return "".join(c if c.isprintable() or c in "\t\x1b" else repr(c)[1:-1] for c in line)


def events(
    session: Session,
    follow: Follow = False,
    since: Annotated[str, typer.Option("--since", metavar="SEQ", help="Only events behind this number.")] = "",
    limit: Limit = "200",
) -> None:
    """Print what happened, in words.

    With --follow and -o json each event is one line.
    """
    output = session.output(allowed=_RECORD_FORMATS)
    query = {"limit": count(limit, "--limit")}
    if since:
        query["since"] = count(since, "--since")
    with session.api() as api:
        if not follow:
            _records(api.request("GET", "/api/v1/events", query=query), output, EVENT_COLUMNS, "events")
            return
        query["follow"] = "true"
        # widths of what usually comes, so that lines stay under one another
        grid = Grid([c.upper() for c in EVENT_COLUMNS], (24, 7, 10, 20, 20, 7))
        header = True
        for _event, record in api.sse("/api/v1/events", query=query):
            if not record.get("message") and not record.get("reason"):
                continue  # a bookmark
            if output in ("json", "yaml"):
                write(json.dumps(record, ensure_ascii=False))
            else:
                grid.print([[record.get(c) for c in EVENT_COLUMNS]], header=header)
                header = False
            sys.stdout.flush()


def journal(session: Session, limit: Limit = "200") -> None:
    """Print how changes that were made while the link was cut were decided, and which lost."""
    output = session.output(allowed=_RECORD_FORMATS)
    with session.api() as api:
        answer = api.request("GET", "/api/v1/journal", query={"limit": count(limit, "--limit")})
    _records(answer, output, JOURNAL_COLUMNS, "entries in the journal")


def audit(
    session: Session,
    what: Annotated[str, typer.Argument(metavar="[list|verify|export]")] = "list",
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Of export and verify; - is the terminal.")] = "",
    limit: Limit = "200",
) -> None:
    """Print who wrote what, and when; check that nobody changed it; take it along.

    `audit verify` asks the server, `audit verify FILE` checks an export without it; the exit code is 3 when a record
    was changed, taken out or cut off. `audit export FILE` writes the whole chain.
    """
    output = session.output(allowed=_RECORD_FORMATS)
    if what == "list":
        with session.api() as api:
            answer = api.request("GET", "/api/v1/audit", query={"limit": count(limit, "--limit")})
        _records(answer, output, AUDIT_COLUMNS, "writes")
    elif what == "verify":
        _audit_verify(session, file, output)
    elif what == "export":
        _audit_export(session, file)
    else:
        raise UsageError(f"audit {what}: audit list, audit verify, or audit export")


def _audit_verify(session: Session, file: str, output: str) -> None:
    if file:
        from edgeward.core.chain import check_export

        try:
            with Path(file).open("rb") as lines:
                verdict = msgspec.to_builtins(check_export(lines))
        except EdgewardError as e:
            e.file = file
            raise
    else:
        with session.api() as api:
            verdict = api.request("GET", "/api/v1/audit/verify")
    broken, vouched = verdict.get("broken", 0), verdict.get("vouched", 0)
    if output in ("json", "yaml"):
        emit(verdict, output)
    elif not broken:
        told = f", vouched for elsewhere up to {vouched}" if vouched else ""
        write(f"{verdict['records']} records ({verdict.get('first', 0)} to {verdict.get('last', 0)}) are whole{told}")
    if broken:
        raise Invalid(f"the audit is not what it was: record {broken} {verdict.get('why', '')}", file=file)


def _audit_export(session: Session, file: str) -> None:
    if not file:
        raise UsageError("audit export FILE: name the file to write, or - for the terminal")
    with session.api() as api:
        chunks = api.stream("/api/v1/audit/export")
        if file == "-":
            for chunk in chunks:
                sys.stdout.buffer.write(chunk)
            return
        with Path(file).open("xb") as out:
            for chunk in chunks:
                out.write(chunk)


def top(
    session: Session,
    what: Annotated[str, typer.Argument(metavar="nodes|apps")] = "nodes",
    wan: Annotated[bool, typer.Option("--wan", help="What each node's link carries, with TLS and TCP.")] = False,
) -> None:
    """Print what nodes or apps use now.

    With --wan the bytes that each node's link carried since its agent started, and kbit/s over the last five minutes.
    """
    output = session.output(allowed=_RECORD_FORMATS)
    plural = {"node": "nodes", "no": "nodes", "app": "apps"}.get(what, what)
    if plural not in ("nodes", "apps"):
        raise UsageError(f"top {what}: top nodes, or top apps")
    if wan and plural != "nodes":
        raise UsageError("top apps --wan: only nodes have a link; write top nodes --wan")
    with session.api() as api:
        answer = api.request("GET", "/api/v1/top")
    items = list(answer.get(plural) or [])
    if plural == "apps" and not session.all_namespaces:
        items = [i for i in items if i.get("namespace", session.namespace) == session.namespace]
    if plural == "nodes":
        # beside the node's own use, or instead of it
        own = ("name", "site", "online")
        items = [
            {k: i[k] for k in own if k in i} | (i.get("wan") or {})
            if wan
            else {k: v for k, v in i.items() if k != "wan"}
            for i in items
        ]
    columns = APP_COLUMNS if plural == "apps" else WAN_COLUMNS if wan else NODE_COLUMNS
    _records({"items": items}, output, columns, plural, everything=True)


def _records(
    answer: Mapping[str, Any], output: str, preferred: Sequence[str], what: str, *, everything: bool = False
) -> None:
    items: list[Record] = list(answer.get("items") or [])
    if output in ("json", "yaml"):
        emit({"items": items}, output)
    elif not items:
        typer.echo(f"no {what}", err=True)
    else:
        print_rows(*record_rows(items, preferred, everything=everything or output == "wide"))
