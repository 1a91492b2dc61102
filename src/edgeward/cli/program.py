"""Commands about the program itself: `version` and `completion`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from edgeward.cli.session import Session, UsageError
from edgeward.core.errors import EdgewardError, NotFound

SHELLS = ("bash", "zsh", "fish")
#: `version` answers at once, also when the hub's link is cut.
_HUB_PATIENCE = 1.0


def client_version() -> str:
    """The version that was installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("edgeward")
    except PackageNotFoundError:
        return "unknown"


def _server_version(session: Session) -> tuple[str | None, str]:
    """The server's version (None: not known) and, where there is none, why."""
    try:
        with session.api(connect_timeout=_HUB_PATIENCE) as api:
            doc = api.request("GET", "/api/v1/version", timeout=_HUB_PATIENCE)
    except NotFound as e:
        return None, "it does not tell" if not e.resource else str(e)
    except EdgewardError as e:
        return None, e.message
    return str(doc.get("version") or "unknown"), ""


def version(session: Session) -> None:
    """Print the versions of this program and, if it can be reached, of the hub."""
    output = session.output(allowed=("table", "json", "yaml"))
    client = client_version()
    server, why = _server_version(session)
    if output == "table":
        print(f"edgeward {client}")
        name = f"node {session.at}" if session.at else "hub"
        print(f"{name} {server}" if server else f"{name}: {why}")
        return
    doc = {"client": client, "hub": server}
    if output == "json":
        print(json.dumps(doc))
    else:
        print("\n".join(f"{k}: {'null' if v is None else v}" for k, v in doc.items()))


def completion(session: Session, shell: Annotated[str, typer.Argument(metavar="|".join(SHELLS))]) -> None:
    """Print the completion script of a shell.

    For bash: eval "$(edgeward completion bash)" in ~/.bashrc.
    """
    if shell not in SHELLS:
        raise UsageError(f"no completion for {shell!r}: choose one of {', '.join(SHELLS)}")
    import os

    from edgeward.cli.main import COMPLETE_VAR, PROGRAM, program

    # typer writes its script when it is asked by the variable that the script itself sets
    os.environ[COMPLETE_VAR] = f"source_{shell}"
    program().main(args=[], prog_name=PROGRAM, complete_var=COMPLETE_VAR)
