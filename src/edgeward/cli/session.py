"""What every command shares: the global options, the API they choose, the output they ask for.

The options may stand before the command or behind it; :func:`command` adds them to a command's own signature and hands
it a :class:`Session`. A command then asks the session for its API and never reads the environment itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward.cli.plain import plain
from edgeward.core.errors import EdgewardError, Unauthorized, Unreachable

if TYPE_CHECKING:
    from edgeward.cli.client import Api
    from edgeward.core.registry import Kind


FORMATS = ("table", "wide", "json", "yaml", "name")
DEFAULT_NAMESPACE = "default"
_PANEL = "Global options"

ContextOption = Annotated[
    str | None,
    typer.Option(
        "--context",
        metavar="FILE",
        rich_help_panel=_PANEL,
        help="Context file of the system to talk to, or the folder of a hub or node; else $EDGEWARD_CONTEXT, else the "
        "file that `edgeward up` wrote.",
    ),
]
AtOption = Annotated[
    str | None,
    typer.Option(
        "--at",
        metavar="NODE",
        rich_help_panel=_PANEL,
        help="Talk straight to that node's own API; `local` is the one on this machine.",
    ),
]
NamespaceOption = Annotated[
    str | None,
    typer.Option("--namespace", "-n", metavar="NAME", rich_help_panel=_PANEL, help="Namespace; else `default`."),
]
AllNamespacesOption = Annotated[
    bool,
    typer.Option("--all-namespaces", "-A", rich_help_panel=_PANEL, help="In all namespaces."),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="FORMAT", rich_help_panel=_PANEL, help="One of table, wide, json, yaml, name."
    ),
]


@dataclass
class Session:
    """The global options of this run."""

    context: str | None = None
    at: str | None = None
    namespace_given: str | None = None
    all_namespaces: bool = False
    output_given: str | None = None

    @property
    def namespace(self) -> str:
        return self.namespace_given or DEFAULT_NAMESPACE

    def scope(self, kind: Kind) -> str | None:
        """The namespace to list a kind in; None for all of them or where it has none."""
        return None if self.all_namespaces or not kind.namespaced else self.namespace

    def one(self, kind: Kind) -> str | None:
        """The namespace of one named resource."""
        if kind.namespaced and self.all_namespaces:
            raise UsageError("a resource is named within one namespace: use -n NAME instead of -A")
        return self.namespace if kind.namespaced else None

    def output(self, default: str = "table", *, allowed: tuple[str, ...] = FORMATS) -> str:
        """The format asked for; a usage error when this command has no such."""
        chosen = self.output_given or default
        if chosen not in allowed:
            raise UsageError(f"-o {chosen}: this command prints {', '.join(allowed)}")
        return chosen

    def api(self, *, connect_timeout: float | None = None) -> Api:
        from edgeward.cli.client import CONNECT_TIMEOUT, connect

        return connect(self.context, self.at, connect_timeout=connect_timeout or CONNECT_TIMEOUT)


class UsageError(Exception):
    """The command line makes no sense: exit code 2, and a pointer to the command's help."""


#: What stood before the command.
before = Session()


def root_options(
    context: ContextOption = None,
    at: AtOption = None,
    namespace: NamespaceOption = None,
    all_namespaces: AllNamespacesOption = False,
    output: OutputOption = None,
) -> None:
    """Edgeward: a cloud hub and edge sites that keep working when the link between them is gone."""
    given = Session(context, at, namespace, all_namespaces, output)
    for f in fields(Session):
        setattr(before, f.name, getattr(given, f.name))


def _globals() -> list[inspect.Parameter]:
    return list(inspect.signature(root_options, eval_str=True).parameters.values())


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Makes a typer command of a function whose first argument is the session: the global options are added."""
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    added = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in _globals()]

    @functools.wraps(function)
    def run(**values: Any) -> None:
        behind = [values.pop(p.name) for p in added]
        was = [getattr(before, f.name) for f in fields(Session)]
        # what stands behind the command is nearer to it and wins
        session = Session(*(b if b not in (None, False) else w for b, w in zip(behind, was, strict=True)))
        function(session, **values)

    names = [*own, *added]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in names], return_annotation=None
    )
    run.__annotations__ = {p.name: p.annotation for p in names}
    # typer asks for type hints by __wrapped__, which would be the bare function's
    del run.__wrapped__
    return run


class Failures:
    """Errors of a command that goes on with the rest: each is printed when it happens, the first decides the code."""

    def __init__(self) -> None:
        self.first: EdgewardError | None = None

    def add(self, error: EdgewardError) -> None:
        """Prints the error; raises it again when nothing behind it can succeed either."""
        if isinstance(error, Unreachable | Unauthorized):
            raise error
        typer.echo(f"error: {plain(str(error))}", err=True)
        self.first = self.first or error

    def finish(self) -> None:
        """Ends the command with the first error's exit code, if there was one."""
        if self.first is not None:
            raise typer.Exit(self.first.exit_code)
