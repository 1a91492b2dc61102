"""The demo's numbers: which there are, how they are counted, how they are told. Pure.

The acts in ``demo.py`` fill a result with these fields; :func:`tally` compares what a publisher saw acknowledged with
what the hub's stream holds, message by message, and :func:`rows` says it all for people.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from typing import Any

#: What an App may limit.
LIMITS = ("cpu", "memory", "pids", "user")
#: What ``--json`` tells, null where the run did not come so far.
FIELDS = (
    *("edge_p50_ms", "edge_p99_ms", "cloud_p50_ms", "cloud_p99_ms"),
    *("sent", "received", "duplicates", "lost", "out_of_order"),
    *("offline_requests", "offline_failures", "offline_restart_s", "backlog_first_s", "backlog_done_s"),
    *("local_change_applied", "hub_pss_mb", "agent_pss_mb", "nats_pss_mb", "enforced"),
)


def percentile(values: list[float], p: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))]


def tally(acked: Set[int], ids: Sequence[int]) -> dict[str, int]:
    """``acked``: the readings that were acknowledged; ``ids``: those of the hub's stream, in its order."""
    counts: dict[int, int] = {}
    for i in ids:
        counts[i] = counts.get(i, 0) + 1
    return {
        "sent": len(acked),
        "received": sum(1 for i in acked if i in counts),
        "duplicates": sum(n - 1 for n in counts.values()),
        "lost": sum(1 for i in acked if i not in counts),
        "out_of_order": sum(1 for a, b in itertools.pairwise(ids) if b < a),
    }


def enforced_of(result: dict[str, Any]) -> list[str]:
    """The limits that this machine enforces, by their short names."""
    return [what.rpartition(".")[2] for what in result["enforced"] or []]


def rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured, and its number, as people read it."""
    enforced = enforced_of(r)
    return [
        ("answered at the edge, p50 / p99", f"{r.get('edge_p50_ms')} / {r.get('edge_p99_ms')} ms"),
        ("answered by the cloud over 4g, p50 / p99", f"{r.get('cloud_p50_ms')} / {r.get('cloud_p99_ms')} ms"),
        ("readings acknowledged / at the hub", f"{r.get('sent')} / {r.get('received')}"),
        ("lost / twice / out of order", f"{r.get('lost')} / {r.get('duplicates')} / {r.get('out_of_order')}"),
        ("requests while cut / failed", f"{r.get('offline_requests')} / {r.get('offline_failures')}"),
        ("agent and broker back after SIGKILL, cut off", f"{r.get('offline_restart_s')} s"),
        ("backlog after the heal: first / all", f"{r.get('backlog_first_s')} / {r.get('backlog_done_s')} s"),
        (
            "memory: hub / agent / its nats-server",
            f"{r.get('hub_pss_mb')} / {r.get('agent_pss_mb')} / {r.get('nats_pss_mb')} MB",
        ),
        ("limits enforced on this machine", ", ".join(enforced) or "none"),
    ]
