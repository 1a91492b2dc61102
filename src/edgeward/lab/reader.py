"""Reads a stream of the hub's API, to the end or on and on: the witness of what arrived, and when.

It stands beside ``publisher.py``, the witness of what was sent; neither knows anything but the protocol it speaks.
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from edgeward.core.errors import EdgewardError


class Reader:
    """Follows the hub's stream and keeps when each reading arrived."""

    def __init__(self, url: str, ca_file: str, token: str, stream: str) -> None:
        self._args = (url, ca_file, token, stream)
        self.arrived: dict[int, float] = {}
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        at = 0
        while not self._halt.is_set():
            try:
                for doc in read_stream(*self._args, start=at, follow=True, timeout=2.0):
                    at = doc["seq"] + 1
                    self.arrived.setdefault(int(doc["payload"]["id"]), time.monotonic())
                    if self._halt.is_set():
                        return
            except (OSError, http.client.HTTPException, ValueError, EdgewardError):
                self._halt.wait(0.1)

    def end(self) -> None:
        self._halt.set()
        self._thread.join(5)


def read_stream(
    url: str, ca_file: str, token: str, stream: str, *, start: int = 0, follow: bool = False, timeout: float = 30.0
) -> Any:
    """The messages of a hub stream, decoded, one by one."""
    parts = urlsplit(url)
    context = ssl.create_default_context(cafile=ca_file)
    c = http.client.HTTPSConnection(str(parts.hostname), parts.port, timeout=timeout, context=context)
    try:
        path = f"/api/v1/streams/{stream}?from={start}" + ("&follow=true" if follow else "")
        c.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        answer = c.getresponse()
        if answer.status == 404:
            return
        if answer.status != 200:
            raise EdgewardError(f"the hub answered {answer.status} for the stream")
        for line in answer:
            yield json.loads(line)
    finally:
        c.close()
