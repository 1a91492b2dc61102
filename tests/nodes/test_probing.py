"""When checks are due, and what they add up to."""

from __future__ import annotations

import math
import random

from tests.nodes.council import World

from edgeward.nodes.probing import CUT, Check, Look, Probes, linked, pull

PING = Check("ping", weight=1.0, interval=5.0, retries=2)
WEB = Check("tcp", weight=2.0, port=80, interval=5.0, retries=0)


def probes(*checks: Check, agent: float = 1.0) -> Probes:
    made = Probes()
    made.set(checks, agent, ["b"], 0.0)
    return made


def test_a_cut_is_told_by_two_that_wait() -> None:
    assert linked(True, True, 0.0, 2), "it answers"
    assert linked(True, True, 9.0, 0), "one alone may have lost a packet"
    assert not linked(True, True, CUT, 1)
    assert linked(True, False, 9.0, 2), "a slow link has its own patience"
    assert not linked(False, True, 0.0, 0)


def test_beats_of_a_site_come_one_after_another() -> None:
    """After an outage all ask at once; each but the first comes forward by its place, and none does so again."""
    a, b, c = 11.0, 10.9, 10.8
    b = pull(b, [a], 3, 11.0)
    c = pull(c, [a, pull(10.9, [a], 3, 11.0)], 3, 11.0)
    assert [round(x, 1) for x in (a, b, c)] == [11.0, 7.2, 3.5]
    assert (pull(b, [a], 3, 11.0), pull(c, [a, b], 3, 11.0)) == (b, c)
    assert pull(0.7, [0.7], 3, 11.0) == 0.7, "too late to move it"
    assert pull(9.0, [9.0] * 19, 20, 11.0) == 9.0, "so many beat often enough by chance"
    assert pull(2.0, [2.0] * 5, 6, 11.0) == 0.5, "not at once"


def test_beats_that_are_kept_apart_cost_the_link_little() -> None:
    """They come a little early by chance, each a little other than the rest: so they meet for ever."""
    for n in (2, 3, 6, 7, 10, 20):
        chance, now, due = random.Random(n), 0.0, [11.0] * n
        beats, moved = [0] * n, [0.0] * n
        while now < 3600:
            for i in range(n):
                if now >= due[i]:
                    beats[i] += 1
                    due[i] = now + 11.0 * (1 - 0.04 * chance.random())
                earlier = pull(due[i] - now, [at - now for at in due[:i]], n, 11.0)
                if earlier < due[i] - now and now - moved[i] > 30.0:
                    moved[i], due[i] = now, now + earlier
            now += 0.25
        plain = 3600 / 11.0  # with nothing moved
        assert sum(beats) / n < 1.05 * plain, (n, beats)
        assert max(beats) < 1.15 * plain, (n, beats)


def test_without_checks_only_reports_count() -> None:
    assert probes().works("b", True) is None
    assert probes().next() == math.inf


def test_looks_are_due_once_and_again_after_their_result() -> None:
    p = probes(PING, WEB)
    assert p.due(0.0) == [Look("b", 0), Look("b", 1)]
    assert p.due(1.0) == [], "they are out"
    p.result(Look("b", 0), True, 1.0)
    assert p.next() == 6.0
    assert p.due(6.0) == [Look("b", 0)]


def test_a_check_fails_after_its_retries_and_returns_after_two_successes() -> None:
    p = probes(PING)
    look = Look("b", 0)
    p.result(look, True, 0.0)
    for n in range(2):
        p.result(look, False, n)
        assert p.works("b", False) == 0.5
        assert p.next() == n + 1.0, "what fails is looked at again soon"
    p.result(look, False, 3.0)
    assert p.works("b", False) == 0.0
    assert p.failing("b") == ["ping"]
    p.result(look, True, 4.0)
    assert p.works("b", False) == 0.0
    p.result(look, True, 5.0)
    assert p.works("b", False) == 0.5


def test_weights_add_up_and_unknown_ones_do_not_count() -> None:
    p = probes(PING, WEB)
    assert p.works("b", True) == 1.0
    p.result(Look("b", 1), False, 0.0)
    assert p.works("b", True) == 1 / 3
    p.result(Look("b", 0), True, 1.0)
    assert p.works("b", True) == 0.5
    assert p.failing("b") == ["tcp:80"]


def test_changed_checks_start_anew() -> None:
    p = probes(PING)
    p.due(0.0)
    p.set([WEB], 1.0, ["b", "c"], 3.0)
    p.result(Look("b", 0), True, 3.0)
    assert p.due(3.0) == [Look("c", 0)]
    p.set([WEB], 1.0, ["c"], 3.0)
    p.result(Look("b", 0), True, 3.0)
    assert p.failing("b") == []


def test_a_machine_that_answers_is_not_dead_where_its_site_says_so() -> None:
    """The agent is silent, its machine answers pings of more weight: unknown, so nothing moves."""
    world = World(("a", "b", "c"))
    world.run(6)
    world.alive -= {"c"}
    for name in "ab":
        world.councils[name].checked("c", 0.75)
    world.run(20)
    assert world.states("a")["c"] == "unknown"
    for name in "ab":
        world.councils[name].checked("c", 0.25)
    world.run(20)
    assert world.states("a")["c"] == "dead"


def test_a_majority_that_finds_no_answer_overrules_a_node_that_only_reports() -> None:
    world = World(("a", "b", "c"))
    world.run(6)
    for name in "ab":
        world.councils[name].checked("c", 0.25)
    world.run(6)
    assert world.states("a")["c"] == "dead"
    assert world.states("b")["c"] == "dead"
