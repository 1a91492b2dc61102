"""What this node should do, read from the replica: its apps, their settings, its exports, its services.

Pure reading; every answer follows from the replica alone, so it is the same with and without the link.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeward.agent.replica import Replica
from edgeward.agent.rolling import Rolling
from edgeward.core import clock
from edgeward.core.resource import CLUSTER, Key, Resource
from edgeward.core.scope import NodeView, matches
from edgeward.workloads.persite import effective, replicas_at
from edgeward.workloads.placement import share


class Desired:
    def __init__(self, replica: Replica, node: str, site: str, now: Callable[[], float] = clock.now) -> None:
        self._replica = replica
        self._rolling = Rolling(replica, node, now)
        self._node, self._site = node, site
        self._said: dict[Key, list[dict[str, Any]]] = {}
        #: The endpoints of a Service at other nodes; the hub's word, until there is a better one.
        self.others: Callable[[Resource], list[dict[str, Any]]] = lambda s: list(s.status.get("endpoints", []))
        #: What the site's verdicts say: whose share of an App moves, whether it stops here, who is dead.
        self.gone: Callable[[Resource], frozenset[str]] = lambda app: frozenset()
        self.stops: Callable[[Resource], bool] = lambda app: False
        self.dead: Callable[[str], bool] = lambda node: False
        #: Instances that served when the agent before us ended: they do until one of our own looks says otherwise.
        self._served = {
            str(i.get("id"))
            for app in replica.items("App")
            for i in app.status.get("instances", [])
            if i.get("phase") == "Running" and i.get("node", node) == node
        }

    def said(self, key: Key, status: dict[str, Any] | None) -> None:
        """What this node's own app is now. The replica keeps it too, but a moment later: an app that starts because
        another one is ready must find that one's endpoints."""
        self._said[key] = list((status or {}).get("instances", []))
        if status is None:
            del self._said[key]

    def deleted(self, key: Key) -> None:
        """The object is no more."""
        self._rolling.deleted(key)

    def nodes(self) -> list[Resource]:
        return [n for n in self._replica.items("Node") if n.spec.site == self._site]

    def apps(self) -> dict[tuple[str, str], tuple[Resource, int]]:
        """Every App with instances on this node: (namespace, name) to (App, number of instances here)."""
        nodes = self.nodes()
        found: dict[tuple[str, str], tuple[Resource, int]] = {}
        for declared in self._replica.items("App"):
            app = self._rolling.of(declared)
            count = 0 if app is None or app.metadata.deletionTimestamp else self._share(app, nodes)
            if app is not None and count:
                found[app.metadata.namespace, app.metadata.name] = (effective(app, self._site), count)
        return found

    def _share(self, app: Resource, nodes: list[Resource]) -> int:
        return 0 if self.stops(app) else share(app, nodes, self._node, self.gone(app))

    def elsewhere(self, key: Key) -> dict[str, Any]:
        """What this node can say of an App of which it runs nothing: which nodes of its site do, as far as it knows."""
        app = self._replica.find(key)
        if app is None or app.metadata.deletionTimestamp:
            return {}
        if not replicas_at(app, self._site):
            return {"phase": "Stopped"}
        nodes = self.nodes()
        if waits := self.waits(key):
            return waits
        found = sorted(n.metadata.name for n in nodes if share(app, nodes, n.metadata.name, self.gone(app)))
        if not found:
            return {"phase": "Pending", "message": f"no node of site {self._site} matches the placement"}
        return {"phase": "Elsewhere", "elsewhere": found, "message": f"runs on {', '.join(found)}, not on this node"}

    def waits(self, key: Key) -> dict[str, Any]:
        """The status of an App that this node is to run when its Rollout has come so far; {}: no such."""
        app = self._replica.find(key)
        if app is None or app.metadata.deletionTimestamp or not share(app, self.nodes(), self._node, self.gone(app)):
            return {}
        return self._rolling.waits(app)

    def config(self, namespace: str, name: str) -> dict[str, str] | None:
        found = self._replica.find(Key("Config", namespace, name))
        return dict(found.spec.data) if found else None

    def secret(self, namespace: str, name: str) -> dict[str, str] | None:
        found = self._replica.find(Key("Secret", namespace, name))
        return dict(found.spec.data) if found else None

    def exports(self) -> list[Resource]:
        labels = self._replica.find(Key("Node", CLUSTER, self._node))
        me = NodeView(self._node, self._site, (labels.metadata.labels if labels else {},))
        return [
            e
            for e in self._replica.items("Export")
            if not e.metadata.deletionTimestamp and matches(getattr(e.spec, "placement", None), me)
        ]

    def messages(self, namespace: str) -> float:
        """Readings a second that the namespace's quota lets its Exports take on this node; 0: as many as come."""
        found = self._replica.find(Key("Namespace", CLUSTER, namespace))
        quota = found.spec.quota if found is not None else None
        return float(quota.messages or 0) if quota is not None else 0.0

    def release(self) -> Resource | None:
        """The Release that is declared for this node: of several the first by name."""
        return next(iter(sorted(self._placed("Release"), key=lambda r: r.metadata.name)), None)

    def governed(self, declared: Resource) -> Resource | None:
        """The version of it that a Rollout has let this node on to; None: none yet."""
        return self._rolling.of(declared)

    def functions(self) -> list[Resource]:
        """The Functions that are to be called on this node."""
        return [f for one in self._functions() if (f := self._rolling.of(one)) is not None]

    def _functions(self) -> list[Resource]:
        """Those that are placed here, as they are declared."""
        me = self._replica.find(Key("Node", CLUSTER, self._node))
        # a node that its replica does not know yet is itself all the same
        labels = me.metadata.labels if me is not None else {}
        view = NodeView(self._node, self._site, (labels,))
        placed = [f for f in self._replica.items("Function") if matches(f.spec.placement, view)]
        return [f for f in placed if not f.metadata.deletionTimestamp]

    def waiting(self) -> dict[Key, dict[str, Any]]:
        """The status of each Function that is to be called here when its Rollout has come so far."""
        return {f.key: waits for f in self._functions() if (waits := self._rolling.waits(f))}

    def coming(self) -> list[Resource]:
        """The Functions that a Rollout will bring to this node."""
        return [c for f in self._functions() if (c := self._rolling.coming(f)) is not None]

    def coming_apps(self) -> dict[tuple[str, str], Resource]:
        """The Apps of which a Rollout will bring another version to this node."""
        nodes = self.nodes()
        # asked with each look at an App: whose share it is, is reckoned only of what a Rollout moves
        coming = [c for a in self._replica.items("App") if (c := self._rolling.coming(a)) is not None]
        mine = [c for c in coming if self._share(c, nodes)]
        return {(c.metadata.namespace, c.metadata.name): effective(c, self._site) for c in mine}

    def fetched(self, here: dict[Key, bool]) -> dict[Key, dict[str, Any]]:
        """What the hub is told of Rollouts: what of :meth:`coming` and :meth:`coming_apps` is here."""
        return self._rolling.told(here)

    def values(self, kind: str, namespace: str, name: str) -> tuple[dict[str, str], str] | None:
        """A Config's or Secret's data and revision."""
        found = self._replica.find(Key(kind, namespace, name))
        return (dict(found.spec.data), found.metadata.resourceVersion) if found else None

    def routes(self) -> list[Resource]:
        """The Routes that this node's gateway serves."""
        return self._placed("Route")

    def listeners(self) -> list[Resource]:
        """Where this node's gateway listens beside."""
        return self._placed("Listener")

    def _placed(self, kind: str) -> list[Resource]:
        labels = self._replica.find(Key("Node", CLUSTER, self._node))
        me = NodeView(self._node, self._site, (labels.metadata.labels if labels else {},))
        return [
            r
            for r in self._replica.items(kind)
            if not r.metadata.deletionTimestamp and matches(getattr(r.spec, "placement", None), me)
        ]

    def neighbours(self) -> list[dict[str, Any]]:
        """Sites that may be asked in place of this one, the nearest first: as the hub said last."""
        site = self._replica.find(Key("Site", CLUSTER, self._site))
        found = site.status.get("neighbours") if site is not None else None
        return [n for n in found if isinstance(n, dict)] if isinstance(found, list) else []

    def fallback(self, namespace: str, service: str) -> str:
        """Where a Service's requests go when nothing of it runs here."""
        found = self._replica.find(Key("Service", namespace, service))
        return str(found.spec.fallback) if found is not None else "fail"

    def guests(self, namespace: str, service: str) -> list[str] | None:
        """Nodes of other sites that may ask this one for a Service; None: it allows no site by name."""
        found = self._replica.find(Key("Service", namespace, service))
        if found is None or not found.spec.allowFrom:
            return None
        return sorted(n for n, site in (found.status.get("guests") or {}).items() if site != self._site)

    def doors(self, namespace: str, service: str) -> list[dict[str, str]] | None:
        """Where other sites let this one ask for a Service: ``{node, site, address}``; None: it allows none by name."""
        found = self._replica.find(Key("Service", namespace, service))
        if found is None or not found.spec.allowFrom:
            return None
        if self._site not in found.spec.allowFrom:
            return []
        doors = (found.status.get("doors") or {}).items()
        return [{"node": n, **d} for n, d in sorted(doors) if d.get("site") != self._site]

    def remote(self, namespace: str, service: str) -> bool:
        """Whether a Service is known here only because another site allows this one to ask for it."""
        found = self._replica.find(Key("Service", namespace, service))
        return found is not None and self._replica.find(Key("App", namespace, str(found.spec.app))) is None

    def lets_in(self, service: Resource) -> bool:
        """Whether this site answers other sites' gateways for it."""
        app = Key("App", service.metadata.namespace, str(service.spec.app))
        return bool(service.spec.allowFrom) and self._replica.find(app) is not None

    def endpoints(self, namespace: str, name: str) -> list[dict[str, Any]] | None:
        """The running endpoints of a Service at this site (of this node alone, where its scope says so).

        ``{address, port, here}``; None when there is no such Service.
        """
        service = self._replica.find(Key("Service", namespace, name))
        if service is None:
            return None
        found = [{"address": a, "port": p, "here": True} for a, p in self._here(service)]
        if service.spec.scope != "node":
            for e in self.others(service):
                if self._elsewhere(e) and e.get("address"):
                    found.append({"address": str(e["address"]), "port": int(e["port"]), "here": False})
        return found

    def _elsewhere(self, endpoint: dict[str, Any]) -> bool:
        """Whether it is one of another node of this site that is not dead."""
        node = str(endpoint.get("node"))
        return node != self._node and endpoint.get("site") == self._site and not self.dead(node)

    def ports(self, service: Resource) -> list[int]:
        """The ports of a Service's instances on this node, whether they serve yet or not."""
        key = Key("App", service.metadata.namespace, str(service.spec.app))
        app = self._replica.find(key)
        all_ = self._said.get(key, (app.status if app else {}).get("instances", []))
        mine = [i.get("ports", {}).get(service.spec.port) for i in all_ if i.get("node", self._node) == self._node]
        return sorted({int(p) for p in mine if p})

    def _here(self, service: Resource) -> list[tuple[str, int]]:
        key = Key("App", service.metadata.namespace, str(service.spec.app))
        app = self._replica.find(key)
        found: list[tuple[str, int]] = []
        for i in self._said.get(key, (app.status if app else {}).get("instances", [])):
            port = i.get("ports", {}).get(service.spec.port)
            serves = i.get("phase") == "Running" or (i.get("phase") == "Starting" and i.get("id") in self._served)
            # an App's status may be the hub's, which knows of other nodes' instances as well
            if port and serves and i.get("node", self._node) == self._node:
                found.append((str(i.get("address") or "127.0.0.1"), int(port)))
        return found

    def service_env(self, namespace: str) -> dict[str, str]:
        """``EDGEWARD_SERVICE_<NAME>``: the endpoints (``host:port``, comma-separated) known of each Service."""
        env: dict[str, str] = {}
        for service in self._replica.items("Service", namespace):
            endpoints: list[str] = []
            key = Key("App", namespace, str(service.spec.app))
            app = self._replica.find(key)
            for i in self._said.get(key, (app.status if app else {}).get("instances", [])):
                port = i.get("ports", {}).get(service.spec.port)
                if port and i.get("phase") == "Running":
                    endpoints.append(f"{i.get('address') or '127.0.0.1'}:{port}")
            for e in self.others(service):
                if self._elsewhere(e):
                    endpoints.append(f"{e.get('address')}:{e.get('port')}")
            name = service.metadata.name.upper().replace("-", "_")
            env[f"EDGEWARD_SERVICE_{name}"] = ",".join(dict.fromkeys(endpoints))
        return env
