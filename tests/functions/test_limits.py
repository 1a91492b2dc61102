"""What `limits.tmp`, `limits.files` and `limits.cpu` mean to a handler, where this machine enforces them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.functions.node import Node, function, looped

CODE = """
import errno, os, time

def handler(event, context):
    try:
        if event.data == b"tmp":
            for n in range(64):
                with open(f"part{n}", "wb", buffering=0) as f:
                    if f.write(bytes(1 << 20)) < 1 << 20:
                        return "ENOSPC"
        if event.data == b"files":
            held = [open("/dev/null") for _ in range(200)]
        if event.data == b"cpu":
            began, used = time.monotonic(), time.process_time()
            while time.monotonic() - began < 1.5:
                pass
            return str((time.process_time() - used) / (time.monotonic() - began))
    except OSError as e:
        for n in range(64):
            if os.path.exists(f"part{n}"):
                os.unlink(f"part{n}")
        return errno.errorcode[e.errno]
    return "well"
"""


@looped
async def test_temporary_files_and_open_files_end_at_their_limit_and_the_instance_goes_on(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", CODE, limits={"tmp": "4Mi", "files": 32, "timeout": "60s"}, scale={"max": 1})])
        await node.phase("f", "Running")
        assert (await node.call("f", b"files")).body == b"EMFILE"
        # without a file system of its own each single file is bounded still (RLIMIT_FSIZE), not their sum
        answer = (await node.call("f", b"tmp")).body
        assert answer == (b"ENOSPC" if "tmp" in node.status("f")["enforced"] else b"well")
        assert (await node.call("f")).body == b"well"


@looped
async def test_a_function_gets_no_more_processor_than_its_limit(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        node.d.configure([function("f", CODE, limits={"cpu": 0.2, "timeout": "60s"})])
        await node.phase("f", "Running")
        if "cpu" not in node.status("f")["enforced"]:
            pytest.skip("this machine enforces no limits.cpu")
        # a busy machine only gives less
        assert float((await node.call("f", b"cpu")).body) < 0.5
