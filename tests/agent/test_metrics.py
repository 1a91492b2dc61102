"""The agent's numbers have the names that Prometheus' rules ask for, and each a meaning."""

from __future__ import annotations

from edgeward.agent.metrics import HELP, numbers


def test_every_number_has_a_name_and_a_meaning() -> None:
    queue = {"accepted": 5, "pending": 0, "dropped_full": 1, "no_identity": 2, "last_ack_at": 1.5, "stream": "line1"}
    found = numbers(
        replica={"revision": 7, "resources": 3},
        link={"beats": 4, "full_syncs": 1},
        queues={"a": queue, "b": {"accepted": 6}},
        online=True,
        pending=2,
        memory=2.0**20,
        uptime=9.5,
        mesh={"said": 8, "otherSite": 1},
        site={"asked": 2, "lost": 1},
        peers=(2, 1),
    )
    assert found == {
        "edgeward_agent_revision": 7.0,
        "edgeward_agent_resources": 3.0,
        "edgeward_agent_pending_changes": 2.0,
        "edgeward_agent_memory_bytes": 1048576.0,
        "edgeward_agent_uptime_seconds": 9.5,
        "edgeward_link_up": 1.0,
        "edgeward_mesh_peers": 2.0,
        "edgeward_mesh_linked": 1.0,
        "edgeward_mesh_said_total": 8.0,
        "edgeward_site_asked_total": 2.0,
        "edgeward_site_lost_total": 1.0,
        "edgeward_mesh_other_site_total": 1.0,
        "edgeward_link_beats_total": 4.0,
        "edgeward_link_full_syncs_total": 1.0,
        'edgeward_outbox_accepted_total{queue="a"}': 5.0,
        'edgeward_outbox_pending{queue="a"}': 0.0,
        'edgeward_outbox_dropped_full_total{queue="a"}': 1.0,
        'edgeward_outbox_without_identity_total{queue="a"}': 2.0,
        'edgeward_outbox_last_ack_timestamp_seconds{queue="a"}': 1.5,
        'edgeward_outbox_accepted_total{queue="b"}': 6.0,
    }
    assert {name.partition("{")[0] for name in found} <= HELP.keys()
