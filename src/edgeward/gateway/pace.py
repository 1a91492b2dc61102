"""How often each client may ask: a bucket of tokens for each address, within a bound of memory. Pure.

A bucket fills at the rate and holds the burst. A client whose bucket is full is as good as unknown, so the memory of
many clients stays small: when there are too many, those who have not asked for longest are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict

#: Clients that are remembered for one route.
CLIENTS = 4096


class Pace:
    def __init__(self, rate: float, burst: int) -> None:
        #: Requests a second, and how many at once.
        self.rate, self.burst = rate, burst
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float) -> float:
        """0.0 when the client may ask now, else the seconds until it may."""
        tokens, at = self._clients.pop(client, (float(self.burst), now))
        tokens = min(float(self.burst), tokens + max(0.0, now - at) * self.rate)
        wait = 0.0
        if tokens >= 1.0:
            tokens -= 1.0
        else:
            wait = (1.0 - tokens) / self.rate
        self._clients[client] = (tokens, now)
        if len(self._clients) > CLIENTS:
            self._clients.popitem(last=False)
        return wait

    def __len__(self) -> int:
        return len(self._clients)
