"""A site in accelerated time: councils, links between them that are there or not, lose, and take their time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Collection, Iterable

import msgspec

from edgeward.nodes.voting import Council, PassOn, Report, Say, Told, Verdict

NAMES = ("a", "b", "c", "d", "e")


def told_of(report: Report) -> Told:
    """The signature is the author's name: a test that forges writes another one."""
    return Told(msgspec.msgpack.encode(report), report.node.encode())


class World:
    """``hears(a, b)``: whether ``b`` gets what ``a`` sends now."""

    def __init__(
        self, names: Iterable[str] = NAMES, *, delay: float = 0.01, loss: float = 0.0, seed: int = 1, step: float = 0.5
    ) -> None:
        self.now = 1000.0
        self.names = tuple(names)
        self.delay, self.loss, self.step = delay, loss, step
        self.random = random.Random(seed)
        self.skew = dict.fromkeys(self.names, 0.0)
        self.alive = set(self.names)
        self.hears: Callable[[str, str], bool] = lambda a, b: True
        self.lies: dict[str, Callable[[Report], Report]] = {}
        self.councils: dict[str, Council] = {}
        self.epochs = dict.fromkeys(self.names, 0)
        self.wire: list[tuple[float, int, str, str, Told]] = []
        self.sent = 0
        for name in self.names:
            self.start(name)

    def start(self, name: str, *, gone: Collection[str] = ()) -> None:
        self.epochs[name] += 1
        council = Council(name, "plant", self.epochs[name], self.now, gone=gone)
        council.members(self.names, self.now)
        self.councils[name] = council
        self.alive.add(name)

    def steady(self, name: str) -> float:
        return self.now + self.skew[name]

    def links(self, up: Iterable[str]) -> None:
        up = set(up)
        for name, council in self.councils.items():
            council.link = name in up

    def send(self, a: str, b: str, told: Told) -> None:
        self.sent += 1
        if self.hears(a, b) and self.random.random() >= self.loss:
            took = self.delay * (0.5 + self.random.random())
            heapq.heappush(self.wire, (self.now + took, self.sent, a, b, told))

    def act(self, name: str, acts: list[Say | PassOn]) -> None:
        council = self.councils[name]
        for act in acts:
            if isinstance(act, PassOn):
                self.send(name, act.to, act.told)
                continue
            report = council.report(self.now, self.steady(name), to_all=act.to is None)
            report = self.lies.get(name, lambda r: r)(report)
            for peer in act.to if act.to is not None else self.names:
                if peer != name:
                    self.send(name, peer, told_of(report))

    def deliver(self, until: float) -> None:
        while self.wire and self.wire[0][0] <= until:
            self.now, _, a, b, told = heapq.heappop(self.wire)
            if b in self.alive:
                self.act(b, self.take(b, told, a))
        self.now = until

    def take(self, name: str, told: Told, via: str) -> list[Say | PassOn]:
        report = msgspec.msgpack.decode(told.body, type=Report)
        if told.signature != report.node.encode():
            return []  # what the shell's check of the signature does
        return self.councils[name].take(report, told, via, self.now, self.steady(name))

    def run(self, seconds: float, look: Callable[[], None] = lambda: None) -> None:
        for _ in range(round(seconds / self.step)):
            self.deliver(self.now + self.step)
            for name in sorted(self.alive):
                self.act(name, self.councils[name].tick(self.now))
            look()

    def verdicts(self, name: str) -> dict[str, Verdict]:
        return self.councils[name].vote(self.now)

    def states(self, name: str) -> dict[str, str]:
        return {n: v.state for n, v in self.verdicts(name).items()}
