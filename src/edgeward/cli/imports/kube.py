"""Kubernetes manifests of the common subset become Apps, Services, Configs, Secrets and Namespaces. Pure.

In come all documents of one `apply`, since they refer to one another: a Service finds its App by the labels of the
pods, an environment variable its value by the name of a ConfigMap. Pods are in ``kube_pods.py``. A kind that has no
counterpart is left as a whole and told.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeward.cli.imports.kube_pods import Pod, pod_apps
from edgeward.cli.imports.taking import Doc, Fields, Taken, dump, name_of, plain
from edgeward.core.manifest import Manifest

#: Groups of Kubernetes whose documents are taken for such, whatever their version.
_GROUPS = ("apps", "batch", "networking.k8s.io", "autoscaling", "policy", "rbac.authorization.k8s.io", "extensions")
_WHY = {
    "Ingress": "write a Route for each of its paths, and a Listener for TLS",
    "HorizontalPodAutoscaler": "replicas are what is declared; Functions scale by themselves",
    "PersistentVolumeClaim": "a volume is named by the App and made by the node",
    "PersistentVolume": "a volume is named by the App and made by the node",
    "ServiceAccount": "an app has no token; Roles and AccessTokens say who may do what",
    "NetworkPolicy": "scope: site on a Service closes its traffic inside the site",
    "StatefulSet": "write an App with a named volume for each instance",
    "DaemonSet": "write an App whose replicas are the number of matching nodes",
    "Job": "write an App with restart: {policy: on-failure}",
    "Pod": "write a Deployment",
}
_META = ("creationTimestamp", "uid", "resourceVersion", "generation", "managedFields", "selfLink")


def is_kube(doc: Any) -> bool:
    """A Kubernetes document: by its group, or a core one (`v1`)."""
    if not isinstance(doc, dict) or not isinstance(doc.get("kind"), str):
        return False
    version = doc.get("apiVersion")
    return isinstance(version, str) and (version == "v1" or version.partition("/")[0] in _GROUPS)


@dataclass
class World:
    """What the documents say of one another."""

    taken: Taken
    #: (namespace, name) -> keys and texts
    configs: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    secrets: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    pods: list[Pod] = field(default_factory=list)
    #: Claims that are declared: their names become volumes.
    claims: set[tuple[str, str]] = field(default_factory=set)


def translate(manifests: Sequence[Manifest], namespace: str = "default") -> Taken:
    """``namespace``: of documents that name none. Raises ``Invalid`` for what Kubernetes would refuse as well."""
    taken = Taken()
    world = World(taken)
    documents = [_Document(one, taken, namespace) for m in manifests for one in _items(m)]
    for d in documents:
        if d.kind == "ConfigMap":
            world.configs[d.namespace, d.name] = _config(d)
        elif d.kind == "Secret":
            world.secrets[d.namespace, d.name] = _secret(d)
        elif d.kind == "PersistentVolumeClaim":
            world.claims.add((d.namespace, d.name))
    for d in documents:
        if d.kind == "Namespace":
            taken.resource(d.source, "$", "Namespace", {"name": d.name}, {})
        elif d.kind in ("Deployment", "CronJob"):
            pod_apps(d, world)
    for d in documents:
        if d.kind == "Service":
            _service(d, world)
        elif d.kind not in ("ConfigMap", "Secret", "Namespace", "Deployment", "CronJob"):
            d.fields.left("$.kind", f"a {d.kind} has no counterpart here", _WHY.get(d.kind) or "")
    return taken


def _items(manifest: Manifest) -> list[Manifest]:
    """The documents of a `List`, else the document itself."""
    doc = manifest.doc
    if doc.get("kind") != "List" or not isinstance(doc.get("items"), list):
        return [manifest]
    found = []
    for n, item in enumerate(doc["items"]):
        at = f"$.items[{n}]"
        lines = {"$" + k[len(at) :]: v for k, v in manifest.lines.items() if k.startswith(at)}
        found.append(Manifest(item, manifest.file, manifest.line_of(at), lines))
    return found


class _Document:
    """One document's envelope."""

    def __init__(self, source: Manifest, taken: Taken, namespace: str) -> None:
        self.source = source
        self.fields = Fields(source.doc, "$", source, taken)
        self.fields.ignore("apiVersion", "status")
        self.kind = self.fields.text("kind")
        self.meta = self.fields.inner("metadata")
        self.meta.ignore(*_META)
        self.name = name_of(self.meta.text("name"), self.meta, "name")
        self._named = self.meta.text("namespace")
        self.namespace = self._named or namespace
        self.labels = {k: plain(v) for k, v in self.meta.map("labels").items()}
        self.annotations = {
            k: plain(v)
            for k, v in self.meta.map("annotations").items()
            if k != "kubectl.kubernetes.io/last-applied-configuration"
        }

    def metadata(self, name: str = "", *, annotated: bool = True) -> Doc:
        return dump(
            {
                "name": name or self.name,
                "namespace": self._named,
                "labels": self.labels,
                "annotations": self.annotations if annotated else {},
            }
        )


