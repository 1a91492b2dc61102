"""The program `edgeward`.

In comes an argument list, out goes an exit code: 0 done, 1 failed, 2 usage, 3 refused or invalid, 4 conflict,
5 not found, 6 unreachable, 130 interrupted. Every command is a row of a table here and lives in a module that is
imported only when that command runs, so `edgeward get` does not pay for `edgeward lab`. No command catches errors to
print them; that happens here, once.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import signal
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import typer
import typer.core
import typer.main

from edgeward.cli.plain import plain
from edgeward.cli.session import UsageError, command, root_options
from edgeward.core.errors import EdgewardError

PROGRAM = "edgeward"
COMPLETE_VAR = "_EDGEWARD_COMPLETE"
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Row:
    """A command before it is imported. ``target`` is ``module:name``; a group's name is a typer app."""

    target: str
    panel: str
    help: str
    group: bool = False
    #: Made with :func:`command`: takes a session and the global options.
    session: bool = True


_RUN, _RES, _SEE, _DATA, _MORE = "Run a system", "Resources", "See what happens", "Sites and data", "More"
_CARE = "Care"
_FLEET, _WHO = "Boxes", "Who may"
_LAB = "edgeward.lab.cli"
_CLI = "edgeward.cli"

COMMANDS: dict[str, Row] = {
    "up": Row(f"{_LAB}:up", _RUN, "Run a hub and a first edge on this machine.", session=False),
    "demo": Row(f"{_LAB}:demo", _RUN, "Cut a running edge off its cloud and watch it survive.", session=False),
    "lab": Row(f"{_LAB}:lab", _RUN, "Rehearse outages: sites on emulated links.", group=True, session=False),
    "apply": Row(f"{_CLI}.write:apply", _RES, "Create or update what files declare."),
    "get": Row(f"{_CLI}.read:get", _RES, "List resources, or print one."),
    "describe": Row(f"{_CLI}.read:describe", _RES, "Show one resource with its status and events."),
    "edit": Row(f"{_CLI}.edit:edit", _RES, "Change a resource in your editor."),
    "delete": Row(f"{_CLI}.write:delete", _RES, "Delete resources by name or by file."),
    "rollout": Row(
        f"{_CLI}.rollout:app", _RES, "How new versions go from group to group: status, approve.", group=True
    ),
    "release": Row(f"{_CLI}.release:app", _FLEET, "Releases of the agent: create.", group=True),
    "site": Row(f"{_CLI}.site:app", _RES, "Whether a site takes the hub's changes: hold, release.", group=True),
    "scale": Row(f"{_CLI}.apps:scale", _RES, "How many instances an App has."),
    "app": Row(f"{_CLI}.apps:app", _RES, "An App's versions, and the way back.", group=True),
    "label": Row(f"{_CLI}.write:label", _RES, "Set and remove labels."),
    "diff": Row(f"{_CLI}.diff:diff", _RES, "What apply would change; exit code 1 if anything."),
    "explain": Row(f"{_CLI}.explain:explain", _RES, "What a kind or one of its fields means."),
    "invoke": Row(f"{_CLI}.functions:invoke", _SEE, "Call a function and print its answer."),
    "function": Row(f"{_CLI}.develop:app", _RES, "Write a function: new, test, run, deploy.", group=True),
    "functions": Row(f"{_CLI}.functions:app", _SEE, "What functions wrote, their versions and packages.", group=True),
    "logs": Row(f"{_CLI}.observe:logs", _SEE, "Print what an app wrote."),
    "events": Row(f"{_CLI}.observe:events", _SEE, "What happened, in words."),
    "top": Row(f"{_CLI}.observe:top", _SEE, "What nodes or apps use now."),
    "journal": Row(f"{_CLI}.observe:journal", _SEE, "Changes that lost against the other side's."),
    "audit": Row(f"{_CLI}.observe:audit", _SEE, "Who wrote what, and when."),
    "override": Row(f"{_CLI}.overrides:app", _DATA, "What sites changed for themselves.", group=True),
    "persite": Row(f"{_CLI}.persite:app", _DATA, "In what sites differ from an App's declaration.", group=True),
    "stream": Row(f"{_CLI}.streams:app", _DATA, "Read what sites delivered.", group=True),
    "exec": Row(f"{_CLI}.remote:exec_", _FLEET, "Run a program on a node."),
    "shell": Row(f"{_CLI}.remote:shell", _FLEET, "A shell on a node."),
    "cp": Row(f"{_CLI}.remote:cp", _FLEET, "Copy files and folders to a node, or from it."),
    "tunnel": Row(f"{_CLI}.tunnel:app", _SEE, "Reach a port of a node that cannot be dialled.", group=True),
    "gateway": Row(f"{_CLI}.gateway:app", _SEE, "What a node's gateway does with a request.", group=True),
    "steer": Row(f"{_CLI}.steer:steer", _SEE, "Which site serves a client, and why."),
    "backup": Row(f"{_CLI}.backup:app", _CARE, "Keep the hub's state, check it, bring it back.", group=True),
    "login": Row(f"{_CLI}.login:login", _WHO, "Sign in with the organisation's account."),
    "logout": Row(f"{_CLI}.login:logout", _WHO, "End the token that you are signed in with."),
    "whoami": Row(f"{_CLI}.access:whoami", _WHO, "Who you are to the system, and your rules."),
    "can": Row(f"{_CLI}.access:can", _WHO, "Whether you may do something."),
    "join": Row(f"{_CLI}.fleet:join", _FLEET, "Join this box to a fleet and run its agent.", session=False),
    "leave": Row(f"{_CLI}.fleet:leave", _FLEET, "Take this box out of its fleet.", session=False),
    "hub": Row(f"{_CLI}.hub:app", _FLEET, "The hub itself: its certificate authority.", group=True),
    "node": Row(f"{_CLI}.fleet:app", _FLEET, "The boxes of the fleet: list, revoke, replace.", group=True),
    "token": Row(f"{_CLI}.token:app", _WHO, "Make, list and end tokens: of boxes, people, programs.", group=True),
    "doctor": Row(f"{_CLI}.doctor:doctor", _CARE, "Check this machine, and say what to do."),
    "support-bundle": Row(f"{_CLI}.support:support_bundle", _CARE, "Collect what a supporter needs, no secrets."),
    "install-service": Row(f"{_CLI}.service:install_service", _CARE, "Run a hub or an agent by systemd."),
    "sbom": Row(f"{_CLI}.sbom:sbom", _CARE, "What this release is made of (CycloneDX)."),
    "completion": Row(f"{_CLI}.program:completion", _MORE, "Print the completion script of a shell."),
    "version": Row(f"{_CLI}.program:version", _MORE, "Print the versions of program and hub."),
}


