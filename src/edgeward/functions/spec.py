"""Kind Function: code that is pushed from the cloud and answers beside the user. Pure."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeward.core.blobs import DIGEST
from edgeward.core.declared import Declared, EnvFrom, Placement
from edgeward.core.errors import Invalid
from edgeward.core.quantity import BYTES_PATTERN, parse_bytes, parse_duration
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import Resource
from edgeward.core.topics import check_filter
from edgeward.functions import reach
from edgeward.functions.sources import RULES
from edgeward.functions.trigger_spec import Duration, Trigger, check_triggers
from edgeward.functions.wheels import parse_lock

Size = Annotated[str, Meta(pattern=BYTES_PATTERN)] | int
_ENV = re.compile(r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
#: Bytes of a function's source and environment: it must fit one object and one message to a worker.
_MAX_ENV = 64 * 1024
_MAX_STATE = 64 << 20

Promise = Literal["memory", "cpu", "pids", "tmp", "files", "network", "exec", "user", "signals", "kernel"]


class Archive(Declared):
    """A tar.gz or zip that the namespace holds at the hub; the command line makes one of `folder: ./src`."""

    digest: Annotated[str, Meta(description="Of its bytes: sha256: and 64 hex digits", pattern=DIGEST)]


class Dependencies(Declared):
    """Packages that the code imports: fetched by the hub as wheels, once, so that no node needs a registry."""

    lock: Annotated[
        str, Meta(description="A requirements file with hashes, as `uv pip compile --generate-hashes` writes it")
    ]


class Source(Declared):
    """The code: one of the three. In a file for the command line also `folder: PATH`, which it packs and uploads, and
    `file: PATH`, which it puts in."""

    inline: Annotated[
        str,
        Meta(
            description="The text of main.py (python), main.mjs or main.cjs (node), main (command), "
            "main.wat (wasm, in its text form)"
        ),
    ] = ""
    files: Annotated[
        dict[str, str], Meta(description="Relative path to text; modules and other files; wasm: main.wasm in base64")
    ] = {}
    archive: Annotated[Archive | None, Meta(description="A packed folder")] = None


class Limits(Declared):
    """What one instance may use. Status says which are enforced on which node."""

    timeout: Annotated[Duration, Meta(description="Of one call; the instance that is over it is ended")] = "10s"
    startup: Annotated[Duration, Meta(description="Of loading the code")] = "10s"
    memory: Annotated[Size, Meta(description="Bytes, e.g. 64Mi")] = "128Mi"
    cpu: Annotated[Annotated[float, Meta(gt=0, le=1024)] | None, Meta(description="Processors, e.g. 0.5")] = None
    pids: Annotated[int, Meta(description="Processes and threads", ge=1, le=4096)] = 16
    tmp: Annotated[Size, Meta(description="Bytes of temporary files (in memory where it is enforced)")] = "16Mi"
    files: Annotated[int, Meta(description="Open files", ge=8, le=1024)] = 64
    body: Annotated[Size, Meta(description="Bytes of an event's data, and of an answer in one piece")] = "6Mi"
    network: Annotated[
        Literal["none", "all"] | list[str],
        Meta(
            description="none: no socket at all; all: TCP and UDP anywhere; or a list of what it may reach, e.g. "
            "api.example.org:443, 192.0.2.0/24:502, 192.0.2.1:53/udp"
        ),
    ] = "none"


class Scale(Declared):
    """Instances on each node; each works on one call at a time."""

    min: Annotated[int, Meta(description="Kept warm; 0: none while nobody calls", ge=0, le=256)] = 0
    max: Annotated[int, Meta(description="At most", ge=1, le=256)] = 4
    idle: Annotated[Duration, Meta(description="Ended after so long without a call, down to min")] = "60s"


class Check(Declared):
    """A call that a new version must answer (status below 400) before it takes over."""

    data: Annotated[str, Meta(description="The event's data")] = ""


class Canary(Declared):
    """What is declared gets a share of the calls, and the version before it goes on, until this is removed.

    Each node takes it back by itself when it does worse; it does not come back by itself.
    """

    weight: Annotated[
        float, Meta(description="Percent of the calls; 0: only calls that ask for NAME@canary", ge=0, le=100)
    ]
    calls: Annotated[
        int,
        Meta(description="Judged from so many of its calls on, or when more of them failed than may", ge=1, le=10_000),
    ] = 20
    errors: Annotated[
        float, Meta(description="Its share of failed calls may be higher than stable's by this", ge=0, le=1)
    ] = 0.05
    latency: Annotated[Duration, Meta(description="Slower calls count as failed; 0: only errors count")] = 0


class Score(Declared):
    """Of pairs that a handler offers by context.sample(): which scores are kept. Both left out: all."""

    below: Annotated[float | None, Meta(description="Kept when the score is less, e.g. the model was not sure")] = None
    above: Annotated[float | None, Meta(description="Kept when the score is more")] = None


class Samples(Declared):
    """Inputs and outputs that are kept on each node, for those who look after the function or its model.

    They may be people's data: left out, nothing is kept.
    """

    rate: Annotated[float, Meta(description="This share of the calls, e.g. 0.01", ge=0, le=1)] = 0.0
    errors: Annotated[bool, Meta(description="Calls that failed or were answered 500 and above")] = False
    score: Annotated[Score | None, Meta(description="Pairs that the handler offers; left out: all of them")] = None
    perDay: Annotated[Size, Meta(description="Bytes a day (UTC) on each node; more is counted, not kept")] = "1Mi"
    keep: Annotated[Size, Meta(description="Hard cap on each node's disk, oldest half first to go")] = "8Mi"


class StateSpec(Declared):
    """What it remembers on each node (``context.state``)."""

    bytes: Annotated[Size, Meta(description="At most, keys and values together")] = "1Mi"


class Logs(Declared):
    bytes: Annotated[Size, Meta(description="Hard cap on each node's disk, oldest first to go")] = "10Mi"
    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="What is less is not kept")] = (
        "info"
    )


class FunctionSpec(Declared):
    """Code that answers calls on the node where they come in."""

    runtime: Annotated[
        Literal["python", "node", "wasm", "command"],
        Meta(description="What runs it"),
    ]
    source: Annotated[Source, Meta(description="The code")] = msgspec.field(default_factory=Source)
    handler: Annotated[str, Meta(description="`function` of main, or `module:function`")] = "handler"
    command: Annotated[
        list[str],
        Meta(description="Of runtime command: a program of the node's or a file of the source, and its arguments"),
    ] = []
    mode: Annotated[
        Literal["", "worker", "stdio"],
        Meta(
            description="Of runtime command: worker (the default) speaks the worker protocol; stdio is started for "
            "each call, with the event as its input and the answer as its output"
        ),
    ] = ""
    dependencies: Annotated[Dependencies | None, Meta(description="Packages (python)")] = None
    env: Annotated[dict[str, str], Meta(description="Environment")] = {}
    envFrom: Annotated[list[EnvFrom], Meta(description="Environment from Configs and Secrets")] = []
    secrets: Annotated[
        list[str], Meta(description="Secrets that the handler reads as `context.secrets[name][key]`", max_length=32)
    ] = []
    publish: Annotated[
        list[str], Meta(description="Topics of the node's broker it may publish on (`+` and `#`)", max_length=64)
    ] = []
    state: Annotated[StateSpec, Meta(description="Key-value memory on each node, kept over versions and restarts")] = (
        msgspec.field(default_factory=StateSpec)
    )
    limits: Annotated[Limits, Meta(description="What an instance may use")] = msgspec.field(default_factory=Limits)
    require: Annotated[
        list[Promise], Meta(description="What must really be enforced; else the node refuses to run it")
    ] = []
    concurrency: Annotated[
        int, Meta(description="Calls in hand on one node, waiting ones too; one more is answered 503", ge=1, le=10_000)
    ] = 100
    scale: Annotated[Scale, Meta(description="How many instances")] = msgspec.field(default_factory=Scale)
    triggers: Annotated[list[Trigger], Meta(description="What calls it beside Routes and people", max_length=32)] = []
    check: Annotated[Check | None, Meta(description="How a new version proves itself")] = None
    canary: Annotated[Canary | None, Meta(description="Only a share of the calls at first; left out: all of them")] = (
        None
    )
    logs: Annotated[Logs, Meta(description="What is kept of its log")] = msgspec.field(default_factory=Logs)
    samples: Annotated[Samples | None, Meta(description="What is kept of its calls; left out: nothing")] = None
    placement: Annotated[Placement, Meta(description="Where")] = msgspec.field(default_factory=Placement)


def _check_source(spec: FunctionSpec) -> None:
    source = spec.source
    ways = bool(source.inline) + bool(source.files) + (source.archive is not None)
    if ways > 1 or (ways == 0 and not (spec.runtime == "command" and spec.command)):
        raise Invalid("give the code in one way", field="$.spec.source", remedy="inline:, files: or archive:, one only")
    for path in source.files:
        parts = PurePosixPath(path)
        if not path or parts.is_absolute() or ".." in parts.parts or "\0" in path or "\\" in path or str(parts) != path:
            raise Invalid(
                f"{path[:80]!r} is no relative path", field="$.spec.source.files", remedy="e.g. main.py or lib/a.py"
            )
    if spec.runtime != "command" and (spec.command or spec.mode):
        name = "command" if spec.command else "mode"
        raise Invalid(f"{spec.runtime} has a handler", field=f"$.spec.{name}", remedy="write runtime: command")
    RULES[spec.runtime].check(spec)
    if spec.dependencies is not None:
        if spec.runtime != "python":
            raise Invalid(
                f"are for python, not for {spec.runtime}",
                field="$.spec.dependencies",
                remedy="put what it needs into the folder of its source",
            )
        parse_lock(spec.dependencies.lock)


#: Fields that say how much, where and how it is looked after. All others are its code: together they are what a
#: version is, and what a rollback brings back.
POLICY = frozenset(
    {"canary", "check", "concurrency", "logs", "placement", "publish", "samples", "scale", "state", "triggers"}
)


def _check_numbers(spec: FunctionSpec) -> None:
    limits = spec.limits
    for name, value, least in (
        ("limits.memory", limits.memory, 16 << 20),
        ("limits.tmp", limits.tmp, 4096),
        ("limits.body", limits.body, 1),
        ("logs.bytes", spec.logs.bytes, 16384),
        ("state.bytes", spec.state.bytes, 0),
        *([("samples.perDay", spec.samples.perDay, 1024)] if spec.samples else []),
        *([("samples.keep", spec.samples.keep, 65536)] if spec.samples else []),
    ):
        try:
            size = parse_bytes(value)
        except ValueError as e:
            raise Invalid(str(e), field=f"$.spec.{name}") from None
        if size < least:
            raise Invalid(f"{size} bytes are too few", field=f"$.spec.{name}", remedy=f"at least {least}")
    if parse_bytes(spec.state.bytes) > _MAX_STATE:
        raise Invalid("is more than 64Mi", field="$.spec.state.bytes", remedy="keep large things elsewhere")
    if spec.samples and parse_bytes(spec.samples.keep) > 256 << 20:
        raise Invalid("is more than 256Mi", field="$.spec.samples.keep", remedy="fetch them more often")
    if parse_bytes(limits.body) > 6 << 20:
        raise Invalid("is more than 6Mi", field="$.spec.limits.body", remedy="send larger answers in pieces (yield)")
    for name, duration in (("timeout", limits.timeout), ("startup", limits.startup)):
        try:
            seconds = parse_duration(duration)
        except ValueError as e:
            raise Invalid(str(e), field=f"$.spec.limits.{name}") from None
        if not 0.001 <= seconds <= 900:
            raise Invalid("is not between 1ms and 15m", field=f"$.spec.limits.{name}", remedy="write e.g. 2s")
    try:
        parse_duration(spec.scale.idle)
    except ValueError as e:
        raise Invalid(str(e), field="$.spec.scale.idle") from None
    if spec.canary is not None:
        try:
            parse_duration(spec.canary.latency)
        except ValueError as e:
            raise Invalid(str(e), field="$.spec.canary.latency") from None
    if spec.scale.min > spec.scale.max:
        raise Invalid("min is more than max", field="$.spec.scale.min", remedy=f"at most {spec.scale.max}")


def _check_network(network: str | list[str]) -> None:
    if isinstance(network, str):
        return
    if not network:
        raise Invalid("the list is empty", field="$.spec.limits.network", remedy="write none")
    if len(network) > reach.MOST:
        raise Invalid(f"has more than {reach.MOST} entries", field="$.spec.limits.network", remedy="name networks")
    for n, entry in enumerate(network):
        try:
            reach.parse(entry)
        except ValueError as e:
            remedy = "write host:port, network:port or host:port/udp"
            raise Invalid(str(e), field=f"$.spec.limits.network[{n}]", remedy=remedy) from None


def _check(r: Resource) -> None:
    spec: FunctionSpec = r.spec
    if spec.runtime not in RULES:
        raise Invalid(
            f"runtime {spec.runtime} is not here yet",
            field="$.spec.runtime",
            remedy=f"this release has: {', '.join(RULES)}",
        )
    _check_source(spec)
    _check_numbers(spec)
    _check_network(spec.limits.network)
    check_triggers(spec.triggers)
    for n, topic in enumerate(spec.publish):
        check_filter(topic, f"$.spec.publish[{n}]")
    for name in spec.env:
        if not _ENV.fullmatch(name):
            raise Invalid(f"{name[:60]!r} is no variable name", field="$.spec.env", remedy="letters, digits, _")
    if sum(len(k) + len(v) for k, v in spec.env.items()) > _MAX_ENV:
        raise Invalid(f"is more than {_MAX_ENV} bytes", field="$.spec.env", remedy="put large values into files")
    for n, e in enumerate(spec.envFrom):
        if bool(e.config) == bool(e.secret):
            raise Invalid("name a config or a secret", field=f"$.spec.envFrom[{n}]", remedy="exactly one of the two")
    if spec.limits.network == "all" and "network" in spec.require:
        raise Invalid("limits.network is open", field="$.spec.require", remedy="leave network out of require")
    if "cpu" in spec.require and spec.limits.cpu is None:
        raise Invalid("there is no limits.cpu to enforce", field="$.spec.require", remedy="write limits.cpu")


def _refs(r: Resource) -> list[Ref]:
    spec: FunctionSpec = r.spec
    ns = r.metadata.namespace
    refs = []
    if spec.placement.site:
        refs.append(Ref("Site", "_", spec.placement.site, "$.spec.placement.site"))
    for n, e in enumerate(spec.envFrom):
        kind = "Config" if e.config else "Secret"
        refs.append(Ref(kind, ns, e.config or e.secret, f"$.spec.envFrom[{n}].{kind.lower()}"))
    refs += [Ref("Secret", ns, name, f"$.spec.secrets[{n}]") for n, name in enumerate(spec.secrets)]
    return refs


def _status(d: dict[str, Any], name: str, default: object = "") -> object:
    return d.get("status", {}).get(name, default)


def _canary(d: dict[str, Any]) -> str:
    trying = d.get("status", {}).get("canary") or {}
    weight = (d["spec"].get("canary") or {}).get("weight")
    return f"{trying['version']} {weight:g} %" if trying.get("version") and weight is not None else ""


kinds.add(
    Kind(
        "Function",
        "functions",
        FunctionSpec,
        reported=True,
        doc="Code that answers calls at the edge.",
        scope="placed",
        short=("fn",),
        level=2,
        at_once=("placement", "scale", "concurrency", "logs", "samples"),
        check=_check,
        refs=_refs,
        columns=(
            Column("PHASE", lambda d: _status(d, "phase", "Pending")),
            Column("VERSION", lambda d: _status(d, "version")),
            Column("CANARY", _canary, wide=True),
            Column("INSTANCES", lambda d: _status(d, "instances", 0)),
            Column("SITE", lambda d: d["spec"].get("placement", {}).get("site", "") or "all"),
            Column("NODES", lambda d: ",".join(sorted(d.get("status", {}).get("nodes", {}))), wide=True),
            Column("MESSAGE", lambda d: _status(d, "message"), wide=True),
        ),
        example=(
            "apiVersion: edgeward/v1\nkind: Function\nmetadata: {name: hello}\nspec:\n  runtime: python\n  source:\n"
            "    inline: |\n      def handler(event, context):\n"
            '          return {"hello": event.data.decode(), "version": context.version}\n'
            "  limits: {timeout: 2s, memory: 64Mi}\n"
        ),
    )
)
