"""A process that is killed while it writes: ``python diskchild.py FOLDER``.

A line ``SEED`` on its input has it fork a child that keeps answers on the disk without end, one line for each that is
written (its process id first). A child that ended is reported by a line ``ended``.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import random
import sys
from pathlib import Path

from edgeward.gateway.cache import Stored
from edgeward.gateway.disk import Disk
from edgeward.gateway.entry import PIECE
from edgeward.gateway.files import Reader

LIMIT = 4 * 1024**2


@functools.lru_cache(500)
def body_of(path: str, version: str) -> bytes:
    """What an answer must be: it follows from its name and its version."""
    seed = hashlib.sha256(f"{path} {version}".encode()).digest()
    rng = random.Random(seed)
    size = rng.choice((0, 10, 5000, PIECE, PIECE + 1, 3 * PIECE, 9 * PIECE))
    return rng.randbytes(size)


def stored(path: str, version: str) -> Stored:
    fields = {"etag": version, "cache-control": "max-age=9999999999", "cache-tag": path}
    return Stored(
        200, "", list(fields.items()), fields, body_of(path, version), (), {}, 0.0, 0.0, 1e9, tags=frozenset({path})
    )


def disk(folder: Path, reader: Reader) -> Disk:
    tasks: set[asyncio.Task[None]] = set()

    def spawn(work):  # type: ignore[no-untyped-def]
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return Disk(folder, LIMIT, reader, spawn, lambda reason, text: None, lambda key: False)


async def write(folder: Path, seed: int) -> None:
    made = disk(folder, Reader())
    await made.open()
    rng = random.Random(seed)
    print(os.getpid(), flush=True)
    n = 0
    while True:
        n += 1
        path, version = f"/{rng.randrange(40)}", f"{seed}-{n}"
        answer = stored(path, version)
        if rng.random() < 0.3 and len(answer.body) > PIECE and (spool := made.spool(0)) is not None:
            for at in range(0, len(answer.body), 50_000):
                spool.write(answer.body[at : at + 50_000])
            answer.body = b""
            made.finish(spool, ("h", path), answer)
        else:
            made.keep(("h", path), answer)
        if rng.random() < 0.1:
            made.drop(("h", f"/{rng.randrange(40)}"))
        if n % 3 == 0:
            await made.settle()
        print(n, flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        child = os.fork()
        if not child:
            asyncio.run(write(folder, int(line)))
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
