"""The agent's side of functions: what the plane is told, from the replica, and the words that its answers are put in.

The plane (``plane.py``) runs them; the agent only says which there should be. Values of Secrets go into the plane's
configuration file sealed with the node's own key, as they lie in the replica.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edgeward.core import clock
from edgeward.core.blobs import hex_of
from edgeward.core.errors import Invalid, NotFound
from edgeward.core.quantity import parse_duration
from edgeward.core.resource import Key, Resource, check_name
from edgeward.functions import logs
from edgeward.functions.samples import samples_path, wanted_lines
from edgeward.functions.sieve import check as check_regex
from edgeward.functions.stock import Missing
from edgeward.functions.versions import config_of

#: (namespace, name) -> (data, revision), or None
Lookup = Callable[[str, str], tuple[dict[str, str], str] | None]
#: Seconds that an invocation from outside may take at most; a function's own limit is at most this.
LONGEST = 900.0
#: Samples that one question may bring.
LIMIT = 10_000


class Seals(Protocol):
    def seal(self, data: bytes, place: str) -> bytes: ...


def place(key: str, digest: str) -> str:
    """Where a version's secret values are sealed for."""
    return f"Function/{key}/{digest}"


class Shelf(Protocol):
    """What code and packages are here (``stock.py``)."""

    def code(self, namespace: str, hex: str) -> Missing | None: ...
    def packages(self, namespace: str, lock: str) -> Missing | None: ...
    def settle(self) -> None: ...


class Sections:
    """Makes the plane's section ``functions``: the same bytes as long as nothing changed."""

    def __init__(
        self,
        config: Lookup,
        secret: Lookup,
        vault: Seals,
        shelf: Shelf | None = None,
        beside: Callable[[Resource], tuple[bool, Resource | None]] | None = None,
    ) -> None:
        """Without ``shelf``: functions that are a text only. ``beside``: what a canary is tried beside, and whether it
        has to be waited for (``beside.py``)."""
        self._config, self._secret, self._vault, self._shelf = config, secret, vault, shelf
        self._beside = beside
        self._sealed: dict[tuple[str, str], str] = {}
        #: Of what is to come, whether its code and packages are here.
        self.fetched: dict[Key, bool] = {}

    def section(self, functions: Sequence[Resource], coming: Sequence[Resource] = ()) -> dict[str, Any]:
        """``coming``: what does not run here yet, and whose code and packages are fetched meanwhile."""
        entries = [self._whole(f) for f in sorted(functions, key=lambda r: (r.metadata.namespace, r.metadata.name))]
        self.fetched = {f.key: self._missing(f) is None for f in coming}
        if self._shelf is not None:
            self._shelf.settle()
        kept = {(e["key"], e.get("digest", "")) for e in [*entries, *(e["before"] for e in entries if "before" in e)]}
        self._sealed = {k: v for k, v in self._sealed.items() if k in kept}
        return {"functions": entries}

    def _whole(self, function: Resource) -> dict[str, Any]:
        """The entry, and that of the version which a canary is tried beside."""
        entry = self._entry(function)
        if self._beside is None:
            return entry
        waits, old = self._beside(function)
        if "config" not in entry or not (waits or old):
            return entry
        before = self._entry(old) if old is not None else {"waiting": "asks the hub what it is to be tried beside"}
        if "config" not in before:
            return {**before, "key": entry["key"]}
        return entry if before["digest"] == entry["digest"] else {**entry, "before": before}

    def _entry(self, function: Resource) -> dict[str, Any]:
        ns = function.metadata.namespace
        key = f"{ns}/{function.metadata.name}"
        env: dict[str, str] = {}
        secret: dict[str, str] = {}
        marks: list[str] = []
        for one in function.spec.envFrom:
            found = self._config(ns, one.config) if one.config else self._secret(ns, one.secret)
            if found is None:
                what = f"Config/{one.config}" if one.config else f"Secret/{one.secret}"
                return {"key": key, "waiting": f"{what} is not here yet"}
            if one.config:
                env |= found[0]
            else:
                secret |= found[0]
                marks.append(f"{one.secret}@{found[1]}")
        secrets: dict[str, dict[str, str]] = {}
        for name in function.spec.secrets:
            found = self._secret(ns, name)
            if found is None:
                return {"key": key, "waiting": f"Secret/{name} is not here yet"}
            secrets[name] = found[0]
            marks.append(f"{name}@{found[1]}@")  # read by name: another version than one in the environment
        if missing := self._missing(function):
            generation = function.metadata.generation
            return {"key": key, "waiting": missing.message, "phase": missing.phase, "generation": generation}
        made = config_of(function, env, secret, marks, secrets)
        entry: dict[str, Any] = {"key": key, "digest": made.version.digest}
        if made.version.secret or made.version.secrets:
            at = (key, made.version.digest)
            if at not in self._sealed:
                values = {k: made.version.env[k] for k in made.version.secret}
                # no variable has a slash in its name
                values |= {f"{name}/{k}": v for name, data in made.version.secrets.items() for k, v in data.items()}
                sealed = self._vault.seal(msgspec.json.encode(values), place(*at))
                self._sealed[at] = base64.b64encode(sealed).decode()
            entry["sealed"] = self._sealed[at]
            made.version.env = {k: v for k, v in made.version.env.items() if k not in made.version.secret}
            made.version.secrets = {name: {} for name in made.version.secrets}
        entry["config"] = msgspec.to_builtins(made)
        return entry

    def _missing(self, function: Resource) -> Missing | None:
        """What of its code and packages is not here yet; both are fetched at once."""
        ns, spec = function.metadata.namespace, function.spec
        if spec.source.archive is None and spec.dependencies is None:
            return None
        if self._shelf is None:
            return Missing("Degraded", "this node fetches no archives and packages")
        code = spec.source.archive and self._shelf.code(ns, hex_of(spec.source.archive.digest))
        return (spec.dependencies and self._shelf.packages(ns, spec.dependencies.lock)) or code


