"""`rollout status|pause|resume|approve|cancel|hold|release`: how a run goes, and a person's word in it.

What a person says is written into the Rollout's spec, on the revision that was read; hub and nodes follow it. `hold`
and `release` are the site's: with `--at NODE` they take effect there at once, with and without the link.
"""

from __future__ import annotations

import contextlib
import time
from typing import Annotated, Any

import typer

from edgeward.cli.kinds import find_kind
from edgeward.cli.output import emit, print_rows, write
from edgeward.cli.session import Session, command
from edgeward.cli.write import Timeout, seconds
from edgeward.core.errors import EdgewardError, NotFound, Refused

app = typer.Typer(no_args_is_help=True, add_completion=False, help="How new versions go from group to group.")

Name = Annotated[str, typer.Argument(metavar="ROLLOUT", show_default=False)]
Doc = dict[str, Any]
#: Seconds between two looks.
_LOOK = 1.0


def status(
    session: Session,
    name: Name,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until what is declared is everywhere; fails when it went back.")
    ] = False,
    timeout: Timeout = "1h",
) -> None:
    """How far a run is: its groups, and which nodes failed and why."""
    output = session.output()
    kind = find_kind("rollout")
    until = time.monotonic() + seconds(timeout, "--timeout")
    with session.api() as api:
        while True:
            doc: Doc = api.get(kind, session.one(kind), _plain(name))
            said: Doc = doc.get("status") or {}
            if not wait or _over(api, doc) or time.monotonic() >= until:
                break
            time.sleep(_LOOK)  # the pace of looking
        late = wait and not _over(api, doc)
    _show(said, output)
    if late or (wait and said.get("phase") != "Succeeded"):
        raise EdgewardError(
            f"is {said.get('phase', 'Pending')}" + (f" after {timeout}" if late else ""),
            resource=f"Rollout/{_plain(name)}",
            remedy=str(said.get("message") or "see: edgeward rollout status"),
        )


def _over(api: Any, doc: Doc) -> bool:
    """Whether the run is over of what is declared now: the hub may not have begun with it yet."""
    said: Doc = doc.get("status") or {}
    if said.get("phase") not in ("Succeeded", "RolledBack"):
        return False
    known = {(t["kind"], t["name"]): t.get("generation") for t in said.get("targets", [])}
    for t in doc["spec"].get("targets", []):
        with contextlib.suppress(NotFound):
            target = api.get(find_kind(t["kind"]), doc["metadata"].get("namespace"), t["name"])
            if known.get((t["kind"], t["name"])) != target["metadata"]["generation"]:
                return False
    return True


def _show(said: Doc, output: str) -> None:
    if output in ("json", "yaml"):
        emit(said, output)
        return
    write(" ".join(p for p in (said.get("phase", "Pending"), f"run {said['run']}" if said.get("run") else "") if p))
    if said.get("message"):
        write(said["message"])
    if said.get("phase") in ("Pending", "Running", "Paused") and said.get("prefetched"):
        write(f"{said['prefetched']} nodes have all that it needs")
    rows: list[list[object]] = []
    for g in said.get("groups", []):
        nodes, failed = g.get("nodes", []), g.get("failed", {})
        done = f"{g.get('done', 0)}/{g.get('total', 0)}"
        rows.append(
            [g["name"], g.get("phase", "Pending"), done, len(nodes), len(failed), g.get("late", 0), g.get("message")]
        )
    if rows:
        print_rows(["GROUP", "PHASE", "DONE", "LET ON", "FAILED", "LATE", "MESSAGE"], rows)
    for g in said.get("groups", []):
        for node, why in sorted(g.get("failed", {}).items()):
            write(f"{node} failed: {why}")
    if older := said.get("ungoverned"):
        write(f"of an earlier release, they take what is declared at once: {', '.join(older)}")


def _plain(name: str) -> str:
    return name.removeprefix("rollout/")


def _change(session: Session, name: str, what: str, make: Any) -> None:
    """Writes what ``make(spec, status)`` gives as a merge patch of the spec, on the revision that it saw."""
    session.output(allowed=("table",))
    kind = find_kind("rollout")
    with session.api() as api:
        doc: Doc = api.get(kind, session.one(kind), _plain(name))
        patch = make(doc.get("spec") or {}, doc.get("status") or {})
        body = {"metadata": {"resourceVersion": doc["metadata"]["resourceVersion"]}, "spec": patch}
        api.patch(kind, session.one(kind), _plain(name), body)
    write(f"rollout/{_plain(name)} {what}")


def _run(name: str, status: Doc) -> str:
    run = str(status.get("run", ""))
    if not run or status.get("phase") == "Succeeded":
        raise Refused("has no run under way", resource=f"Rollout/{_plain(name)}", remedy="see: edgeward rollout status")
    return run


def pause(session: Session, name: Name) -> None:
    """Let nobody on; who was let on proves it or fails as before."""
    _change(session, name, "paused", lambda spec, status: {"paused": True})


def resume(session: Session, name: Name) -> None:
    """End a pause; begin a cancelled run again."""

    def make(spec: Doc, status: Doc) -> Doc:
        patch: Doc = {"paused": None, "cancelled": None}
        if status.get("cancelled"):
            patch["approved"] = [*_of(spec, status), str(status.get("run", ""))]
        return patch

    _change(session, name, "resumed", make)


def _of(spec: Doc, status: Doc) -> list[str]:
    """What was approved of this very run."""
    return [a for a in spec.get("approved", []) if a.startswith(f"{status.get('run', '')}/")]


def approve(
    session: Session,
    name: Name,
    group: Annotated[str, typer.Argument(metavar="[GROUP]", help="The one that waits, unless said.")] = "",
) -> None:
    """Let a group of this run begin that waits for approval."""

    def make(spec: Doc, status: Doc) -> Doc:
        run = _run(name, status)
        waits = [g["name"] for g in status.get("groups", []) if g.get("phase") == "Waiting"]
        known = [g["name"] for g in status.get("groups", [])]
        which = group or (waits[0] if waits else "")
        if which not in known:
            what = f"has no group {which!r}" if which else "has no group that waits"
            raise Refused(what, resource=f"Rollout/{_plain(name)}", remedy=f"its groups: {', '.join(known)}")
        return {"approved": [*(a for a in _of(spec, status) if a != f"{run}/{which}"), f"{run}/{which}"]}

    _change(session, name, "approved", make)


def cancel(session: Session, name: Name) -> None:
    """End the run: what was touched goes back."""

    def make(spec: Doc, status: Doc) -> Doc:
        run = _run(name, status)
        return {"cancelled": run, "approved": _of(spec, status) or None}

    _change(session, name, "cancelled", make)


def hold(session: Session, name: Name) -> None:
    """Changes wait: with --at NODE at that node's site alone, with and without the link."""
    _change(session, name, "held", lambda spec, status: {"hold": True})


def release(session: Session, name: Name) -> None:
    """End a hold: the site takes what the run has for it."""
    _change(session, name, "released", lambda spec, status: {"hold": False})


for _command in (status, pause, resume, approve, cancel, hold, release):
    app.command(_command.__name__)(command(_command))
