"""`token create|list|revoke`: keys to the API for people and programs.

A token is shown once, as the last word of what `create` prints; the hub keeps its hash.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgeward.cli.kinds import find_kind
from edgeward.cli.output import emit, print_rows, write
from edgeward.cli.session import Failures, Session, UsageError, command
from edgeward.core.errors import EdgewardError
from edgeward.core.registry import redact

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make, list and end tokens.")

Names = Annotated[list[str], typer.Argument(metavar="NAME...", show_default=False)]
_FORMATS = ("table", "json", "yaml")


def create(
    session: Session,
    role: Annotated[str, typer.Option("--role", metavar="ROLE", help="For a person or program: what it may do.")] = "",
    ttl: Annotated[str, typer.Option("--ttl", metavar="DURATION", help="How long it is good for, e.g. 24h.")] = "",
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Its name in lists and in the audit.")] = "",
    sites: Annotated[
        str, typer.Option("--sites", metavar="A,B", help="Sites whose nodes take it too, also while cut off; * is all.")
    ] = "",
    description: Annotated[str, typer.Option("--description", metavar="TEXT", help="Who has it, what for.")] = "",
) -> None:
    """Make a token; it is shown once, as the last word of the output."""
    output = session.output(allowed=_FORMATS)
    if not role:
        raise UsageError("say what the token may do: --role ROLE (see: edgeward get roles)")
    asked: dict[str, Any] = {"role": role, "ttl": ttl, "name": name, "description": description}
    asked["sites"] = [s.strip() for s in sites.split(",") if s.strip()]
    with session.api() as api:
        made = api.request("POST", "/api/v1/issue/accesstoken", body={k: v for k, v in asked.items() if v})
    if output in ("json", "yaml"):
        emit(made, output)
    else:
        write(f"token {made['name']} (role {made['role']}) until {made['expires']}, shown this once:\n{made['token']}")


def list_tokens(session: Session) -> None:
    """List tokens: role, end, last use."""
    output = session.output(allowed=_FORMATS)
    kind = find_kind("accesstoken")
    with session.api() as api:
        items = api.list(kind, None)["items"]
    if output in ("json", "yaml"):
        emit({"items": [redact(i) for i in items]}, output)
    elif not items:
        typer.echo("no tokens", err=True)
    else:
        titles = ["NAME", "ROLE", "EXPIRES", "LAST USED", "SITES"]
        print_rows(titles, [_row(i) for i in items])


def _row(item: dict[str, Any]) -> list[object]:
    spec, status = item["spec"], item.get("status") or {}
    used = status.get("lastUsed", "never")
    return [item["metadata"]["name"], spec["role"], spec["expires"], used, ",".join(spec.get("sites", []))]


def revoke(session: Session, names: Names) -> None:
    """End tokens at once."""
    session.output(allowed=("table",))
    kind = find_kind("accesstoken")
    failures = Failures()
    with session.api() as api:
        for name in names:
            try:
                api.delete(kind, None, name)
            except EdgewardError as e:
                failures.add(e)
                continue
            write(f"token {name} revoked")
    failures.finish()


app.command("create")(command(create))
app.command("list")(command(list_tokens))
app.command("revoke")(command(revoke))
