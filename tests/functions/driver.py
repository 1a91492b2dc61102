"""A dispatcher that loops in a handler until it is killed: ``python -m tests.functions.driver DIR``.

Says the pids of its zygote and of a worker that has a call it never ends, one line each.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import uvloop
from tests.core.pair import until
from tests.functions.node import Node, function

from edgeward.core.invocation import CallFailed

CODE = """
import os

def handler(event, context):
    open("kept", "w").write("x")
    while event.data:
        pass
    return str(os.getpid())
"""


async def main() -> None:
    async with Node(Path(sys.argv[1])) as node:
        code = CODE
        node.d.configure([function("f", code, scale={"max": 1}, limits={"timeout": "5m"})])
        worker = (await node.call("f")).body.decode()
        call = asyncio.create_task(node.call("f", b"loop"))
        await until(lambda: node.d.counters()["default/f"]["in_hand"] == 1)
        print(node.d.nursery.pid, worker, flush=True)
        with contextlib.suppress(CallFailed):
            await call


uvloop.run(main())
