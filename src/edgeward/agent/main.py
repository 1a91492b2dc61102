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
import platform
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from edgeward import __version__
from edgeward.agent.desired import Desired
from edgeward.agent.doors import GatewayRoutes
from edgeward.agent.keeper import Keeper
from edgeward.agent.kinds import load
from edgeward.agent.listen import Listener, address_of, needs_token
from edgeward.agent.replica import Replica
from edgeward.agent.timekeeping import Timekeeper
from edgeward.core import clock, daemon
from edgeward.core.access import Action, declare, needs, record_routes, top_sift
from edgeward.core.api import build_app
from edgeward.core.audit import Audit
from edgeward.core.authz import Principal, administrator
from edgeward.core.bus import Bus
from edgeward.core.chain import Head
from edgeward.core.describe import LOGS, described
from edgeward.core.errors import EdgewardError, NotFound, Unreachable
from edgeward.core.files import read_json
from edgeward.core.gate import Auth, Gate
from edgeward.core.identity import NodeIdentity, inbox_prefix
from edgeward.core.invocation import MAX_BODY
from edgeward.core.natsserver import AGENT_USER, NatsServer, NodeSpec, free_port
from edgeward.core.outbox import Outbox
from edgeward.core.records import SqliteRecords
from edgeward.core.resource import Key, Resource
from edgeward.core.resources import Resources
from edgeward.core.scope import check_local
from edgeward.core.store import Change
from edgeward.core.streaming import flag, json, number, read_body
from edgeward.core.tokens import AccessTokens
from edgeward.core.vault import Vault
from edgeward.functions.edge import Sections, read_logs
from edgeward.functions.relay import INVOKE, LONGEST, SILENCE, answer, call_args, log_args, pieces_of, to_plane
from edgeward.functions.relay import LOGS as FUNCTION_LOGS
from edgeward.functions.stats import HELP as FUNCTION_HELP
from edgeward.gateway import edge as gateway
from edgeward.gateway.relay import CALL
from edgeward.gateway.rules import Listen
from edgeward.nodes.calls import CallServer, Handler
from edgeward.nodes.door import Door
from edgeward.nodes.edge import NodeEdge
from edgeward.nodes.enrol_edge import Renewer, doors_of
from edgeward.nodes.older import check_level
from edgeward.nodes.wan import LinkWatch, redial
from edgeward.streams.edge import ExportsEdge
from edgeward.streams.turnstile import Turnstile
from edgeward.workloads.edge import AppsEdge

log = logging.getLogger("edgeward.agent")

MQTT_USER = "edge"
#: Seconds that a node that starts waits for its data plane before it calls itself ready.
_PLANE_TIME = 20.0

