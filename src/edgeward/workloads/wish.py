"""What is wanted of an app, as this node has to run it. Pure.

A declared App and the Configs and Secrets that it names become a :class:`~edgeward.workloads.state.Snapshot`, whole
enough to be started whatever happens to them later; its digest is the version's name, and :func:`rules_of` the numbers
that ``plan.py`` goes by. How many there shall be, where and after whom is no part of a version: changing that starts
nothing anew.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import msgspec

from edgeward.core.errors import EdgewardError
from edgeward.core.quantity import parse_duration
from edgeward.core.resource import Resource
from edgeward.workloads.live import AppKey
from edgeward.workloads.plan import Rules
from edgeward.workloads.spec import AT_ONCE, AppSpec
from edgeward.workloads.state import Snapshot


class Source(Protocol):
    """The wishes: read from the replica, the same with and without a link."""

    def apps(self) -> dict[AppKey, tuple[Resource, int]]: ...
    def config(self, namespace: str, name: str) -> dict[str, str] | None: ...
    def secret(self, namespace: str, name: str) -> dict[str, str] | None: ...
    def service_env(self, namespace: str) -> dict[str, str]: ...


def snapshot(app: Resource, source: Source) -> Snapshot:
    """The version that is wanted now. Raises ``EdgewardError`` when a Config or Secret is missing."""
    namespace = app.metadata.namespace
    spec: AppSpec = app.spec
    what = str(app.key)

    def data(config: str, secret: str) -> dict[str, str]:
        found = source.config(namespace, config) if config else source.secret(namespace, secret)
        if found is None:
            kind = f"Config {config!r}" if config else f"Secret {secret!r}"
            raise EdgewardError(f"{kind} is not on this node (yet)", resource=what, remedy="apply it")
        return found

    env: dict[str, str] = {}
    for e in spec.envFrom:
        env |= data(e.config, e.secret)
    files = {}
    for f in spec.files:
        found = data(f.config, f.secret)
        if f.key not in found:
            raise EdgewardError(f"{f.config or f.secret} has no key {f.key!r}", resource=what, field="$.spec.files")
        files[f.path] = found[f.key]
    plain = msgspec.to_builtins(spec)
    for name in AT_ONCE:
        plain.pop(name, None)
    return Snapshot(plain, env, files)


def digest(of: Snapshot) -> str:
    """The version's name: the same for the same spec, settings and files."""
    return hashlib.sha256(msgspec.json.encode(msgspec.to_builtins(of), order="sorted")).hexdigest()


def rules_of(spec: AppSpec, replicas: int) -> Rules:
    """The numbers of the spec that the plan goes by, in seconds."""
    return Rules(
        replicas,
        startup=parse_duration(spec.health.startup),
        window=parse_duration(spec.health.window),
        drain=parse_duration(spec.stop.drain),
        backoff=parse_duration(spec.restart.backoff),
        backoff_max=parse_duration(spec.restart.max),
        policy=spec.restart.policy,
        fixed_port=any(p.port is not None for p in spec.ports),
    )
