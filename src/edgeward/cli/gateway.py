"""`gateway explain` and `gateway purge`: what a node's gateway would do with a request, and what its cache forgets.

A URL of a context's ``gateway_url`` says which node is meant; else it is the one of ``--at``, or the only one. With
``--node`` the hub asks it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any
from urllib.parse import urlencode, urlsplit

import typer

from edgeward.cli.context import load_context
from edgeward.cli.output import emit, write
from edgeward.cli.session import Session, UsageError, command
from edgeward.core.resource import check_name

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The doors of the nodes.")

Url = Annotated[str, typer.Argument(metavar="URL", help="A URL of the gateway, or a path.", show_default=False)]


Node = Annotated[str, typer.Option("--node", metavar="NODE", help="Of this node, asked by the hub.")]


def _at(session: Session, url: str, node: str) -> tuple[Session, str]:
    """The session that talks to the node whose gateway is meant, and the path of its gateway there."""
    if node:
        if session.at is not None:
            raise UsageError("--node asks by the hub, --at asks the node itself: give one of them")
        return session, f"/api/v1/nodes/{check_name(node, '--node', '')}/gateway"
    return _direct(session, url), "/api/v1/gateway"


def _direct(session: Session, url: str) -> Session:
    if session.at is not None:
        return session
    context = load_context(session.context)
    try:
        asked = urlsplit(url).netloc
    except ValueError:
        raise UsageError(f"{url[:80]!r} is no URL: write http://host/path or /path") from None
    for node in context.nodes:
        if asked and node.gateway_url and urlsplit(node.gateway_url).netloc == asked:
            return replace(session, at=node.name)
    if len(context.nodes) == 1:
        return replace(session, at=context.nodes[0].name)
    names = ", ".join(n.name for n in context.nodes)
    raise UsageError(f"which node? give a URL that begins with its gateway_url, or --node NODE ({names})")


def explain(
    session: Session,
    url: Url,
    method: Annotated[str, typer.Option("--method", "-X", metavar="METHOD", help="The request's method.")] = "GET",
    header: Annotated[
        list[str], typer.Option("--header", "-H", metavar="NAME:VALUE", help="A header field; may be given often.")
    ] = [],  # noqa: B006 - typer copies it
    node: Node = "",
) -> None:
    """Say which Route answers a request, from where, what the cache has, and why the others do not."""
    output = session.output(allowed=("table", "json", "yaml"))
    session, base = _at(session, url, node)
    with session.api() as api:
        query = urlencode([("url", url), ("method", method), *(("header", h) for h in header)])
        got: dict[str, Any] = api.request("GET", f"{base}/explain?{query}")
    if output != "table":
        emit(got, output)
        return
    for line in lines(got):
        write(line)


def lines(got: dict[str, Any]) -> list[str]:
    """The answer for people."""
    asked = got.get("request") or {}
    out = [f"request   {asked['method']} {asked['host'] or '-'} {asked['path']}{asked['query']}"] if asked else []
    if "route" not in got:
        out.append(f"answer    {got['status']}: {got['why']}")
        if got.get("allow"):
            out.append(f"allowed   {', '.join(got['allow'])}")
    else:
        out.append(f"route     {got['route']}  ({got['why']})")
        out.append(f"target    {got['target']}")
        for e in got["endpoints"]:
            out.append(f"endpoint  {e['address']}{'  here' if e['here'] else ''}  circuit {e['circuit']}")
        if got.get("engine"):
            out.append(f"engine    {got['engine']}")
        for p in got.get("places", []):
            name = f"{p['place']} {p.get('name', '')}".rstrip()
            out.append(f"place     {name}" + (f": {p['why']}" if p["why"] else ""))
        cache = got["cache"]
        facts = [f"{k} {cache[k]}" for k in ("fwd", "status", "age", "ttl", "hits", "bytes") if k in cache]
        out.append("cache     " + ", ".join([cache["state"], *facts]))
    for entry in got.get("considered", []):
        if entry["why"]:
            out.append(f"not       {entry['route']}: {entry['why']}")
    return out


def purge(
    session: Session,
    url: Annotated[str, typer.Argument(metavar="[URL]", help="Exactly this one.")] = "",
    prefix: Annotated[str, typer.Option("--prefix", metavar="PATH", help="All below this path.")] = "",
    tag: Annotated[str, typer.Option("--tag", metavar="TAG", help="All answers with this Cache-Tag.")] = "",
    node: Node = "",
) -> None:
    """Make a node's gateway forget stored answers: by URL, by prefix or by tag."""
    output = session.output(allowed=("table", "json", "yaml"))
    asked = {k: v for k, v in (("url", url), ("prefix", prefix), ("tag", tag)) if v}
    if len(asked) != 1:
        raise UsageError("what? give a URL, --prefix PATH or --tag TAG")
    session, base = _at(session, url, node)
    with session.api() as api:
        got: dict[str, Any] = api.request("POST", f"{base}/purge", body=asked)
    if output != "table":
        emit(got, output)
    else:
        write(f"{got['purged']} stored answer{'' if got['purged'] == 1 else 's'} forgotten")


app.command("explain")(command(explain))
app.command("purge")(command(purge))
