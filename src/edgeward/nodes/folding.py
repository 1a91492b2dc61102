"""A status made of what nodes report, whatever one of them reports. Pure.

A node's report is a stranger's document: of an older or a newer release, or of one that was broken into. What a fold
cannot read of one node must not hide what all the others say; that node's report is left out, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Reports = Mapping[str, dict[str, Any]]
#: How a fold fails on a document that is not what it should be.
ODD = (TypeError, ValueError, AttributeError, LookupError, OverflowError)


def folded(fold: Callable[[Reports], dict[str, Any]], reports: Reports) -> tuple[dict[str, Any], list[str]]:
    """The status, and the nodes whose reports were left out of it. Raises what ``fold`` raises without any report."""
    try:
        return fold(reports), []
    except ODD:
        odd = [node for node in sorted(reports) if not _readable(fold, {node: reports[node]})]
        status = fold({n: r for n, r in reports.items() if n not in odd})
        return status, odd


def _readable(fold: Callable[[Reports], dict[str, Any]], report: Reports) -> bool:
    try:
        fold(report)
    except ODD:
        return False
    return True
