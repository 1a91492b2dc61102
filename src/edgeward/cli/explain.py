"""`explain`: what a kind or one of its fields means, from the kind's own description.

The same struct that validates a document is read here, so what is explained is what is accepted. No server is asked.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
import typer

from edgeward.cli.kinds import find_kind
from edgeward.cli.output import emit, write
from edgeward.cli.session import Session
from edgeward.core.errors import NotFound
from edgeward.core.quantity import BYTES_PATTERN, DURATION_PATTERN
from edgeward.core.registry import Kind
from edgeward.core.resource import Metadata

#: Metadata that people write; the rest is the system's.
_WRITTEN = ("name", "namespace", "labels", "annotations", "conflict")
_QUANTITIES = {BYTES_PATTERN: "size", DURATION_PATTERN: "duration"}


def explain(
    session: Session,
    what: Annotated[str, typer.Argument(metavar="KIND[.FIELD...]", show_default=False)],
) -> None:
    """Print what a kind or one of its fields means: explain app.spec.health."""
    output = session.output(allowed=("table", "json", "yaml"))
    word, *path = what.split(".")
    kind = find_kind(word)
    if path[:1] not in (["spec"], ["metadata"]) and path:
        path.insert(0, "spec")
    struct: Any = Metadata if path[:1] == ["metadata"] else kind.spec
    at, note = walk(kind, struct, path[1:])
    doc = {
        "kind": kind.name,
        "path": ".".join(path) or "spec",
        "type": type_name(at),
        "doc": note or (_doc(at) if path[1:] else kind.doc),
        "fields": list(fields_of(at)),
    }
    if output in ("json", "yaml"):
        emit(doc, output)
        return
    _print(kind, doc, top=not path)


def walk(kind: Kind, at: Any, path: list[str]) -> tuple[Any, str]:
    """The type at a path below a struct, and the field's own description."""
    note = ""
    done: list[str] = []
    for part in path:
        struct = struct_of(at)
        fields = {f.encode_name: f for f in msgspec.structs.fields(struct)} if struct else {}
        name = part.split("[", 1)[0]
        if name not in fields:
            where = ".".join([kind.name.lower(), *done])
            known = ", ".join(fields) or "none"
            raise NotFound(f"{where} has no field {name!r}", remedy=f"its fields: {known}")
        at = fields[name].type
        note = description(at)
        done.append(name)
    return at, note


def description(hint: Any) -> str:
    """The description that an annotated type carries."""
    if typing.get_origin(hint) is Annotated:
        for meta in hint.__metadata__:
            if isinstance(meta, msgspec.Meta) and meta.description:
                return meta.description
    return ""


def _strip(hint: Any) -> Any:
    while typing.get_origin(hint) is Annotated:
        hint = hint.__origin__
    return hint


def struct_of(hint: Any) -> type[msgspec.Struct] | None:
    """The struct inside a type: ``Probe | None``, ``list[Port]``, ``dict[str, X]``."""
    hint = _strip(hint)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint
    for inner in reversed(typing.get_args(hint)):
        found = struct_of(inner)
        if found is not None:
            return found
    return None


def type_name(hint: Any) -> str:
    """A type as a reader of YAML calls it: ``size`` and ``duration`` for what `quantity.py` reads."""
    quantity = _QUANTITIES.get(_meta(hint, "pattern") or "")
    if quantity:
        return quantity
    low, high = _meta(hint, "ge"), _meta(hint, "le")
    if low is not None and high is not None:
        return f"{type_name(_strip(hint))} from {low} to {high}"
    hint = _strip(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return "object"
    if origin is typing.Literal:
        return " | ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        names = list(dict.fromkeys(type_name(a) for a in args if a is not type(None)))
        # a size may be a plain number of bytes, a duration one of seconds; their words say so
        return next((n for n in names if n in _QUANTITIES.values()), " | ".join(names))
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}" if args else "list"
    if origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return f"map of {type_name(args[1])}"
    plain = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "list"}
    return plain.get(hint, "any" if hint is Any else getattr(hint, "__name__", str(hint)))


def _meta(hint: Any, name: str) -> Any:
    """A constraint that an annotated type carries, None without one."""
    found = None
    while typing.get_origin(hint) is Annotated:
        for meta in hint.__metadata__:
            if isinstance(meta, msgspec.Meta) and getattr(meta, name) is not None:
                found = getattr(meta, name)
        hint = hint.__origin__
    return found


def _doc(hint: Any) -> str:
    struct = struct_of(hint)
    text = (struct.__doc__ or "") if struct else ""
    return " ".join(text.split())


def _default(field: msgspec.structs.FieldInfo) -> object:
    if field.default is not msgspec.NODEFAULT:
        return msgspec.to_builtins(field.default)
    if field.default_factory is not msgspec.NODEFAULT:
        return msgspec.to_builtins(field.default_factory())
    return None


def fields_of(hint: Any) -> Iterator[dict[str, Any]]:
    """The fields of the struct inside a type, as people read them: name, type, required, default, doc."""
    struct = struct_of(hint)
    for f in msgspec.structs.fields(struct) if struct else ():
        if struct is Metadata and f.encode_name not in _WRITTEN:
            continue
        entry: dict[str, Any] = {"name": f.encode_name, "type": type_name(f.type), "required": f.required}
        default = _default(f)
        if default not in (None, "", [], {}):
            entry["default"] = default
        entry["doc"] = description(f.type) or _doc(f.type)
        yield entry


def _print(kind: Kind, doc: Mapping[str, Any], *, top: bool) -> None:
    write(f"KIND:   {kind.name}" + (f" ({', '.join((kind.plural, *kind.short))})"))
    if not top:
        write(f"FIELD:  {doc['path']} <{doc['type']}>")
    elif not kind.namespaced:
        write("SCOPE:  the whole system (no namespace)")
    if doc["doc"]:
        write("")
        for line in _wrapped(str(doc["doc"]), ""):
            write(line)
    if doc["fields"]:
        write("")
        write("FIELDS of spec:" if top else "FIELDS:")
    for field in doc["fields"]:
        extra = " required" if field["required"] else ""
        extra += f" default: {_flow(field['default'])}" if "default" in field else ""
        write(f"  {field['name']} <{field['type']}>{extra}")
        for line in _wrapped(str(field["doc"]), "      "):
            write(line)
    if top and kind.example:
        write("")
        write("EXAMPLE:")
        for line in kind.example.strip("\n").splitlines():
            write(f"  {line}".rstrip())


def _flow(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | bool) else str(value)


def _wrapped(text: str, pad: str) -> list[str]:
    import textwrap

    return [
        line
        for paragraph in text.split("\n\n")
        for line in textwrap.wrap(" ".join(paragraph.split()), 100, initial_indent=pad, subsequent_indent=pad)
    ]
