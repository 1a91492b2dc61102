"""What a WebAssembly guest may ask of its node: publish, remember, Secrets, samples. More of the module ``edgeward``.

Each is a frame to the node and its answer (``core/invocation.py``); the guest waits. Lengths come back, or what went
wrong as a number below zero. What the node would refuse for its size alone is not sent. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from edgeward.core import invocation as wire
from edgeward.functions import wasi
from edgeward.functions.wasi import Memory, System

#: There is none; then by what the node says.
NONE = -1
ERRORS = {"refused": -2, "conflict": -3, "too-large": -4, "too-many": -5, "unavailable": -6}
_TOO_LARGE = ERRORS["too-large"]
#: name -> parameters, and after ``>`` what comes back when it is not 32 bits (d: a 64-bit float). Each key, value,
#: topic and buffer is a pointer and a length.
ASKS = {
    "publish": "iiiii",  # topic, data, QoS
    "state_get": "iiii",  # key, buffer: gives back the value's length (more than fits: nothing is written)
    "state_set": "iiiiI",  # key, value, revision that it must have: 0 none at all, -1 whatever is there
    "state_delete": "iiI",  # key, revision: 1 when it was there
    "state_keys": "iiii",  # prefix, buffer: gives back the length of the keys, a line each
    "revision": ">I",  # of what state_get or state_set was last about; 0: there was none
    "secret": "iiiiii",  # name, key, buffer: gives back the value's length
    "sample": "iiiid",  # input, output, score (NaN: none): 1 when it is kept
}


class Node(wasi.Host, Protocol):
    def ask(self, make: Callable[[str, int], wire.Ask]) -> wire.Answer:
        """The node's answer to what ``make(id of the call, number of the ask)`` gives. Raises ``wasi.Late``."""
        ...


class Asking(System):
    def __init__(
        self,
        host: Node,
        args: list[bytes],
        env: Callable[[], dict[str, str]],
        data: bytes,
        bound: int,
        secrets: dict[str, dict[str, str]],
    ) -> None:
        super().__init__(host, args, env, data, bound)
        self._node, self._secrets, self._largest = host, secrets, bound
        self._revision = 0

    def _ask(self, make: Callable[[str, int], wire.Ask]) -> tuple[int, Any]:
        """(0, the answer's value), or the error's number."""
        answer = self._node.ask(make)
        if answer.error is None:
            return 0, answer.value
        return ERRORS.get(answer.error[0], ERRORS["unavailable"]), None

    @staticmethod
    def _text(memory: Memory, at: int, size: int) -> str:
        """Keys and topics; what is longer than any may be is refused by the node."""
        return memory.read(at, min(size, 4096)).decode("utf-8", "replace")

    @staticmethod
    def _fill(memory: Memory, at: int, size: int, value: bytes) -> int:
        if len(value) <= size:
            memory.write(at, value)
        return len(value)

    def edgeward_publish(self, memory: Memory, topic: int, topic_size: int, data: int, size: int, qos: int) -> int:
        if size > self._largest:
            return _TOO_LARGE
        name, content = self._text(memory, topic, topic_size), memory.read(data, size)
        return self._ask(lambda id, ask: wire.Publish(id, ask, name, content, min(qos, 1)))[0]

    def edgeward_state_get(self, memory: Memory, key: int, key_size: int, at: int, size: int) -> int:
        name = self._text(memory, key, key_size)
        error, value = self._ask(lambda id, ask: wire.StateGet(id, ask, name))
        self._revision = 0
        if error:
            return error
        if value is None:
            return NONE
        self._revision = value[1]
        return self._fill(memory, at, size, value[0])

    def edgeward_state_set(self, memory: Memory, key: int, key_size: int, value: int, size: int, revision: int) -> int:
        if size > wire.MAX_VALUE:
            return _TOO_LARGE
        name, content = self._text(memory, key, key_size), memory.read(value, size)
        must = revision if 0 <= revision < 1 << 63 else None
        error, made = self._ask(lambda id, ask: wire.StateSet(id, ask, name, content, must))
        if not error:
            self._revision = made
        return error

    def edgeward_state_delete(self, memory: Memory, key: int, key_size: int, revision: int) -> int:
        name = self._text(memory, key, key_size)
        must = revision if 0 <= revision < 1 << 63 else None
        error, there = self._ask(lambda id, ask: wire.StateDelete(id, ask, name, must))
        return error or int(there)

    def edgeward_state_keys(self, memory: Memory, prefix: int, prefix_size: int, at: int, size: int) -> int:
        name = self._text(memory, prefix, prefix_size)
        error, keys = self._ask(lambda id, ask: wire.StateKeys(id, ask, name))
        return error or self._fill(memory, at, size, "\n".join(keys).encode())

    def edgeward_revision(self, memory: Memory) -> int:
        return self._revision

    def edgeward_secret(
        self, memory: Memory, name: int, name_size: int, key: int, key_size: int, at: int, size: int
    ) -> int:
        found = self._secrets.get(self._text(memory, name, name_size), {}).get(self._text(memory, key, key_size))
        return NONE if found is None else self._fill(memory, at, size, found.encode())

    def edgeward_sample(
        self, memory: Memory, input: int, input_size: int, output: int, output_size: int, score: float
    ) -> int:
        if input_size + output_size > self._largest:
            return _TOO_LARGE
        given, made = memory.read(input, input_size), memory.read(output, output_size)
        said = None if math.isnan(score) else score
        error, kept = self._ask(lambda id, ask: wire.Sample(id, ask, given, made, said))
        return error or int(kept)
