"""Makes docs/reference.md from the registry and the command table; with ``--check`` says whether it is up to date.

What `edgeward explain` prints of a field is what stands here: both read the structs that validate a document.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from edgeward.cli.explain import fields_of, struct_of
from edgeward.cli.main import COMMANDS, load
from edgeward.core.registry import Kind, kinds
from edgeward.core.resource import Metadata
from edgeward.hub.kinds import load as load_kinds

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
INTRO = """# Reference

Made from the code by `scripts/reference.py`; do not edit. `edgeward explain KIND.FIELD` prints the same.

A *size* is written `64Mi`, `1.5G` or as a number of bytes; a *duration* `500ms`, `24h`, `1h30m` or as a number of
seconds.

## Every resource

`apiVersion: edgeward/v1`, `kind`, `metadata`, `spec`; `status` is written by the system only. A resource of a namespace
is at `/api/v1/namespaces/<namespace>/<plural>/<name>`, another at `/api/v1/<plural>/<name>`, at hub and node alike. The
rest of `metadata` (`uid`, `resourceVersion`, `generation`, times, `finalizers`, `ownerReferences`) is the system's.
"""
HEAD = ["| field | type | default | meaning |", "|---|---|---|---|"]


def rows(hint: Any, path: str, depth: int = 0) -> Iterator[str]:
    types = {f.encode_name: f.type for f in msgspec.structs.fields(struct_of(hint) or Metadata)}
    for field in fields_of(hint):
        here = f"{path}.{field['name']}"
        default = "required" if field["required"] else f"`{plain(field['default'])}`" if "default" in field else ""
        kind = field["type"].replace("|", "\\|")
        yield f"| `{here}` | {kind} | {default} | {field['doc'].replace('|', chr(92) + '|')} |"
        inner = types[field["name"]]
        if depth < 5 and struct_of(inner) is not None:
            yield from rows(inner, here + ("[]" if field["type"].startswith("list of") else ""), depth + 1)


def plain(value: object) -> str:
    """A default as a person writes it in YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True)
    return text.removesuffix("...\n").strip()


def of_kind(kind: Kind) -> list[str]:
    where = f"/api/v1/namespaces/<namespace>/{kind.plural}" if kind.namespaced else f"/api/v1/{kind.plural}"
    names = ", ".join(f"`{s}`" for s in (kind.name.lower(), kind.plural, *kind.short))
    out = [f"## {kind.name}", "", f"{kind.doc} API: `{where}`.", "", f"On the command line: {names}.", ""]
    if kind.example:
        out += ["```yaml", kind.example.rstrip(), "```", ""]
    return [*out, *HEAD, *rows(kind.spec, "spec"), ""]


def commands() -> list[str]:
    out = ["## Commands", "", "Each says more with `--help`.", "", "| command | what it does |", "|---|---|"]
    for name, row in COMMANDS.items():
        if not row.group:
            out.append(f"| `{name}` | {row.help} |")
            continue
        for inner, command in load(name).commands.items():
            out.append(f"| `{name} {inner}` | {' '.join((command.help or '').split())} |")
    return [*out, ""]


def page() -> str:
    load_kinds()
    out = [INTRO, *HEAD, *rows(Metadata, "metadata"), ""]
    for kind in kinds:
        out += of_kind(kind)
    return "\n".join([*out, *commands()])


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text() != text:
            print("docs/reference.md is stale: run scripts/reference.py", file=sys.stderr)
            raise SystemExit(1)
    else:
        PAGE.write_text(text)
