"""Clients of an app who measure: how long an answer takes, and whether one ever fails.

They speak plain HTTP, over one connection that stays open as a browser's does, and know nothing of Edgeward: what they
count is what a user of the app would see.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import Any


class Client:
    """One keep-alive HTTP connection, as a browser has it."""

    def __init__(self, port: int, timeout: float = 5.0) -> None:
        self._port, self._timeout = port, timeout
        self._c: http.client.HTTPConnection | None = None

    def get(self) -> dict[str, Any]:
        try:
            if self._c is None:
                self._c = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout)
            self._c.request("GET", "/")
            answer = self._c.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise http.client.HTTPException(f"status {answer.status}")
            doc: dict[str, Any] = json.loads(body)
            return doc
        except (OSError, http.client.HTTPException, ValueError):
            self.close()
            raise

    def close(self) -> None:
        if self._c is not None:
            self._c.close()
            self._c = None


def latencies(port: int, n: int) -> list[float]:
    """Milliseconds of ``n`` requests on one warm connection."""
    client = Client(port, 20.0)
    client.get()
    took = []
    for _ in range(n):
        t = time.perf_counter()
        client.get()
        took.append((time.perf_counter() - t) * 1000)
    client.close()
    return took


class Asker(threading.Thread):
    """Asks the edge for an answer, again and again, and counts failures. The app's port may move with its version."""

    def __init__(self, port: Callable[[], int]) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._halt = threading.Event()
        self.requests = self.failures = 0
        self.greetings: list[str] = []
        self.errors: list[str] = []

    def run(self) -> None:
        client, at = None, 0
        while not self._halt.wait(0.03):
            try:
                port = self._port()
                if client is None or port != at:
                    client, at = Client(port, 2.0), port
                self.requests += 1
                greeting = str(client.get()["greeting"])
                if not self.greetings or self.greetings[-1] != greeting:
                    self.greetings.append(greeting)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as e:
                self.failures += 1
                self.errors.append(f"{type(e).__name__}: {e}")

    def end(self) -> None:
        self._halt.set()
        self.join(5)
