"""Kinds App and Service: what people declare of the programs that run at the edge. Pure."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeward.core.declared import Declared, EnvFrom, Placement
from edgeward.core.errors import Invalid
from edgeward.core.quantity import BYTES_PATTERN, DURATION_PATTERN, parse_bytes, parse_duration
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import Resource, check_name
from edgeward.workloads import disconnect
from edgeward.workloads.container_spec import Container, check_container
from edgeward.workloads.disconnect import Disconnect
from edgeward.workloads.persite import checked, effective, with_sites
from edgeward.workloads.times import Times, check_times

Duration = Annotated[str, Meta(pattern=DURATION_PATTERN)] | float | int
Size = Annotated[str, Meta(pattern=BYTES_PATTERN)] | int
_ENV = re.compile(r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
_VARIABLE = re.compile(r"\$(?:\$|\{([^}]*)\})")
#: Variables that every instance has, beside its ports and its own ``env``.
BUILT_IN = (
    "EDGEWARD_APP",
    "EDGEWARD_NAMESPACE",
    "EDGEWARD_NODE",
    "EDGEWARD_SITE",
    "EDGEWARD_INSTANCE",
    "EDGEWARD_VERSION",
)


class Process(Declared):
    """The process runtime: a program of the node itself."""

    command: Annotated[list[str], Meta(description="Program and first arguments; ${NAME} is replaced", min_length=1)]
    args: Annotated[list[str], Meta(description="More arguments; ${NAME} is replaced")] = []
    env: Annotated[dict[str, str], Meta(description="Environment; ${NAME} is replaced")] = {}
    user: Annotated[str, Meta(description="System user to run as (needs root; reported when not enforced)")] = ""
    inheritPath: Annotated[bool, Meta(description="Give it the agent's PATH")] = True


class File(Declared):
    """One key of a Config or Secret as a file (0600) in the instance's working folder."""

    path: Annotated[str, Meta(description="Relative to the working folder", min_length=1, max_length=512)]
    key: Annotated[str, Meta(description="The key in the Config or Secret", min_length=1)]
    config: Annotated[str, Meta(description="A Config of the namespace")] = ""
    secret: Annotated[str, Meta(description="A Secret of the namespace")] = ""


class Port(Declared):
    """A port the app listens on; without ``port`` each instance gets a free one, told by ``env``."""

    name: Annotated[
        str, Meta(description="A name for health checks and Services", pattern=r"^[a-z0-9][a-z0-9-]{0,31}$(?!\n)")
    ]
    env: Annotated[str, Meta(description="Environment variable that tells the app its port")] = ""
    port: Annotated[
        Annotated[int, Meta(ge=1, le=65535)] | None,
        Meta(description="A fixed port; updates then stop the old before the new"),
    ] = None


class HttpCheck(Declared):
    port: Annotated[str, Meta(description="Name of the port")]
    path: Annotated[str, Meta(description="Path to GET", pattern=r"^/[^\s]*$(?!\n)")] = "/"


class TcpCheck(Declared):
    port: Annotated[str, Meta(description="Name of the port")]


class ExecCheck(Declared):
    command: Annotated[
        list[str],
        Meta(
            description="Healthy when it ends with status 0; ${NAME} is replaced; runs as the app's user", min_length=1
        ),
    ]


class Health(Declared):
    """How it is known that an instance works. Exactly one of http, tcp, exec, or none: then living is healthy."""

    http: Annotated[HttpCheck | None, Meta(description="Healthy on status 200 to 399")] = None
    tcp: Annotated[TcpCheck | None, Meta(description="Healthy when a connection opens")] = None
    exec: Annotated[ExecCheck | None, Meta(description="Healthy when a command succeeds")] = None
    interval: Annotated[Duration, Meta(description="Between two checks")] = "5s"
    timeout: Annotated[Duration, Meta(description="Of one check")] = "3s"
    startup: Annotated[Duration, Meta(description="Longest time to the first success")] = "30s"
    window: Annotated[Duration, Meta(description="How long a new version must be healthy before it takes over")] = "1s"
    failureThreshold: Annotated[int, Meta(description="Failures in a row that restart it", ge=1, le=1000)] = 3


class Limits(Declared):
    """Enforced by cgroups where the node can; status says which."""

    memory: Annotated[Size | None, Meta(description="Bytes, e.g. 64Mi")] = None
    cpu: Annotated[Annotated[float, Meta(gt=0, le=1024)] | None, Meta(description="Processors, e.g. 0.5")] = None
    pids: Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="Processes and threads")] = None


class Restart(Declared):
    policy: Annotated[
        Literal["always", "on-failure", "never"],
        Meta(description="When to start it again; on-failure: not after status 0"),
    ] = "always"
    backoff: Annotated[Duration, Meta(description="First pause; doubles with each failure")] = "200ms"
    max: Annotated[Duration, Meta(description="Longest pause")] = "30s"


