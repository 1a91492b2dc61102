"""A value that does not fit its kind, said so that a person can mend it.

In comes the decoder's error with the document it is about, out goes an :class:`Invalid` with the exact field (the key
in a map, not ``[...]``), what was found and what to write instead. Pure. It shows values only where a field's own rule
(an enum, a pattern, a bound) refused them: what is merely of the wrong type may be a secret.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from edgeward.core.errors import Invalid
from edgeward.core.quantity import BYTES_PATTERN, DURATION_PATTERN

_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<field>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `([^`]*)`$")
_WRONG = re.compile(r"^Expected `(?P<wanted>[^`]*)`, got `(?P<found>[^`]*)`$")
_LENGTH = re.compile(r"^Expected `(?P<type>[^`]*)` of length (?P<sign>>=|<=|==) (?P<n>\d+)$")
_BOUND = re.compile(r"^Expected `[^`]*` (?P<sign>>=|<=|>|<) (?P<n>\S+)$")
_PATTERN = re.compile(r"^Expected `str` matching regex ")
_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.S)
_PART = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|(\[\.\.\.\])")
#: Keys that are tried one by one to find the one that the decoder's ``[...]`` stands for.
_TRIES = 2000

_WORDS = {
    "str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false", "array": "a list",
    "object": "a mapping", "null": "nothing", "dict": "a mapping",
}  # fmt: skip
_FORMS = {
    BYTES_PATTERN: ("size", "write e.g. 64Mi, 1.5G or a number of bytes"),
    DURATION_PATTERN: ("duration", "write e.g. 500ms, 30s, 24h or a number of seconds"),
}
_NAME_FORM = "use lower-case letters, digits and '-', starting with a letter or digit"


def invalid_from(
    error: msgspec.ValidationError, struct: type, *, prefix: str = "$", resource: str = "", doc: object = None
) -> Invalid:
    """Our error for msgspec's, with the path below ``prefix``; ``doc`` is what was converted to ``struct``."""
    match = _AT.match(str(error))
    what, at = (match["what"], match["path"] or "$") if match else (str(error), "$")
    at, value = _exact(at, str(error), struct, doc)
    hint = _at(struct, at)
    message, tail, remedy = _say(what, value, hint)
    return Invalid(message, resource=resource, field=prefix + at.removeprefix("$") + tail, remedy=remedy)


def _say(what: str, value: object, hint: object) -> tuple[str, str, str]:
    """Message, what follows the path, remedy."""
    if unknown := _UNKNOWN.match(what):
        known = _names(hint)
        near = difflib.get_close_matches(unknown["field"], known, n=1, cutoff=0.6)
        remedy = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}" if known else ""
        return "unknown field", f".{unknown['field']}", remedy
    if missing := _MISSING.match(what):
        return "is required", f".{missing[1]}", "add it"
    if wrong := _WRONG.match(what):
        wanted = [w for w in wrong["wanted"].split(" | ") if w != "null"]
        words = " or ".join(dict.fromkeys(_WORDS.get(w, w) for w in wanted))
        found = "a boolean" if wrong["found"] == "bool" else _WORDS.get(wrong["found"], wrong["found"])
        return f"expected {words}, got {found}", "", _retype(wanted, wrong["found"], value)
    if what.startswith("Invalid enum value"):
        choices = list(_choices(hint))
        near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.6)
        return f"{_short(value)} is not taken", "", (
            (f"did you mean {near[0]!r}? " if near else "") + f"one of: {', '.join(choices)}" if choices else ""
        )  # fmt: skip
    if _PATTERN.match(what):
        pattern = next(_patterns(hint), "")
        word, remedy = _FORMS.get(pattern, ("", ""))
        if word:
            return f"{_short(value)} is no {word}", "", remedy
        return f"{_short(value)} is not taken", "", _form(pattern)
    if length := _LENGTH.match(what):
        limit = {">=": "at least", "<=": "at most", "==": "exactly"}[length["sign"]]
        unit = "characters" if length["type"] == "str" else "entries"
        size = len(value) if isinstance(value, str | list | Mapping) else None
        message = "is empty" if size == 0 else f"has {size} {unit}" if size is not None else "has the wrong length"
        return message, "", f"{limit} {length['n']}"
    if bound := _BOUND.match(what):
        text = {">=": "at least {}", "<=": "at most {}", ">": "more than {}", "<": "less than {}"}[bound["sign"]]
        return f"{_short(value)} is too {'small' if '>' in bound['sign'] else 'large'}", "", text.format(bound["n"])
    return what[:1].lower() + what[1:], "", ""


