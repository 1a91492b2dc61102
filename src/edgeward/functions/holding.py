"""What the node's nats-server holds for triggers: a consumer for each, and a stream for those by subject and event.

Only how they are made; which there should be is ``intake.py``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, DiscardPolicy, RetentionPolicy, StreamConfig

from edgeward.core.bus import Bus
from edgeward.functions.listener import ACK_WAIT, MAX_PENDING
from edgeward.functions.triggers import BUS_STREAM, MQTT_PREFIX, MQTT_STREAM, Taking, cover

#: Bytes that wait for triggers by subject and by event; the oldest go first.
MAX_BYTES = 256 << 20


async def have_consumer(bus: Bus, name: str, plan: Taking) -> None:
    """From here on nothing that the trigger takes is missed."""
    stream, prefix = (MQTT_STREAM, MQTT_PREFIX) if plan.kind == "mqtt" else (BUS_STREAM, "")
    subjects = [prefix + s for s in plan.subjects]
    config = ConsumerConfig(
        durable_name=name,
        deliver_policy=DeliverPolicy.NEW,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ACK_WAIT,
        max_deliver=-1,
        max_ack_pending=MAX_PENDING,
        filter_subjects=subjects if len(subjects) > 1 else None,
        filter_subject=subjects[0] if len(subjects) == 1 else None,
    )
    await bus.jetstream().add_consumer(stream, config)


def bus_config(subjects: Sequence[str]) -> StreamConfig:
    return StreamConfig(
        name=BUS_STREAM,
        subjects=cover(subjects),
        retention=RetentionPolicy.INTEREST,  # what no trigger waits for is not kept
        discard=DiscardPolicy.OLD,
        max_bytes=MAX_BYTES,
        no_ack=True,  # who asks on such a subject gets its answer from whom it asked
        num_replicas=1,
    )


async def have_stream(js: Any, config: StreamConfig, *, exactly: bool = False) -> None:
    """Has the stream be there with these subjects; with others beside, unless ``exactly``."""
    try:
        there = (await js.stream_info(config.name)).config
    except nats.js.errors.NotFoundError:
        await js.add_stream(config)
        return
    wanted = config.subjects if exactly else cover([*(there.subjects or []), *(config.subjects or [])])
    if sorted(there.subjects or []) != sorted(wanted or []):
        there.subjects = wanted
        await js.update_stream(there)