def load(name: str) -> Any:
    """Imports the command called so."""
    row = COMMANDS[name]
    module, _, attribute = row.target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if row.group:
        target.info.name = name
        loaded: Any = typer.main.get_group(target)
    else:
        one = typer.Typer(add_completion=False)
        one.command(name, help=None)(command(target) if row.session else target)
        loaded = typer.main.get_command(one)
    loaded.name = name
    return skip_coercion(_reflowed(loaded))


def _reflowed(loaded: Any) -> Any:
    """The command with its help in paragraphs: where lines end in the source is no matter of the reader's terminal."""
    if loaded.help:
        loaded.help = "\n\n".join(" ".join(p.split()) for p in inspect.cleandoc(loaded.help).split("\n\n"))
    for inner in getattr(loaded, "commands", {}).values():
        _reflowed(inner)
    return loaded


class _AsTyped:
    """A parameter's value as the shell gave it."""

    @staticmethod
    def coerce(value: Any, param: Any, ctx: Any) -> Any:
        return () if value is None and (param.multiple or param.nargs == -1) else value


def skip_coercion(loaded: Any) -> Any:
    """Keeps typer from importing pydantic (150 ms, half of our start-up) only to turn strings into strings.

    This typer makes a pydantic adapter for every parameter. Ours are strings, flags and lists of strings, which
    the parser yields already. Where typer has no such slot, nothing is changed and nothing is lost but time.
    """
    made = loaded.get_help_option

    def get_help_option(ctx: Any) -> Any:
        return _as_typed(made(ctx))

    loaded.get_help_option = get_help_option
    for param in loaded.params:
        _as_typed(param)
    for inner in getattr(loaded, "commands", {}).values():
        skip_coercion(inner)
    return loaded


def _as_typed(param: Any) -> Any:
    if getattr(param, "_runtime_param", param) is None and param.type_descriptor.annotation in (str, bool, list[str]):
        param._runtime_param = _AsTyped
    return param


class LazyGroup(typer.core.TyperGroup):
    """A group that lists its commands from the table and imports one when it is called."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self._loaded: dict[str, Any] = {}
        for name, row in COMMANDS.items():
            self.commands[name] = typer.core.TyperCommand(name, help=row.help, rich_help_panel=row.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # A typed name, not a listing: now its import is paid.
        if args and args[0] in COMMANDS and args[0] not in self._loaded:
            self._loaded[args[0]] = self.commands[args[0]] = load(args[0])
        return super().resolve_command(ctx, args)


def program() -> Any:
    """The whole command tree, its commands not yet imported."""
    app = typer.Typer(
        cls=LazyGroup,
        add_completion=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(root_options)
    if COMPLETE_VAR in os.environ:
        # This is what makes typer know its shells; the options that it is for are not offered.
        from typer.completion import get_completion_inspect_parameters

        get_completion_inspect_parameters()
    return skip_coercion(typer.main.get_command(app))


def say(text: str) -> None:
    """One message on stderr; a closed stderr is no reason to fail."""
    try:
        print(plain(text), file=sys.stderr, flush=True)
    except OSError:
        pass


def _leave(code: int) -> NoReturn:
    """Exits without the traceback that a reader who went away would cause at interpreter shutdown."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
    sys.exit(code)


def _drop_stdout() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


_SHORT = re.compile(r"^(-[a-zA-Z])=(.*)$", re.S)


def spread(args: list[str]) -> list[str]:
    """``-o=json``, as kubectl's users write it, is ``-o json``; the parser would read it as ``=json``."""
    got: list[str] = []
    for n, arg in enumerate(args):
        if arg == "--":
            return got + args[n:]
        match = _SHORT.match(arg)
        got += [match[1], match[2]] if match else [arg]
    return got


def main(argv: list[str] | None = None) -> NoReturn:
    """The entry point."""
    args = spread(sys.argv[1:] if argv is None else argv)
    try:
        program().main(args=args, prog_name=PROGRAM, complete_var=COMPLETE_VAR)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except EdgewardError as e:
        say(f"error: {e}")
        code = e.exit_code
    except UsageError as e:
        say(f"usage error: {e}")
        code = 2
    except BrokenPipeError:
        # `edgeward ... | head`: the reader has what it wanted
        _drop_stdout()
        code = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        code = INTERRUPTED
    except OSError as e:
        # a file of the user that cannot be read, a disk that is full
        say(f"error: {e.filename or 'input/output'}: {e.strerror or e}")
        code = 1
    _leave(code)


if __name__ == "__main__":
    main()
