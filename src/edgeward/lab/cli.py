"""The commands that run a whole system: ``up``, ``demo`` and ``lab``. Logic is in ``cluster.py`` and ``demo.py``."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from edgeward.cli.context import CONTEXT_ENV, default_data_dir
from edgeward.cli.session import before
from edgeward.core.errors import Invalid


def _data(default: str) -> Any:
    return typer.Option("--data", help=f"Where the system keeps its state; else {default}.", metavar="DIR")


UpData = Annotated[Optional[Path], _data("the user's state directory")]  # noqa: UP045
LabData = Annotated[Optional[Path], _data("`lab` in the user's state directory")]  # noqa: UP045
DemoData = Annotated[Optional[Path], _data("a temporary one, removed at the end")]  # noqa: UP045
PortOption = Annotated[
    int, typer.Option("--port", help="The hub's port; 0: any free one.", min=0, max=65535, metavar="N")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seeds the emulated links.", metavar="N")]
ReadyOption = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads annotations at run time
    typer.Option("--ready-file", help="Write the context here too, when ready and on change.", metavar="FILE"),
]

UP_TOPOLOGY = "sites: [{name: plant, nodes: 1}]"


def _run(main: Callable[[asyncio.Event], Awaitable[int]]) -> None:
    """Runs until SIGINT, SIGTERM or SIGHUP set the event; a second Ctrl-C does not hurry the orderly stop."""

    async def body() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(sig, stop.set)
        return await main(stop)

    code = asyncio.run(body())
    if code:
        raise typer.Exit(code)


def up(data: UpData = None, port: PortOption = 0, ready_file: ReadyOption = None) -> None:
    """Run a hub and a first edge (node plant-1 of site plant) on this machine, until Ctrl-C.

    State is kept: the next `up` has everything as it was.
    """
    from edgeward.lab.cluster import Cluster
    from edgeward.lab.topology import parse
    from edgeward.lab.view import say, show_ready

    directory = (data or default_data_dir()).absolute()

    async def main(stop: asyncio.Event) -> int:
        topology = parse(UP_TOPOLOGY, file="up")
        async with Cluster(directory, topology, port=port, ready_file=ready_file, say=say) as cluster:
            await _or_stop(cluster.up(), stop)
            if not stop.is_set():
                show_ready(cluster)
                await _or_stop(cluster.run(), stop)
        return 0

    _run(main)


async def _or_stop(work: Any, stop: asyncio.Event) -> None:
    """The work, or as much of it as there is before the stop."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for t in (task, stopped):
            if not t.done():
                t.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


def demo(
    data: DemoData = None,
    port: PortOption = 0,
    ready_file: ReadyOption = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the system running at the end, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object, last line.")] = False,
    seed: SeedOption = 1,
) -> None:
    """Start a cloud and two edge sites, cut one off, kill it, heal it, and count what was lost: nothing.

    Exit status 1 when anything of what it shows did not hold.
    """
    from edgeward.lab.demo import run_demo

    async def main(stop: asyncio.Event) -> int:
        return await run_demo(
            data=data, port=port, ready_file=ready_file, keep=keep, as_json=as_json, stop=stop, seed=seed
        )

    _run(main)


lab = typer.Typer(no_args_is_help=True, help="Rehearse outages: sites on emulated links.")

LabDir = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--data", help="The lab's directory; else the one of the context.", metavar="DIR"),
]
SiteArgument = Annotated[str, typer.Argument(metavar="SITE", show_default=False)]
NodeArgument = Annotated[str, typer.Argument(metavar="NODE", show_default=False)]


def lab_directory(data: Path | None) -> Path:
    """The directory of the lab that is meant: given, the context's, or the default one."""
    import os

    if data is not None:
        return data.absolute()
    context = before.context or os.environ.get(CONTEXT_ENV)
    return Path(context).expanduser().absolute().parent if context else default_data_dir() / "lab"


@lab.command("up")
def lab_up(
    file: Annotated[Path, typer.Option("--file", "-f", help="The topology: sites, nodes, links.", metavar="FILE")],
    data: LabData = None,
    port: PortOption = 0,
    ready_file: ReadyOption = None,
    backing: Annotated[
        str,
        typer.Option(
            "--backing", help="relays, namespaces or auto; else what the file says, else relays.", metavar="BACKING"
        ),
    ] = "",
    seed: SeedOption = 1,
) -> None:
    """Run a topology on this machine, until Ctrl-C."""
    from edgeward.lab.emulated import open_lab
    from edgeward.lab.topology import read
    from edgeward.lab.view import say, show_ready

    topology = read(file)
    directory = (data or default_data_dir() / "lab").absolute()

    async def main(stop: asyncio.Event) -> int:
        async with open_lab(
            directory, topology, backing=backing, port=port, ready_file=ready_file, say=say, seed=seed
        ) as running:
            await _or_stop(running.up(), stop)
            if not stop.is_set():
                show_ready(running.cluster, running.describe())
                await _or_stop(running.run(), stop)
        return 0

    _run(main)


def _ask(data: Path | None, verb: str, **args: Any) -> Any:
    from edgeward.lab.control import ask

    return ask(lab_directory(data), verb, **args)


@lab.command("status")
def lab_status(
    data: LabDir = None,
    output: Annotated[str, typer.Option("-o", "--output", help="table or json", metavar="FORMAT")] = "table",
) -> None:
    """Sites, their links, nodes and processes."""
    doc = _ask(data, "status")
    if output == "json":
        print(json.dumps(doc))
    elif output == "table":
        from edgeward.lab.view import show_status

        show_status(doc)
    else:
        raise Invalid(f"no output {output!r}", field="-o", remedy="table or json")


@lab.command("cut")
def lab_cut(site: SiteArgument, data: LabDir = None) -> None:
    """Cut a site's link: packets vanish, nothing is reset."""
    _ask(data, "cut", site=site)
    print(f"{site}: link cut")


@lab.command("heal")
def lab_heal(site: SiteArgument, data: LabDir = None) -> None:
    """Heal a site's link, and partitions inside it."""
    _ask(data, "heal", site=site)
    print(f"{site}: link healed")


@lab.command("profile")
def lab_profile(
    site: SiteArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    data: LabDir = None,
) -> None:
    """Give a site's link another profile: lan, 4g, satellite, bad-dsl."""
    _ask(data, "profile", site=site, name=name)
    print(f"{site}: link is {name} now")


@lab.command("partition")
def lab_partition(
    site: SiteArgument,
    groups: Annotated[str, typer.Argument(metavar="a,b/c", show_default=False)],
    data: LabDir = None,
) -> None:
    """Part the nodes of a site: `a,b/c` keeps a and b together and c apart (namespaces only)."""
    _ask(data, "partition", site=site, groups=[[n for n in g.split(",") if n] for g in groups.split("/")])
    print(f"{site}: parted into {groups}")


@lab.command("kill")
def lab_kill(node: NodeArgument, data: LabDir = None) -> None:
    """SIGKILL all processes of a node; it stays down until `lab start`."""
    got = _ask(data, "kill", node=node)
    print(f"{node}: killed {len(got['killed'])} processes")


@lab.command("start")
def lab_start(node: NodeArgument, data: LabDir = None) -> None:
    """Start a killed node again; returns when its agent is ready."""
    _ask(data, "start", node=node)
    print(f"{node}: running")
