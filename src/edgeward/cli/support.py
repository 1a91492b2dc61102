"""`support-bundle`: one archive with what a supporter needs to see, and nothing that opens anything.

In: a context, a data directory, or both; what does not answer is noted and left out. Out: a tar of JSON documents and
the ends of logs. What is taken is a list of things known to be useful, never "all files"; each of them goes through
`core/scrub.py`, which also knows the secrets of the folders at hand by value. What apps wrote is not in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeward.cli.doctor import Place, examine, find_places
from edgeward.cli.output import emit, write
from edgeward.cli.session import Session
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.files import replacing
from edgeward.core.scrub import Scrubber

LOG_TAIL = 512 * 1024
#: Bytes of one document; a list that is longer is cut, and says so.
_DOCUMENT_MOST = 8 << 20
_RECORDS = "500"
_PATIENCE = 3.0
_LOGS = ("hub.log", "agent.log", "plane.log", "nats/nats.log", "nats/nats.err")
_CONFIGS = ("hub.json", "node.json", "run.json", "nats/ports.json")


def support_bundle(
    session: Session,
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Else edgeward-support-TIME.tar.gz.")] = "",
    data: Annotated[str, typer.Option("--data", metavar="DIR", help="A hub's, a node's or a system's folder.")] = "",
) -> None:
    """Collect versions, states, events, checks and the ends of logs. No secret is in it; look before you send it."""
    output = session.output(allowed=("table", "json", "yaml"))
    path = Path(file or f"edgeward-support-{time.strftime('%Y%m%dT%H%M%S')}.tar.gz").expanduser()
    if path.is_dir():
        raise Invalid("is a folder", file=str(path), remedy="name a file in it")
    places = find_places(session.context, data)
    bundle = Bundle(Scrubber(known_secrets(session.context, places)))
    bundle.add("doctor.json", {"checks": [c._asdict() for c in examine(session.context, data)]})
    for name, doc in _asked(session, bundle):
        bundle.add(name, doc)
    for place in places:
        _folder(bundle, place)
    bundle.add("summary.json", {**_system(), "notThere": bundle.missing})
    with replacing(path) as out:
        bundle.write(out)
    if output == "table":
        write(f"{path}: {path.stat().st_size} bytes, {len(bundle.entries)} files")
        for missing in bundle.missing:
            typer.echo(f"not in it: {missing}", err=True)
    else:
        doc = {"file": str(path), "bytes": path.stat().st_size, "entries": sorted(bundle.entries)}
        emit({**doc, "notThere": bundle.missing}, output)


class Bundle:
    """Scrubbed entries by name."""

    def __init__(self, scrubber: Scrubber) -> None:
        self._scrub = scrubber
        self.entries: dict[str, bytes] = {}
        self.missing: list[str] = []

    def add(self, name: str, doc: Any) -> None:
        """A document, or text."""
        if isinstance(doc, str):
            self.entries[name] = self._scrub.text(doc).encode()
            return
        text = json.dumps(self._scrub.document(doc), indent=1, ensure_ascii=False, default=str)
        raw = self._scrub.text(text).encode()
        if len(raw) > _DOCUMENT_MOST:
            self.missing.append(f"{name}: the end of it, it has {len(raw)} bytes")
        self.entries[name] = raw[:_DOCUMENT_MOST]

    def skip(self, what: str, why: object) -> None:
        self.missing.append(self._scrub.text(f"{what}: {why}"))

    def write(self, out: Any) -> None:
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            for name, raw in sorted(self.entries.items()):
                info = tarfile.TarInfo(f"edgeward-support/{name}")
                info.size, info.mode, info.mtime = len(raw), 0o600, int(time.time())
                tar.addfile(info, io.BytesIO(raw))


# --- what is known to be secret -------------------------------------------------------------------------------------


def known_secrets(context: str | None, places: list[Place]) -> set[str]:
    """Values that open something here: they are taken out wherever they turn up."""
    from edgeward.cli.context import load_context

    found: set[str] = set()
    with contextlib.suppress(EdgewardError):
        loaded = load_context(context)
        found |= {v for v in (loaded.token, *(n.mqtt_password for n in loaded.nodes)) if v}
    for place in places:
        files = [place.path / "recovery.key", place.path / "nats" / "secret", place.path / "run.json"]
        folders = [place.path / "identity", place.path / "recovery"]
        files += [p for folder in folders if folder.is_dir() for p in folder.rglob("*")]
        for path in files:
            if path.suffix in (".crt", ".pub") or path.is_symlink() or not path.is_file():
                continue
            with contextlib.suppress(OSError, UnicodeDecodeError):
                text = path.read_text()
                with contextlib.suppress(ValueError):
                    found |= set(_strings(json.loads(text)))
                found |= {line.strip() for line in text.splitlines() if len(line.strip()) >= 16}
    return {v for v in found if len(v) >= 16 and " " not in v and not v.startswith(("-----", "https://", "/", "#"))}


def _strings(doc: Any) -> Iterator[str]:
    if isinstance(doc, dict):
        for value in doc.values():
            yield from _strings(value)
    elif isinstance(doc, list):
        for value in doc:
            yield from _strings(value)
    elif isinstance(doc, str):
        yield doc


# --- what is asked --------------------------------------------------------------------------------------------------


def _asked(session: Session, bundle: Bundle) -> Iterator[tuple[str, Any]]:
    """Documents of the hub's API and of the nodes' own, as far as they answer."""
    from edgeward.cli.context import load_context

    try:
        context = load_context(session.context)
    except EdgewardError as e:
        bundle.skip("the APIs", e)
        return
    nodes = [{"name": n.name, "site": n.site, "pids": dict(n.pids)} for n in context.nodes]
    yield "context.json", {"hub": context.hub_url, "pids": dict(context.pids), "nodes": nodes}
    yield from _api(bundle, "hub", session.context, session.at)
    if not session.at:
        for node in context.nodes:
            yield from _api(bundle, f"nodes/{node.name}", session.context, node.name)


def _api(bundle: Bundle, folder: str, context: str | None, at: str | None) -> Iterator[tuple[str, Any]]:
    from edgeward.cli.client import connect
    from edgeward.core.registry import kinds
    from edgeward.hub.kinds import load

    load()
    plain = {"version": {}, "top": {}, "streams": {}, "events": {"limit": _RECORDS}, "journal": {"limit": _RECORDS}}
    try:
        api = connect(context, at, connect_timeout=_PATIENCE)
    except EdgewardError as e:
        bundle.skip(f"{folder}: its API", e)
        return
    with api:
        for name, query in [*plain.items(), ("audit", {"limit": _RECORDS})]:
            try:
                yield f"{folder}/{name}.json", api.request("GET", f"/api/v1/{name}", query=query, timeout=10.0)
            except EdgewardError as e:
                bundle.skip(f"{folder}/{name}", e)
                if e.exit_code == 6:  # nobody is there: the rest would only wait
                    return
        for kind in kinds:
            try:
                yield f"{folder}/{kind.plural}.json", _without_values(kind, api.list(kind, None))
            except EdgewardError as e:
                bundle.skip(f"{folder}/{kind.plural}", e)
        with contextlib.suppress(EdgewardError):
            yield f"{folder}/metrics.txt", b"".join(api.stream("/metrics")).decode("utf-8", "replace")


def _without_values(kind: Any, listing: Any) -> Any:
    """A kind with secret fields shows the names in them only."""
    for item in listing.get("items") or []:
        spec = item.get("spec")
        for name in kind.secret_fields:
            if isinstance(spec, dict) and spec.get(name):
                value = spec[name]
                spec[name] = sorted(value) if isinstance(value, dict) else "(hidden)"
    return listing


# --- what lies there ------------------------------------------------------------------------------------------------


def _folder(bundle: Bundle, place: Place) -> None:
    name = "hub" if place.role == "hub" else f"nodes/{place.config.get('node') or place.path.name}"
    for relative in _CONFIGS:
        with contextlib.suppress(OSError, ValueError):
            bundle.add(f"{name}/files/{relative}", json.loads((place.path / relative).read_text()))
    for relative in _LOGS:
        with contextlib.suppress(OSError):
            bundle.add(f"{name}/files/{relative}", _tail(place.path / relative))
    bundle.add(f"{name}/files/listing.txt", "".join(_listing(place.path)))


def _tail(path: Path) -> str:
    with path.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - LOG_TAIL))
        raw = f.read(LOG_TAIL)
    if size > LOG_TAIL:
        raw = raw.partition(b"\n")[2]  # a line that was cut in two may hold half a secret
    return raw.decode("utf-8", "replace")


def _listing(folder: Path, most: int = 5000) -> Iterator[str]:
    for i, path in enumerate(sorted(folder.rglob("*"))):
        if i >= most:
            yield "...\n"
            return
        with contextlib.suppress(OSError):
            info = path.lstat()
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(info.st_mtime))
            yield f"{info.st_mode & 0o177777:o} {info.st_uid} {info.st_size} {when} {path.relative_to(folder)}\n"


def _system() -> dict[str, Any]:
    from importlib.metadata import distributions

    from edgeward.cli.program import client_version

    return {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "edgeward": client_version(),
        "python": sys.version,
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "packages": {d.metadata["Name"]: d.version for d in distributions()},
    }
