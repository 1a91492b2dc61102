"""`functions versions|promote|rollback`: what a function was, and which of it answers from now on.

What is promoted or brought back is written as any change is: at the hub for all sites, with --at NODE at a cut site.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward.cli.kinds import find_kind
from edgeward.cli.output import age, emit, print_rows, write
from edgeward.cli.session import Failures, Session, UsageError
from edgeward.core.errors import EdgewardError
from edgeward.core.registry import Kind
from edgeward.core.resource import check_name

if TYPE_CHECKING:
    from edgeward.cli.client import Api

Doc = dict[str, Any]
Name = Annotated[str, typer.Argument(metavar="FUNCTION", help="The function's name.", show_default=False)]
To = Annotated[str, typer.Option("--to", metavar="DIGEST", help="This version; its first digits are enough.")]
Wait = Annotated[bool, typer.Option("--wait", help="Until its nodes answer with it; fails when one cannot.")]


def named(session: Session, name: str, word: str = "function") -> tuple[Kind, str | None, str]:
    """The kind, the namespace and the name of the one function, or App (``word``), that is meant."""
    kind = find_kind(word)
    return kind, session.one(kind), check_name(name.removeprefix(f"{word}/"), word.upper(), "")


def kept(api: Api, kind: Kind, namespace: str | None, name: str) -> list[Doc]:
    """Its versions that are kept, the present one last."""
    found: list[Doc] = api.request("GET", api.path(kind, namespace, name) + "/versions")["items"]
    return found


def check_digits(to: str) -> None:
    if to and len(to) < 4:
        raise UsageError(f"--to {to}: at least four digits")


def written(session: Session, api: Api, kind: Kind, now: Doc, spec: Doc, done: str, *, wait: bool) -> None:
    """Puts the spec into the object on the revision that was read, and says so."""
    was = now["metadata"]
    stays = (
        "name",
        "namespace",
        "labels",
        "annotations",
        "conflict",
        "finalizers",
        "ownerReferences",
        "resourceVersion",
    )
    meta = {k: was[k] for k in stays if was.get(k)}
    doc = {"apiVersion": now["apiVersion"], "kind": kind.name, "metadata": meta, "spec": spec}
    got = api.replace(kind, session.one(kind), was["name"], doc)
    write(f"{kind.name.lower()}/{was['name']} {done}")
    failures = Failures()
    if wait:
        from edgeward.cli.wait import wait_ready

        for late in wait_ready(api, [(kind, session.one(kind), got, "configured")], 120.0):
            failures.add(late)
    failures.finish()


def versions(session: Session, name: Name) -> None:
    """List the versions of a function that are kept, the present one last.

    The hub keeps three, and so does each node that has the function, for the time when it is cut off (--at NODE).
    """
    from edgeward.functions.history import state_of

    output = session.output(allowed=("table", "json", "yaml"))
    kind, namespace, function = named(session, name)
    with session.api() as api:
        items = kept(api, kind, namespace, function)
        status: Doc = api.get(kind, namespace, function).get("status") or {}
    if output != "table":
        emit({"items": items}, output)
        return
    titles = ["VERSION", "STATE", "GENERATION", "DECLARED"]
    rows = [
        [i["version"], state_of(i, status, last=i is items[-1]), i["generation"], age(i["declared"])] for i in items
    ]
    print_rows(titles, rows)


def promote(
    session: Session,
    name: Name,
    wait: Wait = False,
    force: Annotated[bool, typer.Option("--force", help="Also what nodes have taken back.")] = False,
) -> None:
    """Give a function's canary all calls."""
    session.output(allowed=("table",))
    kind, namespace, function = named(session, name)
    with session.api() as api:
        now = api.get(kind, namespace, function)
        spec, status = dict(now["spec"]), now.get("status") or {}
        if not spec.pop("canary", None):
            raise EdgewardError("has no canary", resource=f"Function/{function}", remedy="declare spec.canary")
        if status.get("takenBack") and not force:
            raise EdgewardError(
                f"nodes have taken {status['takenBack']} back: {status.get('message', '')}",
                resource=f"Function/{function}",
                remedy="roll it back, or insist with --force",
            )
        written(session, api, kind, now, spec, "promoted", wait=wait)


def rollback(
    session: Session,
    name: Name,
    to: To = "",
    wait: Wait = False,
) -> None:
    """Bring a function's code back as it was: the version before the present one, or one that is kept.

    A canary is given up. Scale, placement, triggers and the like stay as they are.
    """
    from edgeward.functions.history import before, put_back

    session.output(allowed=("table",))
    check_digits(to)
    kind, namespace, function = named(session, name)
    with session.api() as api:
        now = api.get(kind, namespace, function)
        items = kept(api, kind, namespace, function)
        past = before(items, to, function)
        done = f"rolled back to {past['version'] or 'generation ' + str(past['generation'])}"
        written(session, api, kind, now, put_back(now["spec"], past), done, wait=wait)
