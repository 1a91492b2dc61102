"""Tests of this room may be coroutines, on the agent's own event loop; each has a minute, so that one that waits for
ever fails by itself. A module with ``PLAIN_LOOP`` tests what the command line runs, on Python's own loop."""

from __future__ import annotations

import asyncio
import inspect

import pytest
import uvloop


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    plain = getattr(pyfuncitem.module, "PLAIN_LOOP", False)
    with asyncio.Runner(loop_factory=None if plain else uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(pyfuncitem.obj(**{n: pyfuncitem.funcargs[n] for n in names}), 60))
    return True
