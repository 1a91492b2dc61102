"""`invoke` and `functions logs`: call a function, and read what it wrote.

A function's answer goes to standard output byte by byte as it comes, so that it can be piped; what failed goes to
standard error with the function and the limit that was met.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeward.cli.feedback import metrics, samples
from edgeward.cli.observe import Follow, count, harmless
from edgeward.cli.output import write
from edgeward.cli.plain import plain
from edgeward.cli.session import Session, UsageError, command
from edgeward.cli.versions import Name, named, promote, rollback, versions
from edgeward.cli.write import Files, seconds, since_of
from edgeward.core.errors import EdgewardError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="What functions wrote, their versions and packages.")


def _data(text: str) -> bytes:
    """What -d says: text, @FILE, or - for standard input."""
    if text == "-":
        return sys.stdin.buffer.read()
    if text.startswith("@"):
        try:
            return Path(text[1:]).read_bytes()
        except OSError as e:
            raise EdgewardError(e.strerror or str(e), file=text[1:], remedy="name a file that can be read") from None
    return text.encode()


def invoke(
    session: Session,
    name: Name,
    data: Annotated[str, typer.Option("-d", "--data", metavar="DATA|@FILE|-", help="The event's data.")] = "",
    content_type: Annotated[str, typer.Option("--content-type", metavar="TYPE", help="Of the data.")] = "",
    event_type: Annotated[str, typer.Option("--type", metavar="TYPE", help="The event's type (CloudEvents).")] = "",
    node: Annotated[str, typer.Option("--node", metavar="NODE", help="Call it on this node.")] = "",
    version: Annotated[
        str, typer.Option("--version", metavar="DIGEST", help="Only this version may answer, or an alias.")
    ] = "",
    key: Annotated[str, typer.Option("--key", metavar="TEXT", help="Who asks: one key, one version.")] = "",
    timeout: Annotated[str, typer.Option("--timeout", metavar="DURATION", help="Give up earlier, e.g. 2s.")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print status and headers to stderr.")] = False,
) -> None:
    """Call a function and print its answer.

    At the hub a node that has the function is asked; with --at NODE the node itself. NAME@canary asks the version that
    is being tried, NAME@stable the other. The exit code is 0 for an answer
    with a status below 400.
    """
    session.output(allowed=("table",))
    name, at, alias = name.partition("@")
    if at and (version or alias not in ("stable", "canary")):
        raise UsageError("write NAME@stable or NAME@canary, or --version DIGEST")
    kind, namespace, function = named(session, name)
    query = {"node": node, "type": event_type, "version": version or alias, "key": key}
    if timeout:
        query["timeout"] = f"{seconds(timeout, '--timeout'):g}"
    with session.api() as api:
        path = api.path(kind, namespace, function) + "/invoke"
        status, headers, chunks = api.call(
            path, _data(data), query={k: v for k, v in query.items() if v}, content_type=content_type
        )
        if verbose:
            print(f"status: {status}", *(plain(f"{k}: {v}") for k, v in headers), sep="\n", file=sys.stderr)
        for chunk in chunks:
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    if sys.stdout.isatty():
        print()
    if status >= 400:
        raise EdgewardError(f"answered with status {status}", resource=f"Function/{function}")


def logs(
    session: Session,
    name: Name,
    follow: Follow = False,
    tail: Annotated[str, typer.Option("--tail", metavar="N", help="Begin with the last N lines.")] = "",
    since: Annotated[str, typer.Option("--since", metavar="DURATION", help="Only what is younger, e.g. 10m.")] = "",
    level: Annotated[
        str, typer.Option("--level", metavar="LEVEL", help="debug, info, warning or error, and above.")
    ] = "",
    grep: Annotated[str, typer.Option("--grep", metavar="TEXT", help="Only lines with this text.")] = "",
    regex: Annotated[
        str, typer.Option("--regex", metavar="EXPRESSION", help="Only lines with this (Python's) in them.")
    ] = "",
    invocation: Annotated[str, typer.Option("--invocation", metavar="ID", help="Only of this call.")] = "",
    node: Annotated[str, typer.Option("--node", metavar="NODE", help="Only of this node.")] = "",
) -> None:
    """Print what a function wrote, chosen on its nodes; with -o json one record a line."""
    output = session.output(allowed=("table", "json"))
    kind, namespace, function = named(session, name)
    query = {"node": node, "level": level, "grep": grep, "regex": regex, "invocation": invocation}
    if tail:
        query["tail"] = count(tail, "--tail")
    if since:
        query["since"] = since_of(since)
    if follow:
        query["follow"] = "true"
    if output == "json":
        query["json"] = "true"
    if level and level not in ("debug", "info", "warning", "error"):
        raise UsageError(f"--level {level}: debug, info, warning or error")
    with session.api() as api:
        path = api.path(kind, namespace, function) + "/logs"
        for line in api.lines(path, query={k: v for k, v in query.items() if v}, accept="text/plain", follow=follow):
            write(harmless(line) if sys.stdout.isatty() else line)
            sys.stdout.flush()


def bundle(
    session: Session,
    filename: Files = None,
    python: Annotated[
        str, typer.Option("--python", metavar="VERSION", help="Of the nodes, e.g. 3.12; else this one's.")
    ] = "",
    arch: Annotated[
        str, typer.Option("--arch", metavar="NAME", help="Processor of the nodes, e.g. aarch64; else this one's.")
    ] = "",
    glibc: Annotated[
        int, typer.Option("--glibc", metavar="MINOR", help="glibc of the nodes at least 2.MINOR.", min=5, max=99)
    ] = 28,
    index: Annotated[str, typer.Option("--index", metavar="URL", help="Package index; else as pip is set.")] = "",
    find_links: Annotated[
        str, typer.Option("--find-links", metavar="FOLDER", help="Wheels; without --index nothing else is asked.")
    ] = "",
) -> None:
    """Fetch the packages of functions here and bring them to the hub, for a hub that reaches no registry.

    For each Function of the files with dependencies: its wheels for one kind of node, held against the lock file.
    Nodes hold them against it again. Needs pip on this machine.
    """
    from edgeward.cli.uploads import bundle_all

    session.output(allowed=("table",))
    bundle_all(session, filename or [], python=python, arch=arch, glibc=glibc, index=index, find_links=find_links)


def blobs(session: Session) -> None:
    """The archives and bundles that the namespace holds at the hub, and their sizes."""
    from edgeward.cli.output import emit, print_rows
    from edgeward.core.quantity import format_bytes

    output = session.output(allowed=("table", "json", "yaml"))
    with session.api() as api:
        held = api.request("GET", f"/api/v1/namespaces/{session.namespace}/blobs")
    if output != "table":
        emit(held, output)
        return
    print_rows(["DIGEST", "SIZE"], [[b["digest"], format_bytes(int(b["size"]))] for b in held["items"]])


def deadletters(
    session: Session,
    name: Name,
    replay: Annotated[bool, typer.Option("--replay", help="Call the function again with each.")] = False,
    drop: Annotated[bool, typer.Option("--drop", help="Forget them.")] = False,
    node: Annotated[str, typer.Option("--node", metavar="NODE", help="Only of this node.")] = "",
) -> None:
    """Print the messages that no call of a function answered, with the reason; call it again with them, or drop them.

    With -o json one object a line. A letter whose call is answered now is gone; the exit code is 0 when none is left
    that was to go.
    """
    output = session.output(allowed=("table", "json"))
    if replay and drop:
        raise UsageError("--replay or --drop, not both")
    kind, namespace, function = named(session, name)
    query = {"node": node} if node else {}
    do = "replay" if replay else "drop" if drop else ""
    bad = 0
    with session.api() as api:
        path = api.path(kind, namespace, function) + "/deadletters"
        if do:
            query["do"] = do
        method = "POST" if do else "GET"
        for line in api.lines(path, query=query, accept="application/x-ndjson", follow=bool(do), method=method):
            letter = json.loads(line)
            bad += "error" in letter or (bool(do) and letter.get("outcome") == "kept")
            write(line if output == "json" else harmless(_letter(letter)))
    if bad:
        raise EdgewardError(f"{bad} were not answered or not reached", resource=f"Function/{function}")


def _letter(letter: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in letter:
        return f"{letter['node']}  {letter['error']}"
    said = f"{letter['node']}  {letter['at']}  {letter['outcome']}  {letter['subject']}  tried {letter['tries']} times"
    return f"{said}  {letter['reason']}" + (f"  {letter['data'][:60]!r}" if "data" in letter else "")


app.command("logs")(command(logs))
app.command("deadletters")(command(deadletters))
app.command("bundle")(command(bundle))
app.command("metrics")(command(metrics))
app.command("samples")(command(samples))
app.command("versions")(command(versions))
app.command("promote")(command(promote))
app.command("rollback")(command(rollback))
app.command("blobs")(command(blobs))
