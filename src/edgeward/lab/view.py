"""What ``up`` and ``lab`` print for people."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from edgeward.cli.context import CONTEXT_ENV, context_path

if TYPE_CHECKING:
    from edgeward.lab.cluster import Cluster

#: examples/01 as the wheel carries it, and in a checkout.
_EXAMPLES = (
    Path(__file__).parents[1] / "examples" / "01-hello-edge",
    Path(__file__).parents[3] / "examples" / "01-hello-edge",
)

console = Console(stderr=False, highlight=False)


def example() -> Path:
    """The first example's folder: the wheel carries it, a checkout has it."""
    return next((p for p in _EXAMPLES if p.is_dir()), _EXAMPLES[0])


def say(text: str) -> None:
    console.print(f"[dim]·[/dim] {text}", soft_wrap=True)


def program() -> str:
    """How this program was called, so that what is proposed can be typed as it stands."""
    called, found = sys.argv[0], shutil.which("edgeward")
    if Path(called).name != "edgeward" or (found and Path(found).resolve() == Path(called).resolve()):
        return "edgeward"
    here = Path.cwd()
    return str(Path(called).relative_to(here)) if Path(called).is_relative_to(here) else called


def show_ready(cluster: Cluster, links: str = "") -> None:
    context = cluster.context()
    file = cluster.data / "context.json"
    console.print(f"\n[bold green]Ready.[/bold green] Hub {context['hub_url']}\n  context {file}", soft_wrap=True)
    if links:
        console.print(f"  links: {links}", soft_wrap=True)
    for node in context["nodes"]:
        gateway = f", gateway {node['gateway_url']}" if node["gateway_url"] else ""
        console.print(f"  node {node['name']} of site {node['site']}: MQTT {node['mqtt_url']}{gateway}", soft_wrap=True)
    console.print(
        "\nTry, in another terminal:\n"
        + "".join(f"  {line}\n" for line in proposals(file))
        + "\nCtrl-C stops it; state is kept.",
        soft_wrap=True,
    )


def proposals(file: Path) -> list[str]:
    """Commands to begin with; the context is named only where it is not the one that is meant anyway."""
    usual = context_path()
    lines = [] if file == usual else [f"export {CONTEXT_ENV}={shlex.quote(str(file))}"]
    here = Path("examples/01-hello-edge")
    folder = here if here.is_dir() else example()
    called = program()
    return [*lines, f"{called} get nodes", f"{called} apply -f {shlex.quote(str(folder))} --wait", f"{called} get apps"]


def _state(site: dict[str, Any]) -> str:
    parted = "/".join(",".join(group) for group in site["parted"])
    return ("cut" if site["cut"] else "up") + (f", parted {parted}" if parted else "")


def show_status(doc: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("SITE", "LINK", "STATE", "NODE", "AGENT", "NATS", "READY"):
        table.add_column(title)
    for site in doc["sites"]:
        for n, node in enumerate(site["nodes"]):
            table.add_row(
                site["name"] if n == 0 else "",
                site["link"] if n == 0 else "",
                _state(site) if n == 0 else "",
                node["name"],
                str(node["agent"] or "-"),
                str(node["nats"] or "-"),
                "yes" if node["ready"] else "no",
            )
    console.print(table)
    console.print(f"links: {doc['backing']}", soft_wrap=True)
