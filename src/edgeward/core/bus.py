"""The connection to NATS: subjects in, messages out, and one honest error when nobody is there.

A thin layer over nats-py. It stays connected for ever (also through answers of the server after which nats-py gives
up), gives every wait a limit, and turns the client's many failures into :class:`Unreachable`, :class:`Conflict` and
:class:`TooLarge`. Nothing is sent late: what could not be sent when it was asked for is refused, not kept for a later
connection, so a caller that saw ``Unreachable`` may decide anew. It knows no subject's meaning and writes no file.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext

from edgeward.core.errors import Conflict, EdgewardError, NotFound, Refused, TooLarge, Unreachable
from edgeward.core.nkeys import NatsUser

log = logging.getLogger("edgeward.bus")

Handler = Callable[[Msg], Awaitable[None]]
#: Gives the answer, or None for no answer.
Service = Callable[[Msg], Awaitable[bytes | None]]

EXPECT_LAST = "Nats-Expected-Last-Subject-Sequence"
_WRONG_LAST = (10071, 10164)  # nats-server errors.json: JSStreamWrongLastSequenceErrF and ...ConstantErr
#: A stream at its bounds or a full disk: JSStreamStoreFailedF, JSInsufficientResourcesErr,
#: JSStorageResourcesExceededErr, JSAccountResourcesExceededErr. The server gives some of them the code 503, but the
#: message is certainly not there.
_NO_ROOM = (10077, 10023, 10047, 10002)
_CONNECT_WAIT = 2


class Ack(msgspec.Struct, frozen=True):
    """A stream's receipt for one message. It was on the stream's disk when this was sent."""

    stream: str
    seq: int
    duplicate: bool = False


class Stored(msgspec.Struct, frozen=True):
    """A message as a stream keeps it."""

    subject: str
    seq: int
    data: bytes
    headers: dict[str, str]


_T = TypeVar("_T")


async def cancellable(wait: Awaitable[_T]) -> _T:
    """Await ``wait`` such that a cancellation of this task is never lost.

    nats-py waits with ``asyncio.wait_for``, which up to Python 3.11 swallows a cancellation that comes in the same turn
    of the loop as the answer (CPython gh-86296), be that a result or an error: the task would run on for ever, and
    whoever ends it would hang.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        got = await wait
    except Exception as e:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError from e
        raise
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return got


class _PersistentClient(Client):
    """nats-py with three of its endings, its deafness to a cancellation and its hasty flush taken out."""

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        return await cancellable(super().request(*args, **kwargs))

    async def flush(self, *args: Any, **kwargs: Any) -> None:
        # nats-py writes the PING past what is still buffered: its PONG would vouch for less than was sent before
        await cancellable(self._flush_pending(force_flush=True))
        await cancellable(super().flush(*args, **kwargs))

    async def connect(self, *args: Any, **kwargs: Any) -> None:
        await cancellable(super().connect(*args, **kwargs))

    async def _process_err(self, err_msg: str) -> None:
        # nats-py closes for good on any -ERR but two; a server that is restarted or given new users sends such errors.
        error = nats.errors.Error(f"nats: {err_msg.strip()}")
        if "permissions violation" in err_msg.lower():
            await self._error_cb(error)
            return
        self._err = error
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _attempt_reconnect(self) -> None:
        # nats-py's loop ends on an error it did not think of and leaves a client that never connects again.
        while not self.is_closed:
            try:
                await super()._attempt_reconnect()
                return
            except Exception:
                log.exception("reconnecting failed, trying on")
                await asyncio.sleep(1)

    async def _process_connect_init(self) -> None:
        await super()._process_connect_init()
        # Whoever sent what was buffered meanwhile was told that it timed out, or will be. Subscriptions are replayed.
        self._pending = []
        self._pending_data_size = 0


