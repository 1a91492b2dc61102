"""Documents from files: YAML (1.2 core schema) and JSON, with the line of every field.

Text comes in, plain documents go out, each with where it stood, or an ``Invalid`` that names file, line, field and
remedy. What a parser should not be asked to do is refused here: duplicate keys, custom tags, keys that are no strings,
aliases that expand to more than :data:`MAX_NODES` values, nesting deeper than :data:`MAX_DEPTH`, documents over 1 MiB.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edgeward.core.errors import EdgewardError, Invalid, NotFound, TooLarge
from edgeward.core.resource import MAX_DOCUMENT, Resource, decode

MAX_FILE = 16 * MAX_DOCUMENT
MAX_NODES = 100_000
MAX_DEPTH = 64
_SUFFIXES = (".yaml", ".yml", ".json")

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"^[-+]?[0-9]+$|^0o[0-7]+$|^0x[0-9a-fA-F]+$")
_SCALARS = {f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")}
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")


@dataclass
class Manifest:
    """One document and where it stood; ``lines`` maps field paths (``$.spec.ports[0]``) to lines."""

    doc: Any
    file: str
    line: int
    lines: dict[str, int] = field(default_factory=dict)

    def line_of(self, path: str) -> int:
        """The line of a field, or of its nearest ancestor that has one."""
        while path:
            if path in self.lines:
                return self.lines[path]
            cut = max(path.rfind("."), path.rfind("["))
            if cut <= 0:
                break
            path = path[:cut]
        return self.line


class _Builder:
    def __init__(self, file: str) -> None:
        self.file = file
        self.count = 0
        self.lines: dict[str, int] = {}
        #: A Compose file is YAML 1.1 in this one thing: it may use merge keys.
        self.merges = False

    def fail(self, message: str, node: yaml.Node, path: str, remedy: str) -> Invalid:
        return Invalid(message, field=path, remedy=remedy, file=self.file, line=node.start_mark.line + 1)

    def build(self, node: yaml.Node, path: str, depth: int) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise self.fail(
                f"expands to more than {MAX_NODES} values",
                node,
                "$",
                "write the values out; aliases are multiplying them",
            )
        if depth > MAX_DEPTH:
            raise self.fail(f"is nested deeper than {MAX_DEPTH} levels", node, "$", "flatten it")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if depth == 0:
            self.merges = _is_compose(node)
        if isinstance(node, yaml.MappingNode):
            if node.tag != "tag:yaml.org,2002:map":
                raise self.fail(f"the tag {node.tag!r} is not taken", node, path, "remove it")
            result: dict[str, Any] = {}
            merged: list[Any] = []
            for key_node, value_node in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge" and self.merges:
                    several = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                    merged += [self.build(n, f"{path}.<<", depth + 1) for n in several]
                    continue
                if key_node.tag == "tag:yaml.org,2002:merge":
                    raise self.fail("merge keys (<<) are not taken", key_node, path, "write the fields out")
                if not isinstance(key_node, yaml.ScalarNode) or not isinstance(self.scalar(key_node, path), str):
                    raise self.fail("a key is no string", key_node, path, "quote it")
                key = key_node.value
                if key in result:
                    raise self.fail("is given twice", key_node, f"{path}.{key}", "keep one of them")
                inner = f"{path}.{key}"
                self.lines[inner] = key_node.start_mark.line + 1
                result[key] = self.build(value_node, inner, depth + 1)
            for other in merged:
                if not isinstance(other, dict):
                    raise self.fail("merges what is no mapping", node, f"{path}.<<", "write the fields out")
                result = {**other, **result}
            return result
        if isinstance(node, yaml.SequenceNode):
            if node.tag != "tag:yaml.org,2002:seq":
                raise self.fail(f"the tag {node.tag!r} is not taken", node, path, "remove it")
            return [self.build(n, f"{path}[{i}]", depth + 1) for i, n in enumerate(node.value)]
        return self.scalar(node, path)

    def scalar(self, node: yaml.Node, path: str) -> Any:
        text: str = node.value
        if node.tag not in _SCALARS:
            raise self.fail(f"the tag {node.tag!r} is not taken", node, path, "remove it")
        if getattr(node, "style", None) in ("'", '"', "|", ">"):
            return text
        # YAML 1.2 core schema: `no`, `on` and 12:30 are strings
        if text in ("", "~", "null", "Null", "NULL"):
            return None
        if text in ("true", "True", "TRUE"):
            return True
        if text in ("false", "False", "FALSE"):
            return False
        if _INT.match(text):
            if len(text) > 40:
                raise self.fail("is no reasonable number", node, path, "quote it if it is text")
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if _FLOAT.match(text):
            return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".nan", "nan"))
        return text


def _is_compose(node: yaml.Node) -> bool:
    keys = {k.value for k, _ in node.value} if isinstance(node, yaml.MappingNode) else set()
    return "services" in keys and not keys & {"kind", "apiVersion"}


def load(text: str | bytes, file: str = "") -> list[Manifest]:
    """All documents of a text, in order; empty ones are left out."""
    if len(text) > MAX_FILE:
        raise TooLarge(f"has {len(text)} bytes", file=file, remedy=f"at most {MAX_FILE}; split it")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise Invalid(f"is no UTF-8 text (byte {e.start})", file=file, remedy="save it as UTF-8") from None
    found: list[Manifest] = []
    loader = _Loader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            size = node.end_mark.index - node.start_mark.index
            line = node.start_mark.line + 1
            if size > MAX_DOCUMENT:
                raise TooLarge(
                    f"the document has {size} bytes", file=file, line=line, remedy=f"at most {MAX_DOCUMENT} bytes"
                )
            builder = _Builder(file)
            doc = builder.build(node, "$", 0)
            if doc is not None:
                found.append(Manifest(doc, file, line, builder.lines))
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise Invalid(
            f"is no valid YAML: {e.problem or e.context}",
            file=file,
            line=mark.line + 1 if mark else 0,
            remedy="check indentation, quotes and brackets",
        ) from None
    except yaml.YAMLError as e:
        raise Invalid(
            f"is no valid YAML: {str(e).splitlines()[0]}", file=file, remedy="save it as plain text"
        ) from None
    except RecursionError:
        raise Invalid(f"is nested deeper than {MAX_DEPTH} levels", file=file, remedy="flatten it") from None
    finally:
        loader.dispose()
    return found


def read_files(paths: Iterable[str | Path], stdin: Any = None) -> list[Manifest]:
    """Documents of files, of all YAML and JSON files of folders (sorted), of standard input (``-``)."""
    found: list[Manifest] = []
    for given in paths:
        if str(given) == "-":
            source = stdin if stdin is not None else sys.stdin.buffer
            found += load(source.read(MAX_FILE + 1), "standard input")
            continue
        path = Path(given)
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.is_file())
            if not files:
                raise NotFound("has no .yaml, .yml or .json file", resource=str(path), remedy="name another folder")
        else:
            files = [path]
        for one in files:
            try:
                with one.open("rb") as f:
                    found += load(f.read(MAX_FILE + 1), str(one))
            except OSError as e:
                raise NotFound(f"cannot be read: {e.strerror}", resource=str(one), remedy="check the path") from None
    return found


def decode_manifest(manifest: Manifest, *, namespace: str = "default") -> Resource:
    """The typed resource; an error gets the file and the line of the field."""
    try:
        return decode(manifest.doc, namespace=namespace)
    except EdgewardError as e:
        e.file = e.file or manifest.file
        e.line = e.line or manifest.line_of(e.field)
        raise


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # what is no ordinary printable text is escaped: a bare NEL or U+2028 would come back as a line break
    plain = all(c.isprintable() or c in "\n\t" for c in value)
    style = '"' if not plain else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def dump_yaml(doc: Any) -> str:
    """A document as people write it: block style, keys in their order."""
    return yaml.dump(doc, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
