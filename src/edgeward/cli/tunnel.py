"""`tunnel open`: a port of a node, or of a machine behind it, on this machine; and the other way round.

The hub decides who may, the node what it lets through; what the tunnel does is in the hub's audit. Runs until Ctrl-C.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from edgeward.cli.plain import plain
from edgeward.cli.session import Session, UsageError, command
from edgeward.core.errors import Invalid, Unreachable
from edgeward.core.resource import check_name

if TYPE_CHECKING:
    from edgeward.tunnel.client import Target

Node = Annotated[str, typer.Argument(metavar="NODE", help="The node.", show_default=False)]
Port = Annotated[str, typer.Argument(metavar="PORT", help="The port there.", show_default=False)]
Host = Annotated[str, typer.Option("--host", metavar="HOST", help="A machine behind the node; else the node itself.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Ways to nodes that cannot be dialled.")


@app.callback()
def _group() -> None:
    """Ways to nodes that cannot be dialled."""


def target_of(session: Session) -> Target:
    """The server that the session talks to."""
    import ssl
    from urllib.parse import urlsplit

    from edgeward.tunnel.client import Target
    from edgeward.tunnel.link import Way

    with session.api() as api:
        if api.url.startswith("unix://"):
            return Target(Way(unix=api.url.removeprefix("unix://")))
        parts = urlsplit(api.url)
        if parts.scheme == "http":
            return Target(Way(parts.hostname or "", parts.port or 80), api.token)
        try:
            tls = ssl.create_default_context(cafile=api.ca_file)
        except OSError as e:
            raise Unreachable(f"the CA file {api.ca_file} cannot be read: {e.strerror or e}") from None
        way = Way(parts.hostname or "", parts.port or 443, tls, api.server_name)
        return Target(way, api.token)


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Runs until it is done or SIGINT, SIGTERM or SIGHUP come."""

    async def body() -> None:
        task = asyncio.ensure_future(work())
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(sig, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            pass

    try:
        import uvloop
    except ImportError:
        asyncio.run(body())
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())


@app.command("open")
@command
def open_(
    session: Session,
    node: Node,
    port: Port,
    host: Host = "",
    listen: Annotated[
        str, typer.Option("--listen", metavar="ADDRESS:PORT", help="Where to listen here; port 0: any free one.")
    ] = "127.0.0.1:0",
    reverse: Annotated[
        str,
        typer.Option(
            "--reverse", metavar="ADDRESS:PORT", help="Listen on PORT of the node, and lead here to this address."
        ),
    ] = "",
) -> None:
    """Reach a TCP port of a node from here, until Ctrl-C.

    Prints `listening on ADDRESS` when it can be used. With --reverse PORT is opened on the node (0: any free one), and
    leads to an address that this machine reaches.
    """
    from edgeward.tunnel import client

    check_name(node, "NODE", "Node")
    number = _port(port, 0 if reverse else 1)

    def ready(at: str) -> None:
        typer.echo(f"listening on {at}")

    def say(text: str) -> None:
        typer.echo(plain(text), err=True)

    if reverse:
        if listen != "127.0.0.1:0":
            raise UsageError("--reverse listens at the node, --listen here: give one of them")
        to, at_node = client.address(reverse, "--reverse"), (host or "127.0.0.1", number)
        target = target_of(session)
        run(lambda: client.reverse(target, node, at_node, to, ready))
        return
    where = client.address(listen)
    forward = client.Forward(target_of(session), node, host, number, say)
    run(lambda: forward.run(where, ready))


@app.command("stdio")
@command
def stdio(
    session: Session,
    node: Node,
    port: Port,
    host: Host = "",
) -> None:
    """Join a TCP port of a node to this command's input and output.

    For SSH: ssh -o ProxyCommand='edgeward tunnel stdio %h %p' NODE
    """
    from edgeward.tunnel.attach import splice
    from edgeward.tunnel.client import connect

    check_name(node, "NODE", "Node")
    args = {"port": _port(port, 1)} | ({"host": host} if host else {})
    target = target_of(session)

    async def work() -> None:
        async with connect(target, node, "tcp", args) as stream:
            await splice(stream, 0, 1)

    asyncio.run(work())


@app.command("url")
@command
def url(
    session: Session,
    node: Node,
    port: Port,
    host: Host = "",
) -> None:
    """Print a link by which a browser reaches a web page behind a node, through the hub, for an hour.

    Whoever has the link sees the page as you do. A page that does not work so is reached by `tunnel open`.
    """
    from urllib.parse import quote

    check_name(node, "NODE", "Node")
    where = f"{f'[{host}]' if ':' in host else host}:{_port(port, 1)}" if host else str(_port(port, 1))
    with session.api() as api:
        found = api.request("POST", f"/api/v1/nodes/{quote(node, safe='')}/proxy", query={"port": where})
        typer.echo(api.url.rstrip("/") + str(found["path"]))


def _port(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit()) or not least <= int(text) <= 65535:
        raise Invalid("is no port", field="PORT", remedy=f"a number from {least} to 65535")
    return int(text)