def _since(args: dict[str, Any]) -> str:
    """The timestamp that ``since`` (a duration) means; empty where it is not given."""
    if not args.get("since"):
        return ""
    try:
        return clock.timestamp(clock.now() - parse_duration(str(args["since"])))
    except ValueError as e:
        raise Invalid(str(e), field="?since") from None


async def read_samples(folder: Path, args: dict[str, Any]) -> AsyncIterator[bytes]:
    """The samples of the function that ``args`` name, one JSON line each, the newest ``limit``. Raises ``Invalid``."""
    namespace, name = (check_name(str(args[w]), "", "") for w in ("namespace", "name"))
    path, since, why = samples_path(folder, namespace, name), _since(args), str(args.get("why", ""))
    limit = max(1, min(int(args.get("limit", 100)), LIMIT))
    for line in await asyncio.to_thread(wanted_lines, path, since, why, limit):
        yield line + b"\n"


def read_logs(folder: Path, args: dict[str, Any], node: str) -> AsyncIterator[bytes]:
    """The log of the function that ``args`` name, below this node's ``functions/``. Raises ``Invalid``,
    ``NotFound``."""
    name = str(args["name"])
    file = logs.LogFile(logs.log_path(folder, check_name(str(args["namespace"]), "", ""), check_name(name, "", "")), 0)
    if not file.path.exists():
        raise NotFound("wrote nothing on this node", resource=f"Function/{name}", remedy="was it called here?")
    since = _since(args)
    wanted = logs.wanted(
        level=str(args.get("level", "")),
        since=since,
        text=str(args.get("grep", "")),
        invocation=str(args.get("invocation", "")),
    )
    tail, regex = int(args.get("tail", 200)), str(args.get("regex", ""))
    check_regex(regex)
    pieces: AsyncIterator[bytes] = logs.read(
        file, wanted, tail, follow=bool(args.get("follow")), as_json=bool(args.get("json")), regex=regex, node=node
    )
    return pieces
