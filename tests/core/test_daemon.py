"""What all long-running processes share: the metrics' text."""

from __future__ import annotations

from edgeward.core.daemon import metrics_text


def test_metrics_are_written_in_full_with_their_type_and_meaning() -> None:
    text = metrics_text(
        {
            'ew_pending{queue="b"}': 0.0,
            'ew_pending{queue="a"}': 2.0,
            "ew_pending_bytes": 123456789.0,
            "ew_sent_total": 53000123.0,
            "ew_at": 1795600229.574,
        },
        {"ew_sent_total": "Readings sent."},
    )
    assert text.splitlines() == [
        "# TYPE ew_at gauge",
        "ew_at 1795600229.574",
        "# TYPE ew_pending_bytes gauge",
        "ew_pending_bytes 123456789",
        "# TYPE ew_pending gauge",
        'ew_pending{queue="a"} 2',
        'ew_pending{queue="b"} 0',
        "# HELP ew_sent_total Readings sent.",
        "# TYPE ew_sent_total counter",
        "ew_sent_total 53000123",
    ]
    assert text.endswith("\n")
