"""The documents of `-f`: read, given the namespace of the command line, validated, put in an order that can be written.

Everything is checked here before the first write, so that a typo in the last document does not leave the first half of
a change behind. Reading and validation themselves are `core/manifest.py`.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeward.cli.kinds import load_kinds
from edgeward.cli.session import Session, UsageError
from edgeward.core.blobs import MOST, PREFIX
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.manifest import Manifest, decode_manifest, read_files
from edgeward.core.registry import Kind
from edgeward.core.resource import MAX_DOCUMENT, Key, Resource

if TYPE_CHECKING:
    from edgeward.cli.imports.taking import Left

#: What others refer to comes first. A kind that is not named here comes behind those that are.
ORDER = (
    "Namespace", "Site", "Node", "Config", "Secret", "App", "Service", "Function", "Route", "Listener", "Export",
    "Override",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Declared:
    """One document: as written, as understood, and where it stood."""

    manifest: Manifest
    resource: Resource
    kind: Kind
    #: What the document refers to and the hub has to have: (digest, bytes of a packed folder, or a file).
    uploads: tuple[tuple[str, bytes | Path], ...] = ()

    @property
    def namespace(self) -> str | None:
        return self.resource.metadata.namespace if self.kind.namespaced else None

    @property
    def name(self) -> str:
        return self.resource.metadata.name

    @property
    def key(self) -> Key:
        return self.resource.key

    @property
    def revision(self) -> str:
        """The revision the file insists on, or ''."""
        return self.resource.metadata.resourceVersion


def read_declared(
    session: Session, files: Sequence[str], *, pack: bool = True, told: Callable[[str], None] | None = None
) -> list[Declared]:
    """All documents of all files, validated, in the order in which they can be written.

    ``pack``: whether what they say of folders matters; a document that is to be deleted may have lost its own.
    ``told``: gets a line for each field of a Compose file or a Kubernetes manifest that was not taken over.
    """
    if not files:
        raise UsageError("no file given: -f FILE, -f DIRECTORY, or -f - for standard input")
    if session.all_namespaces:
        raise UsageError("a document is of one namespace: use -n NAME instead of -A")
    kinds = load_kinds()
    found: dict[Key, Declared] = {}
    for manifest in taken_over(read_files(list(files), sys.stdin.buffer), session, told):
        _place(manifest, session)
        uploads = packed(manifest, pack)
        resource = decode_manifest(manifest)
        declared = Declared(manifest, resource, kinds.get(resource.kind), uploads)
        first = found.get(declared.key)
        if first is not None:
            raise Invalid(
                f"is declared twice, first at {first.manifest.file}:{first.manifest.line}",
                resource=str(declared.key),
                file=manifest.file,
                line=manifest.line,
                remedy="keep one of the two",
            )
        found[declared.key] = declared
    if not found:
        raise Invalid("no document found", file=", ".join(files))
    rank = {name: i for i, name in enumerate(ORDER)}
    return sorted(found.values(), key=lambda d: rank.get(d.kind.name, len(ORDER)))


def taken_over(manifests: Sequence[Manifest], session: Session, told: Callable[[str], None] | None) -> list[Manifest]:
    """The documents, with those of other systems as the resources that they stand for."""
    from edgeward.cli.imports import compose, kube

    made: list[Manifest] = []
    foreign: list[Manifest] = []
    left: list[Left] = []
    for manifest in manifests:
        if compose.is_compose(manifest.doc):
            base = Path(manifest.file).parent if Path(manifest.file).is_file() else Path()
            profiles = tuple(filter(None, os.environ.get("COMPOSE_PROFILES", "").split(",")))
            got = compose.translate(manifest, _variables(base), lambda path, at=base: _beside(at, path), profiles)  # type: ignore[misc]
            made += got.made
            left += got.left
        elif kube.is_kube(manifest.doc):
            foreign.append(manifest)
        else:
            made.append(manifest)
    if foreign:
        got = kube.translate(foreign, session.namespace)
        made += got.made
        left += got.left
    if told is not None:
        for one in left:
            told(str(one))
    return made


def _beside(base: Path, path: str) -> str:
    """The text of a file that a Compose file names."""
    with (base / Path(path).expanduser()).open("rb") as f:
        data = f.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        raise OSError(errno.EFBIG, f"has more than {MAX_DOCUMENT} bytes")
    return data.decode()


def _variables(base: Path) -> dict[str, str]:
    """What a Compose file's variables stand for: `.env` beside it, and before that the environment."""
    from edgeward.cli.imports.compose import env_file

    try:
        beside = env_file(_beside(base, ".env"))
    except (OSError, UnicodeDecodeError):
        beside = {}
    return {**beside, **os.environ}


