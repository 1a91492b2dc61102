"""Workers that cannot be made: each a clear word to who wanted it, and the others go on."""

from __future__ import annotations

import asyncio
import resource
import sys
from pathlib import Path

import pytest

from edgeward.core.errors import Unreachable
from edgeward.functions.nursery import Nursery
from edgeward.functions.sandbox import Cage

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of another process are Linux's")


def test_a_zygote_that_cannot_fork_ends_nobody(tmp_path: Path) -> None:
    async def body() -> None:
        nursery = Nursery(tmp_path / "log", "test-nursery", "t")
        made = 0

        def cage() -> Cage:
            nonlocal made
            made += 1
            return Cage(f"t{made}", str(tmp_path / f"t{made}"))

        try:
            # probes answer once and end; no spare is kept for them
            first = await nursery.spawn(cage(), {}, probe=True)
            zygote = nursery.pid
            await first.ended
            had = resource.prlimit(zygote, resource.RLIMIT_NOFILE)
            resource.prlimit(zygote, resource.RLIMIT_NOFILE, (3, had[1]))
            for _ in range(3):
                with pytest.raises(Unreachable, match="cannot be forked: Too many open files"):
                    await nursery.spawn(cage(), {}, probe=True)
            resource.prlimit(zygote, resource.RLIMIT_NOFILE, had)
            again = await nursery.spawn(cage(), {}, probe=True)
            await again.ended
            assert nursery.pid == zygote
        finally:
            await nursery.close()
        assert not [p for p in tmp_path.iterdir() if p.is_dir()], "their folders went with them"

    asyncio.run(asyncio.wait_for(body(), 120))
