"""A caller's regular expression, held against log lines by a process of its own.

Python's expressions can take for ever on a line that was made for it. Here they run in a small process with nothing but
the expression: it is asked for a batch of lines at a time, has a bound on its processor time and its memory, and is
killed when it does not answer in time. So the node loses nothing but the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from collections.abc import Sequence

from edgeward.core.errors import Invalid

#: Characters of an expression; of a line that is looked at.
LONGEST, _LINE = 200, 16_384
#: Lines that are asked for at once, and seconds until they must be answered.
BATCH, _TIME = 200, 10.0
#: Processor time (seconds) and memory of the process.
_CPU, _MEMORY = 30, 512 << 20
_CODE = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_CPU}, {_CPU}))
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
search = re.compile(sys.argv[1]).search
for line in sys.stdin.buffer:
    print("".join("1" if search(text) else "0" for text in json.loads(line)), flush=True)
"""


def check(pattern: str) -> None:
    """Raises ``Invalid`` for what is no expression."""
    if len(pattern) > LONGEST:
        raise Invalid("is too long", field="?regex", remedy=f"at most {LONGEST} characters")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise Invalid(f"is no regular expression: {e}", field="?regex", remedy="as Python writes them") from None


class Sieve:
    """``async with Sieve(pattern) as sieve``: the process runs inside. The pattern must have been checked."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Sieve:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", _CODE, self._pattern,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={"LANG": "C.UTF-8"},
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def matches(self, texts: Sequence[str]) -> list[bool]:
        """For each text whether the expression is found in it. Raises ``Invalid`` when that takes too long."""
        found: list[bool] = []
        for at in range(0, len(texts), BATCH):
            found += await self._ask([t[:_LINE] for t in texts[at : at + BATCH]])
        return found

    async def _ask(self, texts: list[str]) -> list[bool]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise Invalid("is not being looked for", field="?regex")
        try:
            async with asyncio.timeout(_TIME):
                process.stdin.write(json.dumps(texts).encode() + b"\n")
                await process.stdin.drain()
                answer = (await process.stdout.readline()).strip()
        except (TimeoutError, ConnectionError):
            answer = b""
        if len(answer) != len(texts):
            raise Invalid(
                "takes too long on these lines", field="?regex", remedy="write a simpler expression, or --grep"
            )
        return [c == 0x31 for c in answer]