class Stop(Declared):
    signal: Annotated[Literal["TERM", "INT", "QUIT", "HUP", "USR1"], Meta(description="Asks it to end")] = "TERM"
    grace: Annotated[Duration, Meta(description="Then SIGKILL")] = "10s"
    drain: Annotated[Duration, Meta(description="Old instances live on this long after a switch")] = "200ms"


class Logs(Declared):
    bytes: Annotated[Size, Meta(description="Hard cap on disk for one instance's output; the oldest goes first")] = (
        "8Mi"
    )


#: Of an App, what is no part of a version: it starts nothing anew, and no Rollout holds it back.
AT_ONCE = ("replicas", "placement", "dependsOn", "schedule", "disconnect")


class AppSpec(Declared):
    """A program kept running at sites, with its settings, health and limits."""

    process: Annotated[Process | None, Meta(description="Runs a program of the node")] = None
    container: Annotated[Container | None, Meta(description="Runs a program in an image")] = None
    placement: Annotated[Placement, Meta(description="Where")] = msgspec.field(default_factory=Placement)
    replicas: Annotated[int, Meta(description="Instances per site, over its matching nodes", ge=0, le=1000)] = 1
    perSite: Annotated[
        dict[str, dict[str, Any]],
        Meta(
            description="What single sites have otherwise: site to a merge patch (RFC 7396) of this spec, e.g. "
            "replicas; all but placement",
            max_length=1000,
        ),
    ] = {}
    ports: Annotated[list[Port], Meta(description="What it listens on")] = []
    envFrom: Annotated[list[EnvFrom], Meta(description="Environment from Configs and Secrets")] = []
    files: Annotated[list[File], Meta(description="Files from Configs and Secrets")] = []
    health: Annotated[Health, Meta(description="How it is checked")] = msgspec.field(default_factory=Health)
    limits: Annotated[Limits, Meta(description="What it may use")] = msgspec.field(default_factory=Limits)
    restart: Annotated[Restart, Meta(description="When it ends by itself")] = msgspec.field(default_factory=Restart)
    stop: Annotated[Stop, Meta(description="How it is ended")] = msgspec.field(default_factory=Stop)
    logs: Annotated[Logs, Meta(description="What is kept of its output")] = msgspec.field(default_factory=Logs)
    disconnect: Annotated[Disconnect, Meta(description="When nodes of its site are lost")] = msgspec.field(
        default_factory=Disconnect
    )
    schedule: Annotated[
        Times | None, Meta(description="It runs at times and ends by itself; left out: it is kept running")
    ] = None
    dependsOn: Annotated[
        list[str],
        Meta(
            description="Apps of the namespace that must be healthy on the same node first; others are not waited for"
        ),
    ] = []


class ServiceSpec(Declared):
    """A name for the endpoints of an app within a site."""

    app: Annotated[str, Meta(description="The App behind it", min_length=1)]
    port: Annotated[str, Meta(description="Name of the App's port", min_length=1)]
    scope: Annotated[
        Literal["node", "site", "any"],
        Meta(description="How far a request may go; enforced by the node's kernel where it can, see status.enforced"),
    ] = "site"
    fallback: Annotated[
        Literal["fail", "nearest", "cloud"],
        Meta(
            description="Where Routes to it go when it has no healthy endpoint here, unless they say so themselves; "
            "cloud: the Route's own"
        ),
    ] = "fail"
    allowFrom: Annotated[
        list[str],
        Meta(
            description="Other sites whose gateways may ask for it, by its name, with their nodes' certificates; "
            "only the hub writes it",
            max_length=256,
        ),
    ] = []


def runtime_of(spec: AppSpec) -> str:
    """The name of the runtime (an extension ``runtime/NAME``) that the App asks for."""
    return "container" if spec.container is not None else "process"


