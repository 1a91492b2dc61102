"""`whoami` and `can`: who the hub (or a node) takes you for, and what that allows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgeward.cli.kinds import load_kinds
from edgeward.cli.output import emit, print_rows, write
from edgeward.cli.session import Session

_FORMATS = ("table", "json", "yaml")


def whoami(session: Session) -> None:
    """Print who you are to the system, and your rules."""
    output = session.output(allowed=_FORMATS)
    with session.api() as api:
        me = api.request("GET", "/api/v1/whoami")
    if output in ("json", "yaml"):
        emit(me, output)
        return
    ends = f", until {me['expires']}" if me.get("expires") else ""
    write(f"{me['name']}: {me['kind']}, role {me['role'] or 'none'}{ends}")
    rules: list[dict[str, Any]] = me.get("rules") or []
    titles = ["VERBS", "KINDS", "NAMESPACES", "LABELS"]
    print_rows(titles, [_rule(r) for r in rules])


def _rule(rule: dict[str, Any]) -> list[object]:
    lists = [rule.get("verbs", []), rule.get("kinds", []), rule.get("namespaces", ["*"])]
    return [*(",".join(words) for words in lists), rule.get("labelSelector", "")]


def can(
    session: Session,
    verb: Annotated[
        str, typer.Argument(metavar="VERB", help="get, list, create, delete, logs ...", show_default=False)
    ],
    kind: Annotated[str, typer.Argument(metavar="KIND[/NAME]", help="app, app/web, secret ...", show_default=False)],
) -> None:
    """Say whether you may do something; exit code 1 when not."""
    output = session.output(allowed=_FORMATS)
    word, _, name = kind.partition("/")
    if word not in ("*", "hub", "Hub"):
        known = load_kinds().find(word)
        asked = {"verb": verb, "kind": known.name, "name": name}
        if known.namespaced and not session.all_namespaces:
            asked["namespace"] = session.namespace
    else:
        asked = {"verb": verb, "kind": "Hub" if word != "*" else "*"}
    with session.api() as api:
        answer = api.request("GET", "/api/v1/can", query={k: v for k, v in asked.items() if v})
    allowed = bool(answer.get("allowed"))
    if output in ("json", "yaml"):
        emit(answer, output)
    else:
        write("yes" if allowed else "some" if answer.get("some") else "no")
    if not allowed:
        raise typer.Exit(1)
