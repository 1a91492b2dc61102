"""`edit`: a resource in the user's editor, written back on the revision that was read.

What the user typed is never lost: when the server refuses it, or somebody else was faster, it stays in a file and the
error says which.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeward.cli.output import full_name, to_yaml, write
from edgeward.cli.read import OneWords
from edgeward.cli.session import Session
from edgeward.cli.targets import one_target
from edgeward.core.errors import EdgewardError, Invalid, Refused

if TYPE_CHECKING:
    from edgeward.core.registry import Kind

_HEAD = """\
# {name}, revision {revision}. Lines that begin with '#' are ignored.
# Save and leave the editor to write it; leave it unchanged, or empty, to write nothing.
"""


def edit(session: Session, words: OneWords) -> None:
    """Change a resource in $VISUAL or $EDITOR; refused when it was changed by somebody else meanwhile."""
    session.output(allowed=("table",))
    kind, name = one_target(words)
    with session.api() as api:
        namespace = session.one(kind)
        current = api.get(kind, namespace, name)
        label = full_name(current)
        meta = current["metadata"]
        shown = {k: v for k, v in current.items() if k != "status"}
        text = _HEAD.format(name=label, revision=meta.get("resourceVersion")) + to_yaml(shown)
        file = _file(name, text)
        keep = False
        try:
            _run_editor(file)
            typed = file.read_text(encoding="utf-8")
            if typed == text or not _content(typed):
                write(f"{label} unchanged")
                return
            keep = True
            doc = _read_back(file, kind, current)
            # the editor may have been open for long: the write stands on what was read, not on what is there now
            api.close()
            api.replace(kind, namespace, name, doc)
            keep = False
        except EdgewardError as e:
            if keep:
                e.file, e.line = e.file or str(file), e.line
                note = f"your text is kept in {file}; mend it and: edgeward apply -f {file}"
                e.remedy = f"{e.remedy}; {note}" if e.remedy else note
            raise
        finally:
            if not keep:
                shutil.rmtree(file.parent, ignore_errors=True)
    write(f"{label} edited")


def _content(text: str) -> bool:
    return any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines())


def _file(name: str, text: str) -> Path:
    # it may hold a secret: a folder of its own (0700), so that what the editor leaves beside it goes too
    file = Path(tempfile.mkdtemp(prefix=f"edgeward-{name}-")) / f"{name}.yaml"
    file.touch(0o600)
    file.write_text(text, encoding="utf-8")
    return file


def _run_editor(file: Path) -> None:
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        code = subprocess.run([*shlex.split(editor), str(file)], check=False).returncode
    except OSError as e:
        raise Refused(f"the editor {editor!r} cannot be started: {e.strerror}", remedy="set EDITOR") from None
    if code != 0:
        raise Refused(f"the editor {editor!r} failed with {code}; nothing was written")


def _read_back(file: Path, kind: Kind, current: dict[str, Any]) -> dict[str, Any]:
    import sys

    from edgeward.core.manifest import decode_manifest, read_files

    manifests = read_files([str(file)], sys.stdin.buffer)
    if len(manifests) != 1:
        raise Invalid(f"holds {len(manifests)} documents", file=str(file), remedy="leave one")
    resource = decode_manifest(manifests[0])
    was = current["metadata"]
    for what, now, before in (
        ("kind", resource.kind, kind.name),
        ("name", resource.metadata.name, was["name"]),
        ("namespace", resource.metadata.namespace, was.get("namespace") or ""),
    ):
        if now != before:
            raise Invalid(
                f"cannot be changed from {before!r} to {now!r}",
                resource=full_name(current),
                field="$.kind" if what == "kind" else f"$.metadata.{what}",
                remedy="make a new resource by apply, delete the old one",
            )
    doc: dict[str, Any] = {**manifests[0].doc, "metadata": dict(manifests[0].doc["metadata"])}
    doc["metadata"].setdefault("resourceVersion", was.get("resourceVersion"))
    return doc
