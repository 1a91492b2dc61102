"""`join` and `leave` on a box; `node list|revoke|replace` at the hub.

`join` makes a directory a node's and then becomes its agent: the same process, so a supervisor sees one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeward.cli.kinds import find_kind
from edgeward.cli.output import emit, print_rows, write
from edgeward.cli.session import Failures, Session, UsageError, command
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.resource import check_name

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The boxes of the fleet.")

Names = Annotated[list[str], typer.Argument(metavar="NODE...", show_default=False)]
DataOption = Annotated[Path, typer.Option("--data", metavar="DIR", help="The node's directory.")]


def join(
    data: DataOption,
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="What `token create` printed; - is stdin.", show_default=False)
    ] = "",
    node: Annotated[str, typer.Option("--node", metavar="NAME", help="Must be the token's; so a mix-up is seen.")] = "",
    site: Annotated[str, typer.Option("--site", metavar="NAME", help="Must be the token's.")] = "",
    hub: Annotated[
        str, typer.Option("--hub", metavar="URL", help="Where the hub is, if not where the token says.")
    ] = "",
    proxy: Annotated[str, typer.Option("--proxy", metavar="URL", help="An HTTP CONNECT proxy on the way to it.")] = "",
    proxy_ca: Annotated[
        str, typer.Option("--proxy-ca", metavar="FILE", help="The CA of a proxy that looks into TLS (PEM).")
    ] = "",
    bind: Annotated[
        str, typer.Option("--bind", metavar="IP", help="Where the node listens for devices (MQTT).")
    ] = "127.0.0.1",
    batch: Annotated[
        str,
        typer.Option("--batch", metavar="FILE", help="Many: lines `NODE TOKEN`, each into DIR/NODE; runs no agent."),
    ] = "",
    at_once: Annotated[int, typer.Option("--at-once", help="How many of a batch at once.", min=1, max=64)] = 8,
    bundle: Annotated[
        str,
        typer.Option("--bundle", metavar="FILE", help="What `token create --bundle` made: token and options in it."),
    ] = "",
    enrol_only: Annotated[bool, typer.Option("--enrol-only", help="Do not run the agent.")] = False,
) -> None:
    """Join this box to a fleet and run its agent in the foreground. Once joined, the token is not needed again."""
    from edgeward.nodes import enrol_edge
    from edgeward.nodes.enrol import decode_token

    directory = data.absolute()
    ca = enrol_edge.load_ca(Path(proxy_ca)) if proxy_ca else ""
    if bundle:
        if token or batch or node or site:
            raise UsageError("a bundle has its token and names in itself")
        from edgeward.nodes.bundle import read

        packed = read(Path(bundle))
        token, node, site = packed.token, packed.node, packed.site
        hub, proxy, ca = hub or packed.hub, proxy or packed.proxy, ca or packed.proxyCa
        bind = packed.bind if bind == "127.0.0.1" else bind
    if batch:
        if token or node or site:
            raise UsageError("a batch has its tokens and names in its file")
        _batch(batch, directory, at_once, {"hub": hub, "proxy": proxy, "proxy_ca": ca, "bind": bind})
        return
    if not token:
        raise UsageError("give the token that `token create` printed")
    text = sys.stdin.read() if token == "-" else token  # noqa: S105 - a place, no secret
    ticket = decode_token(text)
    fresh = enrol_edge.join(directory, ticket, node=node, site=site, hub=hub, proxy=proxy, proxy_ca=ca, bind=bind)
    name = node or ticket.node
    typer.echo(f"node {name}: {'joined' if fresh else 'is joined already'}, directory {directory}", err=True)
    if not enrol_only:
        run_agent(directory)


def _batch(file: str, directory: Path, at_once: int, how: dict[str, str]) -> None:
    from concurrent.futures import ThreadPoolExecutor, as_completed

    from edgeward.nodes import enrol_edge
    from edgeward.nodes.enrol import decode_token

    text = sys.stdin.read() if file == "-" else Path(file).read_text()
    boxes: dict[str, tuple[int, str]] = {}
    for n, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] in boxes:
            raise Invalid("each line is a NODE of its own and its TOKEN", file=file, line=n)
        check_name(words[0], "node")  # it becomes a directory's name
        boxes[words[0]] = (n, words[1])

    def one(node: str, token: str) -> bool:
        return enrol_edge.join(directory / node, decode_token(token), node=node, **how)

    failures = Failures()
    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(one, node, token): (node, n) for node, (n, token) in boxes.items()}
        try:
            for done in as_completed(running):
                node, n = running[done]
                try:
                    fresh = done.result()
                except EdgewardError as e:
                    e.file, e.line = e.file or file, e.line or n
                    failures.add(e)
                    continue
                write(f"node/{node} {'joined' if fresh else 'is joined already'}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    failures.finish()


def leave(
    data: DataOption,
    force: Annotated[bool, typer.Option("--force", help="Also when the hub cannot be told: revoke it there.")] = False,
) -> None:
    """Take this box out of its fleet: its Node goes, its key is never let in again, its agent ends.

    Data of apps and readings that were not delivered stay in the directory; remove it when they are not needed.
    """
    from edgeward.nodes import enrol_edge

    directory = data.absolute()
    node, error = enrol_edge.leave_fleet(directory, force=force)
    if error is not None:
        typer.echo(f"the hub was not told: {error}", err=True)
        typer.echo(f"at the hub: edgeward node revoke {node}", err=True)
    write(f"node {node} left")


def run_agent(directory: Path) -> None:
    """Becomes the agent; nothing of this program stays in memory."""
    os.environ["EDGEWARD_DATA"] = str(directory)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "edgeward.agent", "--data", str(directory)])  # noqa: S606


def list_nodes(session: Session) -> None:
    """List the nodes with the state of their identity."""
    output = session.output()
    kind = find_kind("node")
    with session.api() as api:
        items: list[dict[str, Any]] = api.list(kind, None)["items"]
    if output in ("json", "yaml"):
        emit({"items": items}, output)
    elif output == "name":
        for item in items:
            write(f"node/{item['metadata']['name']}")
    elif not items:
        typer.echo("no nodes", err=True)
    else:
        print_rows(["NAME", "SITE", "STATE", "CREDENTIALS END", "VERSION"], [_row(i) for i in items])


def _row(item: dict[str, Any]) -> list[object]:
    status = item.get("status") or {}
    state = "revoked" if status.get("revoked") else "online" if status.get("online") else "offline"
    if "online" not in status:
        state = "never seen"
    ends = (status.get("credentials") or {}).get("expires")
    return [item["metadata"]["name"], item["spec"]["site"], state, ends, status.get("version")]


def revoke(session: Session, names: Names) -> None:
    """Cut nodes off at once and for good. Their names stay barred until `node replace`."""
    session.output(allowed=("table",))
    failures = Failures()
    kind = find_kind("node")
    with session.api() as api:
        for name in (n.removeprefix("node/") for n in names):
            try:
                api.request("POST", api.path(kind, None, name) + "/revoke")
            except EdgewardError as e:
                failures.add(e)
                continue
            write(f"node/{name} revoked")
    failures.finish()


def replace(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NODE", show_default=False)],
    ttl: Annotated[str, typer.Option("--ttl", metavar="TIME", help="How long the token is good for.")] = "24h",
    site: Annotated[str, typer.Option("--site", metavar="NAME", help="Needed when the Node was deleted.")] = "",
) -> None:
    """Make a token for another box to take a node's name: the present one is let in until the other joins.

    What was declared for the node stays. The old box's key is never let in again.
    """
    from edgeward.cli.token import issue

    output = session.output(allowed=("table", "json", "yaml"))
    name = name.removeprefix("node/")
    with session.api() as api:
        doc = issue(api, name, site, ttl, replace=True)
    if output != "table":
        emit(doc, output)
        return
    typer.echo(f"good once, until {doc['expires']}; on the new box:", err=True)
    typer.echo("  edgeward join TOKEN --data DIR", err=True)
    write(doc["token"])


app.command("list")(command(list_nodes))
app.command("revoke")(command(revoke))
app.command("replace")(command(replace))