class Bus:
    """One connection. Make it with :meth:`connect`, end it with :meth:`close`."""

    def __init__(self, client: Client, url: str) -> None:
        #: The nats-py client; the same object for the life of the bus.
        self.client = client
        self.url = url
        self._reconnected: list[Callable[[], None]] = []
        self._up = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._name = ""
        self._closing = False

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        name: str,
        user: NatsUser | None = None,
        username: str = "",
        password: str = "",
        inbox: str = "_INBOX",
        timeout: float = 10.0,
    ) -> Bus:
        """Connect as ``user`` (JWT) or ``username`` and ``password``; ``Unreachable`` after ``timeout`` seconds."""
        bus = cls(_PersistentClient(), url)
        bus._name = name
        options: dict[str, Any] = {
            "name": name,
            "inbox_prefix": inbox,
            "connect_timeout": _CONNECT_WAIT,
            "reconnect_time_wait": 0.25,
            "max_reconnect_attempts": -1,
            "ping_interval": 5,  # a client whose reader died is noticed by its missing pongs only
            "max_outstanding_pings": 2,
            "pending_size": 16 << 20,
            "flush_timeout": 10,
            "error_cb": bus._on_error,
            "disconnected_cb": bus._on_disconnected,
            "reconnected_cb": bus._on_reconnected,
            "closed_cb": bus._on_closed,
        }
        if user is not None:
            jwt, key = user.jwt.encode(), user.key
            options["user_jwt_cb"] = lambda: bytearray(jwt)
            options["signature_cb"] = lambda nonce: base64.b64encode(key.sign(nonce.encode()))
        elif username:
            options["user"], options["password"] = username, password
        try:
            async with asyncio.timeout(timeout):
                await bus.client.connect(url, **options)
        except (TimeoutError, OSError, nats.errors.Error) as exc:
            last = bus.client.last_error
            bus._closing = True
            with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
                async with asyncio.timeout(_CONNECT_WAIT):
                    await bus.client.close()
            raise Unreachable(f"no connection to {url} within {timeout:g} s: {last or exc}") from exc
        bus._up.set()
        return bus

    @property
    def connected(self) -> bool:
        return bool(self.client.is_connected)

    @property
    def server_id(self) -> str:
        """The id of the server that we are connected to."""
        return str(self.client._server_info.get("server_id", ""))

    async def wait_connected(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
        except TimeoutError:
            raise Unreachable(f"no connection to {self.url} for {timeout:g} s") from None

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` after each reconnection: what was in flight is in doubt. Gives what ends the calls."""
        self._reconnected.append(callback)

        def end() -> None:
            with contextlib.suppress(ValueError):
                self._reconnected.remove(callback)

        return end

    async def close(self, timeout: float = 3.0) -> None:
        """End the connection and the handlers' tasks. What was published before is sent first if that is possible."""
        self._closing = True
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
            async with asyncio.timeout(timeout):
                if self.connected:
                    await self.client.flush(timeout=max(1, int(timeout)))
                await self.client.close()

    # --- messages -----------------------------------------------------------------------------------------------------

    async def publish(
        self, subject: str, payload: bytes, *, headers: Mapping[str, str] | None = None, reply: str = ""
    ) -> None:
        """Hand a message to the server, without a receipt."""
        async with self._mapped(subject, 10.0):
            await self.client.publish(subject, payload, reply=reply, headers=dict(headers) if headers else None)

    async def flush(self, timeout: float = 5.0) -> None:
        """Wait until the server has processed everything published and subscribed so far."""
        async with self._mapped("flush", timeout):
            await self.client.flush(timeout=int(timeout) + 1)

    async def request(
        self, subject: str, payload: bytes = b"", *, timeout: float = 5.0, headers: Mapping[str, str] | None = None
    ) -> Msg:
        """Ask and wait for one answer. ``Unreachable`` at once when nobody serves ``subject``, or after ``timeout``."""
        async with self._mapped(subject, timeout):
            hdrs = dict(headers) if headers else None
            return await self.client.request(subject, payload, timeout=timeout + 1, headers=hdrs)

    async def request_via(self, subject: str, payload: bytes, reply_subject: str, *, timeout: float = 5.0) -> Msg:
        """Like :meth:`request`, with the answer on ``reply_subject``: one that the answering side may publish to.

        ``reply_subject`` must be new for each request and hard to guess.
        """
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        async with self._mapped(subject, timeout):
            sub = await self.client.subscribe(reply_subject, future=answer, max_msgs=1)
            try:
                await self.client.publish(subject, payload, reply=reply_subject)
                msg = await answer
            finally:
                with contextlib.suppress(nats.errors.Error, OSError):
                    await sub.unsubscribe()
            if msg.headers and msg.headers.get("Status") == "503" and not msg.data:
                raise nats.errors.NoRespondersError
            return msg

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", max_messages: int = 8192, max_bytes: int = 32 << 20
    ) -> Subscription:
        """Call ``handler`` for each message, one by one. Beyond the bounds new messages are dropped and logged."""

        async def guarded(msg: Msg) -> None:
            try:
                await handler(msg)
            except Exception:
                log.exception("handler of %s failed", msg.subject)

        async with self._mapped(subject, 10.0, connected=False):
            return await self.client.subscribe(
                subject, queue=queue, cb=guarded, pending_msgs_limit=max_messages, pending_bytes_limit=max_bytes
            )

    async def serve(
        self, subject: str, service: Service, *, node_token: int | None = None, queue: str = "", concurrency: int = 64
    ) -> Subscription:
        """Answer requests, up to ``concurrency`` at a time.

        ``node_token`` is the place (from 0) of the asking node's name in the subject. With it an answer goes only to
        that node's inbox: a reply subject is the asker's free choice, and ours may publish anywhere.
        An :class:`EdgewardError` of the service is answered as ``{"error": problem}`` in JSON with header ``Ew-Error``.
        """
        limit = asyncio.Semaphore(concurrency)

        async def answer(msg: Msg) -> None:
            headers = None
            try:
                data = await service(msg)
            except EdgewardError as exc:
                data, headers = json.dumps({"error": exc.problem()}).encode(), {"Ew-Error": exc.reason}
            except Exception:
                log.exception("service %s failed", msg.subject)
                failure = EdgewardError("the service failed; its log says why", resource=msg.subject)
                data, headers = json.dumps({"error": failure.problem()}).encode(), {"Ew-Error": failure.reason}
            finally:
                limit.release()
            if data is not None and msg.reply:
                try:
                    await self.publish(msg.reply, data, headers=headers)
                except EdgewardError as exc:
                    log.warning("answer to %s not sent: %s", msg.subject, exc)

        async def spawn(msg: Msg) -> None:
            if node_token is not None:
                asker = msg.subject.split(".")[node_token]
                if msg.reply and not msg.reply.startswith((f"_INBOX_{asker}.", "_R_.")):
                    log.warning("request on %s refused: its answer would go to %s", msg.subject, msg.reply)
                    return
            await limit.acquire()
            task = asyncio.create_task(answer(msg))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return await self.subscribe(subject, spawn, queue=queue)

    # --- JetStream ----------------------------------------------------------------------------------------------------

    def jetstream(self, domain: str = "", *, timeout: float = 5.0) -> JetStreamContext:
        """nats-py's JetStream context: of the server we are connected to, or of the ``domain`` behind it."""
        return self.client.jetstream(domain=domain or None, timeout=timeout)

    async def publish_acked(
        self,
        subject: str,
        payload: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        expect_last: int | None = None,
        timeout: float = 5.0,
    ) -> Ack:
        """Publish into whatever stream takes ``subject`` and wait for its receipt.

        ``expect_last`` is the stream sequence of the last message of this subject (0: none yet); ``Conflict`` when
        it is another; ``Refused`` when the stream or the disk is full: the message is not there. After ``Unreachable``
        it may or may not be there: ask :meth:`last_message`.
        """
        hdrs = dict(headers or {})
        if expect_last is not None:
            hdrs[EXPECT_LAST] = str(expect_last)
        msg = await self.request(subject, payload, timeout=timeout, headers=hdrs or None)
        try:
            doc = json.loads(msg.data)
            error = doc.get("error")
            if not error:
                return Ack(doc["stream"], int(doc["seq"]), bool(doc.get("duplicate", False)))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise EdgewardError("not a stream's receipt; a service answered instead", resource=subject) from exc
        text = str(error.get("description", error))
        if error.get("err_code") in _WRONG_LAST:
            raise Conflict(text, resource=subject)
        if error.get("err_code") in _NO_ROOM:
            raise Refused(f"no room: {text}", resource=subject, remedy="raise the bound, or free disk space")
        raise (Unreachable if error.get("code") == 503 else EdgewardError)(text, resource=subject)

    async def last_message(self, stream: str, subject: str, *, domain: str = "", timeout: float = 5.0) -> Stored | None:
        """The last message of ``subject`` in ``stream`` (which must have ``allow_direct``); None when there is none."""
        api = f"$JS.{domain}.API" if domain else "$JS.API"
        msg = await self.request(f"{api}.DIRECT.GET.{stream}.{subject}", timeout=timeout)
        headers = dict(msg.headers or {})
        status = headers.pop("Status", "")
        if status == "404":
            return None
        if status or "Nats-Sequence" not in headers:
            raise NotFound(f"no direct read of stream {stream}: {headers.get('Description', status)}", resource=subject)
        own = {k: v for k, v in headers.items() if k not in ("Nats-Stream", "Nats-Subject", "Nats-Sequence")}
        return Stored(headers["Nats-Subject"], int(headers["Nats-Sequence"]), msg.data, own)

    # --- inside -------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _mapped(self, subject: str, timeout: float, *, connected: bool = True) -> AsyncIterator[None]:
        if connected and not self.connected:
            raise Unreachable(f"not connected to {self.url}", resource=subject)
        try:
            async with asyncio.timeout(timeout):
                yield
        except nats.errors.MaxPayloadError as exc:
            limit = self.client.max_payload
            raise TooLarge(f"a message may have {limit} bytes", resource=subject) from exc
        except nats.errors.NoRespondersError as exc:
            raise Unreachable("nobody answers", resource=subject) from exc
        except TimeoutError as exc:  # nats.errors.TimeoutError is one too
            raise Unreachable(f"no answer within {timeout:g} s", resource=subject) from exc
        except (nats.errors.Error, OSError) as exc:
            raise Unreachable(str(exc) or type(exc).__name__, resource=subject) from exc

    async def _on_error(self, exc: Exception) -> None:
        if isinstance(exc, nats.errors.SlowConsumerError):
            log.warning("%s: subscription %s is too slow, a message was dropped", self._name, exc.subject)
        elif not self._closing and str(exc):
            # Refused connections come every quarter of a second while a server is away: the disconnect was logged once.
            log.log(logging.DEBUG if isinstance(exc, OSError) else logging.INFO, "%s: %s", self._name, exc)

    async def _on_disconnected(self) -> None:
        self._up.clear()
        if not self._closing:
            log.warning("%s: connection to %s lost", self._name, self.url)

    async def _on_reconnected(self) -> None:
        self._up.set()
        log.info("%s: connected to %s again", self._name, self.url)
        for callback in tuple(self._reconnected):
            callback()

    async def _on_closed(self) -> None:
        self._up.clear()
        if not self._closing:
            log.error("%s: the client gave the connection to %s up", self._name, self.url)
