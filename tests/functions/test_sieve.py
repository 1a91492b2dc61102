"""A caller's expression finds its lines, and one that would never end ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edgeward.core.errors import Invalid
from edgeward.functions import sieve as module
from edgeward.functions.logs import Line, LogFile, read
from edgeward.functions.sieve import BATCH, Sieve, check


def test_it_finds_what_the_expression_means() -> None:
    async def body() -> None:
        texts = [f"line {n} ü \n" for n in range(3 * BATCH)]
        async with Sieve(r"^line \d*7 ü") as sieve:
            assert await sieve.matches(texts) == [str(n).endswith("7") for n in range(3 * BATCH)]
            assert await sieve.matches([]) == []
            assert await sieve.matches(["\udc80"]) == [False]

    asyncio.run(body())


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "x" * 201, "(?P<a>.)(?P<a>.)"])
def test_what_is_no_expression_is_refused(pattern: str) -> None:
    with pytest.raises(Invalid) as e:
        check(pattern)
    assert e.value.field == "?regex"


def test_one_that_would_never_end_is_killed_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIME", 0.5)

    async def body() -> list[bytes]:
        file = LogFile(tmp_path / "f.log", 1 << 20)
        file.add(Line("2026-01-01T00:00:00.000Z", "info", "a" * 100))
        file.flush()
        pieces = read(file, lambda _: True, 10, follow=True, as_json=False, regex="(a|aa)+b")
        return [p async for p in pieces]

    (said,) = asyncio.run(asyncio.wait_for(body(), 60))
    assert said.startswith(b"edgeward: ?regex: takes too long on these lines")
