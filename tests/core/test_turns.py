"""Turns on the link: one place, for the first in rank."""

from __future__ import annotations

import asyncio

from tests.core.pair import until

from edgeward.core.turns import Turns


def test_there_is_one_place_for_the_first_in_rank() -> None:
    async def main() -> None:
        gate = Turns()
        order: list[str] = []
        inside = 0

        async def turns(name: str, priority: int, count: int) -> None:
            nonlocal inside
            gate.want(name, priority)
            for _ in range(count):
                await asyncio.sleep(0)  # it reads and prepares
                async with gate.turn(priority):
                    inside += 1
                    try:
                        assert inside == 1
                        await asyncio.sleep(0)
                        order.append(name)
                    finally:  # also where it is given up inside
                        inside -= 1
            gate.leave(name)

        async with asyncio.timeout(30):
            given_up = asyncio.create_task(turns("given up", 9, 1000))
            works = [asyncio.create_task(turns(*w)) for w in (("low", 1, 3), ("high", 8, 5), ("mid", 5, 2))]
            await until(lambda: len(order) >= 3, 30)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            gate.leave("given up")
            await asyncio.gather(*works)
        assert [n for n in order if n != "given up"] == ["high"] * 5 + ["mid"] * 2 + ["low"] * 3

    asyncio.run(main())
