"""`release create`: a release of the agent, made of wheels that lie here, brought to the hub and declared.

In: a folder of wheels for each kind of machine, edgeward's among them with all that it needs. Out: an archive of each
at the hub, named by its digest, and the Release that names them. Nothing is fetched from anywhere: what is not in the
folder is not in the release, and a node that cannot load it refuses it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeward.cli.kinds import find_kind
from edgeward.cli.output import emit, write
from edgeward.cli.session import Session, UsageError, command
from edgeward.core.errors import Invalid, NotFound

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Releases of the agent, which nodes take themselves."
)

Name = Annotated[str, typer.Argument(metavar="RELEASE", show_default=False)]
#: Kinds of machine begin so.
_SYSTEM = "linux-"


def create(
    session: Session,
    name: Name,
    wheels: Annotated[
        list[str] | None,
        typer.Option(
            "--wheels",
            metavar="[MACHINE=]DIR",
            help="A folder of wheels; of this machine's kind, or e.g. linux-aarch64-cp311=DIR. May be repeated.",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--print", help="Upload, and print the Release instead of declaring it.")
    ] = False,
) -> None:
    """Bring a release of the agent to the hub and declare it.

    Each folder holds the wheel of edgeward and of everything it needs for that kind of machine, as `pip download -r
    requirements.lock` and `pip wheel --no-deps` make it. The version is that of edgeward's wheel. A Release that
    is there keeps its health and its placement.
    """
    from edgeward.cli.manifests import read_declared
    from edgeward.cli.uploads import upload
    from edgeward.cli.write import apply_one
    from edgeward.nodes.release_spec import HOME

    session.output(allowed=("table",))
    folders = _folders(wheels or [])
    version, packed = "", {}
    for machine, folder in folders.items():
        found, data = pack(folder)
        if version not in ("", found):
            raise Invalid(f"{folder} has edgeward {found}, another folder {version}", remedy="give one version")
        version, packed[machine] = found, data
    digests = {m: f"sha256:{hashlib.sha256(data).hexdigest()}" for m, data in packed.items()}
    kind = find_kind("release")
    with session.api() as api, tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "release.yaml"
        namespace = {"apiVersion": "edgeward/v1", "kind": "Namespace", "metadata": {"name": HOME}, "spec": {}}
        try:
            api.get(find_kind("namespace"), None, HOME)
        except NotFound:
            file.write_text(json.dumps(namespace))
            apply_one(api, read_declared(session, [str(file)])[0], dry_run=False, new=set())
        upload(api, session.at, HOME, [(digests[m], data) for m, data in packed.items()])
        meta: dict[str, Any] = {"name": name, "namespace": HOME}
        spec: dict[str, Any] = {}
        try:
            there = api.get(kind, HOME, name)
            spec = dict(there["spec"])
            meta |= {k: there["metadata"][k] for k in ("labels", "annotations") if there["metadata"].get(k)}
        except NotFound:
            pass
        spec |= {"version": version, "archives": digests}
        doc = {"apiVersion": "edgeward/v1", "kind": "Release", "metadata": meta, "spec": spec}
        if show:
            emit(doc, "yaml")
            return
        file.write_text(json.dumps(doc))
        verb, _ = apply_one(api, read_declared(session, [str(file)])[0], dry_run=False, new=set())
    sizes = ", ".join(f"{m} {len(data)} bytes" for m, data in packed.items())
    write(f"release/{name} {verb}: edgeward {version} ({sizes})")


def _folders(given: list[str]) -> dict[str, Path]:
    import platform
    import sys

    here = f"{platform.system().lower()}-{platform.machine()}-cp{sys.version_info[0]}{sys.version_info[1]}"
    found: dict[str, Path] = {}
    for text in given:
        machine, _, folder = text.partition("=") if text.startswith(_SYSTEM) else ("", "", text)
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise UsageError(f"--wheels {text}: {folder or 'nothing'} is no folder")
        if found.setdefault(machine or here, path) != path:
            raise UsageError(f"--wheels: {machine or here} is given twice")
    if not found:
        raise UsageError("--wheels DIR is missing: the folder with the wheels of edgeward and all that it needs")
    return found


def pack(folder: Path) -> tuple[str, bytes]:
    """A folder's version of edgeward, and its wheels as one archive: the same bytes for the same wheels."""
    from edgeward.functions.wheels import wheel_of

    names: dict[str, Path] = {}
    version = ""
    for path in sorted(folder.glob("*.whl")):
        name, number, _ = wheel_of(path.name)
        if name in names:
            raise Invalid(f"{name} is there twice: {names[name].name}, {path.name}", remedy="keep one of them")
        names[name] = path
        version = number if name == "edgeward" else version
    if not version:
        raise Invalid(f"{folder} has no wheel of edgeward", remedy="pip wheel --no-deps, or its release page")
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(names.values()):
            data = path.read_bytes()
            info = tarfile.TarInfo(path.name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return version, out.getvalue()


app.command("create")(command(create))
