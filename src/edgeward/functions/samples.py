"""What some calls were given and what was answered, kept on the node for those who look after a function or its model.

Off unless ``spec.samples`` is declared: inputs are people's data. In come calls that ended, and pairs that a handler
offers with a score; out go JSON lines in a file per function, within a budget per day and a cap, read at the node or,
through the hub, from all nodes. What a handler was told is kept is in the file by then.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core.invocation import CallFailed, Event, Reply
from edgeward.core.invocation import Sample as Offer
from edgeward.functions.logs import LogFile
from edgeward.functions.picks import Budget, SamplePlan


class Sample(msgspec.Struct, omit_defaults=True):
    """One line. ``input`` and ``output`` are text where they are UTF-8; else base64, and ``encoded`` names them."""

    time: str
    why: str
    node: str
    version: str
    invocation: str = ""
    type: str = ""
    datacontenttype: str = ""
    input: str = ""
    output: str = ""
    encoded: list[str] = []
    status: int = 0
    error: str = ""
    score: float | None = None
    tags: dict[str, str] = {}


def _text(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return base64.b64encode(data).decode(), True


def _line(sample: Sample, given: bytes, answered: bytes) -> Sample:
    sample.input, odd_input = _text(given)
    sample.output, odd_output = _text(answered)
    sample.encoded = [name for name, odd in (("input", odd_input), ("output", odd_output)) if odd]
    return sample


def of_call(
    time: str, why: str, node: str, event: Event, reply: Reply | None, error: CallFailed | None, version: str
) -> Sample:
    """The line of a call that ended."""
    sample = Sample(time, why, node, version, type=event.type, datacontenttype=event.datacontenttype)
    if reply is not None:
        sample.invocation, sample.status = reply.invocation, reply.status
    if error is not None:
        sample.invocation, sample.status, sample.error = error.invocation, error.status, error.kind
    return _line(sample, event.data, b"" if reply is None else reply.body)


def of_offer(time: str, node: str, invocation: str, offer: Offer, version: str) -> Sample:
    """The line of a pair that a handler offered."""
    sample = Sample(time, "score" if offer.score is not None else "offered", node, version, invocation)
    sample.score, sample.tags = offer.score, dict(offer.tags)
    return _line(sample, offer.input, offer.output)


def samples_path(folder: Path, namespace: str, name: str) -> Path:
    """Where a function's samples lie below the node's ``functions/``."""
    return folder / "samples" / namespace / f"{name}.jsonl"


def forget(folder: Path, namespace: str, name: str) -> None:
    """The samples of a function that is gone."""
    path = samples_path(folder, namespace, name)
    if path.parent.is_dir():
        LogFile(path, 0).remove()


class SampleFile:
    """The samples of one function on this node."""

    def __init__(self, path: Path, plan: SamplePlan) -> None:
        self.plan = plan
        self._file = LogFile(path, plan.keep)
        self._budget: Budget | None = None
        #: Samples that were kept, and that were not for want of room.
        self.kept = self.dropped = 0

    def replan(self, plan: SamplePlan) -> None:
        self.plan, self._file.cap = plan, plan.keep

    def has_room(self, time: str, size: int) -> bool:
        """Whether so many bytes may fit: asked before anything is made of them. What does not is counted."""
        budget, day = self._taken(time), time[:10]
        if size <= self.plan.per_day - (budget.used if budget.day == day else 0):
            return True
        self.dropped += 1
        return False

    def _taken(self, time: str) -> Budget:
        if self._budget is None:  # after a start: what was taken today is what lies there
            mark = f'"time":"{time[:10]}'.encode()
            lines = self._file.raw(lambda line: mark in line[:40])
            self._budget = Budget(time[:10], sum(map(len, lines)))
        return self._budget

    def keep(self, sample: Sample) -> bool:
        """Writes it, if the day's budget has room for it."""
        data = msgspec.json.encode(sample)
        if not self._taken(sample.time).take(sample.time[:10], len(data), self.plan.per_day):
            self.dropped += 1
            return False
        if not self._file.add_raw(data):
            self.dropped += 1
            return False
        lost = self._file.dropped
        self._file.flush()
        if self._file.dropped > lost:
            self.dropped += 1
            return False
        self.kept += 1
        return True


def wanted_lines(path: Path, since: str, why: str, limit: int) -> list[bytes]:
    """The newest ``limit`` lines, oldest first; ``since`` is a timestamp."""

    def is_asked(line: bytes) -> bool:
        try:
            sample = msgspec.json.decode(line, type=Sample)
        except msgspec.MsgspecError:
            return False
        return sample.time >= since and (not why or sample.why == why)

    return LogFile(path, 0).raw(is_asked)[-limit:] if path.parent.is_dir() else []


def counters(file: SampleFile | None) -> dict[str, Any]:
    return {"samples": file.kept, "samples_dropped": file.dropped} if file is not None else {}