#: Counters of the outbox by Prometheus' rules of naming.
_METRIC = {
    **{k: f"{k}_total" for k in ("accepted", "forwarded")},
    **{f"dropped_{k}": f"dropped_{k}_total" for k in ("full", "age", "duplicate", "size")},
    "no_identity": "without_identity_total",
    "last_ack_at": "last_ack_timestamp_seconds",
}
_HELP = {
    "edgeward_agent_memory_bytes": "Resident memory of the agent.",
    "edgeward_agent_pending_changes": "Local changes that the hub has not decided yet.",
    "edgeward_agent_revision": "Revision of the replica.",
    "edgeward_agent_resources": "Resources in the replica.",
    "edgeward_agent_uptime_seconds": "Since the agent started.",
    "edgeward_link_up": "1 while the hub answers.",
    "edgeward_link_beats_total": "Heartbeats that the hub answered.",
    "edgeward_link_syncs_total": "Syncs of desired state.",
    "edgeward_link_full_syncs_total": "Syncs that began from nothing.",
    "edgeward_link_pushed_total": "Local changes sent to the hub.",
    "edgeward_link_reports_total": "Reports of state.",
    "edgeward_outbox_accepted_total": "Readings taken into the queue.",
    "edgeward_outbox_forwarded_total": "Readings that the hub acknowledged.",
    "edgeward_outbox_pending": "Readings that wait for the hub.",
    "edgeward_outbox_pending_bytes": "Bytes that wait for the hub.",
    "edgeward_outbox_dropped_full_total": "Readings dropped because the queue was full.",
    "edgeward_outbox_dropped_age_total": "Readings dropped because they were too old.",
    "edgeward_outbox_dropped_duplicate_total": "Repeats of a reading, known by its identity.",
    "edgeward_outbox_dropped_size_total": "Readings too large to be carried.",
    "edgeward_outbox_without_identity_total": "Readings without the declared identity.",
    "edgeward_outbox_last_ack_timestamp_seconds": "When the hub last acknowledged (Unix time).",
}


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
        self.replica = Replica(data / "replica.db", site=self.site, vault=self.vault)
        self.records = SqliteRecords(data / "records.db")
        self.audit = Audit(data / "audit.db")
        self.resources = Resources(self.replica, self.audit, self._may_write)
        self.link = NodeEdge(self.node, self.replica, self.records, self._flipped)
        self.link.on_strange = self._report_node
        self.desired = Desired(self.replica, self.node, self.site)
        self.apps = AppsEdge(
            node=self.node,
            site=self.site,
            data_dir=data,
            source=self.desired,
            report=self._app_status,
            event=self._event,
            address=self.address,
            vault=self.vault,
        )
        self.tokens = AccessTokens(self.replica, site=self.site, now=self._now)
        listen = address_of(config.get("api"))
        self.listener = Listener(self.identity, listen, self._say) if listen else None
        self.gateway = dict(config.get("gateway") or {})
        values = self.desired.values
        self.functions = Sections(partial(values, "Config"), partial(values, "Secret"), self.vault)
        self.plane = Keeper(
            data,
            sections=self._sections,
            status=lambda kind, ns, name, status: self._status(Key(kind, ns, name), status),
            event=self._event,
            refused=self._plane_refused,
            say=self._say,
        )
        self.doors = GatewayRoutes(self.plane)
        self._ready = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self.nats: NatsServer | None = None
        self.bus: Bus | None = None
        self.outbox: Outbox | None = None
        self._hung_up = False
        self.wan: LinkWatch | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> int:
        self.app = app = self._api(self._who)
        self.api_socket.unlink(missing_ok=True)
        old_umask = os.umask(0o177)  # the socket is for the owner only; uvicorn would make it for everybody
        try:
            server = daemon.http_server(app, uds=str(self.api_socket))
            async with server:
                self.api_socket.chmod(0o600)
                os.umask(old_umask)
                works = [self.apps.run, self.plane.run, self._watch, self._messages, self._token_uses, self._anchor]
                if (listener := self.listener) is not None:
                    open_api = self._api(self._bearer)
                    works.append(lambda: listener.run(open_api))
                await daemon.until(stop, *works)
        finally:
            os.umask(old_umask)
            self._ready = False
            await self.apps.shutdown(leave=not self.stop_apps)
            await self.link.flush()
            if self.bus is not None:
                await self.bus.close()
            if self.stop_apps:
                await self.plane.stop()
                if self.nats is not None:
                    await self.nats.stop()
            self.run_file.remove()
            self.api_socket.unlink(missing_ok=True)
        return 0

    def _api(self, auth: Auth) -> Gate:
        return build_app(
            self.resources,
            self.replica,
            auth=auth,
            extra_routes=self._routes(),
            health=self._health,
            metrics=self._metrics,
            info={"role": "agent", "version": __version__, "node": self.node, "site": self.site},
            audit_head=self._audit_head,
        )

    async def _messages(self) -> None:
        """nats-server, and everything that speaks through it."""
        spec = self._nats_spec()
        self.nats = nats = NatsServer(self.data / "nats", spec, on_restart=self._say)
        await nats.start()
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
            mqtt=(daemon.local(self.bind), nats.ports["mqtt"], MQTT_USER, self._mqtt_password()),
            report=self._export_status,
            quota=self.desired.messages,
            turnstile=Turnstile(bus, self._close_topics, self._closed_topics()),
            event=self._event,
        )
        self._exports = exports
        calls = CallServer(self.node, self._calls())
        if self.replica.hub_revision:  # an empty replica knows nothing: what waits in the queues stays
            await exports.prune(self.desired.exports())
        await exports.apply(self.desired.exports())
        with contextlib.suppress(TimeoutError):  # one that does not start is told as such; the rest of the node works
            async with asyncio.timeout(_PLANE_TIME):
                await self.plane.started.wait()
        self._ready = True
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
                keeper = Timekeeper(self.link.hub_clock, issued, self._event, self._report_node, again)
                group.create_task(keeper.run())
            group.create_task(nats.run())
            group.create_task(self.outbox.run())
            group.create_task(exports.run())
            group.create_task(self.link.run(bus))
            group.create_task(calls.run(bus.client))
            if spec.hub_url:
                group.create_task(self.renewer.run())

    # -- identity ------------------------------------------------------------------------------------------------

    def _nats_spec(self, *, dial: bool = True) -> NodeSpec:
        enrolled = dial and bool(self.hub) and self.identity.enrolled
        urls = [d.address.url.replace("https:", "wss:", 1) for d in self._doors()] if enrolled else [""]
        return NodeSpec(
            self.node,
            hub_url=urls[0],
            more_urls=tuple(urls[1:]),
            creds_file=self.identity.creds_file if enrolled else None,
            ca_file=self.identity.trust_file if enrolled else None,
            proxy=str(self.hub.get("proxy", "")),
            mqtt_host=self.bind,
            mqtt_users={MQTT_USER: self._mqtt_password()},
            closed=self._closed_topics(),
        )

    def _closed_topics(self) -> tuple[str, ...]:
        """What the broker is to refuse; kept, so that it goes on refusing over a restart of the agent."""
        return tuple(msgspec.json.decode(self.replica.meta("mqtt_closed") or "[]", type=list[str]))

    async def _close_topics(self, subjects: tuple[str, ...]) -> None:
        if self.nats is None:
            raise Unreachable("the node's nats-server is not started")
        self.replica.set_meta("mqtt_closed", msgspec.json.encode(list(subjects)).decode())
        await self.nats.apply(self._nats_spec(dial=not self._hung_up))

    def _doors(self) -> list[Door]:
        return doors_of(self.identity, self.hub)

    async def _renewed(self, changed: bool) -> None:
        self._event("Normal", "CredentialsRenewed", "the hub renewed this node's credentials")
        if self.listener is not None:
            self.listener.renewed()
        if (changed or self._hung_up) and self.nats is not None:
            self._hung_up = False
            self.nats.spec = self._nats_spec()
            await self.nats.restart()
            self._say()

    def _kept_out(self, error: EdgewardError) -> None:
        log.warning("the hub refuses this node: %s", error)
        if not self.link.online and not self._hung_up:
            self._hung_up = True
            self._spawn(self._hang_up())
        self._event("Warning", "RefusedByHub", str(error))

    async def _hang_up(self) -> None:
        """A hub that refuses us is not to be dialled every second; the renewals ask now and then."""
        if self.nats is not None:
            await self.nats.apply(self._nats_spec(dial=False))

    async def _renew(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        self.renewer.hurry()
        yield b"{}"

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

    def _mqtt_password(self) -> str:
        import secrets

        saved = self.replica.meta("mqtt_password")
        return saved or self.replica.set_meta("mqtt_password", secrets.token_urlsafe(24))

    def _say(self) -> None:
        nats = self.nats
        self.run_file.write(
            ready=self._ready,
            nats=nats.pid if nats else None,
            api=str(self.api_socket),
            api_url=(self.listener.url or None) if self.listener is not None else None,
            plane=self.plane.pid,
            gateway_url=self._gateway_url(),
            mqtt_url=f"mqtt://{self.address}:{nats.ports['mqtt']}" if nats else None,
            mqtt_user=MQTT_USER,
            mqtt_password=self._mqtt_password(),
        )

    # -- the data plane ------------------------------------------------------------------------------------------------

    def _sections(self) -> dict[str, Any]:
        routes = gateway.section(
            self.node, self.desired.routes(), self.desired.endpoints, self.gateway, self._gateway_listens()
        )
        functions = self.functions.section(self.desired.functions())
        return {"node": self.node, "site": self.site, "functions": functions, "gateway": routes}

    def _gateway_listens(self) -> list[Listen]:
        """Where the gateway listens: as ``node.json`` says, else on a port of its own that is kept."""
        given = self.gateway.get("listen")
        if given == "":
            return []
        if given is not None and (address := address_of(self.gateway, "gateway")) is not None:
            return [Listen(*address)]
        kept = self.replica.meta("gateway_port")
        port = int(kept) if kept else int(self.replica.set_meta("gateway_port", str(free_port(self.bind))))
        return [Listen(self.bind, port)]

    def _gateway_url(self) -> str | None:
        """What answers it, when it does."""
        listens = self._gateway_listens()
        if not listens or self.plane.pid is None or not self.plane.started.is_set():
            return None
        host = self.address if listens[0].host == self.bind else daemon.local(listens[0].host)
        return f"http://[{host}]:{listens[0].port}" if ":" in host else f"http://{host}:{listens[0].port}"

    def _plane_refused(self, error: EdgewardError) -> bool:
        """A port of our own choice that somebody has taken meanwhile is no reason not to serve."""
        if error.field == "$.gateway.listen" and self.gateway.get("listen") is None:
            self.replica.set_meta("gateway_port", str(free_port(self.bind)))
            return True
        return False

    async def _watch(self) -> None:
        """What changed in the replica moves the rooms."""
        for key in [r.key for r in self.replica.items("App")]:
            self.apps.poke(key.namespace, key.name)
        while True:
            try:
                with self.replica.watch(self.replica.revision) as changes:
                    async for change in changes:
                        await self._changed(change)
            except EdgewardError as e:
                log.info("watch starts anew: %s", e)

    async def _changed(self, change: Change) -> None:
        key = change.key
        if self.replica.local_change(key) or change.resource is None:
            self.link.wake_push()
        if change.status_only and key.kind not in ("Service",):
            return
        if key.kind in ("Route", "Service", "App", "Node", "Function", "Config", "Secret"):
            self.plane.poke()
        if key.kind in ("Route", "Function") and change.resource is None:
            self.link.report(key, None)
        if key.kind == "Export":
            if self.outbox is not None and self._ready:
                await self._exports.apply(self.desired.exports())
        elif key.kind == "App":
            self.apps.poke(key.namespace, key.name)
            if change.resource is None:
                self.link.report(key, None)
        elif key.kind == "AccessToken" and change.resource is None:
            self.link.report(key, None)
        elif key.kind in ("Config", "Secret", "Service"):
            for app in self.replica.items("App", key.namespace):
                self.apps.poke(key.namespace, app.metadata.name)
        elif key.kind in ("Node", "Override"):
            for app in self.replica.items("App"):
                self.apps.poke(app.metadata.namespace, app.metadata.name)

    # -- what the rooms say ----------------------------------------------------------------------------------------

    def _may_write(self, new: Resource | None, old: Resource | None) -> None:
        """Raises what the hub would refuse, and what a hub of an earlier release could not read."""
        check_local(new, old, self.site)
        here = new or old
        if here is not None and self.replica.hub_level is not None:
            check_level(new, here.key, self.replica.hub_level)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _status(self, key: Key, status: dict[str, Any] | None) -> None:
        self.link.report(key, status)
        self._keep(key, status or {})

    def _keep(self, key: Key, status: dict[str, Any]) -> None:
        """What the node's own API shows."""
        if self.replica.find(key) is not None:
            self._spawn(self.replica.put_status(key, status))

    def _app_status(self, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        key = Key("App", namespace, name)
        self.desired.said(key, status)
        self.plane.poke()  # where its Services are may be new
        if status is None:
            self.link.report(key, None)
            self._keep(key, self.desired.elsewhere(key))
        else:
            self._status(key, status)

    def _export_status(self, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        self._status(Key("Export", namespace, name), status)

    def _event(
        self, type: str, reason: str, message: str, namespace: str = "", name: str = "", kind: str = "App"
    ) -> None:
        resource = str(Key(kind, namespace or "default", name)) if name else f"Node/{self.node}"
        record = {"type": type, "reason": reason, "resource": resource, "message": message, "node": self.node}

        async def keep() -> None:
            await self.records.append("events", record)
            self.link.wake_events()

        self._spawn(keep())

    def _flipped(self, online: bool) -> None:
        self.renewer.flipped(online)
        if online and self.outbox is not None:
            self.outbox.kick()
        self._event(
            "Normal" if online else "Warning",
            "LinkUp" if online else "LinkDown",
            "the hub answers" if online else "the hub does not answer; the site goes on by itself",
        )

    def _report_node(self) -> None:
        self.link.report_node(
            {
                "version": __version__,
                "address": self.address,
                "system": f"{platform.system()} {platform.machine()}",
                "python": platform.python_version(),
                "enforced": self.apps.enforced(),
                "secrets": {"sealed": True, "key": self.vault.source},
                "clock": self.link.hub_clock.status(clock.now(), clock.steady()),
                "audit": {"last": head.seq, "hash": head.hash} if (head := self._audit_head()) else {},
                **(
                    {"notUnderstood": [str(k) for k in sorted(strange)[:20]]}
                    if (strange := self.replica.strange())
                    else {}
                ),
            }
        )

    def _now(self) -> float:
        """The hub's time, as far as it is known: a token does not live longer because this box's clock is wrong."""
        least = self.identity.lease[0] if self.identity.enrolled else 0.0
        return self.link.hub_clock.best(clock.now(), clock.steady(), least)

    def _who(self, token: str | None, client: Any) -> Principal:
        """The socket is its owner's: who can open it without a token is this machine's administrator."""
        return administrator("local", "local") if token is None else self.tokens.verify(token)

    def _bearer(self, token: str | None, client: Any) -> Principal:
        return self.tokens.verify(needs_token(token))

    # -- API beside the resources ---------------------------------------------------------------------

    def _routes(self) -> list[Route]:
        return [
            Route(
                "/api/v1/namespaces/{ns}/apps/{name}/logs",
                needs("logs", "App", "object")(self._logs_route),
                methods=["GET"],
            ),
            Route(
                "/api/v1/namespaces/{ns}/functions/{name}/logs",
                needs("logs", "Function", "object")(self._function_logs_route),
                methods=["GET"],
            ),
            Route(
                "/api/v1/namespaces/{ns}/functions/{name}/invoke",
                needs("invoke", "Function", "object")(self._invoke_route),
                methods=["POST"],
            ),
            Route("/api/v1/top", declare(self._top_route, Action("own", ("top",), "Node")), methods=["GET"]),
            *self.doors.routes(),
            *record_routes(self.records),
        ]

    def _calls(self) -> dict[str, Handler]:
        """What the hub may ask this node."""
        return {
            "logs": self._logs,
            "usage": self._usage,
            "renew": self._renew,
            "invoke": self._invoke,
            CALL: self.doors.called,
            "function-logs": lambda args: read_logs(self.data / "functions", args),
        }

    def _function_known(self, request: Request) -> tuple[str, str]:
        namespace, name = request.path_params["ns"], request.path_params["name"]
        if self.replica.find(Key("Function", namespace, name)) is None:
            raise NotFound("not found", resource=f"Function/{name}")
        return namespace, name

    @described(
        "Call a function on this node: the body is the event's data, the answer is the function's own",
        query=INVOKE,
        media="*/*",
    )
    async def _invoke_route(self, request: Request) -> Response:
        namespace, name = self._function_known(request)
        data = await read_body(request, MAX_BODY)
        return await answer(self._invoke(call_args(namespace, name, data, request.query_params, request.headers)))

    def _invoke(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        return pieces_of(self.plane.ask("invoke", timeout=LONGEST + SILENCE, **to_plane(args)))

    @described("What a function wrote, on this node", query=FUNCTION_LOGS, media="text/plain")
    async def _function_logs_route(self, request: Request) -> Response:
        args = log_args(*self._function_known(request), request)
        return StreamingResponse(read_logs(self.data / "functions", args), media_type="text/plain; charset=utf-8")

    @described("What an app wrote, on this node", query=LOGS, media="text/plain")
    async def _logs_route(self, request: Request) -> Response:
        args = {
            "namespace": request.path_params["ns"],
            "name": request.path_params["name"],
            "tail": number(request, "tail", 200, high=100_000),
            "follow": flag(request, "follow"),
            "since": request.query_params.get("since", ""),
            "instance": request.query_params.get("instance", ""),
        }
        if self.replica.find(Key("App", args["namespace"], args["name"])) is None:
            raise NotFound("not found", resource=f"App/{args['name']}")
        return StreamingResponse(self._logs(args), media_type="text/plain; charset=utf-8")

    async def _logs(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        pieces = self.apps.logs.read(
            str(args["namespace"]),
            str(args["name"]),
            tail=int(args.get("tail", 200)),
            follow=bool(args.get("follow")),
            since=str(args.get("since", "")),
            instance=str(args.get("instance", "")),
            after={str(k): str(v) for k, v in dict(args.get("after") or {}).items()},
        )
        async for piece in pieces:
            yield piece

    @described("What this node and its apps use now")
    async def _top_route(self, request: Request) -> Response:
        node_seen, app_seen = top_sift(request)
        use = self._use()
        return json({"nodes": list(filter(node_seen, use["nodes"])), "apps": list(filter(app_seen, use["apps"]))})

    async def _usage(self, args: dict[str, Any]) -> AsyncIterator[bytes]:
        yield msgspec.json.encode(self._use())

    def _use(self) -> dict[str, Any]:
        load1 = os.getloadavg()[0]
        return {
            "nodes": [
                {
                    "name": self.node,
                    "site": self.site,
                    "online": True,
                    "load1": round(load1, 2),
                    "cpus": os.cpu_count() or 1,
                    "agentMB": round(daemon.memory_mb(os.getpid()), 1),
                    "planeMB": round(daemon.memory_mb(self.plane.pid), 1),
                    "natsMB": round(daemon.memory_mb(self.nats.pid if self.nats else None), 1),
                    "wan": self.wan.usage() if self.wan else {},
                }
            ],
            "apps": self.apps.usage(),
        }

    def _health(self) -> tuple[bool, dict[str, Any]]:
        return self._ready, {"state": "ready" if self._ready else "starting"}

    async def _metrics(self) -> str:
        values = {f"edgeward_agent_{k}": float(v) for k, v in self.replica.stats().items()}
        values |= {f"edgeward_link_{k}_total": float(v) for k, v in self.link.counters.items()}
        values["edgeward_link_up"] = float(self.link.online)
        values["edgeward_agent_pending_changes"] = float(len(self.replica.pending()))
        values["edgeward_agent_memory_bytes"] = daemon.memory_mb(os.getpid()) * 2**20
        values["edgeward_agent_uptime_seconds"] = clock.monotonic() - daemon.STARTED
        if self.outbox is not None:
            for queue, counters in self.outbox.counters().items():
                for k, v in counters.items():
                    if isinstance(v, int | float):
                        values[f'edgeward_outbox_{_METRIC.get(k, k)}{{queue="{queue}"}}'] = float(v)
        of_gateway, meanings = await self.doors.metrics()
        with contextlib.suppress(EdgewardError):  # a plane that does not answer has no numbers
            values |= (await self.plane.one("functions.stats", timeout=2.0))["metrics"]
        return daemon.metrics_text(values | of_gateway, _HELP | meanings | FUNCTION_HELP)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgeward.agent", description="Runs one node's agent.")
    parser.add_argument("--data", type=Path, required=True, help="the node's directory")
    parser.add_argument("--die-with-parent", action="store_true", help="stop when the starting process ends")
    args = parser.parse_args()
    if args.die_with_parent:
        daemon.die_with_parent()
    data = args.data.absolute()
    os.environ["EDGEWARD_DATA"] = str(data)  # marks all processes of this node
    daemon.set_up_logging(os.environ.get("EDGEWARD_LOG", "INFO"))
    load()
    with contextlib.suppress(KeyboardInterrupt):
        return daemon.run(lambda stop: Agent(data).run(stop))
    return 130
