"""A client's connection of HTTP/2 (RFC 9113): frames in, requests out, answers back as they come and as there is room.

The library ``h2`` knows frames and windows and does no I/O. Each stream is a desk of its own; they take turns, a frame
each, so a client that does not read one answer still gets the others. Of bodies a stream's window is given back only as
its target takes them, the connection's at once: a target that stalls stops its own stream alone. What a client makes us
do for nothing is bounded (``http2.Patience``), and so is what waits to be written.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import H2Error, ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import Frame, GoAwayFrame

from edgeward.gateway.cache import Stored
from edgeward.gateway.desk import BODY_TIME, HEAD_TIME, IDLE_TIME, PACE, Desk, refusal
from edgeward.gateway.http1 import HEAD_BYTES, Bad, Headers, Request
from edgeward.gateway.http2 import Patience, fields_of
from edgeward.gateway.peer import Peer
from edgeward.gateway.shelf import hit_fields

if TYPE_CHECKING:
    from edgeward.gateway.gate import Gate
    from edgeward.gateway.openings import Opening

logging.getLogger("hpack").setLevel(logging.WARNING)  # it tells every field's value

#: Streams at once; bytes that the client may send ahead on one, and on all of them together.
STREAMS, WINDOW, WINDOWS = 100, 64 * 1024 - 1, 1024 * 1024
#: Bytes of an answer that wait for the client before the target is stopped, and of frames before the client is left.
AHEAD, OWED = 64 * 1024, 1024 * 1024
#: Bytes that are looked at before it is asked again whether the client is worth it.
_SLICE = 4096
_ACK = 32 * 1024
#: The client took the stream back, and the library heard of it before us.
_GONE = (H2Error, KeyError)


class _Connection(H2Connection):
    # what is remembered of streams that are over: enough for what is still on the way, not 65,536
    MAX_CLOSED_STREAMS = 1024
    #: Frames since it was last looked.
    frames = 0

    #: The client goes, and still waits for what it asked for.
    going = False

    def _receive_frame(self, frame: Frame) -> list[events.Event]:
        self.frames += 1
        if isinstance(frame, GoAwayFrame) and not frame.stream_id and not frame.error_code:
            self.going = True  # the library would take it for the end of everything, answers too (RFC 9113, 6.8)
            return []
        return super()._receive_frame(frame)


class Stream(Desk):
    """One request and its answer."""

    def __init__(self, door: H2Door, number: int) -> None:
        super().__init__(door.gate, door.client)
        self.door, self.number = door, number
        self.listener, self.peer = door.listener, door.peer
        self.deadline = self.gate.loop.time() + IDLE_TIME
        #: The client's part is not over.
        self.body = False
        self._size = self._unacked = 0
        self._held = False
        self._head: list[tuple[bytes, bytes]] | None = None
        self._out: deque[memoryview] = deque()
        self._queued = 0
        self._ended = self.gone = False

    @property
    def open(self) -> bool:
        return not self.gone

    # -- the request's body ------------------------------------------------------------------------------------------

    def expect_body(self, request: Request) -> None:
        self._size = 0
        self.deadline = self.gate.loop.time() + BODY_TIME

    def go_on(self) -> None:
        self.door.interim(self)

    def on_data(self, data: bytes, flow: int) -> None:
        self._unacked += flow
        exchange = self.exchange
        if exchange is None:
            return  # refused: the client is told to stop
        now = self.gate.loop.time()
        self.deadline = min(now + BODY_TIME, self.deadline + len(data) / PACE)
        self._size += len(data)
        if self._size > exchange.rule.config.body:
            self._break(413, f"a body of more than {exchange.rule.config.body} bytes")
            return
        if data:
            exchange.on_request_body(data)
        if not self._held:
            self._acknowledge()

    def on_data_end(self) -> None:
        self.body = False
        if self.exchange is not None:
            self.deadline = self.gate.loop.time() + IDLE_TIME
            self.exchange.on_request_end()

    def _acknowledge(self) -> None:
        if self._unacked and self.body:
            self.door.acknowledge(self, self._unacked)
        self._unacked = 0

    def want_body(self, wanted: bool) -> None:
        self._held = not wanted
        if not wanted:
            self.deadline = self.gate.loop.time() + 3600.0  # the exchange has its own time
        elif self.body:
            self.deadline = self.gate.loop.time() + BODY_TIME
            self._acknowledge()

    # -- the answer --------------------------------------------------------------------------------------------------

    def head(self, status: int, fields: Headers, reason: str = "") -> None:
        self._head = fields_of(status, fields)
        self.door.wake(self)

    def write(self, data: bytes) -> None:
        if self.gone:
            return
        self._out.append(memoryview(data))
        self._queued += len(data)
        if self._queued > AHEAD and not self._full:
            self._full = True
            if self.exchange is not None:
                self.exchange.client_full(True)
        self.door.wake(self)

    def respond(self, request: Request, status: int, fields: Headers, body: bytes, reason: str = "") -> None:
        self.whole(status, fields, body, reason)
        self._end()

    def give(self, stored: Stored, now: float) -> None:
        self.whole(stored.status, hit_fields(stored, now), stored.body)
        self._end()

    def refuse(
        self, status: int, why: str, request: Request | None = None,
        *, keep: bool = False, headers: Headers | None = None, remedy: str = "",
    ) -> None:  # fmt: skip
        self.gate.refused(self.client, request, status)
        fields, body = refusal(status, why, request, close=False, headers=headers, remedy=remedy)
        self.whole(status, fields, body)
        self._end()

    def finished(self) -> None:
        self.exchange = None
        self._end()

    def _end(self) -> None:
        self._ended = True
        self.deadline = self.gate.loop.time() + IDLE_TIME
        if not self.gone:
            self.door.wake(self)

    def drop(self) -> None:
        """A cut answer looks like one."""
        self.exchange = None
        if not self.gone:
            self.door.reset(self, ErrorCodes.INTERNAL_ERROR)

    def lost(self) -> None:
        """The client took the request back, or is away."""
        self.gone = True
        self.waiting = False
        self._out.clear()
        self._make_room()
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.give_up()

    def send(self, connection: H2Connection) -> bool:
        """Writes one frame of what there is; whether more could be written now."""
        number = self.number
        if self._head is not None:
            alone = self._ended and not self._out
            connection.send_headers(number, self._head, end_stream=alone)
            self._head = None
            if alone:
                self.door.over(self)
            return bool(self._out)
        if not self._out:
            if self._ended:
                connection.end_stream(number)
                self.door.over(self)
            return False
        room = min(connection.local_flow_control_window(number), connection.max_outbound_frame_size)
        if room <= 0:
            return False
        piece = self._out[0]
        if len(piece) > room:
            self._out[0] = piece[room:]
            piece = piece[:room]
        else:
            self._out.popleft()
        last = self._ended and not self._out
        connection.send_data(number, piece, end_stream=last)
        self.door.patience.earn()
        self._queued -= len(piece)
        self.deadline = max(self.deadline, self.gate.loop.time() + IDLE_TIME)
        if last:
            self.door.over(self)
            return False
        if self._full and self._queued < AHEAD // 2:
            self._full = False
            self._make_room()
            if self.exchange is not None:
                self.exchange.client_full(False)
        return bool(self._out) or self._ended

    def check(self, now: float) -> None:
        if now < self.deadline:
            return
        if self.body and self.exchange is not None and not self._held:
            self._break(408, "the body comes too slowly")
        elif self.exchange is None and not self.waiting:
            self.door.reset(self, ErrorCodes.CANCEL)  # an answer that nobody takes


class H2Door(asyncio.Protocol):
    """One connection of one client."""

    def __init__(self, gate: Gate, listener: Opening | None = None, peer: Peer | None = None) -> None:
        self.gate, self.listener, self.peer = gate, listener, peer
        self.client = ""
        self.transport: asyncio.Transport | None = None
        now = gate.loop.time()
        self.deadline = now + HEAD_TIME
        self.patience = Patience(now)
        self.streams: dict[int, Stream] = {}
        self._served = False
        self._last = 0
        self._owed = 0
        self._full = self._leaving = self._in_events = self._scheduled = False
        #: Streams that have something to write and, as far as we know, room for it; they take turns.
        self._ready: dict[Stream, None] = {}
        config = H2Configuration(
            client_side=False, header_encoding=None,
            # what comes is read by http2.py, what goes was made here
            validate_inbound_headers=False, normalize_inbound_headers=False,
            validate_outbound_headers=False, normalize_outbound_headers=False,
        )  # fmt: skip
        self._h2 = _Connection(config)
        # what is a little over is still decoded and gets 431; what is far over ends the connection
        self._h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS,
                SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
                SettingCodes.MAX_HEADER_LIST_SIZE: HEAD_BYTES,
            },
        )

    # -- the transport's side ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = self.transport.get_extra_info("peername")
        self.client = str(peer[0]) if isinstance(peer, tuple) else ""
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(WINDOWS - WINDOW)
        if not self.gate.entered(self):
            self._leave(ErrorCodes.ENHANCE_YOUR_CALM)
            return
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gate.left(self)
        self.transport = None
        self._ready.clear()
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.lost()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._flush()

    def eof_received(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        self._in_events = True
        try:
            for at in range(0, len(data), _SLICE):
                happened = self._h2.receive_data(data[at : at + _SLICE])
                for event in happened:
                    if not self._on(event):
                        self._leave(ErrorCodes.ENHANCE_YOUR_CALM)
                        return
                if self._hoarding() or not self._silent(len(happened)):
                    self._leave(ErrorCodes.ENHANCE_YOUR_CALM)
                    return
        except ProtocolError:  # h2 has said GOAWAY with its code
            self._close()
        except H2Error:
            self._leave(ErrorCodes.INTERNAL_ERROR)
        finally:
            self._in_events = False
            self._leaving = self._leaving or self._h2.going
            self._flush()

    def _hoarding(self) -> bool:
        """More is being collected than one head or one frame may be: CONTINUATION frames without end (CVE-2024-27316),
        a frame that says it has 16 MiB. The library looks only when all of it is there."""
        buffer = self._h2.incoming_buffer
        if len(buffer._data) >= 3 and int.from_bytes(buffer._data[:3], "big") > self._h2.max_inbound_frame_size:
            return True
        block = buffer._headers_buffer
        return bool(block) and sum(len(f.data) for f in block) > 2 * HEAD_BYTES

    def _silent(self, happened: int) -> bool:
        """Frames that nobody hears of, those of streams that are over, cost as well."""
        silent, self._h2.frames = self._h2.frames - happened, 0
        return silent <= 0 or self.patience.spend(silent * Patience.SMALL, self.gate.loop.time())

    # -- events ------------------------------------------------------------------------------------------------------

    def _on(self, event: events.Event) -> bool:
        """False: enough of this client."""
        kind = type(event)
        if kind is events.RequestReceived:
            self._request(cast(events.RequestReceived, event))
            return True
        if kind is events.DataReceived:
            return self._data(cast(events.DataReceived, event))
        now = self.gate.loop.time()
        if kind is events.StreamEnded:
            stream = self._stream(event)
            if stream is not None:
                stream.on_data_end()
            return True
        if kind is events.WindowUpdated:
            number = cast(events.WindowUpdated, event).stream_id
            for stream in self.streams.values() if not number else filter(None, [self.streams.get(number)]):
                self._ready[stream] = None
            return self.patience.spend(Patience.SMALL, now)
        if kind is events.StreamReset:
            stream = self.streams.pop(cast(events.StreamReset, event).stream_id or 0, None)
            if stream is not None:
                self._ready.pop(stream, None)
                stream.lost()
            return self.patience.spend(Patience.COSTS, now)
        if kind is events.RemoteSettingsChanged:
            self._ready.update(dict.fromkeys(self.streams.values()))  # windows may be others now
            return self.patience.spend(Patience.COSTS, now)
        if kind is events.ConnectionTerminated:
            self._leaving = True
            return True
        small = kind in (events.PriorityUpdated, events.UnknownFrameReceived, events.SettingsAcknowledged)
        return self.patience.spend(Patience.SMALL if small else Patience.COSTS, now)

    def _stream(self, event: Any) -> Stream | None:
        return self.streams.get(event.stream_id or 0)

    def _request(self, event: events.RequestReceived) -> None:
        number = event.stream_id or 0
        if self._leaving:
            self._reset(number, ErrorCodes.REFUSED_STREAM)
            return
        self._last, self._served = number, True
        stream = Stream(self, number)
        stream.body = event.stream_ended is None
        self.streams[number] = stream
        try:
            headers = cast(list[tuple[bytes, bytes]], event.headers or [])
            request, rule = self.gate.read2(headers, not stream.body, self.peer)
        except Bad as e:
            stream.refuse(e.status, e.why)
        else:
            stream.take(request, rule)

    def _data(self, event: events.DataReceived) -> bool:
        flow = event.flow_controlled_length or 0
        self._owed += flow
        if self._owed >= _ACK:
            self._h2.increment_flow_control_window(self._owed)
            self._owed = 0
        stream = self._stream(event)
        if stream is not None:
            stream.on_data(bytes(event.data or b""), flow)
        wasted = not event.data and event.stream_ended is None
        return self.patience.spend(Patience.COSTS if wasted else 0.0, self.gate.loop.time())

    # -- for streams -------------------------------------------------------------------------------------------------

    def wake(self, stream: Stream) -> None:
        """It has something to write."""
        self._ready[stream] = None
        self._soon()

    def _soon(self) -> None:
        if not (self._in_events or self._scheduled):
            self._scheduled = True
            self.gate.loop.call_soon(self._scheduled_flush)

    def _scheduled_flush(self) -> None:
        self._scheduled = False
        self._flush()

    def interim(self, stream: Stream) -> None:
        with suppress(*_GONE):
            self._h2.send_headers(stream.number, [(b":status", b"100")])
        self._soon()

    def acknowledge(self, stream: Stream, size: int) -> None:
        with suppress(*_GONE):
            self._h2.increment_flow_control_window(size, stream.number)
        self._soon()

    def _reset(self, number: int, code: ErrorCodes) -> None:
        with suppress(*_GONE):
            self._h2.reset_stream(number, code)

    def reset(self, stream: Stream, code: ErrorCodes) -> None:
        if self.streams.pop(stream.number, None) is not None and self.transport is not None:
            self._reset(stream.number, code)
        self._ready.pop(stream, None)
        stream.lost()
        self._soon()

    def over(self, stream: Stream) -> None:
        """Its answer is written to the end. Of a body that is still coming nobody wants to know (RFC 9113, 8.1)."""
        if stream.body:
            self._reset(stream.number, ErrorCodes.NO_ERROR)
        self.streams.pop(stream.number, None)
        stream.gone = True
        self.deadline = self.gate.loop.time() + IDLE_TIME
        if self._leaving and not self.streams:
            self._soon()

    # -- writing -----------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        transport = self.transport
        if transport is None:
            return
        try:
            turns = 0
            while self._ready and not self._full:
                stream = next(iter(self._ready))
                del self._ready[stream]
                if not stream.gone and stream.send(self._h2) and not stream.gone:
                    self._ready[stream] = None
                turns += 1
                if not turns % 4:  # frames of 16 KiB
                    transport.write(self._h2.data_to_send())
        except H2Error:
            transport.abort()
            return
        data = self._h2.data_to_send()
        if data:
            transport.write(data)
        if transport.get_write_buffer_size() > OWED:
            transport.abort()  # it asks and does not read
        elif self._leaving and not self.streams and not transport.is_closing():
            transport.close()

    def _leave(self, code: ErrorCodes) -> None:
        """GOAWAY, and the end."""
        with suppress(H2Error):  # it is over for the library already
            self._h2.close_connection(code)
        self._close()

    def _close(self) -> None:
        transport = self.transport
        for stream in tuple(self.streams.values()):
            stream.lost()
        self.streams.clear()
        self._ready.clear()
        if transport is not None:
            transport.write(self._h2.data_to_send())
            transport.close()

    def retire(self) -> None:
        """Takes no further requests; what is in progress may end (RFC 9113, section 6.8)."""
        if self.transport is None or self._leaving:
            return
        self._leaving = True
        frame = GoAwayFrame(0, last_stream_id=self._last, error_code=ErrorCodes.NO_ERROR)
        self.transport.write(self._h2.data_to_send() + frame.serialize())
        self._soon()

    def drop(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def check(self, now: float) -> None:
        """Ends what takes too long; called several times a second."""
        for stream in tuple(self.streams.values()):
            stream.check(now)
        if now >= self.deadline and not self.streams:
            if self._leaving:
                self.drop()
            else:
                self.deadline = now + 2.0
                self.retire()

    @property
    def idle(self) -> bool:
        return not self.streams

    @property
    def beginning(self) -> bool:
        return False  # then it is idle: there is no stream yet

    @property
    def idle_since(self) -> float:
        return self.deadline - (IDLE_TIME if self._served else HEAD_TIME)
