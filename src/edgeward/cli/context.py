"""Where the command line finds its hub and nodes: the context file.

`edgeward up`, `lab up` and `demo --keep` write one when they are ready; every other command reads it. In comes a path
(`--context`, `EDGEWARD_CONTEXT`, or the default that `up` uses), out goes a typed :class:`Context`. A path may also be
the folder of a hub or a node, as `install-service` runs them: who may read it may administer it. Nothing here talks to
the network; that is the next file, `client.py`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeward.core.errors import Invalid, NotFound, Unreachable
from edgeward.core.files import read_json

CONTEXT_ENV = "EDGEWARD_CONTEXT"
AGENT_SOCKET_ENV = "EDGEWARD_AGENT_SOCKET"
#: A token that is used instead of the context's.
TOKEN_ENV = "EDGEWARD_TOKEN"  # noqa: S105 - the variable's name
#: The word that `--at` takes for "the node on this machine".
LOCAL = "local"


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """One node of the system. What does not exist (yet) is None."""

    name: str
    site: str = ""
    #: Path of the unix socket of the node's own API.
    api: str | None = None
    mqtt_url: str | None = None
    mqtt_user: str | None = None
    mqtt_password: str | None = field(default=None, repr=False)
    gateway_url: str | None = None
    pids: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Context:
    """What is known of a running system."""

    path: Path
    hub_url: str | None = None
    ca_file: str | None = None
    token: str | None = field(default=None, repr=False)
    pids: Mapping[str, int | None] = field(default_factory=dict)
    nodes: tuple[NodeEntry, ...] = ()

    def node(self, name: str) -> NodeEntry:
        """The node called so, or with ``local`` the only one."""
        if name == LOCAL:
            if len(self.nodes) == 1:
                return self.nodes[0]
            known = ", ".join(n.name for n in self.nodes) or "none"
            raise Invalid(
                f"`--at {LOCAL}` is not clear: the context {self.path} has {len(self.nodes)} nodes ({known})",
                remedy=f"name one: --at NODE, or set {AGENT_SOCKET_ENV}",
            )
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(n.name for n in self.nodes) or "none"
        raise NotFound(f"the context {self.path} has no node {name!r}", remedy=f"it has: {known}")


def default_data_dir() -> Path:
    """The data directory of `edgeward up` without `--data`: below the user's state directory."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "edgeward"
    state = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification tells to ignore a path that is not absolute.
    base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    return base / "edgeward"


def context_path(given: str | None = None) -> Path:
    """The context file that a command uses: what was given, the environment's, or the default."""
    chosen = given or os.environ.get(CONTEXT_ENV) or ""
    return Path(chosen).expanduser() if chosen else default_data_dir() / "context.json"


def _text(doc: Mapping[str, Any], name: str, path: Path, where: str = "$") -> str | None:
    value = doc.get(name)
    if value is None or isinstance(value, str):
        return value or None
    raise Invalid("expected a string or null", file=str(path), field=f"{where}.{name}", remedy="start the system again")


def _pids(doc: Mapping[str, Any]) -> dict[str, int | None]:
    pids = doc.get("pids")
    return {str(k): v for k, v in pids.items()} if isinstance(pids, Mapping) else {}


def parse_context(doc: object, path: Path) -> Context:
    """The context of a parsed file. Unknown members are allowed: a newer `up` may have written it."""
    if not isinstance(doc, Mapping):
        raise Invalid("a context is a JSON object", file=str(path), remedy="start the system again, it writes the file")
    entries = doc.get("nodes")
    entries = [] if entries is None else entries
    if not isinstance(entries, list):
        raise Invalid("expected an array", file=str(path), field="$.nodes", remedy="start the system again")
    nodes = []
    for i, entry in enumerate(entries):
        where = f"$.nodes[{i}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise Invalid("expected an object with a name", file=str(path), field=where)
        names = ("api", "mqtt_url", "mqtt_user", "mqtt_password", "gateway_url")
        rest = {n: _text(entry, n, path, where) for n in names}
        nodes.append(
            NodeEntry(name=entry["name"], site=_text(entry, "site", path, where) or "", pids=_pids(entry), **rest)
        )
    return Context(
        path=path,
        hub_url=_text(doc, "hub_url", path),
        ca_file=_text(doc, "ca_file", path),
        token=_text(doc, "token", path),
        pids=_pids(doc),
        nodes=tuple(nodes),
    )


def folder_context(path: Path) -> Context:
    """The hub or the node whose folder this is, or the system that `edgeward up --data` keeps there."""
    if (path / "context.json").exists():
        return load_context(str(path / "context.json"))
    try:
        hub, node = read_json(path / "hub.json", None), read_json(path / "node.json", None)
        run = read_json(path / "run.json", {})
        if node is not None:
            entry = NodeEntry(str(node.get("node", "")), str(node.get("site", "")), api=_text(run, "api", path))
            return Context(path, nodes=(entry,))
        if hub is not None:
            identity = path / "identity"
            token = (identity / "admin.token").read_text(encoding="ascii").strip()
            return Context(path, hub_url=_text(run, "url", path), ca_file=str(identity / "ca.crt"), token=token)
    except OSError as e:
        raise Unreachable(
            f"the folder {path} cannot be read: {e.strerror or e}", remedy="run as its owner; has it been started yet?"
        ) from None
    raise Unreachable(f"the folder {path} is no hub's and no node's", remedy="name the one with hub.json or node.json")


def load_context(given: str | None = None) -> Context:
    """Reads the context file. Raises ``Unreachable`` when there is none: there is nothing to talk to."""
    path = context_path(given)
    if path.is_dir():
        return folder_context(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Unreachable(
            f"there is no context file {path}",
            remedy=f"start a system with `edgeward up`, or name its file by --context or {CONTEXT_ENV}",
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise Unreachable(
            f"the context file {path} cannot be read: {why}",
            remedy="run as the user who started the system, or name another file by --context",
        ) from None
    try:
        doc = json.loads(text)
    except ValueError as e:
        raise Invalid(f"is no JSON: {e}", file=str(path), remedy="start the system again, it writes the file") from None
    return parse_context(doc, path)
