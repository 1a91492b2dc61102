"""The small HTTP client of the command line: the hub over HTTPS, a node's agent over its unix socket.

In come API calls by kind and name, out go plain documents, event streams, or the error that the server's problem
document stands for. Standard library only, because start-up time is part of the product. It never retries a write;
what to do about a conflict is the caller's decision.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode, urlsplit

from edgeward.cli.context import AGENT_SOCKET_ENV, LOCAL, TOKEN_ENV, Context, load_context
from edgeward.core.authz import is_access_token
from edgeward.core.errors import EdgewardError, Unreachable, from_problem
from edgeward.core.registry import Kind

CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 60.0
#: A function may take 15 minutes.
CALL_TIMEOUT = 930.0
PAGE = 500
#: sun_path holds 108 bytes on Linux, 104 on macOS, with the closing zero.
_SOCKET_PATH_MAX = 100
_AF_UNIX_NAME = "unix://"

Doc = dict[str, Any]


def _connect_unix(path: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        if len(os.fsencode(path)) < _SOCKET_PATH_MAX or sys.platform != "linux":
            sock.connect(path)
            return sock
        # A deep data directory makes the path too long for the address; its directory's descriptor is short.
        fd = os.open(Path(path).parent, os.O_PATH | os.O_DIRECTORY)
        try:
            sock.connect(f"/proc/self/fd/{fd}/{Path(path).name}")
        finally:
            os.close(fd)
    except BaseException:
        sock.close()
        raise
    return sock


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = _connect_unix(self._path, self.timeout or CONNECT_TIMEOUT)


class _NamedConnection(http.client.HTTPSConnection):
    """TLS to a server whose certificate is for another name than the address that it is reached by."""

    def __init__(self, host: str, port: int | None, *, timeout: float, context: Any, name: str) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._tls, self._name = context, name

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), self.timeout)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self._name)


class Api:
    """One server's API. Use it as a context manager, or call :meth:`close`."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        ca_file: str | None = None,
        node: str = "",
        who: str = "the server",
        remedy: str = "",
        connect_timeout: float = CONNECT_TIMEOUT,
    ) -> None:
        self.url = url
        #: The node whose own API this is, if it is one over TLS: its certificate is for its name.
        self.node = node
        self.who = who
        self._remedy = remedy
        self._token = token
        self._ca_file = ca_file
        self._connect_timeout = connect_timeout
        self._connection: http.client.HTTPConnection | None = None

    @property
    def token(self) -> str:
        return self._token or ""

    @property
    def ca_file(self) -> str | None:
        return self._ca_file

    @property
    def server_name(self) -> str:
        """The name that the certificate is for, when it is another one than the address."""
        from edgeward.core.certs import NODE_DOMAIN

        return self.node + NODE_DOMAIN if self.node else ""

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # -- the wire ------------------------------------------------------------------------------------------------

    def _open(self) -> http.client.HTTPConnection:
        timeout = self._connect_timeout
        if self.url.startswith(_AF_UNIX_NAME):
            return _UnixConnection(self.url.removeprefix(_AF_UNIX_NAME), timeout)
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname or "", parts.port
        except ValueError as e:
            raise self._unreachable(f"that is no address: {e}") from None
        if parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=timeout)
        import ssl

        try:
            tls = ssl.create_default_context(cafile=self._ca_file)
        except OSError as e:  # SSLError is one, too
            raise self._unreachable(f"the CA file {self._ca_file} cannot be read: {e.strerror or e}") from None
        if self.node:
            from edgeward.core.certs import NODE_DOMAIN

            return _NamedConnection(host, port, timeout=timeout, context=tls, name=self.node + NODE_DOMAIN)
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=tls)

    def _unreachable(self, why: str) -> Unreachable:
        return Unreachable(f"{self.who} at {self.url} cannot be reached: {why}", remedy=self._remedy)

    def _reason(self, e: Exception) -> str:
        if isinstance(e, TimeoutError):
            return "no answer in time"
        if isinstance(e, http.client.RemoteDisconnected | ConnectionResetError):
            return "it closed the connection"
        verify = getattr(e, "verify_message", "")
        if verify:
            return f"its certificate is not trusted by {self._ca_file}: {verify}"
        if isinstance(e, OSError) and e.strerror:
            return e.strerror
        return str(e) or type(e).__name__

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        timeout: float | None = READ_TIMEOUT,
        fresh: bool = False,
        data: bytes | IO[bytes] | None = None,
        ok: bool = False,
    ) -> http.client.HTTPResponse:
        """The response, its status checked (unless ``ok``: whatever it is), its body not yet read.

        ``fresh``: on a connection of its own. ``data``: a body that is no document."""
        target = path + ("?" + urlencode(query) if query else "")
        all_headers = {"Accept": "application/json", "User-Agent": "edgeward-cli", **(headers or {})}
        if self._token:
            all_headers["Authorization"] = f"Bearer {self._token}"
        if body is not None:
            data = json.dumps(body, ensure_ascii=False).encode()
        if data is not None and content_type:
            all_headers["Content-Type"] = content_type
        reused = self._connection is not None and not fresh
        connection = self._open() if fresh or self._connection is None else self._connection
        try:
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(timeout)
            connection.request(method, target, body=data, headers=all_headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as e:
            connection.close()
            if connection is self._connection:
                self._connection = None
            # An idle connection may have been closed under us. Only a read may be sent twice.
            if reused and method == "GET" and not isinstance(e, TimeoutError):
                return self._send(method, path, query=query, headers=headers, timeout=timeout)
            raise self._unreachable(self._reason(e)) from None
        except BaseException:
            connection.close()
            raise
        if not fresh:
            self._connection = connection
        if response.status >= 400 and not ok:
            error = self._error(response)
            if fresh:
                connection.close()
            raise error
        return response

    def _error(
        self, response: http.client.HTTPResponse, special: Callable[[Doc], EdgewardError | None] = lambda _: None
    ) -> EdgewardError:
        try:
            data = response.read()
        except (OSError, http.client.HTTPException):
            data = b""
        doc: object = None
        with contextlib.suppress(ValueError):
            doc = json.loads(data)
        problem = doc if isinstance(doc, dict) else {}
        if (known := special(problem)) is not None:
            return known
        error = from_problem(problem, response.status)
        if isinstance(error, Unreachable):
            error.message = f"{self.who} at {self.url} answers, but: {error.message}"
        if response.status >= 500 and not problem:
            error.message = f"{self.who} at {self.url} failed with HTTP status {response.status}"
            error.remedy = "its log says why"
        if response.status == 401 and not error.remedy:
            error.remedy = "is the context file of this system? it carries the token"
        return error

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        timeout: float | None = READ_TIMEOUT,
    ) -> Doc:
        """One call; the answer's JSON object, ``{}`` when it has none."""
        response = self._send(
            method, path, query=query, body=body, content_type=content_type, headers=headers, timeout=timeout
        )
        try:
            data = response.read()
        except (OSError, http.client.HTTPException) as e:
            self.close()
            raise self._unreachable(self._reason(e)) from None
        if not data.strip():
            return {}
        try:
            doc = json.loads(data)
        except ValueError:
            raise self._unreachable("what answers there does not speak the Edgeward API") from None
        return doc if isinstance(doc, dict) else {"items": doc}

    def call(
        self, path: str, data: bytes, *, query: Mapping[str, str] | None = None, content_type: str = ""
    ) -> tuple[int, Sequence[tuple[str, str]], Iterator[bytes]]:
        """Calls a function: status, headers and body of its own answer, whatever the status. Raises what is not its
        answer: no such function, no such right, a limit that was met."""
        from edgeward.core.invocation import failed_of

        response = self._send(
            "POST", path, query=query, data=data, content_type=content_type, timeout=CALL_TIMEOUT, fresh=True, ok=True
        )
        kind = response.headers.get_content_type()
        if response.status >= 400 and (kind == "application/problem+json" or "ew-invocation" not in response.headers):
            raise self._error(response, failed_of)
        return response.status, response.getheaders(), self._chunks(response)

    def upload(self, path: str, data: bytes | Path) -> Doc:
        """PUTs bytes, or a file's; the answer's document."""
        with contextlib.ExitStack() as stack:
            body: bytes | IO[bytes] = data if isinstance(data, bytes) else stack.enter_context(data.open("rb"))
            size = len(data) if isinstance(data, bytes) else data.stat().st_size
            response = self._send(
                "PUT",
                path,
                data=body,
                content_type="application/octet-stream",
                headers={"Content-Length": str(size)},
                timeout=CALL_TIMEOUT,
            )
        found = json.loads(response.read() or b"{}")
        return found if isinstance(found, dict) else {}

    def stream(
        self,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        accept: str = "*/*",
        follow: bool = False,
        method: str = "GET",
    ) -> Iterator[bytes]:
        """The body as it comes, in chunks. With ``follow`` the server may be silent for as long as it likes."""
        timeout = None if follow else READ_TIMEOUT
        yield from self._chunks(
            self._send(method, path, query=query, headers={"Accept": accept}, timeout=timeout, fresh=True)
        )

    def _chunks(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            while chunk := response.read1(65536):
                yield chunk
        except (OSError, http.client.HTTPException) as e:
            raise self._unreachable(f"the stream broke off: {self._reason(e)}") from None
        finally:
            response.close()

    def lines(self, path: str, **options: Any) -> Iterator[str]:
        """The body line by line, without line ends. A last line without one counts."""
        rest = b""
        for chunk in self.stream(path, **options):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield line.decode("utf-8", "replace").rstrip("\r")
        if rest:
            yield rest.decode("utf-8", "replace").rstrip("\r")

    def sse(
        self,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        note: Callable[[str, str], None] = lambda what, value: None,
    ) -> Iterator[tuple[str, Doc]]:
        """Server-sent events as (event, data). An event called ``ERROR`` is raised. ``note`` hears of ``open``, when
        the first line comes, and of each event's ``id`` when the event was taken."""
        event, data, number, silent = "", list[str](), "", True
        for line in self.lines(path, query=query, accept="text/event-stream", follow=True):
            if silent:
                silent = False
                note("open", "")
            if not line:
                if data:
                    doc = json.loads("\n".join(data))
                    if event.upper() == "ERROR":
                        raise from_problem(doc)
                    yield event or "message", doc
                if number:
                    note("id", number)
                event, data, number = "", [], ""
                continue
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                event = value
            elif name == "data":
                data.append(value)
            elif name == "id":
                number = value

    # -- resources -----------------------------------------------------------------------------------------------

    @staticmethod
    def path(kind: Kind, namespace: str | None, name: str | None = None) -> str:
        """``namespace`` None means all of them (or none, where the kind has none)."""
        base = "/api/v1" if not kind.namespaced or namespace is None else f"/api/v1/namespaces/{quote(namespace, '')}"
        return f"{base}/{kind.plural}" + (f"/{quote(name, '')}" if name is not None else "")

    def get(self, kind: Kind, namespace: str | None, name: str) -> Doc:
        return self.request("GET", self.path(kind, namespace, name))

    def list(self, kind: Kind, namespace: str | None, *, labels: str = "", fields: str = "") -> Doc:
        """All pages as one ``{items: [...], ...}``; the other members are the first page's."""
        query = _selectors(labels, fields) | {"limit": str(PAGE)}
        whole: Doc = {}
        while True:
            page = self.request("GET", self.path(kind, namespace), query=query)
            if not whole:
                whole = {**page, "items": list(page.get("items") or [])}
            else:
                whole["items"] += page.get("items") or []
            onward = _continue(page)
            if not onward:
                whole.pop("continue", None)
                return whole
            query["continue"] = onward

    def watch(
        self,
        kind: Kind,
        namespace: str | None,
        *,
        since: str = "",
        labels: str = "",
        fields: str = "",
        note: Callable[[str, str], None] = lambda what, value: None,
    ) -> Iterator[tuple[str, Doc]]:
        """Changes behind revision ``since`` (or from now on): (ADDED, MODIFIED, DELETED or BOOKMARK, resource).
        ``note`` as of :meth:`sse`; an id is the revision to go on behind."""
        query = _selectors(labels, fields) | {"watch": "true"}
        if since:
            query["resourceVersion"] = since
        return self.sse(self.path(kind, namespace), query=query, note=note)

    def create(self, kind: Kind, namespace: str | None, doc: Doc, *, dry_run: bool = False) -> Doc:
        return self.request("POST", self.path(kind, namespace), body=doc, query=_dry(dry_run))

    def replace(self, kind: Kind, namespace: str | None, name: str, doc: Doc, *, dry_run: bool = False) -> Doc:
        return self.request("PUT", self.path(kind, namespace, name), body=doc, query=_dry(dry_run))

    def patch(self, kind: Kind, namespace: str | None, name: str, patch: Doc) -> Doc:
        return self.request(
            "PATCH", self.path(kind, namespace, name), body=patch, content_type="application/merge-patch+json"
        )

    def delete(self, kind: Kind, namespace: str | None, name: str, *, dry_run: bool = False) -> Doc:
        return self.request("DELETE", self.path(kind, namespace, name), query=_dry(dry_run))


def _dry(dry_run: bool) -> dict[str, str]:
    return {"dryRun": "true"} if dry_run else {}


def _selectors(labels: str, fields: str) -> dict[str, str]:
    return {k: v for k, v in (("labelSelector", labels), ("fieldSelector", fields)) if v}


def _continue(page: Doc) -> str:
    """The next page's token: at the top, or in ``metadata`` as Kubernetes has it."""
    metadata = page.get("metadata")
    token = page.get("continue") or (metadata.get("continue") if isinstance(metadata, dict) else "")
    return str(token or "")


def revision(listing: Doc) -> str:
    """The store's revision that a list was read at, '' when it does not say."""
    metadata = listing.get("metadata")
    value = listing.get("resourceVersion") or (metadata.get("resourceVersion") if isinstance(metadata, dict) else "")
    return str(value or "")


def connect(context: str | None, at: str | None, *, connect_timeout: float = CONNECT_TIMEOUT) -> Api:
    """The API that `--context` and `--at` choose. No packet is sent yet."""
    socket_path = os.environ.get(AGENT_SOCKET_ENV)
    if at == LOCAL and socket_path:
        # On the box itself there need not be a context file.
        return _agent_api(socket_path, None, f"the agent ({AGENT_SOCKET_ENV})", connect_timeout)
    loaded: Context = load_context(context)
    if given := os.environ.get(TOKEN_ENV):
        loaded = replace(loaded, token=given)
    if at:
        node = loaded.node(at)
        if not node.api:
            raise Unreachable(
                f"the context {loaded.path} has no API address of node {node.name}", remedy="is its agent running?"
            )
        return _agent_api(node.api, loaded, f"node {node.name}", connect_timeout, node.name)
    if not loaded.hub_url and not loaded.nodes and loaded.path.is_dir():
        raise Unreachable(f"the hub in {loaded.path} does not run", remedy="wait, or look at: edgeward doctor")
    if not loaded.hub_url:
        raise Unreachable(
            f"the context {loaded.path} has no hub", remedy="name a node by --at NODE, or start a hub: `edgeward up`"
        )
    return Api(
        loaded.hub_url.rstrip("/"),
        token=loaded.token,
        ca_file=loaded.ca_file,
        who="the hub",
        remedy=f"is `edgeward up` running? its context is {loaded.path}; a node may answer: --at NODE",
        connect_timeout=connect_timeout,
    )


def _agent_api(address: str, context: Context | None, who: str, connect_timeout: float, name: str = "") -> Api:
    token = os.environ.get(TOKEN_ENV) or (context.token if context else None)
    if token and not is_access_token(token):
        token = None  # the hub's own; a node's socket is its owner's without one
    where = f", and is {context.path} its context" if context else ""
    remedy = f"is its agent running{where}?"
    url = address if "://" in address else _AF_UNIX_NAME + str(Path(address).expanduser())
    ca_file = context.ca_file if context else None
    return Api(url, token=token, ca_file=ca_file, node=name, who=who, remedy=remedy, connect_timeout=connect_timeout)
