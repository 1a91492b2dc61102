"""The functions' numbers in Prometheus' names. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: Upper bounds of the latency's histogram, seconds.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
HELP = {
    "edgeward_function_calls_total": "Calls that came to an end.",
    "edgeward_function_failed_total": "Calls without an answer, by what went wrong.",
    "edgeward_function_seconds_total": "Time that calls took.",
    "edgeward_function_latency_total": "Calls that took at most `le` seconds.",
    "edgeward_function_in_hand": "Calls that run or wait.",
    "edgeward_function_instances": "Instances that are there.",
    "edgeward_function_cold_starts_total": "Instances started.",
    "edgeward_function_canary_percent": "The share of calls that a canary is to have; nothing where there is none.",
    "edgeward_function_samples_total": "Samples that were kept.",
    "edgeward_function_samples_dropped_total": "Samples that were not kept for want of room.",
    "edgeward_function_log_dropped_total": "Log lines that were not kept because the disk could not keep up.",
    "edgeward_function_trigger_answered_total": "Messages that a call by a trigger answered.",
    "edgeward_function_trigger_failed_total": "Tries of such calls that failed.",
    "edgeward_function_trigger_dead_total": "Messages that no call answered.",
    "edgeward_function_trigger_dropped_total": "Messages passed over: over the backlog, or QoS 0 that came too fast.",
    "edgeward_function_trigger_pending": "Messages that wait at the broker.",
    "edgeward_function_trigger_connected": "Whether the trigger takes messages now.",
    "edgeward_function_dead_letters": "Dead letters that are kept.",
}


def metrics(counters: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """From ``Dispatcher.counters()``."""
    p, values = "edgeward_function_", dict[str, float]()
    for key, c in counters.items():
        function = f'function="{key}"'
        values[f"{p}calls_total{{{function}}}"] = float(c["calls"])
        values[f"{p}seconds_total{{{function}}}"] = float(c["seconds"])
        values[f"{p}in_hand{{{function}}}"] = float(c["in_hand"])
        values[f"{p}instances{{{function}}}"] = float(c["instances"])
        values[f"{p}cold_starts_total{{{function}}}"] = float(c["cold"])
        values[f"{p}log_dropped_total{{{function}}}"] = float(c["log_dropped"])
        if trial := c.get("canary"):
            values[f'{p}canary_percent{{{function},version="{trial[0]}"}}'] = float(trial[1])
        for name in ("samples", "samples_dropped"):
            if name in c:
                values[f"{p}{name}_total{{{function}}}"] = float(c[name])
        for kind, n in c["failed"].items():
            values[f'{p}failed_total{{{function},kind="{kind}"}}'] = float(n)
        total = 0
        for bound, n in zip((*map(str, BUCKETS), "+Inf"), c["latency"], strict=True):
            total += n
            values[f'{p}latency_total{{{function},le="{bound}"}}'] = float(total)
    return values


def quantile(latency: Sequence[int], q: float) -> float:
    """Seconds below which the share ``q`` of calls was answered, by the histogram: straight lines within a bucket, and
    the last bound for what was slower. 0 without calls."""
    total = sum(latency)
    if not total:
        return 0.0
    rank, below, least = q * total, 0, 0.0
    for bound, n in zip(BUCKETS, latency, strict=False):
        if n and below + n >= rank:
            return least + (bound - least) * (rank - below) / n
        below, least = below + n, bound
    return BUCKETS[-1]


def added(nodes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of several nodes as those of one."""
    whole: dict[str, Any] = {"failed": {}, "latency": [0] * (len(BUCKETS) + 1), "running": []}
    for n in nodes:
        for name in ("calls", "seconds", "cold", "in_hand", "samples", "samples_dropped", "log_dropped"):
            whole[name] = whole.get(name, 0) + n.get(name, 0)
        for kind, count in n.get("failed", {}).items():
            whole["failed"][kind] = whole["failed"].get(kind, 0) + count
        whole["latency"] = [a + b for a, b in zip(whole["latency"], n.get("latency", []), strict=False)]
        whole["running"] += n.get("running", [])
    return whole
