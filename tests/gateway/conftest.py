from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.gateway import rig as rigs


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[rigs.Rig]:
    yield from rigs.rig(tmp_path)


@pytest.fixture
def client(rig: rigs.Rig) -> Iterator[Callable[[], rigs.Client]]:
    made: list[rigs.Client] = []

    def connect() -> rigs.Client:
        made.append(rigs.Client(rig.port))
        return made[-1]

    yield connect
    for c in made:
        c.close()
