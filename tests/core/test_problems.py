"""Refusals that no handler made are problem documents too."""

from __future__ import annotations

from typing import Any

from tests.core.served import CONFIGS, Hub, config, run

REFUSED: list[tuple[str, str, Any, int, str, str]] = [
    ("GET", "/nowhere", None, 404, "", "openapi.json"),
    ("PUT", CONFIGS, {}, 405, "", "POST"),
    ("POST", f"{CONFIGS}/a", {}, 405, "", "PATCH"),
]


def test_what_the_router_refuses_is_a_problem_with_a_remedy() -> None:
    async def body(hub: Hub) -> None:
        await hub.ask("POST", CONFIGS, config("a"))
        for method, path, doc, status, field, remedy in REFUSED:
            got = await hub.refused(method, path, doc)
            assert got[:2] == (status, field), (method, path)
            assert remedy in got[2], (method, path)

    run(body)
