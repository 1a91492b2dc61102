"""What the node says to a process of the WebAssembly tier before the ordinary frames; how the engine is set. Pure."""

from __future__ import annotations

import msgspec

#: What changes the machine code that is made; part of the name under which it is kept.
CONFIG = "epoch,stack=512Ki,no-threads,no-memory64"


class Load(msgspec.Struct, array_like=True):
    """To a new process, before ``Init``, with descriptors: what it is to load.

    To serve: machine code of ``size`` bytes in the first. To compile: source in the first, room for machine code in
    the second, and what tells whether an instance can be made of it (``handler``, ``startup`` in seconds).
    ``memory``: bytes of a guest's memory; ``env``: its environment.
    """

    compile: bool
    size: int
    memory: int = 0
    env: dict[str, str] = {}
    handler: str = ""
    startup: float = 0.0


class Compiled(msgspec.Struct, array_like=True, tag=64):
    """From a process that compiled: bytes of machine code in the second descriptor, or why there are none."""

    size: int = 0
    error: str = ""
    #: The same source would have the same error.
    final: bool = True
