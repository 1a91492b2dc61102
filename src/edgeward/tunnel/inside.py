"""Programs inside an App: whose App a stream of ``exec`` names, and where its instance has its programs run.

Such a stream is decided by the verb ``exec`` on that App, at whichever node it runs, and by nothing that is allowed on
Nodes: who may look into one App is not let onto the box. The hub and the node read the name by the same function, so
what was decided is what is run. How an instance takes a program in is its runtime's to say (``workloads/runtime.py``).
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgeward.core import proc
from edgeward.core.errors import Invalid
from edgeward.core.resource import Key, check_name
from edgeward.tunnel.child import Account


class Place(Protocol):
    """Where and how a program of an instance runs (``workloads.runtime.Inside``)."""

    @property
    def argv(self) -> list[str]: ...
    @property
    def env(self) -> dict[str, str]: ...
    @property
    def folder(self) -> Path: ...
    @property
    def user(self) -> dict[str, Any]: ...
    @property
    def apart(self) -> bool: ...
    @property
    def enter(self) -> Callable[[proc.ProcId], None] | None: ...
    @property
    def instance(self) -> proc.ProcId | None: ...


class Places(Protocol):
    """``workloads.edge.AppsEdge.inside``. Raises ``NotFound``."""

    def __call__(
        self,
        namespace: str,
        name: str,
        argv: Sequence[str],
        instance: str = "",
        *,
        stdin: bool = False,
        tty: bool = False,
        marks: Mapping[str, str] = ...,
    ) -> Place: ...


def app_of(service: str, args: Mapping[str, Any]) -> Key | None:
    """The App whose instance a stream is for; None: the node itself. Raises ``Invalid``."""
    text = args.get("app", "")
    if service != "exec" or text == "":
        return None
    namespace, slash, name = text.partition("/") if isinstance(text, str) else ("", "", "")
    if not slash:
        raise Invalid("an App is named NAMESPACE/NAME", field="app")
    return Key("App", check_name(namespace, "app", ""), check_name(name, "app", ""))


def account_of(user: Mapping[str, Any]) -> Account:
    """Whom the instance's programs run as; the agent's own account where it names nobody."""
    uid, gid = user.get("user"), user.get("group")
    try:
        entry = pwd.getpwuid(os.geteuid() if uid is None else uid)
        name, home, shell = entry.pw_name, entry.pw_dir or "/", entry.pw_shell or "/bin/sh"
    except KeyError:
        name, home, shell = str(os.geteuid() if uid is None else uid), "/", "/bin/sh"
    return Account(name, home, shell, uid, gid, tuple(user.get("extra_groups") or ()))
