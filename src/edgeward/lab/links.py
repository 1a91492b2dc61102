"""What a WAN link does to traffic, decided without any traffic.

In come a :class:`Profile` (what the link is like), the time, the size of a packet or chunk and three random numbers;
out comes a :class:`Fate`: when it arrives at the other end, or why it does not. :class:`Shaper` is one direction of
one site's link and is shared by everything that crosses it, so bandwidth is shared too.

Nothing here reads a clock, rolls dice or touches a socket. The shells around it are ``relay.py`` (TCP connections,
no root needed) and ``wan.py`` with
``namespaces.py`` (IP packets between network namespaces).

The model, in the order in which a packet meets it: a drop-tail queue; the serialization at the link's rate, which a
stall holds up; loss; the one-way delay with jitter, never reordered.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

#: Payload of one TCP segment on an Ethernet path; the unit in which a relay loses data.
SEGMENT = 1448
#: Shortest retransmission time-out of Linux (TCP_RTO_MIN), in seconds.
RTO_MIN = 0.2
#: Bytes on the way (behind the queue) per direction. Only a link with delay and no bandwidth limit can meet it.
MAX_FLIGHT = 16 * 2**20
_QUEUE_MIN, _QUEUE_MAX, _QUEUE_SECONDS = 32 * 2**10, 2**20, 0.5
_CHUNK_MAX, _CHUNK_SECONDS = 64 * 2**10, 0.02

Direction = Literal["up", "down"]
Drop = Literal["", "loss", "queue", "cut"]


def _finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; it must be a finite number")


class Stall(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The link stands still now and then, as a DSL modem does that retrains; each direction by itself."""

    every_s: Annotated[float, Meta(gt=0, le=86400, description="mean time between stalls, in seconds")]
    for_ms: Annotated[float, Meta(gt=0, le=600_000, description="length of a stall, in milliseconds")]

    def __post_init__(self) -> None:
        _finite(every_s=self.every_s, for_ms=self.for_ms)


class Profile(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a site's link to the hub is like. Up is from the site to the hub."""

    name: Annotated[str, Meta(min_length=1, max_length=63)] = "custom"
    delay_ms: Annotated[float, Meta(ge=0, le=60_000, description="least one-way delay, in milliseconds")] = 0.0
    jitter_ms: Annotated[
        float, Meta(ge=0, le=60_000, description="added to the delay, evenly between 0 and this; never reorders")
    ] = 0.0
    up_kbit: Annotated[
        float | None, Meta(description="bandwidth from site to hub in kbit/s (1 or more); absent: no limit")
    ] = None
    down_kbit: Annotated[
        float | None, Meta(description="bandwidth from hub to site in kbit/s (1 or more); absent: no limit")
    ] = None
    loss: Annotated[float, Meta(ge=0, le=1, description="part of the packets that is lost, 0 to 1")] = 0.0
    stall: Annotated[Stall | None, Meta(description="times at which the link stands still")] = None
    cut: Annotated[bool, Meta(description="nothing passes, and nobody is told")] = False

    def __post_init__(self) -> None:
        _finite(delay_ms=self.delay_ms, jitter_ms=self.jitter_ms, loss=self.loss)
        for name, rate in (("up_kbit", self.up_kbit), ("down_kbit", self.down_kbit)):
            if rate is not None and not 1 <= rate <= 100_000_000:
                raise ValueError(f"{name} is {rate:g}; it must be 1 to 100000000 kbit/s, or absent for no limit")

    @property
    def rtt(self) -> float:
        """Least round-trip time in seconds."""
        return 2 * self.delay_ms / 1000

    @property
    def silent(self) -> bool:
        """Nothing ever gets through: cut, or every packet is lost."""
        return self.cut or self.loss >= 1

    def bytes_per_second(self, direction: Direction) -> float:
        """The bandwidth of one direction; infinite without a limit."""
        kbit = self.up_kbit if direction == "up" else self.down_kbit
        return math.inf if kbit is None else kbit * 125


#: The links that can be named in a lab file.
BUILTIN: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(name="lan"),
        Profile(name="4g", delay_ms=35, jitter_ms=15, up_kbit=10_000, down_kbit=30_000, loss=0.002),
        Profile(name="satellite", delay_ms=300, jitter_ms=20, up_kbit=2_000, down_kbit=10_000, loss=0.01),
        Profile(
            name="bad-dsl",
            delay_ms=40,
            jitter_ms=10,
            up_kbit=256,
            down_kbit=2_000,
            loss=0.01,
            stall=Stall(every_s=60, for_ms=1500),
        ),
    )
}


class Draws(NamedTuple):
    """Three independent random numbers in [0, 1), one for each thing that chance decides."""

    loss: float
    jitter: float
    stall: float


class Fate(NamedTuple):
    """What becomes of a packet: it arrives ``at`` a time in seconds, or ``dropped`` names why not.

    ``late`` is what a reliable stream waits on top of ``at`` for its retransmissions (:meth:`Shaper.carry`).
    """

    at: float
    dropped: Drop = ""
    late: float = 0.0


