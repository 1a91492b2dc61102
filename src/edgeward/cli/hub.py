"""`hub rotate-ca|retire-ca|ca|cluster`: the hub itself: its certificate authority, and a hub of several processes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeward.cli.backup import KeyFile, RevokedFiles, WithTokens, key_for, revocations, say_on_terminal, who_gets_in
from edgeward.cli.output import emit, write
from edgeward.cli.session import Session, UsageError, command
from edgeward.core.quantity import parse_duration

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The hub itself: its certificate authority.")

_FORMATS = ("table", "json", "yaml")
_LOOK = 0.5


def rotate_ca(
    session: Session,
    wait: Annotated[
        str, typer.Option("--wait", metavar="TIME", help="How long to wait for the nodes that are online.")
    ] = "60s",
) -> None:
    """Replace the CA: make the next one, have the nodes trust it too, then sign with it.

    Nodes that are away follow when they are back. The old one is trusted until `hub retire-ca`.
    """
    output = session.output(allowed=_FORMATS)
    try:
        patience = parse_duration(wait)
    except ValueError as e:
        raise UsageError(f"--wait: {e}") from None
    with session.api() as api:
        state = api.request("POST", "/api/v1/ca/rotate")
        deadline = time.monotonic() + patience
        while state["waitingOnline"] and time.monotonic() < deadline:
            time.sleep(_LOOK)
            state = api.request("GET", "/api/v1/ca/state")
        state = api.request("POST", "/api/v1/ca/activate")
    _show(state, output)
    if output == "table":
        write("the old CA is trusted until: edgeward hub retire-ca")


def retire_ca(session: Session) -> None:
    """End the trust in all CAs but the one that signs."""
    output = session.output(allowed=_FORMATS)
    with session.api() as api:
        _show(api.request("POST", "/api/v1/ca/retire"), output)


def ca(session: Session) -> None:
    """Which CA signs, and which nodes have not heard of what is trusted now."""
    output = session.output(allowed=_FORMATS)
    with session.api() as api:
        _show(api.request("GET", "/api/v1/ca/state"), output)


def cluster(
    session: Session,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A folder is made in it for each member.")],
    member: Annotated[
        list[str],
        typer.Option("--member", metavar="NAME=HOST:PORT:PEER-PORT", help="One that serves; give two or three."),
    ],
    witness: Annotated[
        str,
        typer.Option(
            "--witness", metavar="NAME=HOST:PEER-PORT", help="The third server where two serve: a vote and a copy."
        ),
    ] = "",
    bind: Annotated[
        str, typer.Option("--bind", metavar="ADDRESS", help="Listen there instead of at its own host.")
    ] = "",
    backup: Annotated[
        str, typer.Option("--restore", metavar="BACKUP", help="Begin with a hub's backup instead of with nothing.")
    ] = "",
    key: KeyFile = "",
    with_tokens: WithTokens = False,
    revoked: RevokedFiles = None,
) -> None:
    """Make the folders of a hub of three servers, of which any one may fail.

    Bring each to its machine and start it there: python -m edgeward.hub --data FOLDER (or install-service). A hub that
    began alone becomes one of three --restore a backup of it; --key and what follows are those of `backup restore`.
    """
    from edgeward.hub.cluster import parse_member, prepare

    if not backup and (key or with_tokens or revoked):
        raise UsageError("--key, --with-tokens and --revoked go with --restore")
    members = [parse_member(m) for m in member] + ([parse_member(witness, witness=True)] if witness else [])
    lines: list[str] = []
    if backup:
        from edgeward.hub.cluster_restore import restore_cluster

        path = Path(backup).expanduser()
        found = key_for(session, path, key, [])
        how: dict[str, Any] = {"with_tokens": with_tokens, "revoked": revocations(revoked), "say": say_on_terminal}
        report = asyncio.run(restore_cluster(path, out.absolute(), members, found, bind=bind, **how))
        report.witnesses += revoked or []
        made, lines = [out / m.name for m in members], who_gets_in(report)
    else:
        made = prepare(out, members, bind=bind)
    for one, folder in zip(members, made, strict=True):
        write(f"{one.name}: {folder}" + (" (witness)" if one.witness else f"  https://{one.host}:{one.port}"))
    for line in lines:
        write(line)
    write("the folders hold the hub's keys: move them by a safe way, and the file recovery.key away from all of them")


def _show(state: dict[str, Any], output: str) -> None:
    if output != "table":
        emit(state, output)
        return
    write(f"signing: {state['signing']}")
    if state["next"]:
        write(f"next: {state['next']}")
    write(f"trusted: {state['trusted']}")
    if state["waiting"]:
        more = len(state["waiting"]) - 20
        names = ", ".join(state["waiting"][:20]) + (f" and {more} more" if more > 0 else "")
        write(f"not heard of it yet: {names}")


app.command("rotate-ca")(command(rotate_ca))
app.command("retire-ca")(command(retire_ca))
app.command("ca")(command(ca))
app.command("cluster")(command(cluster))
