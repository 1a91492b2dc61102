"""A Compose file becomes Apps, Services, Configs and Secrets. Pure but for the files it names, read by what is given.

In comes one document as the Compose specification has it, out go resources: each service is an App in a container, and
a Service where it offers ports, so that Routes and other sites find it. What is not taken over is listed with its
reason.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from edgeward.cli.imports.interpolate import interpolate
from edgeward.cli.imports.taking import Doc, Fields, Taken, dump, literal, name_of, plain, seconds
from edgeward.core.errors import Invalid
from edgeward.core.manifest import Manifest

#: Reads a file that is named from where the Compose file is; raises ``OSError``.
Reader = Callable[[str], str]

_RESTART = {"no": "never", "always": "always", "on-failure": "on-failure", "unless-stopped": "always"}
_SIGNALS = ("TERM", "INT", "QUIT", "HUP", "USR1")
_PORT = re.compile(
    r"(?:(?P<host>\[[^\]]+\]|[0-9]+(?:\.[0-9]+){3}):)?(?:(?P<out>[0-9-]*):)?(?P<to>[0-9-]+)(?:/(?P<protocol>\w+))?"
)
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kmgtKMGT]?)(?:i?[bB])?")
#: Say how an image is built or a project is told apart, nothing about what shall run.
_SILENT = ("container_name", "tty", "stdin_open", "attach", "annotations", "logging", "hostname")


def is_compose(doc: Any) -> bool:
    return isinstance(doc, dict) and isinstance(doc.get("services"), dict) and "kind" not in doc


def translate(manifest: Manifest, env: Mapping[str, str], read: Reader, profiles: tuple[str, ...] = ()) -> Taken:
    """``env``: what variables stand for. Raises ``Invalid`` for what no Compose program would take either."""
    taken = Taken()
    doc, unset = interpolate(manifest, env)
    top = Fields({k: v for k, v in doc.items() if not k.startswith("x-")}, "$", manifest, taken)
    if unset:
        top.left("$", f"not set, so empty: {', '.join(sorted(unset))}", "set them in the environment or in .env")
    project = top.text("name")
    top.ignore("version", "networks", "volumes")
    top.leave("include", "other files are not followed", "apply them as well: -f FILE")
    stores = _Stores(top, read)
    services = top.inner("services")
    names: dict[str, str] = {}
    for service in services._doc:
        made = name_of(service, services, service)
        if made in names.values():
            raise services.wrong(service, f"gives the name {made!r} a second time", "rename one of the two")
        names[service] = made
    for service in names:
        _Service(services.inner(service), names, service, project, stores, read, profiles).make()
    top.rest()
    return taken


class _Stores:
    """The top level's ``configs`` and ``secrets``: made into resources when a service uses them."""

    def __init__(self, top: Fields, read: Reader) -> None:
        self._read = read
        self._found = {"configs": top.inner("configs"), "secrets": top.inner("secrets")}
        self._made: dict[tuple[str, str], str] = {}
        self._top = top

    def use(self, what: str, name: str, user: Fields) -> str:
        """The resource behind ``configs.NAME`` or ``secrets.NAME``; it has one key: ``data``."""
        if (what, name) in self._made:
            return self._made[what, name]
        found = self._found[what]
        if name not in found:
            raise user.wrong(what, f"names {name!r}, which the file does not declare", f"add it under {what}:")
        entry = found.inner(name)
        resource = name_of(name, entry)
        if entry.flag("external"):
            entry.ignore("name")
            entry.left(entry.path, "it is kept elsewhere", f"make it: a {what[:-1].title()} {resource!r} with key data")
        else:
            kind = "Config" if what == "configs" else "Secret"
            content = entry.text("content")
            if file := entry.text("file"):
                content = _file(entry, "file", file, self._read)
            if variable := entry.text("environment"):
                entry.left(entry.at("environment"), f"the value of {variable} is not read", "use file: or content:")
            meta = {"name": resource}
            self._top.taken.resource(entry.source, entry.path, kind, meta, {"data": {"data": content}})
        entry.rest()
        self._made[what, name] = resource
        return resource


