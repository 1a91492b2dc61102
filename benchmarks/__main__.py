from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from benchmarks import cluster, enrol, fleet, idle, outbox, spine
from benchmarks.common import Row, save

ALL = {
    "up": spine.up,
    "apply": spine.apply,
    "memory": spine.memory,
    "restart": spine.restart,
    "backlog": spine.backlog,
    "outbox": outbox.outbox,
    "idle": idle.idle,
    "fleet": fleet.fleet,
    "enrol": enrol.enrol,
    "cluster": cluster.cluster,
}


def main() -> int:
    names = sys.argv[1:] or list(ALL)
    unknown = [n for n in names if n not in ALL]
    if unknown:
        print(f"no benchmark {unknown[0]!r}: choose of {', '.join(ALL)}", file=sys.stderr)
        return 2
    console = Console()
    rows: list[Row] = []
    for name in names:
        console.print(f"[dim]{name} ...[/dim]")
        rows += ALL[name]()
        save(rows)
    table = Table(title="Benchmarks", title_justify="left")
    for title in ("what", "value", "bar", "holds", "baseline", "ratio"):
        table.add_column(title)
    for r in rows:
        held = "yes" if r.holds else "[red]no[/red]"
        table.add_row(r.name, f"{r.value:g} {r.unit}", r.bar, held, r.baseline, str(r.ratio or ""))
    console.print(table)
    return 0


raise SystemExit(main())
