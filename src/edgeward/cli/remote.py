"""`exec`, `shell` and `cp`: programs, terminals and files of a node, and programs inside Apps, over its tunnel.

The hub decides who may (the verb `exec` on the Node, or on the App), the node's own policy has the last word, and both
keep who did what. With `--at NODE` the node's own API serves the same, also while the link is cut.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward.cli.output import write
from edgeward.cli.plain import plain
from edgeward.cli.session import Session, UsageError
from edgeward.cli.tunnel import target_of
from edgeward.core.errors import NotFound
from edgeward.core.resource import check_name

if TYPE_CHECKING:
    from edgeward.tunnel.client import Target
    from edgeward.tunnel.copy import Result

Env = Annotated[list[str], typer.Option("--env", "-e", metavar="NAME=VALUE", help="A variable of the program.")]
Folder = Annotated[str, typer.Option("--cwd", metavar="FOLDER", help="Where it runs; else the account's home.")]


def exec_(
    session: Session,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[NODE] -- PROGRAM [ARGUMENT]...", help="Where (without --app), and what.", show_default=False
        ),
    ],
    app: Annotated[
        str, typer.Option("--app", metavar="[NAMESPACE/]APP", help="Inside an instance of this App, not on a node.")
    ] = "",
    instance: Annotated[
        str, typer.Option("--instance", metavar="ID", help="With --app: this one; else one that runs.")
    ] = "",
    at_node: Annotated[str, typer.Option("--node", metavar="NODE", help="With --app: one on this node.")] = "",
    tty: Annotated[bool, typer.Option("--tty", "-t", help="With a terminal.")] = False,
    no_stdin: Annotated[bool, typer.Option("--no-stdin", help="The program gets no input.")] = False,
    env: Env = [],  # noqa: B006 - typer's
    cwd: Folder = "",
) -> None:
    """Run a program on a node, or inside an App: its input, outputs and exit code are this command's.

    With --app it runs in the instance's container, or as a process App's own do: with its environment, folder, user
    and limits, and it ends when the instance does.

    The words behind NODE are an argument list; no shell looks at them. In a loop that reads lines give --no-stdin, or
    the program eats them. The exit code is the program's (128 + N after signal N, 127 when there is no such program);
    what this command itself fails with is told on stderr.
    """
    if app:
        if env or cwd:
            raise UsageError("inside an App its own environment and folder are used: -- env NAME=VALUE PROGRAM")
        where, inside = _instance(session, app, instance, at_node)
        raise typer.Exit(_session(session, where, "exec", inside | {"argv": words}, terminal=tty, no_stdin=no_stdin))
    if instance or at_node:
        raise UsageError("--instance and --node choose among an App's instances: give --app APP")
    if len(words) < 2:
        raise UsageError("which program? edgeward exec NODE -- PROGRAM [ARGUMENT]...")
    node, argv = words[0], words[1:]
    args: dict[str, Any] = {"argv": argv} | _common(env, cwd)
    raise typer.Exit(_session(session, node, "exec", args, terminal=tty, no_stdin=no_stdin))


def _instance(session: Session, app: str, instance: str, node: str) -> tuple[str, dict[str, Any]]:
    """The node to go to, and what names the instance there."""
    from edgeward.cli.kinds import find_kind

    kind = find_kind("app")
    namespace, slash, name = app.removeprefix("app/").rpartition("/")
    namespace = check_name(namespace, "--app", "") if slash else str(session.one(kind))
    check_name(name, "--app", "")
    args = {"app": f"{namespace}/{name}"} | ({"instance": instance} if instance else {})
    if node:
        return node, args
    with session.api() as api:
        if api.node:  # its API leads to itself only, and it knows best what runs there
            return api.node, args
        status = api.get(kind, namespace, name).get("status") or {}
    known = [i for i in status.get("instances") or [] if isinstance(i, dict) and instance in ("", i.get("id"))]
    running = [i for i in known if i.get("phase") == "Running"]
    best = sorted(running or (known if instance else []), key=lambda i: (bool(i.get("stale")), str(i.get("node"))))
    if not best:
        what = f"instance {instance!r}" if instance else "instance"
        raise NotFound(f"no {what} of it runs", resource=f"App/{name}", remedy=f"edgeward get app {name} -o yaml")
    return str(best[0].get("node")), args


def shell(
    session: Session,
    node: Annotated[str, typer.Argument(metavar="NODE", help="Where.", show_default=False)],
    env: Env = [],  # noqa: B006 - typer's
    cwd: Folder = "",
) -> None:
    """A terminal on a node, with the shell of the account that node.json names (else the agent's).

    Enter ~ . ends a session that says nothing more.
    """
    raise typer.Exit(_session(session, node, "shell", _common(env, cwd), terminal=True))


def _common(env: list[str], cwd: str) -> dict[str, Any]:
    given: dict[str, str] = {}
    for pair in env:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--env {pair}: write NAME=VALUE")
        given[name] = value
    return ({"env": given} if given else {}) | ({"cwd": cwd} if cwd else {})


def _session(
    session: Session, node: str, service: str, args: dict[str, Any], *, terminal: bool, no_stdin: bool = False
) -> int:
    from edgeward.tunnel.attach import Attached, has_terminal, terminal_size
    from edgeward.tunnel.client import connect

    check_name(node, "NODE", "Node")
    if terminal:
        args |= {"tty": list(terminal_size(0)), "term": os.environ.get("TERM", "dumb")[:64]}
    raw = terminal and has_terminal(0)
    stdin = -1 if no_stdin or not _is_open(0) else 0
    target = target_of(session)

    async def work() -> int:
        async with connect(target, node, service, args) as stream:
            if service == "shell" and not raw:
                stream.reset("ended", "no terminal")
                raise UsageError("shell needs a terminal: for commands from a file, edgeward exec NODE -- sh")
            end = await Attached(stream, stdin=stdin, terminal=raw).run()
        if end.error:
            typer.echo(f"error: {plain(end.error)}", err=True)
        return end.code

    sys.stdout.flush()
    return asyncio.run(work())


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def cp(
    session: Session,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="PATH, or NODE:PATH.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="PATH, or NODE:PATH.", show_default=False)],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Copy a file or a folder to a node, or from it.

    A path at the node is absolute, or below the home of the account that node.json names (else the agent's). Into a
    folder that is there, the copy goes by its own name. Modes and times are kept; a copy that broke off goes on where
    it stopped when it is made again, and a file takes its place only when all of it is there and its hash is right.
    """
    there, here = _split(source), _split(target)
    if (there is None) == (here is None):
        raise UsageError("one side is at a node: edgeward cp PATH NODE:PATH, or edgeward cp NODE:PATH PATH")
    remote = there or here
    assert remote is not None  # noqa: S101 - for the type checker
    node, path = remote
    check_name(node, "NODE", "Node")
    result = asyncio.run(_copy(target_of(session), node, path, source, target, get=there is not None, quiet=quiet))
    for failed, why in result.failed:
        typer.echo(f"error: {plain(failed)}: {plain(why)}", err=True)
    if not quiet:
        moved = f", {result.moved} of them sent" if result.moved != result.bytes else ""
        write(f"{result.files} {'file' if result.files == 1 else 'files'}, {result.bytes} bytes{moved}")
    if result.failed:
        raise typer.Exit(1)


def _split(text: str) -> tuple[str, str] | None:
    """Node and path, as scp has it: a colon before any slash."""
    head, colon, path = text.partition(":")
    if not colon or "/" in head or not head:
        return None
    return head, path or "."


async def _copy(to: Target, node: str, path: str, source: str, target: str, *, get: bool, quiet: bool) -> Result:
    from edgeward.tunnel.client import connect
    from edgeward.tunnel.copy import copy_in, copy_out

    if get:
        name = Path(path).name or node
        async with connect(to, node, "copy", {"path": path}) as stream:
            with _Bar(quiet) as bar:
                return await copy_in(stream, target, name, bar)
    name = Path(source).resolve().name
    async with connect(to, node, "copy", {"path": path, "take": True, "name": name}) as stream:
        with _Bar(quiet) as bar:
            return await copy_out(stream, source, bar)


class _Bar:
    """A progress bar, where somebody looks."""

    def __init__(self, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._moved = 0

    def __enter__(self) -> _Bar:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("copy")
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._progress.stop()

    def __call__(self, moved: int, total: int) -> None:
        self._moved += moved
        if self._shown:
            self._progress.update(self._task, completed=self._moved, total=total)
