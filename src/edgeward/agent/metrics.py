"""The agent's own numbers under the names that ``/metrics`` gives them, and what each one means. Pure.

Those of the gateway and of functions come from the plane and have their meanings beside them, in their rooms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Counters of the outbox by Prometheus' rules of naming.
_METRIC = {
    **{k: f"{k}_total" for k in ("accepted", "forwarded")},
    **{f"dropped_{k}": f"dropped_{k}_total" for k in ("full", "age", "duplicate", "size")},
    "no_identity": "without_identity_total",
    "last_ack_at": "last_ack_timestamp_seconds",
}
HELP = {
    "edgeward_agent_memory_bytes": "Resident memory of the agent.",
    "edgeward_agent_pending_changes": "Local changes that the hub has not decided yet.",
    "edgeward_agent_revision": "Revision of the replica.",
    "edgeward_agent_resources": "Resources in the replica.",
    "edgeward_agent_uptime_seconds": "Since the agent started.",
    "edgeward_closed_refused_in_packets_total": "Packets to closed Services that were not from their site.",
    "edgeward_closed_refused_out_packets_total": "Packets to closed Services of other sites.",
    "edgeward_link_up": "1 while the hub answers.",
    "edgeward_link_beats_total": "Heartbeats that the hub answered.",
    "edgeward_link_syncs_total": "Syncs of desired state.",
    "edgeward_link_full_syncs_total": "Syncs that began from nothing.",
    "edgeward_link_shared_total": "Syncs of desired state that another node of the site had.",
    "edgeward_link_pushed_total": "Local changes sent to the hub.",
    "edgeward_link_reports_total": "Reports of state.",
    "edgeward_site_asked_total": "Questions to other nodes of the site for their open changes.",
    "edgeward_site_answered_total": "Such questions of other nodes.",
    "edgeward_site_lost_total": "Changes seen to lose against another node's of the site.",
    "edgeward_site_sent_for_total": "Changes of other nodes that the hub decided through this one.",
    "edgeward_mesh_peers": "Other nodes of the site.",
    "edgeward_mesh_linked": "Other nodes of the site with which keys were agreed on.",
    "edgeward_mesh_said_total": "Datagrams sent to other nodes of the site.",
    "edgeward_mesh_heard_total": "Datagrams of other nodes of the site that counted.",
    "edgeward_mesh_cards_total": "Cards of runs of other nodes.",
    "edgeward_mesh_garbage_total": "Datagrams that are none of ours.",
    "edgeward_mesh_strange_total": "Datagrams of a node, or a run of one, that is not known here.",
    "edgeward_mesh_other_site_total": "Cards of nodes that name another site.",
    "edgeward_mesh_forged_total": "Datagrams that the node they name did not make.",
    "edgeward_mesh_replayed_total": "Datagrams that had come before.",
    "edgeward_mesh_future_total": "Datagrams dated later than they came.",
    "edgeward_mesh_stale_total": "Datagrams that were held back.",
    "edgeward_mesh_early_total": "Datagrams dropped because their sender's clock was not measured yet.",
    "edgeward_mesh_flooded_total": "Datagrams and connections dropped because too many came.",
    "edgeward_mesh_answered_total": "Questions of other nodes of the site.",
    "edgeward_mesh_refused_total": "Connections that did not prove to be a node of the site.",
    "edgeward_mesh_unsent_total": "Datagrams that could not be sent.",
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


def numbers(
    *,
    replica: Mapping[str, float],
    link: Mapping[str, float],
    queues: Mapping[str, Mapping[str, Any]],
    online: bool,
    pending: int,
    memory: float,
    uptime: float,
    mesh: Mapping[str, int],
    site: Mapping[str, int],
    peers: tuple[int, int],
) -> dict[str, float]:
    """The samples by their names. ``queues``: the outbox's counters, queue by queue; ``memory`` in bytes, ``uptime`` in
    seconds; ``peers``: other nodes of the site, and those that are linked."""
    values = {f"edgeward_agent_{k}": float(v) for k, v in replica.items()}
    values |= {f"edgeward_link_{k}_total": float(v) for k, v in link.items()}
    values |= {f"edgeward_mesh_{'other_site' if k == 'otherSite' else k}_total": float(v) for k, v in mesh.items()}
    values |= {f"edgeward_site_{k}_total": float(v) for k, v in site.items()}
    values["edgeward_mesh_peers"], values["edgeward_mesh_linked"] = map(float, peers)
    values["edgeward_link_up"] = float(online)
    values["edgeward_agent_pending_changes"] = float(pending)
    values["edgeward_agent_memory_bytes"] = memory
    values["edgeward_agent_uptime_seconds"] = uptime
    for queue, counters in queues.items():
        for k, v in counters.items():
            if isinstance(v, int | float):
                values[f'edgeward_outbox_{_METRIC.get(k, k)}{{queue="{queue}"}}'] = float(v)
    return values