def _config(d: _Document) -> dict[str, str]:
    data = {k: plain(v) for k, v in d.fields.map("data").items()}
    d.fields.leave("binaryData", "a Config holds text", "put it into an image, or into an archive")
    d.fields.leave("immutable", "an update makes a new version of the apps that use it")
    d.meta.rest()
    d.fields.rest()
    d.fields.taken.resource(d.source, "$", "Config", d.metadata(), {"data": data})
    return data


def _secret(d: _Document) -> dict[str, str]:
    data: dict[str, str] = {}
    for key, value in d.fields.map("data").items():
        try:
            data[key] = base64.b64decode(plain(value), validate=True).decode()
        except (binascii.Error, ValueError):
            d.fields.left(f"$.data.{key}", "is no base64 of UTF-8 text", "a Secret holds text")
    data |= {k: plain(v) for k, v in d.fields.map("stringData").items()}
    d.fields.ignore("type")
    d.fields.leave("immutable", "an update makes a new version of the apps that use it")
    d.meta.rest()
    d.fields.rest()
    d.fields.taken.resource(d.source, "$", "Secret", d.metadata(), {"data": data})
    return data


def _service(d: _Document, world: World) -> None:
    spec = d.fields.inner("spec")
    selector = {k: plain(v) for k, v in spec.map("selector").items()}
    kind = spec.text("type", "ClusterIP")
    ports = list(spec.each("ports"))
    spec.ignore("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "publishNotReadyAddresses")
    if kind in ("NodePort", "LoadBalancer"):
        spec.left("$.spec.type", f"{kind} opens nothing here", "a Route leads to it, a Listener opens a port")
    elif kind != "ClusterIP":
        spec.left("$.spec.type", f"{kind} has no counterpart here")
        return
    if spec.text("sessionAffinity", "None") != "None":
        spec.left(spec.at("sessionAffinity"), "requests go to any endpoint")
    spec.leave("internalTrafficPolicy", "scope says how far a request goes", "scope: node keeps it on the node")
    spec.rest()
    d.meta.rest()
    d.fields.rest()
    pod = next((p for p in world.pods if p.matches(d.namespace, selector)), None) if selector else None
    if pod is None:
        d.fields.left("$.spec.selector", "no Deployment among these documents has such pods", "apply them together")
        return
    for n, port in enumerate(ports):
        number, name = port.number("port"), port.text("name")
        target = port.take("targetPort")
        port.ignore("appProtocol")
        port.leave("nodePort", "no port is opened on every node", "a Listener opens one")
        protocol = port.text("protocol", "TCP")
        port.rest()
        if protocol != "TCP":
            port.left(port.path, f"{protocol} ports have no Service here")
            continue
        found = pod.port(target if target is not None else number)
        if found is None:
            port.left(port.path, f"the pods have no port {plain(target if target is not None else number)!r}")
            continue
        app, app_port = found
        made = d.name if n == 0 else name_of(f"{d.name}-{name or number}", port, "name")
        if n:
            port.left(port.path, f"a Service has one port: this one is Service {made!r}")
        world.taken.resource(d.source, "$", "Service", d.metadata(made), {"app": app, "port": app_port})
