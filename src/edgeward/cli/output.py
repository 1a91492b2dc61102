"""How resources and records look: tables for people, JSON and YAML for programs, secrets for nobody.

In come plain documents, out goes text on stdout. Colours are used on a terminal only (`NO_COLOR` is honoured). A table
is never cut at the terminal's edge: what stands last (a message, a payload) is what people came for. Nothing here talks
to the API.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from edgeward.core.registry import Column, Kind, redact

if TYPE_CHECKING:
    from rich.console import Console

Doc = dict[str, Any]
#: Nothing is cut or wrapped: a terminal goes on in the next line, as with ls.
_NO_LIMIT = 100_000

_GOOD = {"running", "true", "online", "healthy", "ready", "created", "configured", "active"}
_WAITING = {"pending", "starting", "stopped", "unknown", "wan-cut", "stopping", "deleting"}
_BAD = {"failed", "degraded", "false", "offline", "dead", "lost"}


@functools.cache
def console() -> Console:
    """The console of stdout."""
    from rich.console import Console

    tty = sys.stdout.isatty()
    plain = not tty or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return Console(
        width=_NO_LIMIT,
        force_terminal=tty,
        color_system=None if plain else "auto",
        no_color=plain,
        highlight=False,
        emoji=False,
        markup=False,
    )


def write(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(text + "\n")


# -- JSON and YAML -----------------------------------------------------------------------------------------------------


def to_json(doc: object) -> str:
    return json.dumps(doc, indent=2, ensure_ascii=False)


def to_yaml(doc: object) -> str:
    """YAML as a person would write it: members in their order, text of several lines as a block."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return str(yaml.dump(doc, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120))


def emit(doc: object, output: str) -> None:
    """A document as JSON or YAML."""
    sys.stdout.write(to_json(doc) + "\n" if output == "json" else to_yaml(doc))


# -- cells -------------------------------------------------------------------------------------------------------------


def full_name(doc: Mapping[str, Any]) -> str:
    """``app/web``: how a resource is named in messages and by ``-o name``."""
    return f"{str(doc.get('kind', '')).lower()}/{_meta(doc).get('name', '')}"


def _meta(doc: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = doc.get("metadata")
    return meta if isinstance(meta, Mapping) else {}


def age(stamp: object) -> str:
    """How long ago an RFC 3339 time was."""
    from edgeward.core.quantity import format_age

    try:
        then = datetime.fromisoformat(str(stamp).replace("Z", "+00:00"))
    except ValueError:
        return "<unknown>"
    return format_age((datetime.now(UTC) - then.replace(tzinfo=then.tzinfo or UTC)).total_seconds())


def cell(value: object) -> str:
    """A value in one line of a table."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, Mapping):
        return ",".join(f"{k}={cell(v)}" for k, v in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ",".join(cell(v) for v in value) or "-"
    # Control characters of a payload or a name must not reach the terminal.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def style(text: str) -> str:
    """The colour of a state."""
    word = text.lower()
    if word in _GOOD:
        return "green"
    if word in _BAD:
        return "red"
    return "yellow" if word in _WAITING else ""


# -- tables ------------------------------------------------------------------------------------------------------------


def print_rows(titles: Sequence[str], rows: Iterable[Sequence[object]], *, header: bool = True) -> list[int]:
    """A table; returns the widths of its columns."""
    return Grid(titles).print(rows, header=header)


class Grid:
    """A table that may grow: later rows keep the widths of the earlier ones."""

    def __init__(self, titles: Sequence[str], widths: Sequence[int] = ()) -> None:
        self.titles = list(titles)
        self.widths = list(widths) or [len(t) for t in titles]

    def print(self, rows: Iterable[Sequence[object]], *, header: bool = True) -> list[int]:
        from rich.cells import cell_len
        from rich.table import Table
        from rich.text import Text

        lines = [[cell(v) for v in row] for row in rows]
        for line in lines:
            self.widths = [max(w, cell_len(c)) for w, c in zip(self.widths, line, strict=True)]
        table = Table(box=None, pad_edge=False, show_header=header, header_style="bold", padding=(0, 2, 0, 0))
        last = len(self.titles) - 1
        for i, (title, width) in enumerate(zip(self.titles, self.widths, strict=True)):
            # the last column is not padded: no blanks at the ends of lines
            table.add_column(title, no_wrap=True, overflow="ellipsis", min_width=None if i == last else width)
        for line in lines:
            table.add_row(*(Text(c, style=style(c)) for c in line))
        out = console()
        with out.capture() as captured:
            out.print(table)
        for text in captured.get().splitlines():
            write(text.rstrip())
        return self.widths


def columns_of(kind: Kind, *, wide: bool, namespace: bool, several: bool = False) -> list[Column]:
    """The columns of a kind's table: what the kind declares, always with a name and, at the end, an age."""
    declared = [c for c in kind.columns if wide or not c.wide]
    titles = {c.title.upper() for c in declared}
    got = list[Column]()
    if namespace and kind.namespaced and "NAMESPACE" not in titles:
        got.append(Column("NAMESPACE", lambda d: _meta(d).get("namespace")))
    if "NAME" not in titles:
        got.append(Column("NAME", full_name if several else lambda d: _meta(d).get("name")))
    got += declared
    if "AGE" not in titles:
        got.append(Column("AGE", lambda d: age(_meta(d).get("creationTimestamp"))))
    return got


def _value(column: Column, doc: Doc) -> object:
    try:
        return column.value(doc)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        # a status that is not written yet must not spoil the list
        return None


def resource_rows(columns: Sequence[Column], docs: Iterable[Doc]) -> list[list[object]]:
    return [[_value(c, redact(d)) for c in columns] for d in docs]


def record_rows(
    records: Sequence[Mapping[str, Any]], preferred: Sequence[str], *, everything: bool = False
) -> tuple[list[str], list[list[object]]]:
    """Titles and rows of records that are no resources: the preferred members first, with ``everything`` all."""
    present = dict.fromkeys(k for r in records for k in r)
    names = [n for n in preferred if n in present or not records]
    if everything or not names:
        names += [n for n in present if n not in names]
    return [_title(n) for n in names], [[_figure(n, r.get(n)) for n in names] for r in records]


def _title(name: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).replace("_", " ")
    return words.upper().removesuffix(" BYTES") if words != "bytes" else "BYTES"


def _figure(name: str, value: object) -> object:
    """A number by what its member's name says of its unit."""
    from edgeward.core.quantity import format_bytes

    if name == "namespace" and value == "_":
        return None  # how keys write "without namespace"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (name.lower().endswith("bytes") or name == "memory"):
        return format_bytes(float(str(value)))
    if number and name.lower().endswith("percent"):
        return f"{float(str(value)):.1f}%"
    return value
