"""``python -m benchmarks [NAME ...]``: runs them one by one; what was measured is kept after each.

One that fails or takes longer than :data:`LIMIT` loses its own rows only; which ones did is said at the end, and the
exit status is 1.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

from rich.console import Console
from rich.table import Table

from benchmarks import (
    closed,
    cluster,
    convergence,
    enrol,
    fleet,
    functions,
    gateway,
    gateway_tls,
    idle,
    outbox,
    rollouts,
    sharing,
    spine,
    steering,
    tunnel,
    verdicts,
)
from benchmarks.common import Row, save

ALL: dict[str, Callable[[], list[Row]]] = {
    "up": spine.up,
    "edge": spine.edge,
    "apply": spine.apply,
    "memory": spine.memory,
    "restart": spine.restart,
    "backlog": spine.backlog,
    "outbox": outbox.outbox,
    "convergence": convergence.convergence,
    "cluster": cluster.cluster,
    "enrol": enrol.enrol,
    "closed": closed.closed,
    "gateway": gateway.gateway,
    "gateway-tls": gateway_tls.gateway_tls,
    "idle": idle.idle,
    "fleet": fleet.fleet,
    "rollouts": rollouts.rollouts,
    "functions": functions.functions,
    "steering": steering.steering,
    "sharing": sharing.sharing,
    "tunnel": tunnel.tunnel,
    "verdicts": verdicts.verdicts,
}
#: Seconds for one benchmark.
LIMIT = 900


def _too_long(_: int, __: FrameType | None) -> None:
    raise TimeoutError(f"not done within {LIMIT} s")


def run(name: str, console: Console) -> list[Row] | None:
    """Its rows; None when it failed, which was said."""
    began = time.monotonic()
    signal.alarm(LIMIT)
    try:
        rows = ALL[name]()
    except Exception:  # noqa: BLE001 - whatever it was, the others are measured all the same
        traceback.print_exc()
        console.print(f"[red]{name} failed[/red] after {time.monotonic() - began:.0f} s; its rows stay as they were")
        return None
    finally:
        signal.alarm(0)
    console.print(f"[dim]{name}: {len(rows)} rows in {time.monotonic() - began:.0f} s[/dim]")
    return rows


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="Benchmarks", title_justify="left")
    for title in ("what", "value", "bar", "holds", "baseline", "ratio"):
        table.add_column(title)
    for r in rows:
        held = "yes" if r.holds else "[red]no[/red]"
        table.add_row(r.name, f"{r.value:g} {r.unit}", r.bar, held, r.baseline, str(r.ratio or ""))
    console.print(table)


def main() -> int:
    names = sys.argv[1:] or list(ALL)
    unknown = [n for n in names if n not in ALL]
    if unknown:
        print(f"no benchmark {unknown[0]!r}: choose of {', '.join(ALL)}", file=sys.stderr)
        return 2
    console = Console()
    signal.signal(signal.SIGALRM, _too_long)
    rows: list[Row] = []
    failed: list[str] = []
    for at, name in enumerate(names, 1):
        console.print(f"[dim]{at} of {len(names)}: {name} ...[/dim]")
        got = run(name, console)
        if got is None:
            failed.append(name)
        else:
            rows += got
            save(rows)
    show(rows, console)
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/red]")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