def _file(at: Fields, name: str, path: str, read: Reader) -> str:
    try:
        return read(path)
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or "is no UTF-8 text"
        raise at.wrong(name, f"{path}: {why}", "paths are from where the Compose file is") from None


class _Service:
    def __init__(
        self,
        fields: Fields,
        names: Mapping[str, str],
        service: str,
        project: str,
        stores: _Stores,
        read: Reader,
        profiles: tuple[str, ...],
    ) -> None:
        self.f, self.names, self.service, self.name = fields, names, service, names[service]
        self.project, self.stores, self.read, self.profiles = project, stores, read, profiles

    def make(self) -> None:
        f = self.f
        needed = f.texts("profiles")
        if needed and not set(needed) & set(self.profiles):
            f.left(f.at("profiles"), f"the service is only for {', '.join(needed)}", "remove profiles: to have it")
            return
        f.ignore(*_SILENT, *(n for n in f._doc if n.startswith("x-")))
        f.leave("extends", "other services are not followed", "write the fields out")
        if "image" not in f:
            raise f.wrong("image", "is required", "images are not built here: build and name it, or load its archive")
        f.leave("build", "images are not built here", "what runs is the image by its name")
        volumes, files = self._volumes()
        ports, inside = self._ports()
        network = self._network()
        if network == "host":  # what the program listens on is what it is
            ports, inside = [{"name": p["name"], "port": inside[p["name"]]} for p in ports], {}
        container: Doc = {
            "image": f.text("image"),
            "command": self._words("entrypoint"),
            "args": self._words("command"),
            "env": self._env(),
            "user": f.text("user"),
            "workingDir": f.text("working_dir"),
            "volumes": volumes,
            "ports": inside,
            "network": network,
            "pull": {"always": "always", "never": "never"}.get(f.text("pull_policy"), ""),
        }
        spec: Doc = {
            "container": dump(container),
            "replicas": self._replicas(ports),
            "ports": ports,
            "files": files,
            "health": self._health(),
            "limits": self._limits(),
            "restart": self._restart(),
            "stop": self._stop(),
            "dependsOn": self._depends(),
        }
        labels = {"project": self.project} if self.project else {}
        meta = dump({"name": self.name, "labels": labels, "annotations": self._annotations()})
        f.rest()
        if spec["replicas"] == 1:
            spec["replicas"] = None
        f.taken.resource(f.source, f.path, "App", meta, dump(spec))
        if ports:
            made = {"app": self.name, "port": ports[0]["name"]}
            f.taken.resource(f.source, f.path, "Service", dump({"name": self.name, "labels": labels}), made)

    # -- what runs ---------------------------------------------------------------------------------------------------

    def _words(self, name: str) -> list[str]:
        """A command as a list; a text is split as a shell would, and goes through none."""
        value = self.f.take(name)
        if value is None:
            return []
        if isinstance(value, list):
            return [literal(plain(v)) for v in value]
        try:
            return [literal(w) for w in shlex.split(plain(value))]
        except ValueError as e:
            raise self.f.wrong(name, f"cannot be split into words: {e}", "write it as a list") from None

    def _env(self) -> dict[str, str]:
        env: dict[str, str] = {}
        files = self.f.take("env_file")
        for n, entry in enumerate(files if isinstance(files, list) else [files] if files else []):
            where = Fields(entry, f"{self.f.at('env_file')}[{n}]", self.f.source, self.f.taken) if isinstance(
                entry, dict) else None  # fmt: skip
            path = where.text("path") if where else plain(entry)
            if where is not None:
                required = where.take("required") is not False
                where.rest()
                if not required:
                    try:
                        self.read(path)
                    except (OSError, UnicodeDecodeError):
                        continue
            env |= env_file(_file(self.f, "env_file", path, self.read))
        given = self.f.take("environment")
        pairs = given.items() if isinstance(given, dict) else [_pair(plain(e)) for e in given or []]
        for key, value in pairs:
            if value is None:
                self.f.left(
                    self.f.at("environment"), f"the value of {key} is your shell's", f"write it: {key}: ${{{key}}}"
                )
            else:
                env[str(key)] = plain(value)
        return {k: literal(v) for k, v in env.items()}

    def _volumes(self) -> tuple[list[Doc], list[Doc]]:
        """The volumes, and the files out of Configs and Secrets."""
        found: list[Doc] = []
        files: list[Doc] = []
        for n in range(len(self.f.items("volumes"))):
            volume = self._volume(n)
            if volume is not None:
                (files if "key" in volume else found).append(volume)
        for what, folder in (("configs", "/"), ("secrets", "/run/secrets/")):
            for n, entry in enumerate(self.f.items(what)):
                if isinstance(entry, dict):
                    use = Fields(entry, f"{self.f.at(what)}[{n}]", self.f.source, self.f.taken)
                    name = use.text("source")
                    target = use.text("target") or name
                    use.rest(why="owner and mode are what the runtime gives")
                else:
                    name = target = plain(entry)
                at = target if target.startswith("/") else f"{folder}{target}"
                resource = self.stores.use(what, name, self.f)
                files.append({"path": at.lstrip("/"), what[:-1]: resource, "key": "data"})
        return found, files

    def _volume(self, n: int) -> Doc | None:
        entry = self.f.items("volumes")[n]
        path = f"{self.f.at('volumes')}[{n}]"
        if isinstance(entry, dict):
            v = Fields(entry, path, self.f.source, self.f.taken)
            kind, source, target = v.text("type", "volume"), v.text("source"), v.text("target")
            read_only = v.flag("read_only")
            v.rest()
        else:
            parts = plain(entry).split(":")
            if len(parts) > 3 or not parts[-1]:
                raise self.f.wrong(
                    "volumes", f"{plain(entry)[:80]!r} is no volume", "write SOURCE:TARGET or NAME:TARGET"
                )
            source, target = (parts[0], parts[1]) if len(parts) > 1 else ("", parts[0])
            modes = parts[2].split(",") if len(parts) > 2 else []
            read_only = "ro" in modes
            kind = "bind" if source.startswith(("/", ".", "~")) else "volume"
            if odd := [m for m in modes if m not in ("ro", "rw", "z", "Z", "cached", "delegated", "consistent")]:
                self.f.left(path, f"the mode {', '.join(odd)} has no counterpart here")
        if not target.startswith("/"):
            raise self.f.wrong("volumes", f"{target[:80]!r} is no absolute path in the container")
        if kind == "bind":
            return self._bind(source, target, path, read_only)
        if kind != "volume":
            self.f.left(path, f"a volume of type {kind} has no counterpart here")
            return None
        if not source:
            source = f"{self.name}-{target.strip('/')}"
        name = name_of(source, self.f, "volumes")
        return dump({"name": name, "path": target, "readOnly": read_only or None})

    def _bind(self, source: str, target: str, path: str, read_only: bool) -> Doc | None:
        if source.startswith("/"):
            return dump({"hostPath": source, "path": target, "readOnly": read_only or None})
        # a path from where the Compose file is lies on the machine of who types, not on the node: its text travels
        try:
            text = self.read(source)
        except IsADirectoryError:
            self.f.left(
                path, f"the folder {source} is on this machine, not on the node",
                "put its files under configs:, or copy it to the nodes and give its absolute path",
            )  # fmt: skip
            return None
        except (OSError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or "is no text"
            self.f.left(path, f"{source}: {why}", "copy it to the nodes and give its absolute path there")
            return None
        name = name_of(f"{self.name}-{source.rsplit('/', 1)[-1]}", self.f, "volumes")
        meta = {"name": name}
        self.f.taken.resource(self.f.source, path, "Config", meta, {"data": {"data": text}})
        if not read_only:
            self.f.left(path, "the file is a copy that the container cannot change", "use a named volume for data")
        return {"path": target.lstrip("/"), "config": name, "key": "data"}

    def _network(self) -> str:
        mode = self.f.text("network_mode")
        if mode in ("", "bridge", "default"):
            found = self.f.take("networks")
            named = [n for n in (found or []) if n != "default"]
            if len(named) > 1:
                self.f.left(self.f.at("networks"), "all apps of a namespace share one network of the node")
            if isinstance(found, dict):
                for name in found:
                    if found[name]:
                        self.f.left(f"{self.f.at('networks')}.{name}", "addresses and aliases are what the node gives")
            return ""
        if mode in ("host", "none"):
            return mode if mode == "host" else self._no_network()
        self.f.left(self.f.at("network_mode"), f"{mode} has no counterpart here")
        return ""

    def _no_network(self) -> str:
        self.f.left(self.f.at("network_mode"), "a container without a network has no counterpart here")
        return ""

    # -- how it is reached, checked, ended ---------------------------------------------------------------------------

    def _ports(self) -> tuple[list[Doc], dict[str, int]]:
        """The App's ports, and which port in the container each leads to."""
        found: dict[int, Doc] = {}
        for n, entry in enumerate(self.f.items("ports")):
            path = f"{self.f.at('ports')}[{n}]"
            if isinstance(entry, dict):
                p = Fields(entry, path, self.f.source, self.f.taken)
                given = f"{p.text('published')}:{p.text('target')}/{p.text('protocol', 'tcp')}"
                host, name = p.text("host_ip"), p.text("name")
                p.ignore("mode", "app_protocol")
                p.rest()
            else:
                given, host, name = plain(entry), "", ""
            match = _PORT.fullmatch(given.lstrip(":"))
            if match is None:
                raise self.f.wrong("ports", f"{given[:80]!r} is no port", "write 8080:80")
            host = host or match["host"] or ""
            if host not in ("", "127.0.0.1", "[::1]", "::1"):
                self.f.left(path, f"the address {host} is the node's to say", "a Listener or a Service leads to it")
            protocol = (match["protocol"] or "tcp").lower()
            if protocol != "tcp":
                self.f.left(path, f"{protocol} ports are not published")
                continue
            inside, outside = _span(match["to"]), _span(match["out"] or "")
            if not inside or (outside and len(outside) != len(inside)):
                raise self.f.wrong("ports", f"{given[:80]!r} is no port", "both ranges have the same length")
            for i, port in enumerate(inside):
                label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:32] or f"p{port}"
                found[port] = dump({"name": label, "port": outside[i] if outside else None})
        for entry in self.f.texts("expose"):
            for port in _span(entry.partition("/")[0]):
                found.setdefault(port, {"name": f"p{port}"})
        return list(found.values()), {p["name"]: inside for inside, p in found.items()}

    def _health(self) -> Doc:
        check = self.f.inner("healthcheck")
        test = check.take("test")
        every, timeout, start = check.text("interval"), check.text("timeout"), check.text("start_period")
        retries = check.number("retries")
        off = check.flag("disable") or test in (["NONE"], "NONE")
        check.leave("start_interval", "the pace of checks is one")
        check.rest()
        if off or test is None:
            return {}
        if isinstance(test, str):
            command = ["sh", "-c", test]
        elif test[:1] == ["CMD"]:
            command = [plain(t) for t in test[1:]]
        elif test[:1] == ["CMD-SHELL"]:
            command = ["sh", "-c", *(plain(t) for t in test[1:])]
        else:
            raise check.wrong("test", "begins with none of CMD, CMD-SHELL, NONE", 'write ["CMD", "program", ...]')
        made = {
            "exec": {"command": [literal(c) for c in command]},
            "interval": seconds(every or "30s"),
            "timeout": seconds(timeout or "30s"),
            "failureThreshold": retries or 3,
        }
        if start:
            made["startup"] = seconds(start)
        return made

    def _limits(self) -> Doc:
        deploy = self.f.inner("deploy")
        limits = deploy.inner("resources").inner("limits")
        cpu = limits.text("cpus") or self.f.text("cpus")
        memory = limits.text("memory") or self.f.text("mem_limit")
        pids = limits.number("pids") or self.f.number("pids_limit")
        limits.rest()
        found: Doc = {}
        try:
            if cpu:
                found["cpu"] = float(cpu)
        except ValueError:
            raise self.f.wrong("cpus", f"{cpu[:40]!r} is no number") from None
        if memory:
            found["memory"] = _size(memory, self.f)
        if pids > 0:
            found["pids"] = pids
        return found

    def _replicas(self, ports: list[Doc]) -> int:
        deploy = self.f.inner("deploy")
        count = deploy.number("replicas", 1) if "replicas" in deploy else self.f.number("scale", 1)
        for name, why in (
            ("placement", "say where by placement: {site, nodeSelector}"),
            ("update_config", "an update starts the new beside the old; groups are a Rollout's"),
            ("rollback_config", "a version that fails is rolled back by itself"),
            ("restart_policy", "restart: says it"),
            ("mode", "replicas count per site"),
            ("endpoint_mode", "a Service of the site is one name with all endpoints"),
        ):
            deploy.leave(name, why)
        resources = deploy.inner("resources")
        resources.ignore("limits")
        resources.leave("reservations", "nothing is reserved")
        resources.rest()
        deploy.rest()
        if count > 1 and any("port" in p for p in ports):
            fixed = next(p for p in ports if "port" in p)
            self.f.left(
                self.f.at("ports"), f"{count} instances cannot all have port {fixed['port']} on one node",
                "leave the published port out, or have a node for each",
            )  # fmt: skip
        return count

    def _restart(self) -> Doc:
        given = self.f.text("restart") or "no"
        policy, _, most = given.partition(":")
        if policy not in _RESTART:
            raise self.f.wrong("restart", f"{given[:40]!r} is not known", f"one of {', '.join(_RESTART)}")
        if most:
            self.f.left(self.f.at("restart"), "how often it is tried again is not bounded", "pauses grow up to 30s")
        return {} if policy in ("always", "unless-stopped") else {"policy": _RESTART[policy]}

    def _stop(self) -> Doc:
        grace, signal = self.f.text("stop_grace_period"), self.f.text("stop_signal").removeprefix("SIG")
        if signal and signal not in _SIGNALS:
            self.f.left(self.f.at("stop_signal"), f"SIG{signal} is not among {', '.join(_SIGNALS)}")
            signal = ""
        return dump({"grace": seconds(grace) if grace else "", "signal": signal if signal != "TERM" else ""})

    def _depends(self) -> list[str]:
        given = self.f.take("depends_on") or []
        found: list[str] = []
        for other in given:
            if other not in self.names:
                raise self.f.wrong("depends_on", f"there is no service {plain(other)[:60]!r}")
            how = given[other] if isinstance(given, dict) else None
            condition = (how or {}).get("condition", "service_started")
            path = f"{self.f.at('depends_on')}.{other}"
            if condition == "service_completed_successfully":
                self.f.left(path, "an app that ends is not waited for")
                continue
            if isinstance(how, dict) and how.get("required") is False:
                self.f.left(path, "what is not required is waited for all the same, where it runs on the node")
            found.append(self.names[other])
        for other in self.f.items("links"):
            target = plain(other).partition(":")[0]
            if ":" in plain(other):
                self.f.left(self.f.at("links"), f"{target} is found by its own name only")
            if target in self.names and self.names[target] not in found:
                found.append(self.names[target])
        return found

    def _annotations(self) -> dict[str, str]:
        given = self.f.take("labels")
        pairs = given.items() if isinstance(given, dict) else [_pair(plain(e)) for e in given or []]
        return {str(k): plain(v) for k, v in pairs}


def _pair(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    return key, value if equals else None


def _span(text: str) -> list[int]:
    """``8000-8002`` as its ports; [] for none."""
    low, dash, high = text.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        return []
    first, last = int(low), int(high or low)
    return list(range(first, last + 1)) if 0 < first <= last < 65536 and last - first < 256 else []


def _size(text: str, at: Fields) -> str:
    """Compose's units are powers of 1024, with or without the i."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise at.wrong("mem_limit", f"{text[:40]!r} is no size", "write 64m or 1g")
    unit = found[2].upper()
    return f"{found[1]}{unit + 'i' if unit else ''}"


def env_file(text: str) -> dict[str, str]:
    """``KEY=value`` a line, comments and quotes as Compose's dotenv has them; nothing is replaced in it."""
    found: dict[str, str] = {}
    for one in text.splitlines():
        line = one.strip().removeprefix("export ")
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        value = value.strip()
        if value[:1] in ("'", '"') and value.rfind(value[0]) > 0:
            value = value[1 : value.rfind(value[0])]
        else:
            value = re.split(r"\s#", value, maxsplit=1)[0].rstrip()
        if equals and key.strip():
            found[key.strip()] = value
    return found


__all__ = ["Invalid", "env_file", "is_compose", "translate"]
