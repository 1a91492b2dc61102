"""Makes docs/reference.md from the registry; with ``--check`` says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core.registry import kinds
from edgeward.hub.kinds import load

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"


def rows(schema: dict[str, Any], schemas: dict[str, Any], path: str, depth: int = 0) -> list[str]:
    found = []
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        inner = resolve(field, schemas)
        here = f"{path}.{name}"
        kind = type_of(field, schemas)
        default = (
            "required"
            if name in required
            else f"`{field['default']!r}`"
            if field.get("default") not in (None, {}, [], "")
            else ""
        )  # noqa: E501
        found.append(f"| `{here}` | {kind} | {default} | {field.get('description', '')} |")
        item = resolve(inner.get("items", {}), schemas) if inner.get("type") == "array" else inner
        if depth < 5 and item.get("properties"):
            found += rows(item, schemas, here + ("[]" if inner.get("type") == "array" else ""), depth + 1)
    return found


def resolve(field: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in field:
        return schemas[field["$ref"].rsplit("/", 1)[1]]
    for one in field.get("anyOf", []):
        if "$ref" in one:
            return schemas[one["$ref"].rsplit("/", 1)[1]]
    return field


def type_of(field: dict[str, Any], schemas: dict[str, Any]) -> str:
    if "$ref" in field:
        return "object"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(type_of(f, schemas) for f in field["anyOf"] if f.get("type") != "null"))
    if "enum" in field:
        return ", ".join(f"`{v}`" for v in field["enum"])
    if field.get("type") == "array":
        return f"list of {type_of(field.get('items', {}), schemas)}"
    if "additionalProperties" in field and isinstance(field["additionalProperties"], dict):
        return f"map of {type_of(field['additionalProperties'], schemas)}"
    return str(field.get("type", "any"))


def page() -> str:
    load()
    out = ["# Reference", "", "Made from the code by `scripts/reference.py`; do not edit.", ""]
    for kind in kinds:
        (ref,), schemas = msgspec.json.schema_components([kind.spec])
        schema = resolve(ref, schemas)
        where = "in a namespace" if kind.namespaced else "without namespace"
        out += [f"## {kind.name}", "", f"{kind.doc} API: `/api/v1/.../{kind.plural}`, {where}.", ""]
        short = ", ".join(f"`{s}`" for s in (kind.name.lower(), kind.plural, *kind.short))
        out += [f"On the command line: {short}.", ""]
        if kind.example:
            out += ["```yaml", kind.example.rstrip(), "```", ""]
        out += ["| field | type | default | meaning |", "|---|---|---|---|", *rows(schema, schemas, "spec"), ""]
    return "\n".join(out)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text() != text:
            print("docs/reference.md is stale: run scripts/reference.py", file=sys.stderr)
            raise SystemExit(1)
    else:
        PAGE.write_text(text)
