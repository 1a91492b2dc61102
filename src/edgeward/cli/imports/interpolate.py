"""Variables in a Compose file: ``$NAME``, ``${NAME:-default}``, ``${NAME:?error}``, ``${NAME:+other}``, ``$$``. Pure.

As the Compose specification says ("Interpolation"): in values, never in keys, before anything else is looked at; nested
in a default too. Without the colon only an unset variable counts, with it an empty one as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgeward.core.errors import Invalid
from edgeward.core.manifest import Manifest

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DEPTH = 8


class _Reader:
    def __init__(self, env: Mapping[str, str], unset: set[str]) -> None:
        self._env, self._unset = env, unset

    def text(self, text: str, depth: int = 0) -> str:
        out: list[str] = []
        at = 0
        while (dollar := text.find("$", at)) >= 0:
            out.append(text[at:dollar])
            at = dollar + 1
            if text[at : at + 1] == "$":
                out.append("$")
                at += 1
            elif text[at : at + 1] == "{":
                end = self._closing(text, at)
                out.append(self._braced(text[at + 1 : end], depth))
                at = end + 1
            elif name := _NAME.match(text, at):
                out.append(self._value(name[0]))
                at = name.end()
            else:
                raise ValueError("a lone $", "write $$ for a plain $")
        return "".join(out) + text[at:]

    def _closing(self, text: str, at: int) -> int:
        deep = 0
        for n in range(at, len(text)):
            if text[n] == "{":
                deep += 1
            elif text[n] == "}":
                deep -= 1
                if not deep:
                    return n
        raise ValueError("${ without }", "close it, or write $$ for a plain $")

    def _braced(self, inner: str, depth: int) -> str:
        name = _NAME.match(inner)
        if name is None or depth > _DEPTH:
            raise ValueError(f"${{{inner[:40]}}} is not understood", "write ${NAME} or ${NAME:-default}")
        rest = inner[name.end() :]
        if not rest:
            return self._value(name[0])
        colon = rest.startswith(":")
        how, other = rest[colon : colon + 1], rest[colon + 1 :]
        got = self._env.get(name[0])
        there = bool(got) if colon else got is not None
        if how == "-":
            return got or "" if there else self.text(other, depth + 1)
        if how == "+":
            return self.text(other, depth + 1) if there else ""
        if how == "?":
            if not there:
                raise ValueError(f"{name[0]} is not set: {other or 'it is required'}", f"set it: {name[0]}=... before")
            return got or ""
        raise ValueError(f"${{{inner[:40]}}} is not understood", "write ${NAME} or ${NAME:-default}")

    def _value(self, name: str) -> str:
        if name not in self._env:
            self._unset.add(name)
        return self._env.get(name, "")


def interpolate(manifest: Manifest, env: Mapping[str, str]) -> tuple[Any, set[str]]:
    """The document with its variables replaced, and the names that were not set. Raises ``Invalid``."""
    unset: set[str] = set()
    reader = _Reader(env, unset)

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {k: walk(v, f"{path}.{k}") for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, f"{path}[{n}]") for n, v in enumerate(value)]
        if not isinstance(value, str) or "$" not in value:
            return value
        try:
            return reader.text(value)
        except ValueError as e:
            message, *remedy = (str(a) for a in e.args)
            raise Invalid(
                message,
                field=path,
                remedy=remedy[0] if remedy else "",
                file=manifest.file,
                line=manifest.line_of(path),
            ) from None

    return walk(manifest.doc, "$"), unset
