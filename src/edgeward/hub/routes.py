"""What the hub's API has beside resources and enrolment (``enrol.py``): logs, usage, streams, overrides, records."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec
from nats.aio.client import Client
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from edgeward.core.access import (
    Action,
    ask_for,
    ask_of,
    declare,
    needs,
    object_route,
    principal,
    record_routes,
    top_sift,
)
from edgeward.core.authz import Ask
from edgeward.core.describe import FOLLOW, LOGS, described
from edgeward.core.errors import EdgewardError, NotFound, Unreachable
from edgeward.core.invocation import MAX_BODY
from edgeward.core.records import Records
from edgeward.core.registry import kinds
from edgeward.core.resource import CLUSTER, Key, Resource, from_stored, merge_patch, to_stored
from edgeward.core.scope import takes
from edgeward.core.store import Store
from edgeward.core.streaming import NDJSON, flag, json, ndjson, number, read_body
from edgeward.functions.keeping import CloudHistory
from edgeward.functions.logs import problem_line
from edgeward.functions.relay import (
    INVOKE,
    LETTERS,
    SAMPLES,
    SILENCE,
    answer,
    call_args,
    doing,
    letter_args,
    log_args,
    sample_args,
)
from edgeward.functions.relay import LOGS as FUNCTION_LOGS
from edgeward.nodes.calls import call
from edgeward.nodes.cloud import NodesCloud
from edgeward.streams.cloud import StreamsCloud
from edgeward.workloads.logs import Marked

#: Bytes of the body that brings a node's public key.
MAX_KEY = 4096

log = logging.getLogger("edgeward.hub")


class HubRoutes:
    def __init__(
        self,
        *,
        store: Store,
        client: Client,
        nodes: NodesCloud,
        streams: StreamsCloud,
        records: Records,
        write: Any,
        history: CloudHistory,
    ) -> None:
        self._store, self._nc = store, client
        self._nodes, self._streams, self._records, self._write = nodes, streams, records, write
        self._history = history

    def routes(self) -> list[Route]:
        base = "/api/v1"
        return [
            object_route("App", "logs", "logs", self.logs),
            object_route("Function", "logs", "logs", self.function_logs),
            object_route("Function", "samples", "logs", self.function_samples),
            object_route("Function", "metrics", "get", self.function_metrics),
            object_route("App", "versions", "get", self.app_versions),
            object_route("Function", "versions", "get", self.function_versions),
            object_route("Function", "invoke", "invoke", self.invoke, "POST"),
            object_route("Function", "deadletters", "logs", self.letters),
            object_route("Function", "deadletters", "invoke", self.letters_done, "POST"),
            object_route("Override", "promote", "promote", self.promote, "POST"),
            Route(f"{base}/top", declare(self.top, Action("own", ("top",), "Node")), methods=["GET"]),
            Route(f"{base}/streams", needs("streams", "Export", "each")(self.streams), methods=["GET"]),
            Route(
                f"{base}/streams/{{name}}",
                declare(self.stream, Action("own", ("streams",), "Export")),
                methods=["GET"],
            ),
            *record_routes(self._records),
        ]

    @described("Make a site's override everybody's")
    async def promote(self, request: Request) -> Response:
        """Makes a site's override everybody's: the patch goes into the target, the override goes away."""
        key = Key("Override", request.path_params["ns"], request.path_params["name"])
        override = self._store.get(key)
        target = override.spec.target
        target_key = Key(target.kind, target.namespace or CLUSTER, target.name)
        principal(request).require(ask_for(self._store, "update", target_key))
        base = self._store.get(target_key)
        stored = to_stored(base)
        stored.spec = merge_patch(stored.spec, override.spec.patch)
        promoted = from_stored(stored)
        try:
            kinds.get(promoted.kind).check(promoted)
        except EdgewardError as e:
            e.resource = e.resource or str(target_key)
            raise
        actor = principal(request).name
        await self._write(promoted, target_key, base.revision, actor)
        await self._write(None, key, override.revision, actor)
        return json(self._store.get(target_key).document(show_secrets=False))

    # -- nodes' answers --------------------------------------------------------------------------------------------

    def _nodes_of(self, app: Resource, wanted: str) -> list[str]:
        nodes = sorted({i.get("node", "") for i in app.status.get("instances", [])} - {""})
        if wanted and wanted not in nodes:
            raise NotFound(
                f"has no instance on node {wanted!r}",
                resource=str(app.key),
                remedy=f"it runs on: {', '.join(nodes) or 'no node'}",
            )
        return [wanted] if wanted else nodes

    @described(
        "What an app wrote, on all its nodes",
        query={"node": ("string", "Of the instances on this node only"), **LOGS},
        media="text/plain",
    )
    async def logs(self, request: Request) -> Response:
        app = self._store.get(Key("App", request.path_params["ns"], request.path_params["name"]))
        nodes = self._nodes_of(app, request.query_params.get("node", ""))
        args = {
            "namespace": app.metadata.namespace,
            "name": app.metadata.name,
            "tail": number(request, "tail", 200, high=100_000),
            "follow": flag(request, "follow"),
            "since": request.query_params.get("since", ""),
            "instance": request.query_params.get("instance", ""),
        }
        if not nodes:
            raise NotFound(
                "runs nowhere yet, so it has no logs", resource=str(app.key), remedy="see: edgeward describe"
            )
        return StreamingResponse(self._merge(nodes, args), media_type="text/plain; charset=utf-8")

    @described("The versions of an App that its nodes keep, the present one last: of the node that keeps the most")
    async def app_versions(self, request: Request) -> Response:
        app = self._store.get(Key("App", request.path_params["ns"], request.path_params["name"]))
        args = {"namespace": app.metadata.namespace, "name": app.metadata.name}
        target = (app.kind, app.metadata.namespace, app.metadata.name)
        # what a site has otherwise than the others is no version of the whole
        own = {o.spec.site for o in self._store.items("Override")
               if (o.spec.target.kind, o.spec.target.namespace, o.spec.target.name) == target}  # fmt: skip
        sites = {n.metadata.name: n.spec.site for n in self._store.items("Node")}
        found: list[dict[str, Any]] = []
        for node in self._nodes_of(app, ""):
            if sites.get(node) in own or not self._nodes.is_online(node):
                continue
            with contextlib.suppress(EdgewardError, msgspec.MsgspecError):
                data = b"".join([p async for p in call(self._nc, node, "app-versions", args, timeout=10.0)])
                found = max(found, msgspec.json.decode(data, type=list[dict[str, Any]]), key=len)
            if len(found) > 1:
                break
        if not found:
            raise Unreachable("no node that runs it answers", resource=str(app.key), remedy="see: edgeward get nodes")
        return json({"items": found})

    # -- functions -------------------------------------------------------------------------------------------------

    def _placed(self, function: Resource, wanted: str) -> list[str]:
        """The nodes that have the function, those that are there first."""
        nodes = [n for n in self._store.items("Node") if takes(function, n)]
        names = sorted((n.metadata.name for n in nodes), key=lambda n: (not self._nodes.is_online(n), n))
        if wanted and wanted not in names:
            raise NotFound(
                f"is not on node {wanted!r}",
                resource=str(function.key),
                remedy=f"its placement takes: {', '.join(names) or 'no node'}",
            )
        if not names:
            raise NotFound("its placement takes no node", resource=str(function.key), remedy="see: edgeward get nodes")
        return [wanted] if wanted else names

    @described(
        "Call a function: the body is the event's data, the answer is the function's own",
        query={"node": ("string", "On this node"), **INVOKE},
        media="*/*",
    )
    async def invoke(self, request: Request) -> Response:
        """Calls the function on a node that has it, or on ``?node=``."""
        function = self._store.get(Key("Function", request.path_params["ns"], request.path_params["name"]))
        data = await read_body(request, MAX_BODY)
        args = call_args(
            function.metadata.namespace, function.metadata.name, data, request.query_params, request.headers
        )
        node = self._placed(function, request.query_params.get("node", ""))[0]
        if not self._nodes.is_online(node):
            raise Unreachable(f"node {node} is not connected", resource=str(function.key), remedy="call it at the site")
        return await answer(call(self._nc, node, "invoke", args, timeout=SILENCE))

    @described(
        "What a function wrote, on all its nodes",
        query={"node": ("string", "On this node only"), **FUNCTION_LOGS},
        media="text/plain",
    )
    async def function_logs(self, request: Request) -> Response:
        function = self._store.get(Key("Function", request.path_params["ns"], request.path_params["name"]))
        nodes = self._placed(function, request.query_params.get("node", ""))
        args = log_args(function.metadata.namespace, function.metadata.name, request)
        return StreamingResponse(self._merge(nodes, args, "function-logs"), media_type="text/plain; charset=utf-8")

    @described(
        "Samples of a function on all its nodes, one JSON object a line; a node that is away is a line with its name "
        "and error",
        query={"node": ("string", "On this node only"), **SAMPLES},
        media=NDJSON,
    )
    async def function_samples(self, request: Request) -> Response:
        function = self._store.get(Key("Function", request.path_params["ns"], request.path_params["name"]))
        nodes = self._placed(function, request.query_params.get("node", ""))
        args = sample_args(function.metadata.namespace, function.metadata.name, request)
        lines = self._one_by_one(nodes, "function-samples", args, field="unreadable", what="samples", timeout=10.0)
        return StreamingResponse(lines, media_type=NDJSON)

    async def _one_by_one(
        self, nodes: list[str], verb: str, args: dict[str, Any], *, field: str, what: str, timeout: float
    ) -> AsyncGenerator[bytes, None]:
        """Lines of node after node: order is worth more than haste. What is wrong with one is a line of its own, with
        the reason in ``field``; half a line before it is left out."""
        for node in nodes:
            rest = b""
            try:
                if not self._nodes.is_online(node):
                    raise Unreachable(f"is not connected; its {what} are on it")
                async with contextlib.aclosing(call(self._nc, node, verb, args, timeout=timeout)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        whole, _, rest = (rest + piece).rpartition(b"\n")
                        if whole:
                            yield whole + b"\n"
            except EdgewardError as e:
                yield msgspec.json.encode({"node": node, field: str(e)}) + b"\n"

    @described("How a function does on each of its nodes: calls, failures, latencies, instances")
    async def function_metrics(self, request: Request) -> Response:
        function = self._store.get(Key("Function", request.path_params["ns"], request.path_params["name"]))
        nodes = self._placed(function, request.query_params.get("node", ""))
        args = {"namespace": function.metadata.namespace, "name": function.metadata.name}
        return json({"nodes": await asyncio.gather(*(self._numbers(node, args) for node in nodes))})

    async def _numbers(self, node: str, args: dict[str, Any]) -> dict[str, Any]:
        try:
            if not self._nodes.is_online(node):
                raise Unreachable("is not connected")
            data = b"".join([p async for p in call(self._nc, node, "function-metrics", args, timeout=15.0)])
            found: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        except (EdgewardError, msgspec.MsgspecError) as e:
            return {"node": node, "unreadable": str(e)}
        return {**found, "node": node}

    @described("The versions of a function that are kept, the present one last")
    async def function_versions(self, request: Request) -> Response:
        function = self._store.get(Key("Function", request.path_params["ns"], request.path_params["name"]))
        return json({"items": self._history.of(function.metadata.namespace, function.metadata.name)})

    @described(
        "Messages that no call of a function answered, on all its nodes, a JSON object a line",
        query={"node": ("string", "On this node only")},
        media=NDJSON,
    )
    async def letters(self, request: Request) -> Response:
        return self._letters(request, "list")

    @described(
        "Call a function again with its dead letters, or drop them",
        query={"node": ("string", "On this node only"), **LETTERS},
        media=NDJSON,
    )
    async def letters_done(self, request: Request) -> Response:
        return self._letters(request, doing(request))

    def _letters(self, request: Request, do: str) -> Response:
        function = self._store.get(Key("Function", request.path_params["ns"], request.path_params["name"]))
        nodes = self._placed(function, request.query_params.get("node", ""))
        args = letter_args(function.metadata.namespace, function.metadata.name, do)
        lines = self._one_by_one(
            nodes, "function-deadletters", args, field="error", what="dead letters", timeout=SILENCE
        )
        return StreamingResponse(lines, media_type=NDJSON)

    async def _merge(self, nodes: list[str], args: dict[str, Any], verb: str = "logs") -> AsyncGenerator[bytes, None]:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(64)
        several, records = len(nodes) > 1, verb == "function-logs" and bool(args["json"])

        async def one(node: str) -> None:
            # records name their node themselves
            marked = Marked(f"[{node}] ".encode() if several and not records else b"", whole=several)
            try:
                if not self._nodes.is_online(node):
                    raise Unreachable(f"node {node} is not connected; its logs are on it")
                async with contextlib.aclosing(self._again(node, verb, args)) as pieces:
                    async for piece in pieces:
                        if data := marked.feed(piece):
                            await queue.put(data)
            except EdgewardError as e:
                await queue.put(marked.rest() + problem_line(str(e), node, as_json=records))
            except Exception:
                log.exception("%s of node %s", verb, node)
                why = "the hub failed; its log says why"
                await queue.put(marked.rest() + problem_line(why, node, as_json=records))
            # not where this is cancelled: then nobody takes anything out any more, and it would wait for ever
            await queue.put(marked.rest())
            await queue.put(None)

        # no task group: a reader that goes ends this at its `yield`, and a group makes an error of that
        tasks = [asyncio.create_task(one(n)) for n in nodes]
        open_ = len(tasks)
        try:
            while open_:
                piece = await queue.get()
                if piece is None:
                    open_ -= 1
                elif piece:
                    yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _again(self, node: str, verb: str, args: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """A node's answer; what is followed goes on behind its last mark when the node's agent ends and comes again."""
        mark: dict[str, str] = {}
        while True:
            try:
                asked = call(self._nc, node, verb, {**args, "after": mark} if mark else args)
                async with contextlib.aclosing(asked) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        mark = getattr(piece, "mark", mark)
                        yield piece
                return
            except Unreachable:
                if not (mark and args.get("follow")):
                    raise
            await asyncio.sleep(1.0)  # the pace of asking for a node that is away

    @described("What nodes and apps use now")
    async def top(self, request: Request) -> Response:
        """Present use of processor and memory, asked of every node that is there."""
        node_seen, app_seen = top_sift(request)
        nodes = [n.metadata.name for n in self._store.items("Node")]

        async def one(node: str) -> dict[str, Any]:
            with contextlib.suppress(EdgewardError, msgspec.DecodeError):
                if self._nodes.is_online(node):
                    data = b"".join([p async for p in call(self._nc, node, "usage", {}, timeout=3.0)])
                    usage: dict[str, Any] = msgspec.json.decode(data)
                    return usage
            return {"nodes": [{"name": node, "online": False}], "apps": []}

        answers = await asyncio.gather(*(one(n) for n in nodes))
        return json(
            {
                "nodes": [n for a in answers for n in a["nodes"] if node_seen(n)],
                "apps": [x for a in answers for x in a["apps"] if app_seen(x)],
            }
        )

    # -- streams ------------------------------------------------------------------------------------------

    @described("The streams that exports filled")
    async def streams(self, request: Request) -> Response:
        items = await self._streams.list()
        return json({"items": [i for i in items if self._may_read(request, str(i["name"]))]})

    def _may_read(self, request: Request, stream: str) -> bool:
        """A stream is read by who may read all Exports that fill it; one that none fills any more, by who may all."""
        who = principal(request)
        filling = [
            e for e in self._store.items("Export") if e.spec.to.hub is not None and e.spec.to.hub.stream == stream
        ]
        if not filling:
            return who.may(Ask("streams", "Export"))
        return all(who.may(ask_of("streams", e)) for e in filling)

    @described(
        "The readings of a stream, a JSON object a line",
        query={
            "from": ("integer", "From this number on; 0: from the oldest"),
            "limit": ("integer", "At most so many; 0: all"),
            **FOLLOW,
        },
        media=NDJSON,
    )
    async def stream(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not self._may_read(request, name):
            raise principal(request).refusal(Ask("streams", "Export", None, name))
        limit = number(request, "limit", 0)
        items = await self._streams.reader(name, number(request, "from", 0), follow=flag(request, "follow"))
        return ndjson(_limited(items, limit) if limit else items)


async def _limited(items: AsyncIterator[dict[str, Any]], limit: int) -> AsyncIterator[dict[str, Any]]:
    n = 0
    async for item in items:
        yield item
        n += 1
        if n >= limit:
            return
