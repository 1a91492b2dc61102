"""What ``up`` and ``lab`` print for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from edgeward.lab.cluster import Cluster

console = Console(stderr=False, highlight=False)


def say(text: str) -> None:
    console.print(f"[dim]·[/dim] {text}")


def show_ready(cluster: Cluster, links: str = "") -> None:
    context = cluster.context()
    console.print(
        f"\n[bold green]Ready.[/bold green] Hub {context['hub_url']}, context {cluster.data / 'context.json'}"
    )
    if links:
        console.print(f"Links: {links}")
    for node in context["nodes"]:
        console.print(f"  node {node['name']} of site {node['site']}: MQTT {node['mqtt_url']}")
    flag = f" --context {cluster.data / 'context.json'}"
    console.print(f"\nTry, in another terminal:\n  edgeward get nodes{flag}", soft_wrap=True)
    console.print(
        f"  edgeward apply -f examples/01-hello-edge{flag}\n\nCtrl-C stops it; state is kept.", soft_wrap=True
    )


def show_status(doc: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("SITE", "LINK", "STATE", "NODE", "AGENT", "NATS", "READY"):
        table.add_column(title)
    for site in doc["sites"]:
        for n, node in enumerate(site["nodes"]):
            table.add_row(
                site["name"] if n == 0 else "",
                site["link"] if n == 0 else "",
                ("cut" if site["cut"] else "up") if n == 0 else "",
                node["name"],
                str(node["agent"] or "-"),
                str(node["nats"] or "-"),
                "yes" if node["ready"] else "no",
            )
    console.print(table)
    console.print(f"links: {doc['backing']}")
