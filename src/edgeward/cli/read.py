"""`get` and `describe`: resources as tables, documents or prose.

In come words and selectors, out goes text. Watching begins at the revision of the list that was printed, so that no
change between the two is missed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward.cli.output import (
    Grid,
    age,
    cell,
    columns_of,
    console,
    emit,
    full_name,
    resource_rows,
    style,
    write,
)
from edgeward.cli.session import Session, UsageError
from edgeward.cli.targets import Target, one_target, parse_targets
from edgeward.core.errors import EdgewardError, NotFound
from edgeward.core.registry import redact

if TYPE_CHECKING:
    from edgeward.cli.client import Api
    from edgeward.core.registry import Kind

Doc = dict[str, Any]

Words = Annotated[list[str], typer.Argument(metavar="KIND[,KIND] [NAME...] | KIND/NAME...", show_default=False)]
OneWords = Annotated[list[str], typer.Argument(metavar="KIND NAME | KIND/NAME", show_default=False)]
Labels = Annotated[str, typer.Option("--selector", "-l", metavar="LABELS", help="e.g. app=web,env in (a,b)")]
Fields = Annotated[
    str, typer.Option("--field-selector", "-f", metavar="FIELDS", help="e.g. status.phase!=Running,spec.site=plant")
]


def get(
    session: Session,
    words: Words,
    selector: Labels = "",
    fields: Fields = "",
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on printing changes until Ctrl-C, over restarts of the server.")
    ] = False,
    show_secrets: Annotated[bool, typer.Option("--show-secrets", help="Print secret values in -o json|yaml.")] = False,
) -> None:
    """List resources, or print some.

    With -o json one named resource is printed as the API gives it, everything else as {"items": [...]}; with
    --watch each change is one line {"type": ..., "object": ...}.
    """
    output = session.output()
    targets = parse_targets(words)
    named = [t for t in targets if t.name is not None]
    if named and (selector or fields):
        raise UsageError("a selector chooses by itself: leave the names out")
    if watch and len(targets) > 1:
        raise UsageError("--watch follows one kind or one resource")
    if watch and output == "yaml":
        raise UsageError("--watch prints table, wide, json or name")
    with session.api() as api:
        if watch:
            _watch(session, api, targets[0], selector, fields, output, show_secrets)
            return
        if named:
            _print_named(session, api, targets, output, show_secrets)
            return
        groups = [
            (t.kind, api.list(t.kind, session.scope(t.kind), labels=selector, fields=fields)["items"]) for t in targets
        ]
    _print(session, groups, output, show_secrets=show_secrets)


def _print_named(session: Session, api: Api, targets: Sequence[Target], output: str, show_secrets: bool) -> None:
    groups: dict[str, tuple[Kind, list[Doc]]] = {}
    missing: EdgewardError | None = None
    for t in targets:
        try:
            doc = api.get(t.kind, session.one(t.kind), t.name or "")
        except NotFound as e:
            # the others are still wanted
            missing = missing or e
            continue
        groups.setdefault(t.kind.name, (t.kind, []))[1].append(doc)
    docs = [d for _, found in groups.values() for d in found]
    if len(targets) == 1 and docs and output in ("json", "yaml"):
        emit(docs[0] if show_secrets else redact(docs[0]), output)
    elif docs or not missing:
        _print(session, list(groups.values()), output, show_secrets=show_secrets)
    if missing:
        raise missing


def _print(
    session: Session, groups: Sequence[tuple[Kind, list[Doc]]], output: str, *, show_secrets: bool = False
) -> None:
    if output in ("json", "yaml"):
        emit({"items": [d if show_secrets else redact(d) for _, docs in groups for d in docs]}, output)
        return
    if output == "name":
        for _, docs in groups:
            for doc in docs:
                write(full_name(doc))
        return
    printed = False
    for kind, docs in groups:
        if not docs:
            continue
        if printed:
            write("")
        columns = columns_of(kind, wide=output == "wide", namespace=session.all_namespaces, several=len(groups) > 1)
        Grid([c.title.upper() for c in columns]).print(resource_rows(columns, docs))
        printed = True
    if not printed:
        names = " or ".join(k.plural for k, _ in groups)
        where = f" in namespace {session.namespace}" if all(session.scope(k) for k, _ in groups) else ""
        typer.echo(f"no {names}{where}", err=True)


def _watch(
    session: Session, api: Api, target: Target, selector: str, fields: str, output: str, show_secrets: bool
) -> None:
    from edgeward.cli.follow import Follower

    kind = target.kind
    if target.name is not None:
        fields = f"metadata.name={target.name}"
    namespace = session.one(kind) if target.name is not None else session.scope(kind)
    listing = api.list(kind, namespace, labels=selector, fields=fields)
    docs: list[Doc] = listing["items"]
    if target.name is not None and not docs:
        api.get(kind, namespace, target.name)  # says what a missing one says
    columns = columns_of(kind, wide=output == "wide", namespace=session.all_namespaces)
    grid = Grid([c.title.upper() for c in columns])

    def show(event: str, changed: Sequence[Doc], *, header: bool = False) -> None:
        if output == "json":
            for doc in changed:
                write(json.dumps({"type": event, "object": doc if show_secrets else redact(doc)}, ensure_ascii=False))
        elif output == "name":
            for doc in changed:
                write(full_name(doc))
        else:
            rows = resource_rows(columns, changed)
            if event == "DELETED":
                rows = [[*row[:-1], "deleted"] for row in rows]
            grid.print(rows, header=header)
        _flush()

    show("ADDED", docs, header=True)
    follower = Follower(
        api, kind, namespace, listing, labels=selector, fields=fields, say=lambda text: typer.echo(text, err=True)
    )
    for event, doc in follower.changes():
        if event in ("ADDED", "MODIFIED", "DELETED") and target.name in (None, doc.get("metadata", {}).get("name")):
            show(event, [doc])


def _flush() -> None:
    import sys

    sys.stdout.flush()


# -- describe ----------------------------------------------------------------------------------------------------------


def describe(session: Session, words: OneWords) -> None:
    """Show one resource: what is declared, how it is, what sites changed, what happened to it."""
    session.output(allowed=("table",))
    kind, name = one_target(words)
    with session.api() as api:
        doc = redact(api.get(kind, session.one(kind), name))
        overrides = overrides_of(api, doc)
        happened = _events_of(api, kind, doc)
    for line in _head(doc):
        _styled(line)
    for title in ("spec", "status"):
        body = doc.get(title)
        write(f"{title.capitalize()}:" + ("" if body else "  -"))
        for line in _prose(body, 1) if body else ():
            _styled(line)
    if overrides:
        write("Overrides of sites:")
        for override in overrides:
            _styled(f"  {override['metadata']['name']}:")
            for line in _prose(redact(override).get("spec"), 2):
                _styled(line)
    write("Events:" + ("" if happened else "  -"))
    if happened:
        rows = [(age(e.get("time")), e.get("reason"), e.get("node"), e.get("message")) for e in happened]
        Grid(["  AGE", "REASON", "NODE", "MESSAGE"]).print([("  " + a, *rest) for a, *rest in rows])


def _head(doc: Doc) -> Iterator[str]:
    meta = doc.get("metadata") or {}
    yield f"Kind:       {doc.get('kind')}"
    for title, key in (("Name", "name"), ("Namespace", "namespace"), ("Conflict", "conflict")):
        if meta.get(key):
            yield f"{title + ':':<12}{cell(meta[key])}"
    for title, key in (("Labels", "labels"), ("Annotations", "annotations")):
        if meta.get(key):
            yield f"{title + ':':<12}{cell(meta[key])}"
    yield f"Revision:   {cell(meta.get('resourceVersion'))} (generation {cell(meta.get('generation'))})"
    yield f"Created:    {cell(meta.get('creationTimestamp'))} ({age(meta.get('creationTimestamp'))} ago)"
    if meta.get("deletionTimestamp"):
        yield f"Deleting:   since {meta['deletionTimestamp']}, waits for {cell(meta.get('finalizers'))}"
    for owner in meta.get("ownerReferences") or ():
        yield f"Owner:      {owner.get('kind', '').lower()}/{owner.get('name', '')}"


def _prose(value: object, depth: int) -> Iterator[str]:
    """A document as indented ``name: value`` lines."""
    pad = "  " * depth
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, dict | list) and inner and not _flat(inner):
                yield f"{pad}{key}:"
                yield from _prose(inner, depth + 1)
            elif inner != {}:  # nothing said is nothing to read
                yield f"{pad}{key}: {_short(inner)}"
    elif isinstance(value, list):
        for inner in value:
            lines = list(_prose(inner, depth + 1)) if isinstance(inner, dict | list) else [f"{pad}  {cell(inner)}"]
            if lines:
                yield f"{pad}- {lines[0].lstrip()}"
                yield from lines[1:]
    else:
        yield f"{pad}{cell(value)}"


def _short(value: object) -> str:
    """A value in its line; a list as YAML writes it, so that entries with commas or blanks stay apart."""
    if isinstance(value, list) and value:
        return cell("[" + ", ".join(_entry(v) for v in value) + "]")
    return cell(value)


def _entry(value: object) -> str:
    plain = isinstance(value, str) and value and not re.search(r"[\s,\[\]{}\"'#:\\]", value)
    return str(value) if plain or not isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(value: dict[str, Any] | list[Any]) -> bool:
    return isinstance(value, list) and not any(isinstance(v, dict | list) for v in value)


def _styled(line: str) -> None:
    head, colon, tail = line.partition(": ")
    colour = style(tail) if colon else ""
    if not colour or console().no_color:
        write(line)
        return
    from rich.text import Text

    console().print(Text.assemble(head + colon, (tail, colour)), soft_wrap=True)


def _events_of(api: Api, kind: Kind, doc: Doc) -> list[Doc]:
    """The last events that concern the resource; none where the server keeps none."""
    meta = doc.get("metadata") or {}
    namespace, name = meta.get("namespace") or "", meta.get("name")
    try:
        items = api.request("GET", "/api/v1/events", query={"limit": "500"}).get("items") or []
    except NotFound:
        return []
    keys = {f"{kind.name}/{name}"} if namespace in ("", "default") else set[str]()
    keys |= {f"{kind.name}/{namespace}/{name}"} if namespace else set()
    return [e for e in items if str(e.get("resource")) in keys][-20:]


def overrides_of(api: Api, doc: Doc) -> list[Doc]:
    """The Overrides by which single sites differ from this resource."""
    from edgeward.core.registry import kinds

    kind = kinds.by_plural("overrides")
    if kind is None or doc.get("kind") == kind.name:
        return []
    meta = doc.get("metadata") or {}
    try:
        items = api.list(kind, None)["items"]
    except NotFound:
        return []
    return [o for o in items if _overrides(o, str(doc.get("kind")), meta)]


def _overrides(override: Doc, kind: str, meta: Doc) -> bool:
    target: Doc = (override.get("spec") or {}).get("target") or {}
    return (
        target.get("kind") == kind
        and target.get("name") == meta.get("name")
        and (target.get("namespace") or "default") == (meta.get("namespace") or "default")
    )