def substitute(text: str, env: dict[str, str], path: str) -> str:
    """``${NAME}`` replaced from ``env``, ``$$`` by ``$``. Raises ``Invalid`` for an unknown name."""

    def one(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return "$"
        if name not in env:
            known = ", ".join(sorted(n for n in env if not n.startswith("EDGEWARD_SERVICE_"))[:12])
            raise Invalid(f"${{{name}}} is not known", field=path, remedy=f"known: {known}; write $$ for a plain $")
        return env[name]

    return _VARIABLE.sub(one, text)


def _durations(value: Any, path: str) -> None:
    for f in msgspec.structs.fields(value):
        got = getattr(value, f.name)
        if f.name in ("interval", "timeout", "startup", "window", "backoff", "max", "grace", "drain"):
            try:
                seconds = parse_duration(got)
            except ValueError as e:
                raise Invalid(str(e), field=f"{path}.{f.name}") from None
            if seconds <= 0 and f.name in ("interval", "timeout"):
                raise Invalid("must be more than 0", field=f"{path}.{f.name}", remedy="write e.g. 5s")


def _sizes(spec: AppSpec) -> None:
    for value, path in ((spec.limits.memory, "$.spec.limits.memory"), (spec.logs.bytes, "$.spec.logs.bytes")):
        if value is None:
            continue
        try:
            n = parse_bytes(value)
        except ValueError as e:
            raise Invalid(str(e), field=path) from None
        if n < 4096:
            raise Invalid(f"{n} bytes are too few", field=path, remedy="at least 4Ki")


def check_path(path: str, field: str) -> None:
    """Refuses what would leave the working folder."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path or "\\" in path or str(parts) in (".", ""):
        raise Invalid(
            f"{path[:80]!r} leaves the working folder", field=field, remedy="write a relative path without '..'"
        )


def _check_app(r: Resource) -> None:
    spec: AppSpec = r.spec
    program = spec.process or spec.container
    if program is None:
        raise Invalid(
            "no runtime is given",
            field="$.spec.process",
            remedy="add process: {command: [...]} or container: {image: ...}",
        )
    if spec.process is not None and spec.container is not None:
        raise Invalid("two runtimes are given", field="$.spec.container", remedy="keep process or container")
    names = [p.name for p in spec.ports]
    inside = spec.container.ports if spec.container is not None else {}
    for n, port in enumerate(spec.ports):
        if names.count(port.name) > 1:
            raise Invalid(
                f"the port {port.name!r} is given twice", field=f"$.spec.ports[{n}].name", remedy="rename one"
            )
        if port.env and not _ENV.fullmatch(port.env):
            raise Invalid(f"{port.env[:60]!r} is no variable name", field=f"$.spec.ports[{n}].env")
        if port.port is None and not port.env and port.name not in inside:
            raise Invalid(
                "a port without number needs env", field=f"$.spec.ports[{n}].env", remedy="name the variable, e.g. PORT"
            )
    checks = [c for c in ("http", "tcp", "exec") if getattr(spec.health, c) is not None]
    if len(checks) > 1:
        raise Invalid(f"more than one check is given: {', '.join(checks)}", field="$.spec.health", remedy="keep one")
    for check in ("http", "tcp"):
        named = getattr(spec.health, check)
        if named is not None and named.port not in names:
            raise Invalid(
                f"there is no port {named.port!r}",
                field=f"$.spec.health.{check}.port",
                remedy=f"ports: {', '.join(names) or 'none'}",
            )
    for n, f in enumerate(spec.files):
        if bool(f.config) == bool(f.secret):
            raise Invalid("name a config or a secret", field=f"$.spec.files[{n}]", remedy="exactly one of the two")
        check_path(f.path, f"$.spec.files[{n}].path")
    for n, e in enumerate(spec.envFrom):
        if bool(e.config) == bool(e.secret):
            raise Invalid("name a config or a secret", field=f"$.spec.envFrom[{n}]", remedy="exactly one of the two")
    if spec.schedule is not None:
        check_times(spec.schedule, spec.restart.policy)
    for part in ("health", "restart", "stop"):
        _durations(getattr(spec, part), f"$.spec.{part}")
    _sizes(spec)
    disconnect.check(spec)
    runtime = runtime_of(spec)
    if spec.container is not None:
        check_container(spec.container, names)
    for name in program.env:
        if not _ENV.fullmatch(name):
            raise Invalid(
                f"{name[:60]!r} is no variable name", field=f"$.spec.{runtime}.env", remedy="letters, digits, _"
            )
    if r.metadata.name in spec.dependsOn:
        raise Invalid("an app cannot wait for itself", field="$.spec.dependsOn", remedy="remove it")
    if not spec.envFrom:
        known = dict.fromkeys([*BUILT_IN, *program.env, *(p.env for p in spec.ports if p.env)], "x")
        known |= {p.env: "1" for p in spec.ports if p.env}
        texts = [(f"{runtime}.command", program.command), (f"{runtime}.args", program.args)]
        if spec.health.exec is not None:
            texts.append(("health.exec.command", spec.health.exec.command))
        for field, values in texts:
            for n, text in enumerate(values):
                if "EDGEWARD_SERVICE_" not in text:
                    substitute(text, known, f"$.spec.{field}[{n}]")


def _app_refs(r: Resource) -> list[Ref]:
    spec: AppSpec = r.spec
    ns = r.metadata.namespace
    refs = []
    if spec.placement.site:
        refs.append(Ref("Site", "_", spec.placement.site, "$.spec.placement.site"))
    for n, f in enumerate(spec.files):
        kind = "Config" if f.config else "Secret"
        refs.append(Ref(kind, ns, f.config or f.secret, f"$.spec.files[{n}].{kind.lower()}"))
    for n, e in enumerate(spec.envFrom):
        kind = "Config" if e.config else "Secret"
        refs.append(Ref(kind, ns, e.config or e.secret, f"$.spec.envFrom[{n}].{kind.lower()}"))
    return refs


def _app_usage(r: Resource) -> dict[str, float | None]:
    limits, replicas = r.spec.limits, r.spec.replicas
    return {
        "apps": 1,
        "cpu": None if limits.cpu is None else limits.cpu * replicas,
        "memory": None if limits.memory is None else parse_bytes(limits.memory) * replicas,
    }


def _service_refs(r: Resource) -> list[Ref]:
    app = Ref("App", r.metadata.namespace, r.spec.app, "$.spec.app")
    return [app, *(Ref("Site", "_", s, f"$.spec.allowFrom[{n}]") for n, s in enumerate(r.spec.allowFrom))]


def _service_at(r: Resource, _: str) -> Resource:
    """A site knows of no other one."""
    return msgspec.structs.replace(r, spec=msgspec.structs.replace(r.spec, allowFrom=[])) if r.spec.allowFrom else r


def _check_service(r: Resource) -> None:
    if r.spec.allowFrom and r.spec.scope != "site":
        raise Invalid(
            f"with scope {r.spec.scope} there is nobody to allow",
            field="$.spec.allowFrom",
            remedy="remove it, or write scope: site",
        )
    for n, site in enumerate(r.spec.allowFrom):
        check_name(site, f"$.spec.allowFrom[{n}]")


def _ready(d: dict[str, Any]) -> str:
    if elsewhere := d.get("status", {}).get("elsewhere"):  # a node's own API, of what other nodes of its site run
        return f"on {','.join(elsewhere)}"
    instances = d.get("status", {}).get("instances", [])
    return f"{sum(i.get('phase') == 'Running' for i in instances)}/{len(instances)}"


def _closed(d: dict[str, Any]) -> str:
    """Whether ``scope`` is more than a word; "" where nobody has said yet."""
    return {True: "enforced", False: "not enforced"}.get(d.get("status", {}).get("enforced"), "")


kinds.add(
    Kind(
        "App",
        "apps",
        AppSpec,
        reported=True,
        doc="A program kept running at sites.",
        scope="placed",
        newer={"disconnect": 2, "perSite": 2, "schedule": 2, "container": 2},
        at_once=AT_ONCE,
        check=checked(_check_app),
        refs=with_sites(_app_refs),
        usage=_app_usage,
        at=effective,
        sites=lambda r: r.spec.perSite,
        columns=(
            Column("PHASE", lambda d: d.get("status", {}).get("phase", "Pending")),
            Column("READY", _ready),
            Column("SITE", lambda d: d["spec"].get("placement", {}).get("site", "") or "all"),
            Column("VERSION", lambda d: d.get("status", {}).get("version", "")),
            Column(
                "NODES",
                lambda d: ",".join(sorted({i["node"] for i in d.get("status", {}).get("instances", [])})),
                wide=True,
            ),
            Column("MESSAGE", lambda d: d.get("status", {}).get("message", ""), wide=True),
        ),
        example=(
            "apiVersion: edgeward/v1\nkind: App\nmetadata: {name: web}\nspec:\n  placement: {site: plant}\n"
            '  process: {command: [python3, -m, http.server, "${PORT}", --bind, 127.0.0.1]}\n'
            "  ports: [{name: http, env: PORT}]\n  health: {http: {port: http, path: /}}\n"
        ),
    )
)
kinds.add(
    Kind(
        "Service",
        "services",
        ServiceSpec,
        reported=True,
        doc="A name for an app's endpoints within a site. Apps of the namespace find them in EDGEWARD_SERVICE_<NAME>, "
        "as they were when the app started.",
        scope="follows",
        short=("svc",),
        newer={"allowFrom": 2},
        # whom a site lets in concerns both
        hub_fields=("allowFrom",),
        check=_check_service,
        refs=_service_refs,
        at=_service_at,
        also=lambda r: r.spec.allowFrom,
        columns=(
            Column("APP", lambda d: d["spec"]["app"]),
            Column("SCOPE", lambda d: d["spec"].get("scope", "site")),
            Column("ENDPOINTS", lambda d: len(d.get("status", {}).get("endpoints", []))),
            Column("CLOSED", _closed),
        ),
        example="apiVersion: edgeward/v1\nkind: Service\nmetadata: {name: web}\nspec: {app: web, port: http}\n",
    )
)
