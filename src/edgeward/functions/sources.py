"""What the code of a Function looks like in each runtime: file names, handler, what must be there. Pure.

``spec.py`` asks the :class:`Rule` of the runtime; a runtime that has none here is not in this release.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from edgeward.core.errors import Invalid

if TYPE_CHECKING:
    from edgeward.functions.spec import FunctionSpec

_PYTHON = re.compile(r"^(?:[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*:)?[A-Za-z_][A-Za-z0-9_]*$")


class Rule(NamedTuple):
    #: The file that inline source becomes.
    inline: Callable[[FunctionSpec], str]
    #: Raises ``Invalid`` where source, handler or what belongs to the runtime is not right. Paths are checked already.
    check: Callable[[FunctionSpec], None]


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


#: What this release can run; other runtimes are named in the spec so that the refusal can say so.
RULES: dict[str, Rule] = {"python": Rule(lambda spec: "main.py", _check_python)}
