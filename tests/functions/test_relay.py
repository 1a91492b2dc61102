"""Answers of functions on their way to a caller of the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from edgeward.functions.relay import Head, answer, encode_head


@pytest.mark.parametrize("status", [-5, 0, 101, 99999, 2**40])
def test_what_a_function_says_is_not_trusted_to_be_http(status: int) -> None:
    headers = [("a\r\nb", "c"), ("x", "y\r\nz: 1"), ("ü", "é"), ("a b", "c"), ("", "c"), ("Good", "one"), ("te", "x")]
    headers += [("esc", "a\x1b[31m"), ("bell", "\x07"), ("del", "\x7f")]

    async def pieces() -> AsyncIterator[bytes]:
        yield encode_head(Head(status, headers))
        yield b"body"

    async def run() -> tuple[int, list[tuple[bytes, bytes]]]:
        response = await answer(pieces())
        return response.status_code, response.raw_headers

    got, raw = asyncio.run(run())
    assert got == 502
    assert [h for h in raw if not h[0].startswith(b"ew-")] == [(b"good", b"one")]
