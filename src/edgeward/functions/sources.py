"""What the code of a Function looks like in each runtime: file names, handler, what must be there. Pure.

``spec.py`` asks the :class:`Rule` of the runtime; a runtime that has none here is not in this release.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from edgeward.core.errors import Invalid

if TYPE_CHECKING:
    from edgeward.functions.spec import FunctionSpec

_PYTHON = re.compile(r"^(?:[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*:)?[A-Za-z_][A-Za-z0-9_]*$")
_JAVASCRIPT = re.compile(r"^[A-Za-z_$][\w$]{0,127}$", re.ASCII)
_MODULE = re.compile(r"(?:^|;)[ \t]*(?:export\b|import\b(?![ \t]*[(.]))", re.MULTILINE)
_ENDINGS = (".mjs", ".cjs", ".js")
_EXPORT = re.compile(r"^[A-Za-z_][A-Za-z0-9_.-]{0,127}$")


class Rule(NamedTuple):
    #: The file that inline source becomes.
    inline: Callable[[FunctionSpec], str]
    #: Raises ``Invalid`` where source, handler or what belongs to the runtime is not right. Paths are checked already.
    check: Callable[[FunctionSpec], None]
    #: What is started, where the function says that.
    command: Callable[[FunctionSpec], list[str]] = lambda spec: []


def _check_python(spec: FunctionSpec) -> None:
    source = spec.source
    if not _PYTHON.fullmatch(spec.handler):
        raise Invalid(
            f"{spec.handler[:80]!r} names no function",
            field="$.spec.handler",
            remedy="write handler, or module:function",
        )
    module = (spec.handler.rpartition(":")[0] or "main").replace(".", "/")
    if source.files and not {f"{module}.py", f"{module}/__init__.py"} & set(source.files):
        there = ", ".join(sorted(source.files)[:8])
        raise Invalid(
            f"there is no file {module}.py",
            field="$.spec.handler",
            remedy=f"files: {there}",
        )
    if source.inline and module != "main":
        raise Invalid(
            "inline source is the module main", field="$.spec.handler", remedy="write the function's name only"
        )


def _node_file(spec: FunctionSpec) -> str:
    """ES modules have statements that begin with import or export; what has none is CommonJS."""
    return "main.mjs" if _MODULE.search(spec.source.inline) else "main.cjs"


def _check_node(spec: FunctionSpec) -> None:
    source = spec.source
    module, _, name = spec.handler.rpartition(":")
    path = PurePosixPath(module or "main")
    if not _JAVASCRIPT.fullmatch(name) or path.is_absolute() or ".." in path.parts or str(path) != (module or "main"):
        remedy = "write handler, or lib/file:function (the file without its ending)"
        raise Invalid(f"{spec.handler[:80]!r} names no function", field="$.spec.handler", remedy=remedy)
    if source.files and not {f"{path}{end}" for end in _ENDINGS} & set(source.files):
        there = ", ".join(sorted(source.files)[:8])
        raise Invalid(f"there is no file {path}.mjs, .cjs or .js", field="$.spec.handler", remedy=f"files: {there}")
    if source.inline and str(path) != "main":
        raise Invalid(
            "inline source is the module main", field="$.spec.handler", remedy="write the function's name only"
        )


#: Arguments of a command, and characters of one.
_ARGUMENTS, _ARGUMENT = 64, 4096


def _command(spec: FunctionSpec) -> list[str]:
    return spec.command or (["./main"] if spec.source.inline else [])


def _check_command(spec: FunctionSpec) -> None:
    if spec.handler != "handler":
        raise Invalid("a command has no handler", field="$.spec.handler", remedy="leave it out")
    if not spec.command and not spec.source.inline.startswith("#!"):
        remedy = "write command: [perl, main.pl], or begin the inline source with e.g. #!/bin/sh"
        raise Invalid("nothing says what is started", field="$.spec.command", remedy=remedy)
    if len(spec.command) > _ARGUMENTS:
        raise Invalid(f"has more than {_ARGUMENTS} arguments", field="$.spec.command", remedy="put them into a file")
    for n, argument in enumerate(spec.command):
        if "\0" in argument or len(argument) > _ARGUMENT or (not n and not argument):
            remedy = f"up to {_ARGUMENT} characters, none of them NUL; the first is not empty"
            raise Invalid("is no argument", field=f"$.spec.command[{n}]", remedy=remedy)
    first = PurePosixPath(spec.command[0]) if spec.command else PurePosixPath("main")
    if not first.is_absolute() and ".." in first.parts:
        raise Invalid("leaves its folder", field="$.spec.command[0]", remedy="name a file of the source, or a program")


def _check_wasm(spec: FunctionSpec) -> None:
    source = spec.source
    if not _EXPORT.fullmatch(spec.handler):
        remedy = "write the name of an exported function"
        raise Invalid(f"{spec.handler[:80]!r} names no export", field="$.spec.handler", remedy=remedy)
    if spec.limits.network != "none":
        remedy = "leave it out, or write it in another runtime"
        raise Invalid("a wasm function has no network", field="$.spec.limits.network", remedy=remedy)
    if not source.files:
        return
    if len(source.files) != 1 or set(source.files) - {"main.wasm", "main.wat"}:
        there = ", ".join(sorted(source.files)[:8])
        remedy = "files: {main.wasm: BASE64}, or main.wat: its text"
        raise Invalid(f"there must be one module, there is {there}", field="$.spec.source.files", remedy=remedy)
    if text := source.files.get("main.wasm"):
        try:
            found = base64.b64decode(text, validate=True)
        except ValueError:
            found = b""
        if found[:4] != b"\0asm":
            remedy = "write base64 of a module: base64 -w0 main.wasm"
            raise Invalid("is no WebAssembly", field="$.spec.source.files.main.wasm", remedy=remedy)


#: What this release can run; other runtimes are named in the spec so that the refusal can say so.
RULES: dict[str, Rule] = {
    "python": Rule(lambda spec: "main.py", _check_python),
    "node": Rule(_node_file, _check_node),
    "command": Rule(lambda spec: "main", _check_command, _command),
    "wasm": Rule(lambda spec: "main.wat", _check_wasm),
}
