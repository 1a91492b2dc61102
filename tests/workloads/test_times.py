"""Apps that run at times: what is due (pure), and real programs at their seconds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.core.pair import until
from tests.workloads.test_edge import Node

from edgeward.agent.kinds import load
from edgeward.core.errors import Invalid
from edgeward.core.resource import decode
from edgeward.workloads.plan import Slot, State, slot_key
from edgeward.workloads.times import Times, look

HOUR = 3600.0
#: 2026-01-01T00:30:00Z
NOW = 1767227400.0
HOURLY = Times("0 * * * *")


def ended(state: State, version: str) -> None:
    state.slots[slot_key(version, 0)] = Slot(restarts=2, not_before=9.9, done=True)


def test_a_run_begins_at_its_time_and_is_over_when_its_slots_are() -> None:
    state = State()
    first = look(HOURLY, state, "v1", 1, False, NOW)
    assert not first.began and not state.due and state.current == "v1" and first.next == NOW + HOUR / 2
    assert first.again == 20.0  # the clock may be set: it is looked at again
    assert look(HOURLY, state, "v1", 1, False, NOW + HOUR / 2).began and state.due
    assert not look(HOURLY, state, "v1", 1, True, NOW + HOUR / 2 + 5).began and state.due
    ended(state, "v1")
    assert not look(HOURLY, state, "v1", 1, False, NOW + HOUR / 2 + 9).began and not state.due
    again = look(HOURLY, state, "v1", 1, False, NOW + 1.5 * HOUR)
    assert again.began and state.slots[slot_key("v1", 0)] == Slot()  # a new run knows nothing of the failures before


def test_what_is_due_while_a_run_goes_on_is_left_out() -> None:
    state = State()
    look(HOURLY, state, "v1", 1, False, NOW)
    look(HOURLY, state, "v1", 1, False, NOW + HOUR / 2)
    late = look(HOURLY, state, "v1", 1, True, NOW + 1.5 * HOUR)
    assert late.left_out and not late.began and state.due
    assert not look(HOURLY, state, "v1", 1, True, NOW + 1.5 * HOUR + 1).left_out  # told once


def test_a_new_version_waits_for_the_end_of_a_run() -> None:
    state = State()
    look(HOURLY, state, "v1", 1, False, NOW)
    look(HOURLY, state, "v1", 1, False, NOW + HOUR / 2)
    assert look(HOURLY, state, "v2", 1, True, NOW + HOUR / 2 + 1).version == "v1"
    ended(state, "v1")
    now = look(HOURLY, state, "v2", 1, False, NOW + HOUR / 2 + 2)
    assert now.version == "v2" and state.history == ["v1"] and state.current == "v2"


@pytest.mark.parametrize(("missed", "runs"), [("skip", False), ("once", True)])
def test_what_was_due_while_the_node_was_off(missed: str, runs: bool) -> None:
    times = Times("0 * * * *", missed=missed)  # type: ignore[arg-type]
    state = State()
    look(times, state, "v1", 1, False, NOW)
    assert look(times, state, "v1", 1, False, NOW + 5.25 * HOUR).began is runs


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"schedule": {"cron": "61 * * * *"}, "restart": {"policy": "never"}}, "$.spec.schedule.cron"),
        ({"schedule": {"cron": "* * * * *", "zone": "Mars"}, "restart": {"policy": "never"}}, "$.spec.schedule.zone"),
        ({"schedule": {"cron": "* * * * *"}}, "$.spec.restart.policy"),
    ],
)
def test_what_makes_no_sense_is_refused(spec: dict[str, object], field: str) -> None:
    load()
    doc = {"apiVersion": "edgeward/v1", "kind": "App", "metadata": {"name": "a"}}
    with pytest.raises(Invalid) as e:
        decode({**doc, "spec": {"process": {"command": ["true"]}, **spec}})
    assert e.value.field == field


def test_a_program_runs_at_its_seconds_and_says_when_it_runs_next(tmp_path: Path) -> None:
    out = tmp_path / "runs"

    async def main() -> None:
        node = Node(tmp_path / "node")
        command = ["sh", "-c", f"echo run >> {out}"]
        node.wish("tick", command, schedule={"cron": "* * * * * *"}, restart={"policy": "never"})
        async with node.agent():
            await until(lambda: out.exists() and len(out.read_text().splitlines()) >= 3, 50)
            await until(lambda: "runs next at" in node.said["tick"].get("message", ""), 50)
            assert node.phase("tick") == "Stopped"
        assert any(e.startswith("RunBegins") for e in node.events)

    asyncio.run(main())


def test_a_run_goes_on_through_a_restart_of_the_agent(tmp_path: Path) -> None:
    out = tmp_path / "runs"

    async def main() -> None:
        node = Node(tmp_path / "node")
        command = ["sh", "-c", f"echo run >> {out}; exec sleep 1000"]
        node.wish("long", command, schedule={"cron": "* * * * * *"}, restart={"policy": "on-failure"})
        async with node.agent(leave=True):
            await until(lambda: out.exists() and out.read_text().endswith("\n"), 50)
            await until(lambda: len(node.running("long")) == 1, 50)
        async with node.agent():
            await until(lambda: any(e.startswith("RunLeftOut") for e in node.events), 50)
            assert out.read_text() == "run\n"
            node.unwish("long")
            await until(lambda: not node.said.get("long"), 50)

    asyncio.run(main())