def packed(manifest: Manifest, pack: bool = True) -> tuple[tuple[str, bytes | Path], ...]:
    """Turns ``source: {folder: PATH}`` of a Function into an archive by digest, and ``{file: PATH}`` into its text;
    the path of an App's ``container.archive`` into its digest.

    Paths are from where the manifest is.
    """
    doc = manifest.doc
    if isinstance(doc, dict) and doc.get("kind") == "App":
        return _image(manifest, doc.get("spec"), pack)
    spec = doc.get("spec") if isinstance(doc, dict) and doc.get("kind") == "Function" else None
    source = spec.get("source") if isinstance(spec, dict) else None
    way = next((w for w in ("folder", "file") if isinstance(source, dict) and w in source), "")
    if not isinstance(spec, dict) or not isinstance(source, dict) or not way:
        return ()
    at: dict[str, Any] = {"file": manifest.file, "line": manifest.line_of(f"$.spec.source.{way}")}
    given = source.pop(way)
    if not isinstance(given, str) or not given or source:
        raise Invalid(
            "give the code in one way",
            field="$.spec.source",
            remedy=f"{way}: and the path of one, nothing beside",
            **at,
        )
    if not pack:
        source["archive"] = {"digest": f"sha256:{'0' * 64}"}
        return ()
    base = Path(manifest.file).parent if Path(manifest.file).is_file() else Path()
    if way == "file":
        source |= _one_file(base / given, str(spec.get("runtime")), at)
        return ()
    from edgeward.functions import archive

    try:
        data, digest = archive.pack(base / given, Path(manifest.file))
    except EdgewardError as e:
        e.field, e.line = "$.spec.source.folder", at["line"]
        e.message = f"{e.file}: {e.message}"
        e.file = manifest.file
        raise
    except OSError as e:
        raise Invalid(f"{e.filename}: {e.strerror}", field="$.spec.source.folder", **at) from None
    source["archive"] = {"digest": digest}
    return ((digest, data),)


def _image(manifest: Manifest, spec: Any, pack: bool) -> tuple[tuple[str, Path], ...]:
    container = spec.get("container") if isinstance(spec, dict) else None
    given = container.get("archive") if isinstance(container, dict) else None
    if not isinstance(container, dict) or not isinstance(given, str) or not given or given.startswith(PREFIX):
        return ()
    if not pack:
        container["archive"] = f"{PREFIX}{'0' * 64}"
        return ()
    field = "$.spec.container.archive"
    at: dict[str, Any] = {"file": manifest.file, "line": manifest.line_of(field), "field": field}
    base = Path(manifest.file).parent if Path(manifest.file).is_file() else Path()
    path = base / given
    try:
        with path.open("rb") as f:
            digest = PREFIX + hashlib.file_digest(f, "sha256").hexdigest()
        size = path.stat().st_size
    except OSError as e:
        raise Invalid(f"{path}: {e.strerror}", remedy="make it with podman save or docker save", **at) from None
    if size > MOST:
        raise Invalid(f"{path} has {size} bytes", remedy=f"at most {MOST}; pack it with gzip", **at)
    container["archive"] = digest
    return ((digest, path),)


def _one_file(path: Path, runtime: str, at: dict[str, Any]) -> dict[str, Any]:
    """A source that is one file: named as its runtime looks for it."""
    field = "$.spec.source.file"
    try:
        with path.open("rb") as f:
            data = f.read(MAX_DOCUMENT + 1)
    except OSError as e:
        raise Invalid(f"{path}: {e.strerror}", field=field, **at) from None
    if len(data) > MAX_DOCUMENT:
        raise Invalid(
            f"{path} has more than {MAX_DOCUMENT} bytes", field=field, remedy="put it into a folder: folder: PATH", **at
        )
    if runtime == "wasm" and data[:4] == b"\0asm":
        return {"files": {"main.wasm": base64.b64encode(data).decode()}}
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Invalid(f"{path} is no text", field=field, remedy="put it into a folder: folder: PATH", **at) from None
    if runtime == "node" and path.suffix in (".mjs", ".cjs", ".js"):
        return {"files": {f"main{path.suffix}": text}}
    return {"inline": text}


def _place(manifest: Manifest, session: Session) -> None:
    """Puts a document that names no namespace into the one of the command line."""
    if not session.namespace_given or not isinstance(manifest.doc, dict):
        return
    kind = next((k for k in load_kinds() if k.name == manifest.doc.get("kind")), None)
    meta = manifest.doc.get("metadata")
    if kind is None or not kind.namespaced or not isinstance(meta, dict):
        return
    named = meta.setdefault("namespace", session.namespace)
    if named != session.namespace:
        raise Invalid(
            f"names namespace {named!r}, the command line {session.namespace!r}",
            resource=f"{kind.name}/{meta.get('name')}",
            field="$.metadata.namespace",
            file=manifest.file,
            line=manifest.line,
            remedy="leave one of the two out",
        )


def intent(resource: Resource) -> dict[str, Any]:
    """What a resource wants, with all defaults filled in: two that want the same are equal."""
    import msgspec

    meta = resource.metadata
    doc: dict[str, Any] = {"name": meta.name}
    if meta.namespace:
        doc["namespace"] = meta.namespace
    doc |= {"labels": dict(meta.labels), "annotations": dict(meta.annotations), "conflict": meta.conflict}
    return {
        "apiVersion": resource.apiVersion,
        "kind": resource.kind,
        "metadata": doc,
        "spec": msgspec.to_builtins(resource.spec),
    }


def intent_of(doc: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a document that the API gave; one from a newer server is taken as it stands."""
    from edgeward.core.resource import decode

    try:
        return intent(decode({**doc, "status": {}}))
    except Invalid:
        meta = doc.get("metadata") or {}
        kept = {k: meta[k] for k in ("name", "namespace", "labels", "annotations", "conflict") if k in meta}
        return {"apiVersion": doc.get("apiVersion"), "kind": doc.get("kind"), "metadata": kept, "spec": doc.get("spec")}
