"""`apply`, `delete` and `label`: the writes.

In come documents or names, out goes one line for each: `app/web created`. A write is based on the revision that was
just read, so it never overwrites what this command has not seen. A failure of one document does not keep the others
from being written; the exit code is the first failure's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward.cli.output import emit, full_name, write
from edgeward.cli.plain import plain
from edgeward.cli.read import Labels
from edgeward.cli.session import Failures, Session, UsageError
from edgeward.cli.targets import parse_targets
from edgeward.core.errors import Conflict, EdgewardError, NotFound
from edgeward.core.registry import redact

if TYPE_CHECKING:
    from edgeward.cli.client import Api
    from edgeward.cli.manifests import Declared
    from edgeward.core.registry import Kind

Doc = dict[str, Any]

Files = Annotated[
    list[str] | None,
    typer.Option("--filename", "-f", metavar="FILE", help="File, directory, or - for stdin; may be repeated."),
]
Timeout = Annotated[str, typer.Option("--timeout", metavar="DURATION", help="How long --wait waits, e.g. 90s.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Let the server check it, write nothing.")]
APPLY_FORMATS = ("table", "json", "yaml", "name")


def seconds(text: str, option: str) -> float:
    """A duration of the command line."""
    from edgeward.core.quantity import parse_duration

    try:
        return parse_duration(text if not text.isdigit() else int(text))
    except ValueError as e:
        raise UsageError(f"{option}: {e}") from None


def since_of(text: str) -> str:
    """What --since says, as the API asks for it."""
    seconds(text, "--since")
    return f"{text}s" if text.isdigit() else text


# -- apply -------------------------------------------------------------------------------------------------------------


def apply(
    session: Session,
    filename: Files = None,
    dry_run: DryRun = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until Apps and Functions run and Exports flow; fails when one fails.")
    ] = False,
    timeout: Timeout = "120s",
) -> None:
    """Create or update what files declare.

    Compose files and Kubernetes manifests (Deployment, Service, ConfigMap, Secret, CronJob, Namespace) are taken as
    well; what of them is not taken over is told on stderr, field by field.

    A document replaces spec, labels and annotations of the resource as it was just read. One that carries a
    metadata.resourceVersion is refused when the resource has moved on.
    """
    from edgeward.cli.manifests import read_declared

    output = session.output(allowed=APPLY_FORMATS)
    patience = seconds(timeout, "--timeout")
    declared = read_declared(session, filename or [], told=_told)
    failures = Failures()
    written: list[tuple[Declared, Doc, str]] = []
    new: set[object] = set()
    with session.api() as api:
        for d in declared:
            try:
                if d.uploads and not dry_run:
                    from edgeward.cli.uploads import upload

                    upload(api, session.at, d.namespace or "default", d.uploads)
                verb, doc = apply_one(api, d, dry_run=dry_run, new=new)
            except EdgewardError as e:
                if e.resource:
                    e.file, e.line = e.file or d.manifest.file, e.line or d.manifest.line_of(e.field)
                failures.add(e)
                continue
            if verb == "created":
                new.add(d.key)
            written.append((d, doc, verb))
            if output == "table":
                going = " (it is being deleted: apply again when it is gone)" if _going(doc) else ""
                write(f"{full_name(doc)} {verb}" + (" (dry run)" if dry_run else "") + going)
            elif output == "name":
                write(full_name(doc))
        if output in ("json", "yaml"):
            emit({"items": [redact(doc) for _, doc, _ in written]}, output)
        if wait and not dry_run:
            from edgeward.cli.wait import wait_ready

            for late in wait_ready(api, [(d.kind, d.namespace, doc, verb) for d, doc, verb in written], patience):
                failures.add(late)
    failures.finish()


def _told(text: str) -> None:
    print(plain(text), file=sys.stderr)


def apply_one(api: Api, d: Declared, *, dry_run: bool, new: set[object]) -> tuple[str, Doc]:
    """Makes the server have what the document declares; returns what was done, and the resource."""
    from edgeward.cli.manifests import intent, intent_of

    for attempt in (1, 2):
        try:
            current: Doc | None = api.get(d.kind, d.namespace, d.name)
        except NotFound:
            current = None
        try:
            if current is None and not d.revision:
                if dry_run and _rests_on(d, new):
                    # the server cannot know what this very dry run would have created before
                    return "created", d.resource.document()
                return "created", api.create(d.kind, d.namespace, to_send(d, None), dry_run=dry_run)
            if current is not None and _settled(d, current) and intent_of(current) == intent(d.resource):
                return "unchanged", current
            return "configured", api.replace(d.kind, d.namespace, d.name, to_send(d, current), dry_run=dry_run)
        except Conflict:
            # Someone was faster. Once more on what they wrote, unless the file itself names a revision.
            if d.revision or attempt == 2:
                raise
    raise AssertionError("unreachable")


def _revision(doc: Mapping[str, Any]) -> str:
    return str((doc.get("metadata") or {}).get("resourceVersion") or "")


def _going(doc: Mapping[str, Any]) -> bool:
    return bool((doc.get("metadata") or {}).get("deletionTimestamp"))


def _settled(d: Declared, current: Mapping[str, Any]) -> bool:
    """Whether leaving it alone is an answer: it stays, and the file does not insist on another revision."""
    return not _going(current) and d.revision in ("", _revision(current))


def _rests_on(d: Declared, new: set[object]) -> bool:
    from edgeward.core.resource import CLUSTER, Key

    needs = {Key(r.kind, r.namespace or CLUSTER, r.name) for r in d.kind.refs(d.resource)}
    if d.namespace:
        needs.add(Key("Namespace", CLUSTER, d.namespace))
    return bool(needs & new)


def to_send(d: Declared, current: Mapping[str, Any] | None) -> Doc:
    """The document as written, on the revision read; what the system added to the metadata stays."""
    meta = d.resource.metadata
    was: Mapping[str, Any] = (current or {}).get("metadata") or {}
    sent: Doc = {"name": meta.name, "labels": meta.labels, "annotations": meta.annotations, "conflict": meta.conflict}
    if d.namespace:
        sent["namespace"] = d.namespace
    written = d.manifest.doc["metadata"]
    for name in ("finalizers", "ownerReferences"):
        value = written.get(name, was.get(name))
        if value:
            sent[name] = value
    revision = d.revision or str(was.get("resourceVersion") or "")
    if revision:
        sent["resourceVersion"] = revision
    return {
        "apiVersion": d.resource.apiVersion,
        "kind": d.kind.name,
        "metadata": sent,
        "spec": d.manifest.doc.get("spec") or {},
    }


# -- delete ------------------------------------------------------------------------------------------------------------


def delete(
    session: Session,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KIND NAME... | KIND/NAME...]", show_default=False)
    ] = None,
    filename: Files = None,
    selector: Labels = "",
    wait: Annotated[bool, typer.Option("--wait", help="Until it is gone everywhere.")] = False,
    timeout: Timeout = "120s",
    ignore_not_found: Annotated[bool, typer.Option("--ignore-not-found", help="What is gone already is fine.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Delete resources by name, by label selector, or those that files declare."""
    output = session.output(allowed=("table", "name"))
    patience = seconds(timeout, "--timeout")
    failures = Failures()
    going: list[tuple[Kind, str | None, str]] = []
    with session.api() as api:
        for kind, namespace, name in _to_delete(session, api, words or [], filename or [], selector):
            label = f"{kind.name.lower()}/{name}"
            try:
                left = api.delete(kind, namespace, name, dry_run=dry_run)
            except NotFound as e:
                if not ignore_not_found:
                    failures.add(e)
                continue
            except EdgewardError as e:
                failures.add(e)
                continue
            going.append((kind, namespace, name))
            write(label if output == "name" else f"{label} {_farewell(left, dry_run=dry_run)}")
        if wait and not dry_run:
            from edgeward.cli.wait import wait_gone

            for late in wait_gone(api, going, patience):
                failures.add(late)
    failures.finish()


