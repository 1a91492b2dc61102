"""The hub: the cloud sides of the rooms in one process, beside its nats-server.

Start order: keys and certificate, nats-server (adopted when it still runs), store, controllers, API. The process keeps
nothing of its own: what it knows is in NATS, so it may be killed at any time, and a second one may run beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import nats.errors

from edgeward import __version__
from edgeward.core import clock, daemon
from edgeward.core.api import build_app
from edgeward.core.audit import Audit
from edgeward.core.authz import BUILT_IN, Principal, administrator
from edgeward.core.bus import Bus
from edgeward.core.certs import LOCAL_NAMES, names_in
from edgeward.core.chain import Head
from edgeward.core.claims import Claims
from edgeward.core.errors import EdgewardError, Refused, Unauthorized
from edgeward.core.files import ensure_dir, read_json
from edgeward.core.identity import HubIdentity
from edgeward.core.natsconf import Cluster, claims_dir
from edgeward.core.natsserver import HubSpec, NatsServer
from edgeward.core.nkeys import verify
from edgeward.core.peers import Peers
from edgeward.core.quantity import parse_duration
from edgeward.core.records import StreamRecords
from edgeward.core.registry import extensions
from edgeward.core.resource import Key, Resource
from edgeward.core.resources import Resources
from edgeward.core.roles import built_in_roles
from edgeward.core.store_nats import NatsStore
from edgeward.core.tokens import AccessTokens
from edgeward.core.vault import Vault
from edgeward.functions.bundling import Source
from edgeward.functions.keeping import CloudHistory
from edgeward.gateway.listener_spec import names_by_node, platform_hosts
from edgeward.hub.backup import backup_routes, sealing_key
from edgeward.hub.blob_routes import BlobRoutes
from edgeward.hub.blobs import Blobs, Settings
from edgeward.hub.bundles import Bundles
from edgeward.hub.enrol import EnrolRoutes
from edgeward.hub.failover import Failover
from edgeward.hub.front import Links, front_protocol
from edgeward.hub.gateways import GatewayRelay
from edgeward.hub.holds import Holds
from edgeward.hub.kinds import load
from edgeward.hub.neighbours import Neighbours
from edgeward.hub.oidc import SignIn
from edgeward.hub.rollouts import Rollouts, baselines
from edgeward.hub.routes import HubRoutes
from edgeward.hub.steering import HubSteering
from edgeward.hub.steering import Settings as SteeringSettings
from edgeward.nodes.calls import call
from edgeward.nodes.cloud import NodesCloud
from edgeward.nodes.enrol_cloud import Enrolment
from edgeward.nodes.wire import LEVEL
from edgeward.streams.cloud import StreamsCloud
from edgeward.tunnel.cloud import Tunnels
from edgeward.tunnel.peers import PeerTunnels
from edgeward.tunnel.proxy import Proxy, ticket_key

log = logging.getLogger("edgeward.hub")

#: Seconds that a process of a cluster waits for most of the others.
_QUORUM = 120.0
_HELP = {
    "edgeward_hub_dns_queries_total": "Queries of the steering zone: answered, over a source's bound, not for us.",
    "edgeward_hub_links": "Open links of nodes.",
    "edgeward_hub_memory_bytes": "Resident memory of the hub.",
    "edgeward_hub_nats_memory_bytes": "Resident memory of its nats-server.",
    "edgeward_hub_nats_restarts_total": "Starts of nats-server after the first.",
    "edgeward_hub_resources": "Resources in the store.",
    "edgeward_hub_revision": "Revision of the store.",
    "edgeward_hub_site_load": "Mean load of the site's nodes for each processor, as steering knows it.",
    "edgeward_hub_site_share": "Part of its clients that steering sends to the site; 0 when it is taken out.",
    "edgeward_hub_tombstones": "Deletions that are remembered.",
    "edgeward_hub_uptime_seconds": "Since the hub started.",
    "edgeward_hub_watchers": "Open watches.",
    "edgeward_node_online": "1 while the hub hears the node.",
}


class Hub:
    """One hub process; :meth:`run` until the stop event."""

    def __init__(self, data: Path, dns: str = "", zone: str = "") -> None:
        self.data = data
        config = read_json(data / "hub.json", {})
        self.port = int(config.get("port", 0))
        self.bind = str(config.get("bind", "127.0.0.1"))
        self.address = str(config.get("advertise", daemon.local(self.bind)))
        self.names = [str(n) for n in config.get("names", [])]
        #: Where boxes find the hub, as it stands in join tokens.
        self.named_urls = [str(u) for u in config.get("urls", [])]
        self.urls = self.named_urls or [f"https://{self.address}:{self.port}"]
        self.oidc = SignIn.settings(config.get("oidc"))
        self.steering_settings = SteeringSettings.read(config.get("steering"), dns, zone)
        #: This process among several; one hub alone has no peers.
        self.name = str(config.get("name", "hub"))
        self.cluster: dict[str, Any] = config.get("cluster") or {}
        self.witness = bool(config.get("witness"))
        self.blob_settings = Settings.read(config.get("blobs"))
        self.packages = Source.read(config.get("packages"))
        self.certificate_life = parse_duration(config.get("certificateLife", "90d"))
        self.run_file = daemon.RunFile(data / "run.json")
        # each hub process has an audit of its own; its head is known by where it is, not by what a file says
        where = f"{socket.gethostname()}\n{data.resolve()}"
        self.head_fact = f"audit.head.{hashlib.sha256(where.encode()).hexdigest()[:16]}"
        self._ready = False
        self._server: Any = None

    async def run(self, stop: asyncio.Event) -> int:
        """Until ``stop``. A hub that cannot run (its port is taken, say) leaves no nats-server behind."""
        try:
            return await self._run(stop)
        except BaseException:  # uvicorn ends the process by SystemExit when its port is taken
            nats: NatsServer | None = getattr(self, "nats", None)
            if nats is not None:
                await nats.stop()
            raise

    async def _run(self, stop: asyncio.Event) -> int:
        ensure_dir(self.data)
        self.identity = identity = HubIdentity.open(self.data / "identity", self.names)
        identity.admin_token()
        self.nats = NatsServer(self.data / "nats", self._nats_spec(identity), on_restart=self._say)
        await self.nats.start()
        if self.witness:
            return await self._witness(stop)
        self.bus = await Bus.connect(self.nats.url, name="hub", user=identity.user)
        vault = Vault.open(self.data / "identity")
        replicas = 3 if self.cluster else 1
        self.store = NatsStore(self.bus.client, vault=vault, replicas=replicas)
        await self._patiently(self.store.open)
        if sealed := await self.store.seal():
            log.info("%d resources of an earlier release had secrets in plain and are sealed now", sealed)
        self.records = StreamRecords(self.bus.client, replicas=replicas)
        await self._patiently(self.records.open)
        audit = Audit(self.data / "audit.db")
        self.audit = audit
        self.resources = Resources(self.store, audit, _keeps_built_in)
        self.tokens = AccessTokens(self.store)
        self.sign_in = SignIn(self.resources, self.oidc)
        await self._first_objects()
        self.peers = Peers(self.bus, clock.new_id(12), several=bool(self.cluster))
        await self.peers.open()
        self.nodes = NodesCloud(self.store, self.bus, self.records, self._write, self.peers)
        self.nodes.sign = self.identity.authority.sign
        await self.nodes.open()
        self.streams = StreamsCloud(self.bus.client, replicas=replicas)
        system = await Bus.connect(self.nats.url, name="hub-system", user=identity.system_user)
        self.enrolment = Enrolment(
            self.store,
            identity,
            Claims(system, claims_dir(self.nats.directory)),
            self._write,
            audit,
            vault,
            urls=self.urls,
            named=self.named_urls,
            names=self._names_of_nodes,
            life=self.certificate_life,
            changed=self.nodes.identity_changed,
        )
        self.nodes.identity = self.enrolment.status
        await self.enrolment.open()
        more: list[Callable[[], Awaitable[None]]] = []
        if self.cluster:
            more.append(self._failover(system).run)
            await self._caught_up(system)
        scratch = ensure_dir(self.data / "scratch")
        self.blobs = Blobs(self.bus, self.blob_settings, replicas=replicas)
        await self._patiently(self.blobs.open)
        history = CloudHistory(self.store)
        await history.open(self.bus)
        self.bundles = Bundles(
            self.store,
            self.bus,
            self.blobs,
            self.packages,
            scratch,
            revoked=lambda node: bool(self.enrolment.status(node)["revoked"]),
            leads=lambda: self.peers.leads,
            kept=lambda: chain(history.specs(), baselines(self.store)),
        )
        await self.bundles.open()
        neighbours = Neighbours(self.store, self.steering_settings.scheme, lambda: self.peers.leads)
        holds = Holds(self.store, lambda: self.peers.leads)
        levels = self.nodes.roster.levels
        rollouts = Rollouts(
            self.store,
            self.records,
            lambda: self.peers.leads,
            lambda node: levels.get(node, LEVEL),
            self.nodes.reported,
        )
        self.nodes.on_report["Rollout"] = rollouts.soon
        self.steering = HubSteering(self.store, self.steering_settings, self._usage_of, neighbours)
        routes = HubRoutes(
            store=self.store,
            client=self.bus.client,
            nodes=self.nodes,
            streams=self.streams,
            records=self.records,
            write=self._write,
            history=history,
        )

        def auth(token: str | None, client: Any) -> Principal:
            if not token:
                raise Unauthorized(
                    "the token is missing", remedy="send 'Authorization: Bearer TOKEN'; the context has it"
                )
            # what the hub wrote for its own machine at its first start; all others are AccessTokens
            name = identity.tokens.verify(token)
            return administrator(name) if name is not None else self.tokens.verify(token)

        enrol_routes = EnrolRoutes(
            self.enrolment,
            identity,
            tell=self._have_renew,
            online=self.nodes.is_online,
            new_ca=self._new_ca,
            leads=lambda: self.peers.leads,
        )
        self.tunnels = Tunnels(
            self.store,
            audit,
            key_of=self.enrolment.key_of,
            verify=verify,
            prove=identity.authority.sign,
            nonce=self.enrolment.nonce,
            use_nonce=self.enrolment.use_nonce,
            call=self._have_dial,
            online=self.nodes.is_online,
        )
        self.tunnels.peers = peer_tunnels = PeerTunnels(self.bus, self.tunnels, self.peers)
        self.proxy = Proxy(self.tunnels, self.store, audit, ticket_key(identity.derived("proxy")))
        self.app = app = build_app(
            self.resources,
            self.store,
            auth=auth,
            extra_routes=[
                *routes.routes(),
                *self.sign_in.routes(),
                *GatewayRelay(self.store, self.bus.client, self.nodes).routes(),
                *self.steering.routes(),
                *BlobRoutes(self.store, self.blobs, self.bundles, audit, scratch).routes(),
                *enrol_routes.routes(),
                *self.tunnels.routes(),
                *self.proxy.routes(),
                *backup_routes(self.bus.client, self.data, sealing_key(self.data), vault),
            ],
            health=self._health,
            metrics=self._metrics,
            info={"role": "hub", "version": __version__},
            audit_head=lambda: _head(self.store.fact(self.head_fact)),
        )
        app.ticket = self.proxy.ticket
        self.links = Links(lambda: ("127.0.0.1", self.nats.ports["websocket"]))
        async with daemon.http_server(
            app,
            host=self.bind,
            port=self.port,
            ssl_certfile=str(identity.tls_file),
            ssl_keyfile=str(identity.tls_file),
            http=front_protocol(self.links),
        ) as server:
            self._server = server
            await self.steering.open()
            self._ready = True
            self._say()
            log.info(
                "hub %s ready on %s:%s; the vault's key is from %s", __version__, self.bind, self.port, vault.source
            )
            try:
                await daemon.until(
                    stop,
                    self.nats.run,
                    self.store.run,
                    self.records.run,
                    self.peers.run,
                    self.nodes.run,
                    self.bundles.run,
                    self.enrolment.run,
                    enrol_routes.run,
                    self.tunnels.run,
                    peer_tunnels.run,
                    self.proxy.run,
                    self._controllers,
                    self._retention,
                    self._listener,
                    self._token_uses,
                    self._anchor,
                    self.steering.run,
                    history.run,
                    rollouts.run,
                    holds.run,
                    *more,
                )
            finally:
                self._ready = False
                self.links.close()
                await self.steering.close()
        await system.close()
        await self.bus.close()
        await self.nats.stop()
        self.run_file.remove()
        return 0

    # -- one of several --------------------------------------------------------------------------------------------

    def _nats_spec(self, identity: HubIdentity) -> HubSpec:
        # the nodes' accounts are in the store and pushed (nodes/enrol_cloud.py)
        cluster = None
        if self.cluster:
            peers = self.data / "identity" / "peer.pem"
            identity.authority.server(peers, self.names, both=True)
            host, port = str(self.cluster["listen"]).rsplit(":", 1)
            cluster = Cluster(
                (host, int(port)),
                tuple(str(r) for r in self.cluster.get("routes", ())),
                identity.derived("cluster").hex(),
                peers,
                identity.ca_file,
            )
        return HubSpec(
            identity.operator_jwt, identity.system_account, identity.own_accounts, self.name, cluster=cluster
        )

    async def _witness(self, stop: asyncio.Event) -> int:
        """A server that has a vote and a copy, and no API: the third of a cluster."""
        system = await Bus.connect(self.nats.url, name="hub-system", user=self.identity.system_user)
        await self._caught_up(system)
        self._ready = True
        self._say()
        log.info("witness %s ready", self.name)
        await daemon.until(stop, self.nats.run, self._failover(system).run)
        await system.close()
        await self.nats.stop()
        self.run_file.remove()
        return 0

    def _failover(self, system: Bus) -> Failover:
        return Failover(system, self.identity.system_account, self.identity.account)

    async def _patiently(self, opening: Callable[[], Awaitable[None]]) -> None:
        """A cluster's streams are there when most of its servers are."""
        until = clock.monotonic() + (_QUORUM if self.cluster else 0.0)
        while True:
            try:
                await opening()
                return
            except (EdgewardError, nats.errors.Error, TimeoutError) as e:
                if clock.monotonic() >= until:
                    raise
                log.info("waiting for most of the hub's servers: %s", str(e) or type(e).__name__)
                await asyncio.sleep(0.5)  # the pace of asking

    async def _caught_up(self, system: Bus) -> None:
        """Until this server has what the others have: ready means that another one may be taken away now."""
        subject = f"$SYS.REQ.SERVER.{system.server_id}.HEALTHZ"
        until = clock.monotonic() + _QUORUM
        while clock.monotonic() < until:
            with contextlib.suppress(EdgewardError, msgspec.DecodeError):
                said = msgspec.json.decode((await system.request(subject, timeout=5.0)).data, type=dict[str, Any])
                if (said.get("data") or {}).get("status") == "ok":
                    return
            await asyncio.sleep(0.25)  # the pace of asking
        log.warning("this server has not caught up with the others within %g s", _QUORUM)

    # -- the listener's certificate --------------------------------------------------------------------------------

    def _new_ca(self) -> None:
        if self.identity.ensure_certificate(self.names) and self._server is not None:
            # the context of the running listener: connections from now on
            self._server.config.ssl.load_cert_chain(self.identity.tls_file)
            log.info("the listener has a new certificate")

    async def _listener(self) -> None:
        while True:
            await asyncio.sleep(6 * 3600)  # the period of looking at a certificate of a year
            self._new_ca()

    async def _have_renew(self, node: str) -> None:
        async for _ in call(self.bus.client, node, "renew", {}):
            pass

    async def _have_dial(self, node: str, args: dict[str, Any]) -> None:
        async for _ in call(self.bus.client, node, "tunnel", args):
            pass

    async def _usage_of(self, node: str) -> dict[str, Any]:
        data = b"".join([p async for p in call(self.bus.client, node, "usage", {}, timeout=3.0)])
        return msgspec.json.decode(data, type=dict[str, Any])

    def _say(self) -> None:
        self.run_file.write(ready=self._ready, nats=self.nats.pid, url=f"https://{self.address}:{self.port}")

    def _names_of_nodes(self) -> dict[str, tuple[str, ...]]:
        """What Listeners have the platform certify. Nobody gets a name by which the hub itself is known."""
        listeners = [r for r in self.store.items("Listener") if platform_hosts(r)]
        if not listeners:
            return {}
        urls = (str(urlsplit(u).hostname) for u in (*self.urls, *self.named_urls))
        taken = {*LOCAL_NAMES, *(n.lower() for n in self.names), *urls, *names_in(self.identity.tls_file)}
        return names_by_node(listeners, self.store.items("Node"), taken)

    async def _first_objects(self) -> None:
        from edgeward.core.resource import decode

        if self.store.find(Key("Namespace", "_", "default")) is None:
            doc = {"apiVersion": "edgeward/v1", "kind": "Namespace", "metadata": {"name": "default"}}
            await self.store.put(decode(doc))
        for role in built_in_roles():
            old = self.store.find(role.key)
            if old is None or old.spec != role.spec:  # another release's
                await self.store.put(role)

    async def _anchor(self) -> None:
        async def keep(head: Head) -> None:
            await self.store.set_fact(self.head_fact, msgspec.json.encode(head))

        await self.audit.run(keep)

    async def _token_uses(self) -> None:
        await self.tokens.run(self.store.put_status)

    async def _write(self, resource: Resource | None, key: Key, expect: int, actor: str) -> None:
        """A validated write by the system on behalf of ``actor``; ``expect`` 0 creates."""
        if resource is None:
            await self.resources.delete(key, expect=expect or None, actor=actor)
        elif expect:
            await self.resources.replace(resource, expect=expect, actor=actor)
        else:
            await self.resources.create(resource, actor=actor)

    async def _retention(self) -> None:
        await self.streams.keep(lambda: self.store.items("Export"))

    async def _controllers(self) -> None:
        """Exports need their streams; owners' dependents go with them."""
        collect = functools.partial(self.resources.collect, strays=True)
        while True:
            try:
                with self.store.watch(0) as changes:
                    await self._retried(collect)
                    async for change in changes:
                        if change.key.kind == "Export" and not change.status_only and change.resource is not None:
                            await self._retried(self.streams.ensure, change.resource)
                        if change.resource is None or change.resource.metadata.deletionTimestamp:
                            await self._retried(collect)
            except EdgewardError as e:
                log.info("controllers start anew: %s", e)

    async def _retried(self, work: Any, *args: Any) -> None:
        for attempt in range(1, 100):
            try:
                await work(*args)
                return
            except EdgewardError as e:
                log.warning("%s: %s", getattr(work, "__name__", "controller"), e)
                await asyncio.sleep(min(5.0, 0.2 * attempt))  # the back-off between two tries

    def _health(self) -> tuple[bool, dict[str, Any]]:
        ok = self._ready and self.bus.connected and self.nats.pid is not None
        return ok, {"state": "ready" if ok else "starting"}

    def _metrics(self) -> str:
        stats = self.store.stats()
        values = {f"edgeward_hub_{k}": float(v) for k, v in stats.items()}
        values["edgeward_hub_memory_bytes"] = daemon.memory_mb(os.getpid()) * 2**20
        values["edgeward_hub_nats_memory_bytes"] = daemon.memory_mb(self.nats.pid) * 2**20
        values["edgeward_hub_nats_restarts_total"] = float(self.nats.restarts)
        values["edgeward_hub_links"] = float(len(self.links.open))
        values["edgeward_hub_uptime_seconds"] = clock.monotonic() - daemon.STARTED
        values |= self.steering.metrics()
        for node in self.store.items("Node"):
            name = node.metadata.name
            values[f'edgeward_node_online{{node="{name}"}}'] = float(self.nodes.is_online(name))
        return daemon.metrics_text(values, _HELP)


def _head(data: bytes | None) -> Head | None:
    return msgspec.json.decode(data, type=Head) if data else None


def _keeps_built_in(new: Resource | None, old: Resource | None) -> None:
    if new is None and old is not None and old.kind == "Role" and old.metadata.name in BUILT_IN:
        raise Refused("is built in and stays", resource=str(old.key))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgeward.hub", description="Runs one hub process.")
    parser.add_argument("--data", type=Path, required=True, help="the hub's directory")
    parser.add_argument("--die-with-parent", action="store_true", help="stop when the starting process ends")
    parser.add_argument("--dns", default="", metavar="ADDRESS:PORT", help="answer DNS there: steering, see --zone")
    parser.add_argument("--zone", default="", metavar="NAME", help="the steering zone, e.g. edge.example.org")
    args = parser.parse_args()
    if args.die_with_parent:
        daemon.die_with_parent()
    daemon.set_up_logging(os.environ.get("EDGEWARD_LOG", "INFO"))
    daemon.raise_file_limit()
    load()
    log.debug("extensions: %s", extensions.names("fold"))
    return daemon.run(Hub(args.data.absolute(), args.dns, args.zone).run)
