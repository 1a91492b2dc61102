"""`functions metrics|samples`: how a function does, and what some of its calls were given and answered."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from edgeward.cli.observe import count, harmless
from edgeward.cli.output import emit, print_rows, write
from edgeward.cli.plain import plain
from edgeward.cli.session import Session, UsageError
from edgeward.cli.versions import Name, named
from edgeward.cli.write import since_of

Doc = dict[str, Any]
Node = Annotated[str, typer.Option("--node", metavar="NODE", help="Only of this node.")]
#: Characters of an input or an output that a table shows.
_SHOWN = 60


def _path(session: Session, api: Any, name: str, what: str) -> str:
    return f"{api.path(*named(session, name))}/{what}"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _row(n: Doc) -> list[object]:
    from edgeward.functions.stats import quantile

    latency = n.get("latency") or []
    times = [_time(quantile(latency, q)) for q in (0.5, 0.95, 0.99)] if n.get("calls") else ["", "", ""]
    running = n.get("running") or []
    memory = max((r.get("memory", 0) for r in running), default=0)
    shown = f"{memory / 2**20:.1f} MB" if memory else ""
    return [
        n["node"],
        n.get("calls", 0),
        sum(n.get("failed", {}).values()),
        *times,
        n.get("cold", 0),
        len(running),
        shown,
    ]


def metrics(session: Session, name: Name, node: Node = "") -> None:
    """Print how a function does on its nodes, since each node's plane started.

    Times are read off a histogram. MEMORY is that of the largest instance, with its part of what it shares.
    """
    from edgeward.functions.stats import added

    output = session.output(allowed=("table", "json", "yaml"))
    with session.api() as api:
        found: list[Doc] = api.request(
            "GET", _path(session, api, name, "metrics"), query={"node": node} if node else None
        )["nodes"]
    if output != "table":
        emit({"nodes": found}, output)
        return
    known = [n for n in found if "unreadable" not in n]
    rows = [_row(n) for n in known]
    if len(known) > 1:
        rows.append(_row({**added(known), "node": "all"}))
    print_rows(["NODE", "CALLS", "FAILED", "P50", "P95", "P99", "COLD", "INSTANCES", "MEMORY"], rows)
    for n in known:
        if failed := n.get("failed"):
            write(f"{n['node']}: failed: " + ", ".join(f"{k} {v}" for k, v in sorted(failed.items())))
        for arm, j in (n.get("judged") or {}).items():
            write(f"{n['node']}: {arm} {j['version']}: {j['failed']} of {j['calls']} judged calls failed")
        if n.get("samples") or n.get("samples_dropped"):
            write(f"{n['node']}: samples: {n['samples']} kept, {n['samples_dropped']} had no room")
    for n in found:
        if "unreadable" in n:
            print(plain(f"edgeward: {n['node']}: {n['unreadable']}"), file=sys.stderr)


def _cut(text: str) -> str:
    text = harmless(text.replace("\n", " "))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def samples(
    session: Session,
    name: Name,
    since: Annotated[str, typer.Option("--since", metavar="DURATION", help="Only what is younger, e.g. 24h.")] = "",
    limit: Annotated[str, typer.Option("--limit", metavar="N", help="So many of each node, the newest.")] = "100",
    why: Annotated[str, typer.Option("--why", metavar="REASON", help="error, rate, score or offered.")] = "",
    node: Node = "",
) -> None:
    """Print samples of a function's inputs and outputs; with -o jsonl whole, one JSON object a line.

    What is kept is declared in spec.samples. A node keeps its samples while it is cut off; they are read from it when
    it is there.
    """
    output = session.output(allowed=("table", "jsonl"))
    query = {"limit": count(limit, "--limit"), "why": why, "node": node}
    if since:
        query["since"] = since_of(since)
    if why not in ("", "error", "rate", "score", "offered"):
        raise UsageError(f"--why {why}: error, rate, score or offered")
    rows: list[list[object]] = []
    away: list[Doc] = []
    with session.api() as api:
        path = _path(session, api, name, "samples")
        for line in api.lines(path, query={k: v for k, v in query.items() if v}, accept="application/x-ndjson"):
            doc: Doc = json.loads(line)
            if "unreadable" in doc:
                away.append(doc)
            elif output == "jsonl":
                write(line)
            else:
                score = doc.get("score", "")
                what = doc["why"] if not doc.get("error") else f"{doc['why']}: {doc['error']}"
                shown = [_cut(str(doc.get(field, ""))) for field in ("input", "output")]
                rows.append([doc["time"], doc["node"], doc["version"], what, score, *shown])
    if output == "table":
        print_rows(["TIME", "NODE", "VERSION", "WHY", "SCORE", "INPUT", "OUTPUT"], rows)
    for doc in away:
        print(plain(f"edgeward: {doc['node']}: {doc['unreadable']}"), file=sys.stderr)
