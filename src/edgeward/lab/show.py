"""What the demo prints for people: its steps, its facts, its table. The same on a terminal and in a pipe.

It decides nothing: what is a fact and whether it held is said by ``demo.py``, the rows of the table by ``tally.py``.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from edgeward.lab.tally import LIMITS, enforced_of, rows


class Show:
    """Progress for people: one line a fact on a terminal or a pipe alike."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)

    def step(self, title: str) -> None:
        self.console.print(f"\n[bold]{title}[/bold]", soft_wrap=True)

    def fact(self, text: str, ok: bool = True) -> None:
        self.console.print(f"  {'[green]✓[/green]' if ok else '[red]✗[/red]'} {text}", soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(f"  [dim]· {text}[/dim]", soft_wrap=True)

    def table(self, result: dict[str, Any]) -> None:
        """What was measured, and which limits this machine does not enforce."""
        enforced = enforced_of(result)
        table = Table(title="What was measured", title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        for row in rows(result):
            table.add_row(*row)
        self.console.print()
        self.console.print(table)
        missing = [what for what in LIMITS if what not in enforced]
        if result["enforced"] is not None and missing:
            self.console.print(f"\nNot enforced here: {', '.join(missing)} (needs root and cgroups).", soft_wrap=True)
