"""`function new`, `run`, `test` and `deploy`: writing a function on one's own machine, then handing it over.

`run` and `test` use the node's real data plane in this process (``lab/workbench.py``), so that what is refused or ended
there is refused or ended here. Only `deploy` talks to a system; it is `apply --wait` of the same manifest.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward.cli.observe import harmless
from edgeward.cli.output import emit, write
from edgeward.cli.session import Session, UsageError, command
from edgeward.core import daemon
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.resource import check_name

if TYPE_CHECKING:
    from edgeward.core.resource import Resource
    from edgeward.lab.cases import Case
    from edgeward.lab.workbench import Workbench

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Write a function: new, test, run, deploy.")

TEMPLATES = Path(__file__).with_name("templates")
MANIFEST = "function.yaml"
#: Seconds between two looks at the files of a function that is being written.
_LOOK = 0.3

Where = Annotated[str, typer.Argument(metavar="[DIR]", help="The function's folder, or its manifest.")]


def _manifest(where: str) -> Path:
    path = Path(where)
    path = path / MANIFEST if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"there is no {path}: name the folder of a function, or write one: edgeward function new NAME")
    return path


def _read(path: Path) -> tuple[list[Resource], list[tuple[str, bytes]]]:
    """What a workbench takes of a manifest, and the folders that it names, packed. Raises ``EdgewardError``."""
    from edgeward.cli.manifests import packed
    from edgeward.core.manifest import decode_manifest, read_files
    from edgeward.lab.workbench import KINDS

    resources: list[Resource] = []
    blobs: list[tuple[str, bytes]] = []
    for manifest in read_files([path]):
        if isinstance(manifest.doc, dict) and manifest.doc.get("kind") in KINDS:
            blobs += [(digest, data) for digest, data in packed(manifest) if isinstance(data, bytes)]
            resources.append(decode_manifest(manifest))
    if not any(r.kind == "Function" for r in resources):
        raise Invalid("declares no Function", file=str(path), remedy="`edgeward function new NAME` writes one")
    return resources, blobs


def _templates() -> list[str]:
    return sorted(p.name for p in TEMPLATES.iterdir() if p.is_dir())


def new(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The function's name.", show_default=False)],
    template: Annotated[str, typer.Option("--template", "-t", metavar="NAME", help="What to begin with.")] = "http",
    folder: Annotated[str, typer.Option("--dir", metavar="DIR", help="Where; else a folder of that name here.")] = "",
) -> None:
    """Write a new function: manifest, code, and events that test it.

    Templates: http (answers requests), node (the same in JavaScript), cron (called at times), mqtt (called by
    messages).
    """
    check_name(name, "NAME", "")
    if template not in _templates():
        raise UsageError(f"--template {template}: one of {', '.join(_templates())}")
    target = Path(folder or name)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise EdgewardError("is there already", resource=str(target), remedy="name another folder: --dir DIR")
    for source in sorted((TEMPLATES / template).rglob("*")):
        if source.is_file() and "__pycache__" not in source.parts:
            made = target / source.relative_to(TEMPLATES / template)
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(re.sub(r"\bNAME\b", name, source.read_text()))
            write(str(made))
    write(f"\nNext: edgeward function test {target}; edgeward function run {target}; edgeward function deploy {target}")


@contextlib.contextmanager
def _data() -> Iterator[Path]:
    """A folder of the workbench's own. Workers of a function may only lie where their user may pass."""
    made = Path(tempfile.mkdtemp(prefix="edgeward-function-"))
    made.chmod(0o711)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def test(
    session: Session,
    where: Where = ".",
    events: Annotated[
        list[str], typer.Option("--events", "-e", metavar="PATH", help="Event files or folders; else events/.")
    ] = [],  # noqa: B006 - typer copies it
    only: Annotated[str, typer.Option("--only", metavar="TEXT", help="Only cases with this in their name.")] = "",
) -> None:
    """Call a function with events from files, in the sandbox of a node, and check its answers.

    The exit code is 0 when every case passed.
    """
    from edgeward.lab.cases import read_cases

    output = session.output(allowed=("table", "json"))
    manifest = _manifest(where)
    paths = [Path(e) for e in events] or [manifest.parent / "events"]
    cases = [c for c in read_cases(paths) if only in c.name]
    if not cases:
        raise UsageError(f"no case{f' with {only!r} in its name' if only else ''} in {', '.join(map(str, paths))}")
    with _data() as data:
        failed = daemon.run(lambda stop: _test(data, manifest, cases, output, stop))
    if failed:
        raise typer.Exit(1)


