"""What one version of a function is: everything that a worker of it is made from, under one digest. Pure.

In comes a Function with the values of the Configs and Secrets that it uses, out goes a :class:`Version`. What does not
change a worker (scale, concurrency, logs) is a :class:`Policy` beside it and is taken over without a new version.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import msgspec

from edgeward.core.blobs import hex_of
from edgeward.core.quantity import parse_bytes, parse_duration
from edgeward.core.resource import Resource
from edgeward.functions.canary import Plan
from edgeward.functions.parts import lock_digest
from edgeward.functions.picks import SamplePlan
from edgeward.functions.sources import RULES
from edgeward.functions.spec import FunctionSpec
from edgeward.functions.trigger_spec import Cron
from edgeward.functions.triggers import Taking, takings_of

#: Characters of a digest that are shown and compared; 48 bits are plenty among the versions of one function.
DIGEST = 12
_USERS, _USER_SPAN = 1_900_000_000, 100_000_000


class Version(msgspec.Struct, omit_defaults=True):
    """What a worker is made from. Sizes in bytes, times in seconds."""

    namespace: str
    name: str
    digest: str
    runtime: str
    handler: str
    files: dict[str, str]
    env: dict[str, str]
    timeout: float
    startup: float
    memory: int
    cpu: float | None
    pids: int
    tmp: int
    open_files: int
    body: int
    network: bool
    require: list[str]
    #: Not empty: what it may reach (``reach.py``), and nothing else.
    reach: list[str] = []
    #: Keys of ``env`` whose values are secret.
    secret: list[str] = []
    #: What the handler finds in ``context.secrets``.
    secrets: dict[str, dict[str, str]] = {}
    #: 64 hex digits of the archive that its code is in, and of the lock file of its packages; empty: none.
    code: str = ""
    packages: str = ""
    #: Of runtime command: what is started, and whether anew for each call.
    command: list[str] = []
    per_call: bool = False

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def user(self) -> int:
        """A system user number of the function's own, beyond those that systems hand out."""
        return _USERS + zlib.crc32(self.key.encode()) % _USER_SPAN


class CronPlan(msgspec.Struct, omit_defaults=True):
    """A trigger by time. ``jitter`` in seconds, as declared."""

    schedule: str
    zone: str = "UTC"
    jitter: float = 0.0
    once: bool = False
    overlap: bool = False
    data: bytes = b""


class Policy(msgspec.Struct, omit_defaults=True):
    """How many, how long, and what is kept: changed without a new version."""

    concurrency: int
    minimum: int
    maximum: int
    idle: float
    log_bytes: int
    log_level: str
    generation: int = 0
    #: A call that a new version must answer well before it takes over; None: it must only load.
    check: bytes | None = None
    crons: list[CronPlan] = []
    #: What is wanted gets a share of the calls; the version before it goes on.
    canary: Plan | None = None
    #: None: nothing of its calls is kept.
    samples: SamplePlan | None = None
    #: Triggers by topic, subject and event.
    takings: list[Taking] = []
    #: Topic filters that it may publish on, bytes that it may remember.
    publish: list[str] = []
    state: int = 1 << 20


class Config(msgspec.Struct, omit_defaults=True):
    """One function as the plane is told of it."""

    version: Version
    policy: Policy


def digest_of(parts: dict[str, Any]) -> str:
    """The digest of plain values, whatever the order of their keys."""
    text = msgspec.json.encode(parts, order="deterministic")
    return hashlib.sha256(text).hexdigest()[:DIGEST]


def _plan(cron: Cron) -> CronPlan:
    jitter, once, overlap = parse_duration(cron.jitter), cron.missed == "once", cron.overlap == "allow"
    return CronPlan(cron.schedule, cron.zone, jitter, once, overlap, cron.data.encode())


def _canary(spec: FunctionSpec) -> Plan | None:
    c = spec.canary
    return (
        None if c is None else Plan(float(c.weight), c.calls, c.errors, parse_duration(c.latency) if c.latency else 0.0)
    )


def _samples(spec: FunctionSpec) -> SamplePlan | None:
    s = spec.samples
    if s is None:
        return None
    below, above = (s.score.below, s.score.above) if s.score is not None else (None, None)
    return SamplePlan(s.rate, s.errors, below, above, parse_bytes(s.perDay), parse_bytes(s.keep))


def config_of(
    function: Resource,
    env: dict[str, str],
    secret: dict[str, str],
    marks: list[str],
    secrets: dict[str, dict[str, str]] | None = None,
) -> Config:
    """``env``: from Configs; ``secret``: from Secrets; ``marks``: names and revisions of all Secrets;
    ``secrets``: those that the handler reads itself.

    The digest is made of the marks, not of the secret values: it is shown to everybody, and a short secret could be
    guessed from it.
    """
    spec: FunctionSpec = function.spec
    limits = spec.limits
    files = dict(spec.source.files)
    if spec.source.inline:
        files[RULES[spec.runtime].inline(spec)] = spec.source.inline
    plain = {**env, **spec.env}
    made: dict[str, Any] = {
        "runtime": spec.runtime,
        "handler": spec.handler,
        "files": files,
        "timeout": parse_duration(limits.timeout),
        "startup": parse_duration(limits.startup),
        "memory": parse_bytes(limits.memory),
        "cpu": limits.cpu,
        "pids": limits.pids,
        "tmp": parse_bytes(limits.tmp),
        "open_files": limits.files,
        "body": parse_bytes(limits.body),
        "network": limits.network == "all",
        "require": sorted(spec.require),
    }
    # only where there are such: the digests of functions that have none stay what they are
    if spec.source.archive is not None:
        made["code"] = hex_of(spec.source.archive.digest)
    if spec.dependencies is not None:
        made["packages"] = lock_digest(spec.dependencies.lock)
    if command := RULES[spec.runtime].command(spec):  # only where there is one: the digests of others stay as they are
        made |= {"command": command, "per_call": spec.mode == "stdio"}
    if not isinstance(limits.network, str):
        made["reach"] = sorted(set(limits.network))
    meta = function.metadata
    version = Version(
        namespace=meta.namespace,
        name=meta.name,
        digest=digest_of({**made, "env": plain, "secrets": sorted(marks)}),
        env={**secret, **plain},
        secret=sorted(set(secret) - set(plain)),
        secrets=secrets or {},
        **made,
    )
    return Config(
        version,
        Policy(
            concurrency=spec.concurrency,
            minimum=spec.scale.min,
            maximum=spec.scale.max,
            idle=parse_duration(spec.scale.idle),
            log_bytes=parse_bytes(spec.logs.bytes),
            log_level=spec.logs.level,
            generation=meta.generation,
            check=None if spec.check is None else spec.check.data.encode(),
            crons=[_plan(t.cron) for t in spec.triggers if t.cron is not None],
            canary=_canary(spec),
            samples=_samples(spec),
            takings=takings_of(spec.triggers),
            publish=list(spec.publish),
            state=parse_bytes(spec.state.bytes),
        ),
    )