def _form(pattern: str) -> str:
    """What a pattern asks for, in words where it is that of a name."""
    plain = pattern.replace("$(?!\\n)", "$")
    inner = re.search(r"\{0,(\d+)\}(\[a-z0-9\])?", plain)
    if inner and plain.startswith("^[a-z0-9]"):
        return f"{_NAME_FORM}, at most {int(inner[1]) + 1 + bool(inner[2])}"
    return f"must match {plain}"


def _retype(wanted: list[str], found: str, value: object) -> str:
    if found == "null":
        return "give it a value, or leave the field out"
    if "str" in wanted and found in ("int", "float", "bool"):
        return "put it in quotes"
    if "array" in wanted:
        return "write it as a list: [...]"
    if isinstance(value, str) and {"int", "float"} & set(wanted) and re.fullmatch(r"-?\d+(\.\d+)?", value):
        return "write it without quotes"
    return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# -- where in the document ---------------------------------------------------------------------------------------------


def _exact(at: str, error: str, struct: type, doc: object) -> tuple[str, object]:
    """The path with the map's key in place of ``[...]`` where it can be found, and the value there."""
    value, path = doc, "$"
    for member, index, some in _PART.findall(at):
        if some and isinstance(value, Mapping):
            key = _culprit(path, error, struct, doc, value)
            if key is None:
                return at, None
            value, path = value[key], f"{path}.{key}"
        elif some:
            return at, None
        elif member:
            value, path = value.get(member) if isinstance(value, Mapping) else None, f"{path}.{member}"
        else:
            n = int(index)
            value, path = value[n] if isinstance(value, list) and n < len(value) else None, f"{path}[{index}]"
    return path, value


def _culprit(path: str, error: str, struct: type, doc: object, mapping: Mapping[str, object]) -> str | None:
    """The key whose value alone, put in the whole map's place, makes the same error."""
    for key in list(mapping)[:_TRIES]:
        try:
            msgspec.convert(_with(doc, path, {key: mapping[key]}), struct)
        except msgspec.ValidationError as e:
            if str(e) == error:
                return key
    return None


def _with(doc: object, path: str, value: object) -> object:
    """A copy of the document that has ``value`` at ``path``."""
    if path == "$":
        return value
    match = _PART.match(path[1:])
    if match is None:
        return doc
    rest = "$" + path[1 + match.end() :]
    if match[1] is not None and isinstance(doc, Mapping):
        return {**doc, match[1]: _with(doc.get(match[1]), rest, value)}
    if match[2] is not None and isinstance(doc, list):
        return [_with(v, rest, value) if n == int(match[2]) else v for n, v in enumerate(doc)]
    return doc


# -- where in the type -------------------------------------------------------------------------------------------------


def _at(hint: Any, path: str) -> Any:
    """The type at a path (best effort: None where it cannot be said)."""
    for member, _index, _some in _PART.findall(path):
        hint = _step(hint, member)
        if hint is None:
            return None
    return hint


def _step(hint: Any, member: str) -> Any:
    for one in _flat(hint):
        if isinstance(one, type) and issubclass(one, msgspec.Struct) and member:
            for f in msgspec.structs.fields(one):
                if f.encode_name == member:
                    return f.type
        elif typing.get_origin(one) in (list, dict):
            return typing.get_args(one)[-1]
    return None


def _flat(hint: Any) -> Iterator[Any]:
    """The members of a union, without their annotations."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from _flat(hint.__origin__)
    elif origin in (typing.Union, types.UnionType):
        for inner in typing.get_args(hint):
            yield from _flat(inner)
    else:
        yield hint


def _names(hint: Any) -> list[str]:
    """The fields that a struct takes."""
    for one in _flat(hint):
        if isinstance(one, type) and issubclass(one, msgspec.Struct):
            return [f.encode_name for f in msgspec.structs.fields(one)]
    return []


def _choices(hint: Any) -> Iterator[str]:
    for one in _flat(hint):
        if typing.get_origin(one) is typing.Literal:
            yield from map(str, typing.get_args(one))


def _patterns(hint: Any) -> Iterator[str]:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        for meta in hint.__metadata__:
            if isinstance(meta, msgspec.Meta) and meta.pattern:
                yield meta.pattern
        yield from _patterns(hint.__origin__)
    elif origin in (typing.Union, types.UnionType):
        for inner in typing.get_args(hint):
            yield from _patterns(inner)
