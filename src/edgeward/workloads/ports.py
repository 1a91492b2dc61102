"""The ports of an instance: the declared ones, and free ones for the rest.

A free port is found by trying to bind it. An instance gets its predecessor's ports if it can, so that who knows them
goes on; ``edge.py`` keeps them with the app's state.
"""

from __future__ import annotations

import random
import socket

from edgeward.core.errors import EdgewardError
from edgeward.workloads.spec import AppSpec

_PORTS = (20000, 31999)  # below the range that the kernel uses for outgoing connections


def choose(spec: AppSpec, before: dict[str, int], taken: set[int]) -> dict[str, int]:
    """A port for each that the spec names; those of ``before`` where nobody else has taken them.

    ``taken``: those of the node's instances; what is found joins them. Raises ``EdgewardError`` when none is free.
    """
    found: dict[str, int] = {}
    for port in spec.ports:
        if port.port is not None:
            found[port.name] = port.port
            continue
        for n in range(200):
            candidate = random.randint(*_PORTS)  # noqa: S311 - spreading, not secrecy
            if n == 0:
                candidate = before.get(port.name, candidate)
            if candidate in taken:
                continue
            with socket.socket() as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    s.bind(("", candidate))
                except OSError:
                    continue
            found[port.name] = candidate
            taken.add(candidate)
            break
        else:
            raise EdgewardError("no free port found", field="$.spec.ports", remedy="free some ports of 20000-31999")
    return found