async def _test(data: Path, manifest: Path, cases: list[Case], output: str, stop: asyncio.Event) -> int:
    from edgeward.lab.cases import judge
    from edgeward.lab.workbench import Workbench

    failed, records = 0, []
    async with Workbench(data) as bench:
        for key, status in (await bench.take(*_read(manifest))).items():
            if status["phase"] != "Running":
                raise EdgewardError(_told(status), resource=f"Function/{key}")
        for case in cases:
            if stop.is_set():
                raise EdgewardError("interrupted")
            got = await bench.play(case)
            wrong = judge(case.expect, got)
            failed += bool(wrong)
            records.append({"name": case.name, "passed": not wrong, "wrong": wrong, "log": got.log})
            if output == "table":
                write(f"{'FAIL' if wrong else 'ok  '} {case.name}")
                for line in wrong:
                    write(f"     {harmless(line)}")
                for line in got.log if wrong else []:
                    write(f"     | {harmless(line)}")
    if output == "json":
        emit({"items": records}, output)
    else:
        write(f"{len(cases) - failed} passed, {failed} failed")
    return failed


def _told(status: dict[str, Any]) -> str:
    return f"{status['phase']}: {status['message']}" if status.get("message") else str(status["phase"])


def run(
    session: Session,
    where: Where = ".",
    port: Annotated[str, typer.Option("--port", metavar="PORT", help="Of its Routes on 127.0.0.1; else any.")] = "",
) -> None:
    """Serve a function here while you write it: each change of its files takes over, as on a node.

    Its Routes answer on this machine, its schedule runs, and what it writes is printed. Ctrl-C ends it.
    """
    manifest = _manifest(where)
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise UsageError(f"--port {port}: a number from 1 to 65535")
    with _data() as data:
        daemon.run(lambda stop: _run(data, manifest, int(port or 0), stop))


async def _run(data: Path, manifest: Path, port: int, stop: asyncio.Event) -> int:
    from edgeward.lab.workbench import Workbench, snapshot

    async with Workbench(data, port=port, say=lambda text: write(f"* {harmless(text)}")) as bench:
        readers: dict[str, asyncio.Task[None]] = {}
        before: dict[str, tuple[int, int]] = {}
        try:
            while not stop.is_set():
                now = snapshot(manifest.parent)
                if now != before:
                    before = now
                    try:
                        _show(await bench.take(*_read(manifest)), bench)
                    except EdgewardError as e:
                        write(f"* not taken: {e}" + ("" if not bench.resources else "; what ran before goes on"))
                    keys = bench.functions()
                    for key in keys - readers.keys():
                        readers[key] = asyncio.create_task(_print(bench, key))
                    for key in readers.keys() - keys:
                        readers.pop(key).cancel()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK):  # the period of looking at the files
                        await stop.wait()
        finally:
            for reader in readers.values():
                reader.cancel()
            await asyncio.gather(*readers.values(), return_exceptions=True)
    return 0


def _show(statuses: dict[str, dict[str, Any]], bench: Workbench) -> None:
    for key, status in statuses.items():
        name = key.removeprefix("default/")
        write(f"* {name} {status.get('version', '')}: {harmless(_told(status))}")
        for missing in status.get("notEnforced", []):
            write(f"*   not enforced here: {missing['what']} ({missing['why']})")
    for name, url in bench.urls().items():
        write(f"* route {name}: {url}")


async def _print(bench: Workbench, key: str) -> None:
    """What a function writes, from its first line on."""
    while True:
        async for line in bench.log(key, follow=True):
            write(harmless(line))
        await asyncio.sleep(_LOOK)  # it has written nothing yet


def deploy(
    session: Session,
    where: Where = ".",
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="DURATION", help="How long to wait until its nodes run it.")
    ] = "120s",
) -> None:
    """Hand a function over: apply its manifest, and wait until its nodes run it."""
    from edgeward.cli.write import apply

    apply(session, filename=[str(_manifest(where))], wait=True, timeout=timeout)


for _name, _command in (("new", new), ("test", test), ("run", run), ("deploy", deploy)):
    app.command(_name)(command(_command))