def _farewell(left: Mapping[str, Any], *, dry_run: bool) -> str:
    if dry_run:
        return "deleted (dry run)"
    meta = left.get("metadata") or {}
    if meta.get("deletionTimestamp"):
        return f"deleting (waits for {', '.join(meta.get('finalizers') or ['what is in it'])})"
    return "deleted"


def _to_delete(
    session: Session, api: Api, words: Sequence[str], files: Sequence[str], selector: str
) -> list[tuple[Kind, str | None, str]]:
    if files:
        if words or selector:
            raise UsageError("either -f FILE or names, not both")
        from edgeward.cli.manifests import read_declared

        # what was written last is referred to by nothing
        return [(d.kind, d.namespace, d.name) for d in reversed(read_declared(session, files, pack=False))]
    targets = parse_targets(words)
    got: list[tuple[Kind, str | None, str]] = []
    for t in targets:
        if t.name is not None:
            if selector:
                raise UsageError("a selector chooses by itself: leave the names out")
            got.append((t.kind, session.one(t.kind), t.name))
        elif not selector:
            raise UsageError(f"which {t.kind.plural}? name them, or choose by -l LABELS")
        else:
            for doc in api.list(t.kind, session.scope(t.kind), labels=selector)["items"]:
                meta = doc["metadata"]
                got.append((t.kind, meta.get("namespace") or None, meta["name"]))
    return got


# -- label -------------------------------------------------------------------------------------------------------------

_SET = re.compile(r"^([^=]+)=(.*)$")


def label(
    session: Session,
    words: Annotated[
        list[str], typer.Argument(metavar="KIND NAME... | KIND/NAME... KEY=VALUE... KEY-...", show_default=False)
    ],
) -> None:
    """Set labels (KEY=VALUE) and remove them (KEY-)."""
    output = session.output(allowed=("table", "json", "yaml", "name"))
    # names cannot end in '-' and hold no '=', so the words sort themselves
    changes = {w: w for w in words if "=" in w or w.endswith("-")}
    if not changes:
        raise UsageError("no label given: KEY=VALUE sets, KEY- removes")
    labels: dict[str, str | None] = {}
    for word in changes:
        match = _SET.match(word)
        labels[match[1] if match else word.removesuffix("-")] = match[2] if match else None
    failures = Failures()
    with session.api() as api:
        for t in parse_targets([w for w in words if w not in changes]):
            if t.name is None:
                raise UsageError(f"which {t.kind.plural}? name them")
            try:
                doc = api.patch(t.kind, session.one(t.kind), t.name, {"metadata": {"labels": labels}})
            except EdgewardError as e:
                failures.add(e)
                continue
            if output in ("json", "yaml"):
                emit(redact(doc), output)
            else:
                write(full_name(doc) + ("" if output == "name" else " labeled"))
    failures.finish()
