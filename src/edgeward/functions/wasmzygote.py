"""The process that WebAssembly workers are forked from: a zygote (``zygote.py``) that has the engine loaded, too.

Engine and host functions are made here, once; each worker finds them and adds its own code. Where wasmtime cannot be
loaded on this machine, each worker says so.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from edgeward.functions import zygote


def _prepared() -> Callable[[socket.socket], None]:
    try:
        from edgeward.functions.wasmengine import Machine
        from edgeward.functions.wasmhost import Worker

        machine = Machine()
    except (ImportError, OSError, RuntimeError, AttributeError) as e:  # no library for it, or another one than we know
        why = f"wasmtime cannot be used here: {type(e).__name__}: {e}"

        def refuse(sock: socket.socket) -> None:
            raise RuntimeError(why)

        return refuse
    return lambda sock: Worker(sock, machine).run()


if __name__ == "__main__":
    zygote.main(_prepared())
