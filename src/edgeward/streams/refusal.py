"""When the node's broker has to take no more for an Export, and of which subjects. Pure.

In come what an Export's queue holds and whether it just refused a batch; out comes whether its topics are closed. The
subjects go to nats-server's configuration (``closed`` of ``core/natsconf.py``): a QoS 1 publisher gets no PUBACK and is
cut off, other topics notice nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Opened again when the queue is down to this share of its bounds: to open for one message is to flap. A batch is
#: up to a quarter of the bounds (``capture.py``), so a queue may refuse one when it is three quarters full.
_OPEN_BELOW = 0.5
#: nats-server reads what we write as a mapping's source: nothing that means something else there.
_TOKEN = re.compile(r"[\w/:@=+~-]+")


def is_full(closed: bool, blocked: bool, waiting: int, bound: int) -> bool:
    """``blocked``: the queue has no room for the batch that is next; ``waiting`` and ``bound`` in bytes."""
    return blocked or (closed and waiting > bound * _OPEN_BELOW)


def closable(subjects: Sequence[str]) -> bool:
    """Whether a broker can be told to take nothing on these subjects (of ``topics.filters``), and nothing else of it.

    nats-server refuses names and whole branches, no ``*`` (``core/natsconf.py``); and a first level is never one that
    the agent itself lives on.
    """
    for subject in subjects:
        first, *rest = subject.split(".")
        if first == "ew" or first.startswith("_INBOX"):
            return False
        if rest and rest[-1] == ">":
            rest = rest[:-1]
        if not all(_TOKEN.fullmatch(token) for token in (first, *rest)):
            return False
    return True
