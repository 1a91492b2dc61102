"""`token create|list|revoke`: what lets boxes in.

A token is printed once, as the last word of the output, or as ``token`` with `-o json`; the hub keeps no copy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward.cli.kinds import find_kind
from edgeward.cli.output import emit, print_rows, write
from edgeward.cli.session import Failures, Session, UsageError, command
from edgeward.core.errors import Conflict, EdgewardError, Invalid

if TYPE_CHECKING:
    from edgeward.cli.client import Api

app = typer.Typer(no_args_is_help=True, add_completion=False, help="What lets boxes in.")

Names = Annotated[list[str], typer.Argument(metavar="NAME...", show_default=False)]
#: Lines of a batch file.
MAX_BATCH = 20_000


def create(
    session: Session,
    node: Annotated[str, typer.Option("--node", metavar="NAME", help="The name of the box that joins.")] = "",
    site: Annotated[str, typer.Option("--site", metavar="NAME", help="The site it stands in.")] = "",
    ttl: Annotated[str, typer.Option("--ttl", metavar="TIME", help="How long it is good for: 30m, 24h, 7d.")] = "24h",
    batch: Annotated[
        str,
        typer.Option("--batch", metavar="FILE", help="Many: a file of lines `NODE [SITE]`, - for standard input."),
    ] = "",
) -> None:
    """Make a join token: it lets one box join, once, under one name at one site."""
    output = session.output(allowed=("table", "json", "yaml"))
    if batch:
        _batch(session, batch, site, ttl, output)
        return
    if not node or not site:
        raise UsageError("name the box and its site: --node NAME --site NAME")
    with session.api() as api:
        doc = issue(api, node, site, ttl)
    if output != "table":
        emit(doc, output)
        return
    typer.echo(f"good once, for node {node} at site {site}, until {doc['expires']}; on the box:", err=True)
    typer.echo("  edgeward join TOKEN --data DIR", err=True)
    write(doc["token"])


def issue(api: Api, node: str, site: str, ttl: str, *, replace: bool = False) -> dict[str, Any]:
    """One token of the hub's. A site that is not there yet is declared: a first box often is its site's beginning."""
    ask = {"node": node, "site": site, "ttl": ttl, "replace": replace}
    try:
        return api.request("POST", "/api/v1/issue/jointoken", body=ask)
    except Invalid as e:
        if not site or f"no Site {site!r}" not in e.message:
            raise
    doc = {"apiVersion": "edgeward/v1", "kind": "Site", "metadata": {"name": site}, "spec": {}}
    try:
        api.request("POST", "/api/v1/sites", body=doc)
        typer.echo(f"site {site} is new: declared", err=True)
    except Conflict:  # somebody else was faster
        pass
    return api.request("POST", "/api/v1/issue/jointoken", body=ask)


def _batch(session: Session, file: str, site: str, ttl: str, output: str) -> None:
    boxes = read_batch(file, site)
    failures = Failures()
    made = []
    with session.api() as api:
        for node, at in boxes:
            try:
                made.append({"node": node, "site": at, **issue(api, node, at, ttl)})
            except EdgewardError as e:
                failures.add(e)
                continue
            if output == "table":
                write(f"{node} {made[-1]['token']}")
    if output != "table":
        emit({"items": made}, output)
    failures.finish()


def read_batch(file: str, site: str = "") -> list[tuple[str, str]]:
    """Pairs (node, site) of a batch file; blank lines and what stands behind # are left out."""
    text = sys.stdin.read() if file == "-" else Path(file).read_text()
    found = []
    for n, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or (len(words) == 1 and not site):
            raise Invalid(f"{line.strip()[:80]!r}", file=file, line=n, remedy="write NODE SITE, or NODE and --site")
        found.append((words[0], words[1] if len(words) == 2 else site))
    if len(found) > MAX_BATCH:
        raise Invalid(f"{len(found)} boxes", file=file, remedy=f"at most {MAX_BATCH} at once")
    return found


def list_tokens(session: Session) -> None:
    """List join tokens: for whom, until when, used from where. The tokens themselves are not kept."""
    output = session.output()
    kind = find_kind("jointoken")
    with session.api() as api:
        items: list[dict[str, Any]] = api.list(kind, None)["items"]
    if output in ("json", "yaml"):
        emit({"items": [{**i, "spec": {**i["spec"], "hash": "***"}} for i in items]}, output)
    elif output == "name":
        for item in items:
            write(f"jointoken/{item['metadata']['name']}")
    elif not items:
        typer.echo("no tokens", err=True)
    else:
        print_rows(["NAME", "NODE", "SITE", "EXPIRES", "USED", "FROM"], [_row(i) for i in items])


def _row(item: dict[str, Any]) -> list[object]:
    spec, status = item["spec"], item.get("status") or {}
    return [
        item["metadata"]["name"], spec["node"], spec["site"], spec["expires"], status.get("usedAt"),
        status.get("usedFrom"),
    ]  # fmt: skip


def revoke(session: Session, names: Names) -> None:
    """Withdraw tokens that were not used yet, by their names."""
    session.output(allowed=("table",))
    kind = find_kind("jointoken")
    failures = Failures()
    with session.api() as api:
        for name in names:
            try:
                api.delete(kind, None, name.removeprefix("jointoken/"))
            except EdgewardError as e:
                failures.add(e)
                continue
            write(f"jointoken/{name.removeprefix('jointoken/')} withdrawn")
    failures.finish()


app.command("create")(command(create))
app.command("list")(command(list_tokens))
app.command("revoke")(command(revoke))
