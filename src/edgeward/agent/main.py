"""The agent: the edge sides of the rooms in one process, beside the node's nats-server.

Start order is the order of need: the replica is read and apps are brought up at once, the nats-server, the API and the
link come beside them. Nothing waits for the hub. Everything that must survive a SIGKILL is on disk before it is
acknowledged: desired state and local changes in ``replica.db``, versions and instances in ``workloads.db``, readings in
the node's JetStream.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from edgeward import __version__
from edgeward.agent.broker import MQTT_USER, Broker
from edgeward.agent.changes import Changes
from edgeward.agent.closing import Closing
from edgeward.agent.desired import Desired
from edgeward.agent.doors import GatewayRoutes
from edgeward.agent.holding import Holding
from edgeward.agent.installing import look
from edgeward.agent.keeper import Keeper
from edgeward.agent.kinds import load
from edgeward.agent.listen import Listener, address_of, needs_token
from edgeward.agent.metrics import HELP, numbers
from edgeward.agent.replica import Replica
from edgeward.agent.reports import Reports, about_node
from edgeward.agent.routes import AgentRoutes
from edgeward.agent.sections import PlaneSections
from edgeward.agent.sitewide import Sitewide
from edgeward.agent.standing import Standing
from edgeward.agent.timekeeping import Timekeeper
from edgeward.agent.tunnel import tunnel_of
from edgeward.agent.updating import Updating
from edgeward.core import clock, daemon
from edgeward.core.api import build_app
from edgeward.core.audit import Audit
from edgeward.core.authz import Principal, administrator
from edgeward.core.blobfetch import BlobFetch
from edgeward.core.bus import Bus
from edgeward.core.chain import Head
from edgeward.core.errors import EdgewardError, Unreachable
from edgeward.core.files import read_json
from edgeward.core.gate import Auth, Gate
from edgeward.core.identity import NodeIdentity, inbox_prefix
from edgeward.core.natsserver import AGENT_USER, NatsServer
from edgeward.core.outbox import Outbox
from edgeward.core.records import SqliteRecords
from edgeward.core.resource import CLUSTER, Key, Resource
from edgeward.core.resources import Resources
from edgeward.core.scope import check_local
from edgeward.core.store import Change
from edgeward.core.tokens import AccessTokens
from edgeward.core.vault import Vault
from edgeward.functions.beside import Beside
from edgeward.functions.keeping import EdgeHistory
from edgeward.functions.stats import HELP as FUNCTION_HELP
from edgeward.functions.stock import Stock
from edgeward.gateway.orders import Orders
from edgeward.nodes.calls import CallServer
from edgeward.nodes.door import Door
from edgeward.nodes.edge import NodeEdge
from edgeward.nodes.enrol_edge import Renewer, doors_of
from edgeward.nodes.mesh import Mesh
from edgeward.nodes.mesh_sockets import settings_of
from edgeward.nodes.mesh_wire import Known, known_of
from edgeward.nodes.older import check_level
from edgeward.nodes.sharing import Sharing
from edgeward.nodes.siblings_edge import Siblings
from edgeward.nodes.siblings_status import Statuses
from edgeward.nodes.wan import LinkWatch, redial
from edgeward.streams.edge import ExportsEdge
from edgeward.streams.turnstile import Turnstile
from edgeward.tunnel.proxy import Proxy, ticket_key
from edgeward.workloads.edge import AppsEdge

log = logging.getLogger("edgeward.agent")

#: Seconds that a node that starts waits for its data plane before it calls itself ready.
_PLANE_TIME = 20.0


class Agent:
    """One node's agent; :meth:`run` until the stop event."""

    def __init__(self, data: Path) -> None:
        self.data = data
        config = read_json(data / "node.json")
        self.node, self.site = str(config["node"]), str(config["site"])
        self.hub = config.get("hub") or {}
        self.bind = str(config.get("bind", "127.0.0.1"))
        self.address = str(config.get("address", daemon.local(self.bind)))
        self.stop_apps = config.get("onStop", "leave") == "stop"
        self.run_file = daemon.RunFile(data / "run.json")
        self.api_socket = daemon.socket_path(data, "api.sock")
        clock.keep_steady(data / "clock.json")
        self.identity = NodeIdentity.open(data / "identity")
        if self.identity.enrolled:
            self.identity.trust()
        self.renewer = Renewer(self.identity, self.node, self._doors, self._renewed, self._kept_out)
        self.vault = Vault.open(data / "identity")
        self.replica = Replica(data / "replica.db", site=self.site, vault=self.vault, node=self.node)
        self.replica.hub_time = self._now
        self.broker = Broker(
            self.node, bind=self.bind, hub=self.hub, identity=self.identity, doors=self._doors, replica=self.replica
        )
        self.records = SqliteRecords(data / "records.db")
        self.audit = Audit(data / "audit.db")
        self.resources = Resources(self.replica, self.audit, self._may_write, site=self.site)
        self.link = NodeEdge(self.node, self.replica, self.records, self._flipped)
        self.link.on_strange = self._report_node
        self.desired = Desired(self.replica, self.node, self.site, self._now)
        self.reports = Reports(
            self.node,
            replica=self.replica,
            records=self.records,
            desired=self.desired,
            link=self.link,
            moved=self._places_moved,
            spawn=self._spawn,
            happened=self._happened,
        )
        self.mesh = Mesh(
            self.node,
            self.site,
            self.identity,
            data / "mesh.json",
            settings_of(config.get("mesh"), self.bind, self.address),
            self._neighbours,
            event=self.reports.event,
            changed=lambda: self._report_node() if self._ready else None,
        )
        self.sharing = self.link.site = Sharing(
            self.node,
            self.site,
            mesh=self.mesh,
            link=self.link,
            replica=self.replica,
            trusted=self.identity.trusted,
            ask=self._from_hub,
            folder=data / "share",
        )
        self.siblings = Siblings(
            self.node, self.site, replica=self.replica, records=self.records, link=self.link, mesh=self.mesh
        )
        self.siblings.statuses = statuses = Statuses(
            self.mesh,
            self.mesh.epoch,
            self.link.statuses,
            lambda node, keys: self.sitewide.changed(node, keys),  # noqa: PLW0108 - it is made later
        )
        self.sitewide = Sitewide(
            self.node,
            self.site,
            replica=self.replica,
            desired=self.desired,
            statuses=statuses,
            own=self.link.statuses,
            show=self.reports.keep,
            moved=self._poke_plane,
        )
        self.holding = Holding(
            self.node, self.site, self.replica, self.audit, changed=self._hold_changed, event=self.reports.event
        )
        self.siblings.holding, self.link.held_back = self.holding, self.holding.held_back
        self.link.on_report = self._reported
        self.desired.others, self.reports.sitewide = self.sitewide.endpoints, self.sitewide.status
        self.standing = Standing(
            self.node,
            self.site,
            data,
            mesh=self.mesh,
            replica=self.replica,
            link=self.link,
            ask_hub=self._ask_hub,
            event=self.reports.event,
            moved=self._died,
            poke=lambda namespace, name: self.apps.poke(namespace, name),  # noqa: PLW0108 - the apps are made later
            alive=lambda namespace, name: self.apps.alive(namespace, name),  # noqa: PLW0108 - the same
        )
        self.desired.gone, self.desired.stops = self.standing.gone, self.standing.stops
        self.desired.dead = self.standing.dead
        #: The mesh is to look at the site's nodes anew.
        self._looks = False
        self.replica.listen(self._after)
        self.blobs = BlobFetch(data / "blobs", self._ask_hub)
        self.apps = AppsEdge(
            node=self.node,
            site=self.site,
            data_dir=data,
            source=self.desired,
            report=self.reports.app_status,
            event=self.reports.event,
            address=self.address,
            vault=self.vault,
            settings=dict(config.get("containers") or {}),
            blobs=self.blobs,
            coming=self.desired.coming_apps,
            fetched=self._poke_plane,
        )
        self.tokens = AccessTokens(self.replica, site=self.site, now=self._now)
        listen = address_of(config.get("api"))
        self.listener = Listener(self.identity, listen, self._say) if listen else None
        self.history = EdgeHistory(data / "functions" / "versions")
        self.stock = Stock(
            data,
            self._ask_hub,
            self._poke_plane,
            kept=self.history.specs,
            blobs=self.blobs,
        )
        self.orders = Orders(
            data / "acme",
            self.vault,
            publish=self._publish,
            changed=self._poke_plane,
            event=self.reports.event,
        )
        self.sections = PlaneSections(
            self.node,
            self.site,
            bind=self.bind,
            address=self.address,
            given=dict(config.get("gateway") or {}),
            identity=self.identity,
            orders=self.orders,
            desired=self.desired,
            replica=self.replica,
            vault=self.vault,
            stock=self.stock,
            history=self.history,
            beside=Beside(
                self.history,
                self._ask_hub,
                self._spawn,
                self._poke_plane,
            ),
            broker=self.broker.reach,
            report=self.link.report,
            status=self.reports.status,
        )
        self.sections.images = lambda: self.apps.ahead.fetched
        self.plane = Keeper(
            data,
            sections=self.sections.all,
            status=lambda kind, ns, name, status: self.reports.status(Key(kind, ns, name), status),
            event=self.reports.event,
            refused=self.sections.refused,
            say=self._say,
        )
        self.doors = GatewayRoutes(self.plane)
        self.routes = AgentRoutes(
            self.node,
            self.site,
            data,
            replica=self.replica,
            records=self.records,
            apps=self.apps,
            plane=self.plane,
            doors=self.doors,
            link_use=self._link_use,
            hurry=self.renewer.hurry,
            history=self.history,
        )
        self.closing = Closing(
            self.node, self.site, self.address, data,
            replica=self.replica, desired=self.desired, event=self.reports.event,
            door=self.sections.door,
            status=self.link.report,  # to the hub alone: here the rest of a Service's status is the hub's
        )  # fmt: skip
        self.changes = Changes(
            self.replica, desired=self.desired, apps=self.apps, plane=self.plane, link=self.link, closing=self.closing,
            exports=self._apply_exports, release=lambda: self.updating.poke(),  # noqa: PLW0108 - it is made later
        )  # fmt: skip
        self.updating = Updating(
            data, self.desired, self.blobs,
            report=self.reports.status, event=self.reports.event,
            online=lambda: self.link.online, end=self._end,
        )  # fmt: skip
        self._stop: asyncio.Event | None = None
        #: Another release of the agent follows this one, and adopts all that runs.
        self._updates = False
        self.tunnel, self.own_tunnels = tunnel_of(
            self.node, self.identity, self._doors, config.get("tunnel"),
            data=data, store=self.replica, audit=self.audit, places=self.apps.inside,
        )  # fmt: skip
        self.proxy = Proxy(self.own_tunnels, self.replica, self.audit, ticket_key(os.urandom(32)))
        self._ready = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self.bus: Bus | None = None
        self.outbox: Outbox | None = None
        self.wan: LinkWatch | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> int:
        self._stop = stop
        self.app = app = self._api(self._who)
        self.api_socket.unlink(missing_ok=True)
        old_umask = os.umask(0o177)  # the socket is for the owner only; uvicorn would make it for everybody
        try:
            server = daemon.http_server(app, uds=str(self.api_socket))
            async with server:
                self.api_socket.chmod(0o600)
                os.umask(old_umask)
                works = [
                    self.mesh.run,
                    self.sharing.run,
                    self.standing.run,
                    self.siblings.run,
                    self.sitewide.run,
                    self.apps.run,
                    self.plane.run,
                    self.changes.run,
                ]
                works += [self._messages, self._token_uses, self._anchor, self.stock.run, self.orders.run]
                works += [self.closing.run, self.own_tunnels.run, self.proxy.run, self.updating.run]
                if (listener := self.listener) is not None:
                    open_api = self._api(self._bearer)
                    works.append(lambda: listener.run(open_api))
                await daemon.until(stop, *works)
        finally:
            os.umask(old_umask)
            self._ready = False
            ends = self.stop_apps and not self._updates
            await self.apps.shutdown(leave=not ends)
            await self.link.flush()
            if self.bus is not None:
                await self.bus.close()
            if ends:
                await self.plane.stop()
                await self.closing.stop()
                if self.broker.server is not None:
                    await self.broker.server.stop()
            self.run_file.remove()
            self.api_socket.unlink(missing_ok=True)
        return 0

    def _end(self) -> None:
        """Another release of the agent is to go on."""
        self._updates = True
        if self._stop is not None:
            self._stop.set()

    def _api(self, auth: Auth) -> Gate:
        app = build_app(
            self.resources,
            self.replica,
            auth=auth,
            extra_routes=[
                *self.routes.routes(),
                *self.holding.routes(),
                *self.own_tunnels.routes(),
                *self.proxy.routes(),
            ],
            health=self._health,
            metrics=self._metrics,
            info={"role": "agent", "version": __version__, "node": self.node, "site": self.site},
            audit_head=self._audit_head,
        )
        app.ticket = self.proxy.ticket
        return app

    async def _messages(self) -> None:
        """nats-server, and everything that speaks through it."""
        spec = self.broker.spec()
        self.broker.server = nats = NatsServer(self.data / "nats", spec, on_restart=self._moved)
        await nats.start()
        self.plane.poke()  # the broker may be elsewhere than it was
        self.bus = bus = await Bus.connect(
            nats.url,
            name=f"agent-{self.node}",
            username=AGENT_USER,
            password=nats.secret,
            inbox=inbox_prefix(self.node),
        )
        self.outbox = Outbox(bus, node=self.node)
        exports = ExportsEdge(
            bus,
            self.outbox,
            data=self.data / "exports",
            mqtt=(daemon.local(self.bind), nats.ports["mqtt"], MQTT_USER, self.broker.password()),
            report=self.reports.export_status,
            quota=self.desired.messages,
            turnstile=Turnstile(bus, self._close_topics, self.broker.closed_topics()),
            event=self.reports.event,
        )
        self._exports = exports
        more = {"tunnel": self.tunnel.called, "verdict": self.standing.called}
        calls = CallServer(self.node, {**self.routes.calls(), **more})
        if self.replica.hub_revision:  # an empty replica knows nothing: what waits in the queues stays
            await exports.prune(self.desired.exports())
        await exports.apply(self.desired.exports())
        with contextlib.suppress(TimeoutError):  # one that does not start is told as such; the rest of the node works
            async with asyncio.timeout(_PLANE_TIME):
                await self.plane.started.wait()
        self._ready = True
        self._show_hold()
        self._say()
        self._report_node()
        log.info("agent %s of node %s ready", __version__, self.node)
        async with asyncio.TaskGroup() as group:
            if spec.hub_url:
                again = lambda: redial(nats.url, nats.secret)  # noqa: E731
                # through a proxy the connection that the kernel knows is the one to the proxy
                urls = [spec.proxy] if spec.proxy else [spec.hub_url, *spec.more_urls]
                ports = [urlsplit(u).port or (80 if spec.proxy else 443) for u in urls]
                self.wan = LinkWatch(self.link, ports, lambda: nats.pid, again)
                group.create_task(self.wan.run())
                issued = lambda: self.identity.lease[0] if self.identity.enrolled else 0.0  # noqa: E731
                keeper = Timekeeper(self.link.hub_clock, issued, self.reports.event, self._report_node, again)
                group.create_task(keeper.run())
            group.create_task(nats.run())
            group.create_task(self.outbox.run())
            group.create_task(exports.run())
            group.create_task(self.link.run(bus))
            group.create_task(calls.run(bus.client))
            group.create_task(self.tunnel.run())
            if spec.hub_url:
                group.create_task(self.renewer.run())

    async def _apply_exports(self) -> None:
        if self.outbox is not None and self._ready:
            await self._exports.apply(self.desired.exports())

    async def _ask_hub(self, verb: str, data: bytes, timeout: float) -> bytes:
        return await self.sharing.ask(verb, data, timeout)

    async def _from_hub(self, verb: str, data: bytes, timeout: float) -> bytes:
        if self.bus is None or not self.link.online:
            raise Unreachable("the hub is not reached", remedy="it is tried again when the link is up")
        answer = await self.bus.request(f"ew.hub.{verb}.{self.node}", data, timeout=timeout)
        return answer.data

    async def _close_topics(self, subjects: tuple[str, ...]) -> None:
        await self.broker.close_topics(subjects)
        self.plane.poke()  # what functions publish there is refused as well

    def _moved(self) -> None:
        """The nats-server was started again."""
        self._say()
        self.plane.poke()

    def _died(self) -> None:
        """A node of the site is dead, or back: what ran there does not count, or counts again."""
        self.plane.poke()
        for app in self.replica.items("App"):
            self.sitewide.shown(app.key)
            self.sitewide.services(app.key)

    def _happened(self, record: dict[str, Any], about: Key | None) -> None:
        """An event is also said on the node's bus: functions may be called by it."""
        if self.bus is not None and self.bus.connected:
            self._spawn(self._tell_bus(self.bus, record, about))

    async def _tell_bus(self, bus: Bus, record: dict[str, Any], about: Key | None) -> None:
        kind = about.kind if about is not None else "Node"
        headers = {"Ew-About": f"{kind}/{about.namespace}/{about.name}"} if about is not None else None
        subject = f"ew.event.{record['type']}.{kind}.{record['reason']}"
        with contextlib.suppress(EdgewardError):  # a node whose broker is away calls nothing by events
            await bus.publish(subject, msgspec.json.encode(record), headers=headers)

    def _link_use(self) -> tuple[int | None, dict[str, Any]]:
        nats = self.broker.server
        return nats.pid if nats else None, self.wan.usage() if self.wan else {}

    # -- identity ------------------------------------------------------------------------------------------------

    def _doors(self) -> list[Door]:
        return doors_of(self.identity, self.hub)

    async def _renewed(self, changed: bool) -> None:
        self.reports.event("Normal", "CredentialsRenewed", "the hub renewed this node's credentials")
        if self.listener is not None:
            self.listener.renewed()
        self.mesh.renewed()
        self.plane.poke()  # Listeners may show the node's own certificate
        if await self.broker.dial_again(changed):
            self._say()

    def _kept_out(self, error: EdgewardError) -> None:
        log.warning("the hub refuses this node: %s", error)
        if not self.link.online and not self.broker.hung_up:
            self.broker.hung_up = True
            self._spawn(self.broker.hang_up())
        self.reports.event("Warning", "RefusedByHub", str(error))

    async def _anchor(self) -> None:
        """The audit's head is kept in the replica's file, and goes to the hub with what the node reports of itself."""

        async def keep(head: Head) -> None:
            self.replica.set_meta("audit_head", msgspec.json.encode(head).decode())
            if self._ready:
                self._report_node()

        await self.audit.run(keep)

    def _audit_head(self) -> Head | None:
        text = self.replica.meta("audit_head")
        return msgspec.json.decode(text, type=Head) if text else None

    async def _token_uses(self) -> None:
        async def used(key: Key, status: dict[str, Any]) -> None:
            await self.replica.put_status(key, status)
            self.link.report(key, {"lastUsed": status["lastUsed"]})

        await self.tokens.run(used)

    def _say(self) -> None:
        nats = self.broker.server
        self.run_file.write(
            ready=self._ready,
            online=self.link.online,
            nats=nats.pid if nats else None,
            api=str(self.api_socket),
            api_url=(self.listener.url or None) if self.listener is not None else None,
            plane=self.plane.pid,
            gateway_url=self.sections.gateway_url(self.plane.pid is not None and self.plane.started.is_set()),
            mqtt_url=f"mqtt://{self.address}:{nats.ports['mqtt']}" if nats else None,
            mqtt_user=MQTT_USER,
            mqtt_password=self.broker.password(),
        )

    async def _publish(self, proofs: dict[str, str]) -> None:
        """What ACME authorities shall find at this node's gateway."""
        await self.plane.one("gateway.challenge", proofs=proofs)

    # -- what the rooms say ----------------------------------------------------------------------------------------

    def _may_write(self, new: Resource | None, old: Resource | None) -> None:
        """Raises what the hub would refuse, and what a hub of an earlier release could not read."""
        check_local(new, old, self.site)
        here = new or old
        if here is not None and self.replica.hub_level is not None:
            check_level(new, here.key, self.replica.hub_level)

    def _places_moved(self) -> None:
        """Where Services are may be new."""
        self.plane.poke()
        self.closing.poke()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _flipped(self, online: bool) -> None:
        self.renewer.flipped(online)
        self.standing.link_changed()
        if online and self.outbox is not None:
            self.outbox.kick()
        if self._ready:
            self._say()
        if online:
            self.updating.poke()
            self.stock.hurry()
            self.apps.hurry()
        self.reports.event(
            "Normal" if online else "Warning",
            "LinkUp" if online else "LinkDown",
            "the hub answers" if online else "the hub does not answer; the site goes on by itself",
        )

    def _report_node(self) -> None:
        self.link.report_node(
            about_node(
                self.address,
                self.apps,
                self.vault,
                self.link,
                self.replica,
                self._audit_head(),
                self.mesh.status(),
                self.holding.status(),
            )
            | self.updating.about()
        )

    def _neighbours(self) -> list[Known]:
        """The nodes of this site, by the hub's word alone: what is written here makes nobody one of them."""
        said = [(n.metadata.name, s) for n, s in self.replica.from_hub("Node") if n.spec.site == self.site]
        return [known for node, status in said if (known := known_of(node, status)) is not None]

    def _hold_changed(self) -> None:
        """Somebody said that the site holds, or does not any more; or more of the hub's changes wait."""
        self.siblings.changed()
        self._show_hold()
        if not self.holding.hold.held:
            self.link.resume()
        if self._ready:
            self._report_node()

    def _show_hold(self) -> None:
        said = self.holding.status()
        self.replica.put_beside(Key("Site", CLUSTER, self.site), {"hold": said} if said else {})

    def _reported(self, key: Key) -> None:
        if self.siblings.statuses is not None:
            self.siblings.statuses.said(key)
        self.siblings.changed()
        if key.kind == "App":
            self.sitewide.services(key)

    def _after(self, change: Change) -> None:
        """What follows from a change of the replica; who listens to it may not write, so what writes comes soon."""
        self.siblings.changed()
        if change.key.kind == "Service":
            asyncio.get_running_loop().call_soon(self.sitewide.service, change.key)
        elif change.key.kind == "Node" and not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_soon(self._look)  # once for all that a sync brings

    def _look(self) -> None:
        self._looks = False
        self.mesh.look()

    def _poke_plane(self) -> None:
        self.plane.poke()

    def _now(self) -> float:
        """The hub's time, as far as it is known: a token does not live longer because this box's clock is wrong."""
        least = self.identity.lease[0] if self.identity.enrolled else 0.0
        return self.link.hub_clock.best(clock.now(), clock.steady(), least)

    def _who(self, token: str | None, client: Any) -> Principal:
        """The socket is its owner's: who can open it without a token is this machine's administrator."""
        return administrator("local", "local") if token is None else self.tokens.verify(token)

    def _bearer(self, token: str | None, client: Any) -> Principal:
        return self.tokens.verify(needs_token(token))

    def _health(self) -> tuple[bool, dict[str, Any]]:
        return self._ready, {"state": "ready" if self._ready else "starting"}

    async def _metrics(self) -> str:
        values = numbers(
            replica=self.replica.stats(),
            link=self.link.counters,
            queues=self.outbox.counters() if self.outbox is not None else {},
            online=self.link.online,
            pending=len(self.replica.pending()),
            memory=daemon.memory_mb(os.getpid()) * 2**20,
            uptime=clock.monotonic() - daemon.STARTED,
            mesh=self.mesh.counters,
            site=self.siblings.counters,
            peers=(len(peers := self.mesh.peers()), sum(p.linked for p in peers.values())),
        )
        refused = {f"edgeward_closed_{k}_packets_total": float(v) for k, v in (await self.closing.counted()).items()}
        of_gateway, meanings = await self.doors.metrics()
        with contextlib.suppress(EdgewardError):  # a plane that does not answer has no numbers
            values |= (await self.plane.one("functions.stats", timeout=2.0))["metrics"]
        return daemon.metrics_text(values | refused | of_gateway, HELP | meanings | FUNCTION_HELP)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgeward.agent", description="Runs one node's agent.")
    parser.add_argument("--data", type=Path, required=True, help="the node's directory")
    parser.add_argument("--die-with-parent", action="store_true", help="stop when the starting process ends")
    parser.add_argument("--check", action="store_true", help="look whether this release can run there, and end")
    args = parser.parse_args()
    if args.check:
        load()
        look(args.data.absolute())
        return 0
    if args.die_with_parent:
        daemon.die_with_parent()
    data = args.data.absolute()
    os.environ["EDGEWARD_DATA"] = str(data)  # marks all processes of this node
    daemon.set_up_logging(os.environ.get("EDGEWARD_LOG", "INFO"))
    load()
    with contextlib.suppress(KeyboardInterrupt):
        return daemon.run(lambda stop: Agent(data).run(stop))
    return 130
