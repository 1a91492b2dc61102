"""A pod's template becomes Apps: one for each of its containers, under the name of what declares it. Pure.

Kubernetes' pods share a network; here each container is an App of its own, which is said when there are several. Probes
become one check, environment variables out of single keys become a Config or a Secret of the App's own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeward.cli.imports.taking import Doc, Fields, dump, literal, name_of, plain

if TYPE_CHECKING:
    from edgeward.cli.imports.kube import World, _Document

_CPU = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m?)")
_VARIABLE = re.compile(r"\$(?:\$|\(([A-Za-z_][A-Za-z0-9_.-]*)\))")
_FIELD_REFS = {
    "metadata.name": "${EDGEWARD_INSTANCE}",
    "metadata.namespace": "${EDGEWARD_NAMESPACE}",
    "spec.nodeName": "${EDGEWARD_NODE}",
}
_POLICY = {"Always": "always", "OnFailure": "on-failure", "Never": "never"}


@dataclass
class Pod:
    """What Services look for: the labels of the pods, and where the ports of their containers are now."""

    namespace: str
    labels: Mapping[str, str]
    #: (port's name or number) -> (App, name of its port)
    ports: dict[str | int, tuple[str, str]] = field(default_factory=dict)

    def matches(self, namespace: str, selector: Mapping[str, str]) -> bool:
        return namespace == self.namespace and all(self.labels.get(k) == v for k, v in selector.items())

    def port(self, target: Any) -> tuple[str, str] | None:
        return self.ports.get(int(target) if isinstance(target, str) and target.isdecimal() else target)


def pod_apps(d: _Document, world: World) -> None:
    """The Apps of a Deployment or a CronJob."""
    spec = d.fields.inner("spec")
    common: Doc = {}
    if d.kind == "CronJob":
        common["schedule"] = _schedule(spec)
        job = spec.inner("jobTemplate")
        inner = job.inner("spec")
        template = inner.inner("template")
        inner.leave("backoffLimit", "a run that fails is over until the next time")
        inner.leave("activeDeadlineSeconds", "a run is not bounded in time")
        inner.leave("ttlSecondsAfterFinished", "nothing is left of a run but its output")
        job.ignore("metadata")
        inner.rest()
        job.rest()
    else:
        template = spec.inner("template")
        count = spec.number("replicas", 1)
        if count != 1:
            common["replicas"] = count
        spec.ignore("selector", "revisionHistoryLimit", "progressDeadlineSeconds", "minReadySeconds")
        strategy = spec.inner("strategy")
        strategy.ignore("rollingUpdate")
        if strategy.text("type", "RollingUpdate") != "RollingUpdate":
            strategy.left(strategy.at("type"), "an update starts the new beside the old", "a fixed port stops it first")
        if spec.flag("paused"):
            spec.left("$.spec.paused", "what is declared runs", "a Rollout can be paused")
    spec.rest()
    meta = template.inner("metadata")
    labels = {k: plain(v) for k, v in meta.map("labels").items()}
    meta.ignore("creationTimestamp", "name")
    meta.leave("annotations", "an App has its own")
    pod = Pod(d.namespace, labels)
    world.pods.append(pod)
    _Template(d, template.inner("spec"), common, pod, world).make()
    template.ignore("spec", "metadata")
    template.rest()
    d.meta.rest()
    d.fields.rest()


def _schedule(spec: Fields) -> Doc:
    made = {"cron": spec.text("schedule"), "zone": spec.text("timeZone")}
    overlap = spec.text("concurrencyPolicy", "Allow")
    if overlap == "Replace":
        spec.left(spec.at("concurrencyPolicy"), "a run that is due while one runs is left out")
    elif overlap == "Allow" and "concurrencyPolicy" in spec:
        spec.left(spec.at("concurrencyPolicy"), "two runs are never at once: what is due meanwhile is left out")
    if spec.flag("suspend"):
        spec.left(spec.at("suspend"), "it is not held back", "set replicas: 0")
    spec.ignore("successfulJobsHistoryLimit", "failedJobsHistoryLimit", "startingDeadlineSeconds")
    return dump(made)


class _Template:
    def __init__(self, d: _Document, f: Fields, common: Doc, pod: Pod, world: World) -> None:
        self.d, self.f, self.common, self.pod, self.world = d, f, common, pod, world

    def make(self) -> None:
        f = self.f
        containers = list(f.each("containers"))
        if not containers:
            raise f.wrong("containers", "is required")
        if len(containers) > 1:
            f.left(
                f.at("containers"), "each container is an App of its own: they do not share a network or a life",
                "reach the others by a Service",
            )  # fmt: skip
        volumes = {v.text("name"): v for v in f.each("volumes")}
        policy = f.text("restartPolicy", "Always" if self.d.kind == "Deployment" else "Never")
        grace = f.take("terminationGracePeriodSeconds")
        shared: Doc = {
            **self.common,
            "placement": dump({"nodeSelector": {k: plain(v) for k, v in f.map("nodeSelector").items()}}),
            "restart": {"policy": _POLICY[policy]} if policy in _POLICY and policy != "Always" else None,
            "stop": {"grace": f"{plain(grace)}s"} if grace is not None else None,
        }
        user = self._user(f.inner("securityContext"))
        network = "host" if f.flag("hostNetwork") else ""
        f.leave("initContainers", "nothing runs before an app", "do it in the image's entrypoint, or by dependsOn")
        for name, why in (
            ("affinity", "placement chooses by site and labels"),
            ("tolerations", "nodes have no taints"),
            ("topologySpreadConstraints", "replicas are spread over the nodes of a site"),
            ("serviceAccountName", "an app has no token"),
            ("serviceAccount", "an app has no token"),
            ("imagePullSecrets", "the node's or the hub's own login is used"),
            ("hostAliases", "names are the node's"),
            ("dnsConfig", "names are the node's"),
            ("priorityClassName", "apps have no priorities"),
        ):
            f.leave(name, why)
        f.ignore("dnsPolicy", "schedulerName", "enableServiceLinks", "automountServiceAccountToken")
        f.rest()
        for c in containers:
            self._container(c, len(containers) > 1, shared, volumes, user, network)
        for v in volumes.values():
            v.ignore("configMap", "secret", "emptyDir", "hostPath", "persistentVolumeClaim", "projected")
            v.rest(why="such a volume has no counterpart here")

    def _user(self, context: Fields) -> str:
        user, group = context.take("runAsUser"), context.take("runAsGroup")
        context.ignore("runAsNonRoot", "seccompProfile", "allowPrivilegeEscalation")
        for name in ("fsGroup", "supplementalGroups", "privileged", "capabilities", "readOnlyRootFilesystem"):
            context.leave(name, "a container has the engine's own defaults, without more")
        context.rest()
        if user is None:
            return ""
        return plain(user) + (f":{plain(group)}" if group is not None else "")

    def _container(
        self, c: Fields, several: bool, shared: Doc, volumes: Mapping[str, Fields], user: str, network: str
    ) -> None:
        part = c.text("name")
        app = name_of(f"{self.d.name}-{part}" if several else self.d.name, c, "name")
        ports, inside = self._ports(c, app, network == "host")
        env, env_from, known = self._env(c, app)
        files, mounts = self._mounts(c, volumes)
        own = self._user(c.inner("securityContext"))
        container = dump(
            {
                "image": c.text("image") or None,
                "command": [words(w, known) for w in c.texts("command")],
                "args": [words(w, known) for w in c.texts("args")],
                "env": env,
                "user": own or user,
                "workingDir": c.text("workingDir"),
                "volumes": mounts,
                "ports": {} if network == "host" else inside,
                "network": network,
                "pull": {"Always": "always", "Never": "never"}.get(c.text("imagePullPolicy"), ""),
            }
        )
        if "image" not in container:
            raise c.wrong("image", "is required")
        health = self._health(c, {**{p["name"]: p["name"] for p in ports}, **{v: k for k, v in inside.items()}})
        spec = {
            "container": container,
            **shared,
            "ports": ports,
            "envFrom": env_from,
            "files": files,
            "health": health,
            "limits": self._limits(c.inner("resources")),
        }
        c.leave("lifecycle", "nothing is called when it starts or stops", "handle SIGTERM")
        c.ignore("terminationMessagePath", "terminationMessagePolicy", "tty", "stdin")
        c.rest()
        self.world.taken.resource(self.d.source, c.path, "App", self.d.metadata(app), dump(spec))

    def _ports(self, c: Fields, app: str, host: bool) -> tuple[list[Doc], dict[str, int]]:
        ports: list[Doc] = []
        inside: dict[str, int] = {}
        for p in c.each("ports"):
            number, outside = p.number("containerPort"), p.number("hostPort")
            name = re.sub(r"[^a-z0-9-]+", "-", p.text("name").lower()).strip("-")[:32] or f"p{number}"
            protocol = p.text("protocol", "TCP")
            p.leave("hostIP", "the node says at which address")
            p.rest()
            if protocol != "TCP":
                p.left(p.path, f"{protocol} ports are not published")
                continue
            ports.append(dump({"name": name, "port": number if host else outside or None}))
            inside[name] = number
            self.pod.ports.setdefault(number, (app, name))
            self.pod.ports.setdefault(name, (app, name))
        return ports, inside

    # -- environment -------------------------------------------------------------------------------------------------

    def _env(self, c: Fields, app: str) -> tuple[dict[str, str], list[Doc], set[str]]:
        """Variables, where more of them come from, and the names that a command may use."""
        env: dict[str, str] = {}
        named = {plain(e.get("name")) for e in c.items("env") if isinstance(e, dict)}
        own: dict[str, dict[str, str]] = {"Config": {}, "Secret": {}}
        for e in c.each("env"):
            name, source = e.text("name"), e.inner("valueFrom")
            if "value" in e or "valueFrom" not in e:
                env[name] = words(e.text("value"), named)
            elif "fieldRef" in source:
                ref = source.inner("fieldRef")
                found = _FIELD_REFS.get(ref.text("fieldPath"))
                ref.ignore("apiVersion")
                if found is None:
                    ref.left(ref.at("fieldPath"), "an app cannot know it")
                else:
                    env[name] = found
            elif "configMapKeyRef" in source or "secretKeyRef" in source:
                kind = "Config" if "configMapKeyRef" in source else "Secret"
                ref = source.inner("configMapKeyRef" if kind == "Config" else "secretKeyRef")
                of, key = ref.text("name"), ref.text("key")
                known = (self.world.configs if kind == "Config" else self.world.secrets).get((self.d.namespace, of), {})
                ref.ignore("optional")
                if key in known:
                    own[kind][name] = known[key]
                else:
                    ref.left(
                        ref.path, f"key {key!r} of {of!r} is not among these documents",
                        "apply them together, or use envFrom",
                    )  # fmt: skip
            source.rest()
            e.rest()
        made: list[Doc] = []
        for e in c.each("envFrom"):
            e.leave("prefix", "names are the keys")
            for what, kind in (("configMapRef", "config"), ("secretRef", "secret")):
                if what in e:
                    ref = e.inner(what)
                    made.append({kind: name_of(ref.text("name"), ref, "name")})
                    ref.ignore("optional")
            e.rest()
        for kind, data in own.items():
            if data:
                name = name_of(f"{app}-env", c, "name")
                meta = {**self.d.metadata(name, annotated=False)}
                self.world.taken.resource(self.d.source, c.path, kind, meta, {"data": data})
                made.append({kind.lower(): name})
        return env, made, set(env) | set(own["Config"]) | set(own["Secret"])

    # -- volumes -----------------------------------------------------------------------------------------------------

    def _mounts(self, c: Fields, volumes: Mapping[str, Fields]) -> tuple[list[Doc], list[Doc]]:
        files: list[Doc] = []
        mounts: list[Doc] = []
        for m in c.each("volumeMounts"):
            volume = volumes.get(m.text("name"))
            path, sub, read_only = m.text("mountPath"), m.text("subPath"), m.flag("readOnly")
            m.leave("mountPropagation", "what is mounted later is not seen")
            m.rest()
            if volume is None:
                raise m.wrong("name", f"there is no volume {m.text('name')!r}")
            if "configMap" in volume or "secret" in volume:
                files += self._keys(volume, path, sub)
                continue
            if sub:
                m.left(m.at("subPath"), "a volume is given whole")
            made: Doc = {"path": path, "readOnly": read_only or None}
            if "emptyDir" in volume:
                volume.inner("emptyDir").rest(why="it is on the node's disk and not bounded")
                made["name"] = name_of(f"{self.d.name}-{volume.text('name')}", m, "name")
                m.left(m.path, "the volume outlives the app's instances, an emptyDir does not")
            elif "hostPath" in volume:
                host = volume.inner("hostPath")
                made["hostPath"] = host.text("path")
                host.ignore("type")
            elif "persistentVolumeClaim" in volume:
                claim = volume.inner("persistentVolumeClaim").text("claimName")
                made["name"] = name_of(claim, m, "name")
            else:
                continue
            mounts.append(dump(made))
        return files, mounts

    def _keys(self, volume: Fields, path: str, sub: str) -> list[Doc]:
        kind = "config" if "configMap" in volume else "secret"
        source = volume.inner("configMap" if kind == "config" else "secret")
        given = source.text("name") or source.text("secretName")
        name = name_of(given, source, "name")
        source.ignore("defaultMode", "optional")
        paths: dict[str, str] = {}
        for item in source.each("items"):
            paths[item.text("key")] = item.text("path")
            item.ignore("mode")
        known = (self.world.configs if kind == "config" else self.world.secrets).get((self.d.namespace, given))
        if not paths and known is None and not sub:
            source.left(source.path, f"the keys of {given!r} are not known here", "apply it together, or list items:")
            return []
        source.rest()
        wanted = paths or {k: k for k in (known or {sub: ""})}
        root = path.strip("/")
        if sub:
            return [{"path": root, kind: name, "key": k} for k, p in wanted.items() if p == sub]
        return [{"path": f"{root}/{p}".lstrip("/"), kind: name, "key": k} for k, p in wanted.items()]

    # -- checks and limits -------------------------------------------------------------------------------------------

    def _health(self, c: Fields, ports: Mapping[Any, str]) -> Doc:
        live, ready, start = (c.inner(f"{n}Probe") for n in ("liveness", "readiness", "startup"))
        probe = live if "livenessProbe" in c else ready if "readinessProbe" in c else start
        if probe is live and "readinessProbe" in c:
            c.left(
                c.at("readinessProbe"), "there is one check: the liveness probe is", "a failing app leaves its Service"
            )
        elif probe is ready and "readinessProbe" in c:
            c.left(c.at("readinessProbe"), "an app that goes on failing is also started again")
        made = self._check(probe, ports)
        if not made:
            return {}
        every, late = probe.number("periodSeconds", 10), probe.number("initialDelaySeconds")
        made |= {
            "interval": f"{every}s",
            "timeout": f"{probe.number('timeoutSeconds', 1)}s",
            "failureThreshold": probe.number("failureThreshold", 3),
        }
        first = start if "startupProbe" in c else probe
        patience = first.number("initialDelaySeconds", late) + first.number("periodSeconds", 10) * first.number(
            "failureThreshold", 3
        )
        if patience > 30:
            made["startup"] = f"{patience}s"
        return made

    def _check(self, probe: Fields, ports: Mapping[Any, str]) -> Doc:
        for how in ("httpGet", "tcpSocket", "exec"):
            if how not in probe:
                continue
            inner = probe.inner(how)
            if how == "exec":
                return {"exec": {"command": [literal(w) for w in inner.texts("command")]}}
            target = inner.take("port")
            port = ports.get(int(target) if isinstance(target, str) and target.isdecimal() else target)
            if port is None:
                inner.left(inner.at("port"), f"the container has no port {plain(target)!r}", "add it under ports:")
                return {}
            if how == "tcpSocket":
                return {"tcp": {"port": port}}
            if inner.text("scheme", "HTTP").upper() != "HTTP":
                inner.left(inner.at("scheme"), "checks are plain HTTP: it is a connection only")
                return {"tcp": {"port": port}}
            for name in ("httpHeaders", "host"):
                inner.leave(name, "a check is a GET of a path")
            return {"http": {"port": port, "path": inner.text("path", "/")}}
        if "grpc" in probe:
            probe.left(probe.at("grpc"), "there is no such check", "use exec or tcpSocket")
        return {}

    def _limits(self, f: Fields) -> Doc:
        f.leave("requests", "nothing is reserved")
        limits = f.inner("limits")
        cpu, memory = limits.text("cpu"), limits.text("memory")
        limits.rest()
        f.rest()
        found: Doc = {}
        if cpu:
            match = _CPU.fullmatch(cpu)
            if match is None:
                raise limits.wrong("cpu", f"{cpu[:40]!r} is no number of processors", "write 500m or 0.5")
            found["cpu"] = float(match[1]) / (1000 if match[2] else 1)
        if memory:
            found["memory"] = int(memory) if memory.isdecimal() else memory
        return found


def words(text: str, known: Collection[str] = ()) -> str:
    """``$(NAME)`` is Kubernetes' way of saying ``${NAME}``, ``$$`` its plain dollar; other names stay as they are."""
    out: list[str] = []
    at = 0
    for match in _VARIABLE.finditer(text):
        if match[1] is None:
            out += [literal(text[at : match.start()]), "$$"]
        elif match[1] in known:
            out += [literal(text[at : match.start()]), f"${{{match[1]}}}"]
        else:
            out.append(literal(text[at : match.end()]))
        at = match.end()
    return "".join(out) + literal(text[at:])
