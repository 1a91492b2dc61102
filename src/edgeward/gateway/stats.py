"""The gateway's numbers in Prometheus' names. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeward.gateway.match import Table
from edgeward.gateway.rules import BUCKETS, Rule
from edgeward.gateway.shelf import Shelf
from edgeward.gateway.upstream import Pool

if TYPE_CHECKING:
    from edgeward.gateway.disk import Disk

HELP = {
    "edgeward_gateway_requests_total": "Requests answered, by route and status.",
    "edgeward_gateway_refused_total": "Requests that no route took, or that were malformed, by status.",
    "edgeward_gateway_seconds_total": "Time that answers took, by route.",
    "edgeward_gateway_latency_total": "Answers that took at most `le` seconds, by route.",
    "edgeward_gateway_bytes_total": "Bytes of answers' bodies, by route.",
    "edgeward_gateway_retries_total": "Requests that were sent again, by route.",
    "edgeward_gateway_places_total": "Answers of routes with fallbacks, by route and place: here, site, cloud.",
    "edgeward_gateway_cache_total": "What the cache did, by route.",
    "edgeward_gateway_active": "Requests in progress, by route.",
    "edgeward_gateway_connections": "Connections of clients.",
    "edgeward_gateway_cache_bytes": "Bytes of stored answers.",
    "edgeward_gateway_cache_entries": "Keys of stored answers.",
    "edgeward_gateway_cache_evicted_total": "Keys that went because the memory was full.",
    "edgeward_gateway_cache_disk_bytes": "Bytes of stored answers on the disk.",
    "edgeward_gateway_cache_disk_entries": "Stored answers on the disk.",
    "edgeward_gateway_cache_disk_loads_total": "Answers that came from the disk.",
    "edgeward_gateway_cache_disk_evicted_total": "Answers that went because the disk's share was full.",
    "edgeward_gateway_cache_disk_skipped_total": "Answers that were kept in memory only: the disk did not take them.",
    "edgeward_gateway_cache_disk_dropped_total": "Files that were torn, changed or not ours.",
    "edgeward_gateway_upstream_opened_total": "Connections opened to targets.",
    "edgeward_gateway_upstream_reused_total": "Requests that went by a connection that was open.",
    "edgeward_gateway_compress_refused_total": "Answers that went out as they are: compression had its share of time.",
    "edgeward_gateway_engine_starts_total": "Starts of the engine before the plane.",
    "edgeward_gateway_engine_reloads_total": "Configurations given to the engine after its first.",
    "edgeward_gateway_engine_refused_total": "Configurations that the engine did not take.",
    "edgeward_gateway_handshakes_total": "TLS handshakes begun, by Listener.",
    "edgeward_gateway_handshakes_failed_total": "TLS handshakes that failed, by Listener.",
    "edgeward_gateway_certificate_end_seconds": "When a certificate that is shown ends, seconds since 1970.",
    "edgeward_gateway_log_dropped_total": "Lines that the access log did not keep.",
}


def disk_metrics(disk: Disk) -> dict[str, float]:
    p = "edgeward_gateway_cache_disk_"
    counts = {"loads": disk.loads, "evicted": disk.evicted, "skipped": disk.skipped, "dropped": disk.dropped}
    found = {f"{p}{name}_total": float(n) for name, n in counts.items()}
    return {f"{p}bytes": float(disk.used), f"{p}entries": float(len(disk)), **found}


def metrics(
    table: Table[Rule], shelf: Shelf, pool: Pool, refusals: Mapping[int, int], connections: int, dropped: int
) -> dict[str, float]:
    p = "edgeward_gateway_"
    values: dict[str, float] = {
        f"{p}connections": float(connections),
        f"{p}cache_bytes": float(shelf.used),
        f"{p}cache_entries": float(len(shelf)),
        f"{p}cache_evicted_total": float(shelf.evicted),
        f"{p}upstream_opened_total": float(pool.opened),
        f"{p}upstream_reused_total": float(pool.reused),
        f"{p}log_dropped_total": float(dropped),
    }
    for status, n in refusals.items():
        values[f'{p}refused_total{{status="{status}"}}'] = float(n)
    for rule in table.rules:
        c, route = rule.counters, f'route="{rule.key}"'
        for status, n in c.statuses.items():
            values[f'{p}requests_total{{{route},status="{status}"}}'] = float(n)
        for kind, n in c.places.items():
            values[f'{p}places_total{{{route},place="{kind}"}}'] = float(n)
        for word, n in c.cache.items():
            values[f'{p}cache_total{{{route},result="{word}"}}'] = float(n)
        total = 0
        for bound, n in zip((*map(str, BUCKETS), "+Inf"), c.buckets, strict=True):
            total += n
            values[f'{p}latency_total{{{route},le="{bound}"}}'] = float(total)
        values[f"{p}seconds_total{{{route}}}"] = c.seconds
        values[f"{p}bytes_total{{{route}}}"] = float(c.bytes)
        values[f"{p}retries_total{{{route}}}"] = float(c.retries)
        values[f"{p}active{{{route}}}"] = float(rule.active[0])
    return values