class Shaper:
    """One direction of one site's link. Times are seconds of any clock that does not go backwards."""

    def __init__(self, profile: Profile, direction: Direction) -> None:
        self.direction: Direction = direction
        self._busy_until = -math.inf
        self._last_arrival = -math.inf
        self._queue: deque[tuple[float, int]] = deque()  # (time it leaves the queue, size)
        self._flight: deque[tuple[float, int]] = deque()  # (time it arrives, size)
        self._queued = 0
        self._flying = 0
        self._next_stall: float | None = None
        self.set_profile(profile)

    def set_profile(self, profile: Profile) -> None:
        """From now on the link is like this. What was accepted before keeps its time; newer traffic stays behind it."""
        self.profile = profile
        self._rate = profile.bytes_per_second(self.direction)
        self.queue_bytes = int(min(_QUEUE_MAX, max(_QUEUE_MIN, self._rate * _QUEUE_SECONDS)))
        #: How much a stream should hand over at once, so that streams which share the link take turns.
        self.chunk_bytes = int(min(_CHUNK_MAX, max(SEGMENT, self._rate * _CHUNK_SECONDS)))
        self._next_stall = None

    def backlog(self, now: float) -> int:
        """Bytes that wait for the link."""
        self._expire(now)
        return self._queued

    def offer(self, now: float, size: int, draws: Draws) -> Fate:
        """The fate of one packet of ``size`` bytes. A lost packet has used its bandwidth all the same."""
        if self.profile.cut:
            return Fate(now, "cut")
        self._expire(now)
        if self._queued + size > self.queue_bytes or self._flying + size > MAX_FLIGHT:
            return Fate(now, "queue")
        arrival = self._transmit(now, size, draws)
        return Fate(arrival, "loss") if draws.loss < self.profile.loss else Fate(arrival)

    def room_at(self, now: float, size: int) -> float:
        """When the queue has room for ``size`` more bytes: ``now``, or later. A stream waits instead of being dropped.

        Anything fits into an empty queue, so a chunk that is larger than the queue does not wait for ever.
        """
        self._expire(now)
        queued, at = self._queued, now
        for leaves, freed in self._queue:
            if queued + size <= self.queue_bytes:
                return at
            queued, at = queued - freed, leaves
        return at

    def carry(self, now: float, size: int, draws: Draws) -> Fate:
        """The fate of ``size`` bytes of a reliable stream: never dropped, but ``late`` by its retransmissions.

        A loss costs max(200 ms, RTT), doubled for each loss of the retransmission itself (RFC 6298), six at most. Only
        the stream that lost a segment waits for it: others that share the link go by. A cut link is the caller's
        business (hold the bytes back); see :attr:`Profile.silent`.
        """
        arrival = self._transmit(now, size, draws)
        loss, late = min(self.profile.loss, 0.99), 0.0
        rto = max(RTO_MIN, self.profile.rtt)
        chance = 1 - (1 - loss) ** math.ceil(size / SEGMENT)
        for _ in range(6):
            if draws.loss >= chance:
                break
            late, rto, chance = late + rto, rto * 2, chance * loss
        return Fate(arrival, "", late)

    def _transmit(self, now: float, size: int, draws: Draws) -> float:
        start = self._after_stall(max(now, self._busy_until), draws.stall)
        self._busy_until = leaves = start + size / self._rate
        delay = (self.profile.delay_ms + self.profile.jitter_ms * draws.jitter) / 1000
        # A path that does not reorder: a packet with less jitter waits for the one before it.
        self._last_arrival = arrival = max(self._last_arrival, leaves + delay)
        self._queue.append((leaves, size))
        self._queued += size
        self._flight.append((arrival, size))
        self._flying += size
        return arrival

    def _after_stall(self, start: float, draw: float) -> float:
        stall = self.profile.stall
        if stall is None:
            return start
        length = stall.for_ms / 1000
        gap = -stall.every_s * math.log1p(-min(draw, 1 - 1e-12))
        if self._next_stall is None or self._next_stall + length <= start:
            # Stalls come at random (exponential gaps), so those that met no traffic need no bookkeeping.
            self._next_stall = start + gap
        if self._next_stall <= start:
            start = self._next_stall + length
            self._next_stall = start + gap
        return start

    def _expire(self, now: float) -> None:
        while self._queue and self._queue[0][0] <= now:
            self._queued -= self._queue.popleft()[1]
        while self._flight and self._flight[0][0] <= now:
            self._flying -= self._flight.popleft()[1]


class Counts(Struct):
    """Traffic of one direction, as it came out at the far end, and what did not. A relay counts no packets."""

    packets: int = 0
    bytes: int = 0
    lost: int = 0  # by the profile's loss
    overflowed: int = 0  # by the drop-tail queue
    cut: int = 0  # by a cut

    def drop(self, why: Drop) -> None:
        if why == "loss":
            self.lost += 1
        elif why == "queue":
            self.overflowed += 1
        elif why == "cut":
            self.cut += 1

    def arrived(self, size: int, packets: int = 1) -> None:
        self.packets += packets
        self.bytes += size


class NodeCounters(Struct):
    """One node's uplink."""

    site: str
    up: Counts
    down: Counts
    connections: int = 0  # relays only: accepted so far
    active: int = 0  # relays only: open now
    refused: int = 0  # packets to nowhere or with a foreign source; relays: connections the target refused


class Counters(Struct):
    """All uplinks by node name, and each ordered pair that tried to talk over the WAN as ``from>to``.

    The hub is called ``hub``. A pair of two nodes is site-to-site traffic, which is dropped unless it was allowed;
    its attempts are then in ``cut``.
    """

    nodes: dict[str, NodeCounters]
    pairs: dict[str, Counts]
