"""The vote in accelerated time: every partition times every set of killed nodes against an oracle; liars, loss."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import msgspec
import pytest
from tests.nodes.council import NAMES, World, told_of

from edgeward.nodes.voting import AHEAD, HUB, Council, Report, Told, tag


def partitions(names: tuple[str, ...]) -> Iterator[list[set[str]]]:
    """Every way to part the nodes into groups that hear one another (Bell number: 52 of five)."""
    if not names:
        yield []
        return
    first, rest = names[0], names[1:]
    for smaller in partitions(rest):
        for n in range(len(smaller)):
            yield [*smaller[:n], {first, *smaller[n]}, *smaller[n + 1 :]]
        yield [{first}, *smaller]


def subsets(names: tuple[str, ...]) -> Iterator[set[str]]:
    for n in range(len(names) + 1):
        yield from map(set, itertools.combinations(names, n))


def oracle(viewer: str, blocks: list[set[str]], killed: set[str], links: set[str]) -> dict[str, str]:
    """What a node should say, told by one who sees all of it."""
    (block,) = [b for b in blocks if viewer in b]
    group = block - killed
    everybody = set().union(*blocks)
    if 2 * len(group) <= len(everybody):
        return dict.fromkeys(everybody, "unknown")
    return {n: ("healthy" if n in links else "wan-cut") if n in group else "dead" for n in everybody}


def warm(**given: float) -> World:
    world = World(**given)  # type: ignore[arg-type]
    world.run(6)
    return world


def test_every_partition_times_every_set_of_killed_nodes() -> None:
    """52 partitions times 32 sets of killed nodes, each with other links to the hub (32 of them in turn)."""
    start = warm(step=1.0)
    links = itertools.cycle(list(subsets(NAMES)))
    cases = 0
    for blocks, killed in itertools.product(partitions(NAMES), list(subsets(NAMES))):
        world = copy.deepcopy(start)
        up = next(links) if cases % 33 else set()
        cases += 1
        block_of = {n: k for k, block in enumerate(blocks) for n in block}
        world.hears = lambda a, b, of=block_of: of[a] == of[b]  # type: ignore[misc]
        world.alive -= killed
        world.links(up)
        expected = {n: oracle(n, blocks, killed, up) for n in world.alive}

        def never(world: World = world, expected: dict[str, dict[str, str]] = expected) -> None:
            for name in world.alive:  # at no moment is anybody taken for dead who should not be
                world.councils[name].vote(world.now)
                wrong = {n for n in world.councils[name].gone if expected[name][n] != "dead"}
                assert not wrong, (name, wrong, expected)

        world.run(world.councils["a"].patience + 4, never)
        for name in world.alive:
            assert world.states(name) == expected[name], (name, blocks, killed, up)
    assert cases == 52 * 32


def test_a_cut_is_told_at_once_and_moves_nothing() -> None:
    world = warm()
    world.links(NAMES)
    world.run(4)
    assert all(set(world.states(n).values()) == {"healthy"} for n in NAMES)
    world.links([])
    for name in NAMES:
        world.act(name, [])
    world.run(3)
    for name in NAMES:
        assert set(world.states(name).values()) == {"wan-cut"}
        assert not world.councils[name].gone


@pytest.mark.parametrize("liar", NAMES)
def test_one_liar_of_five_changes_no_verdict(liar: str) -> None:
    """It says that all others are lost, that the hub parts them from it, and repeats what dead ones said before."""
    dead = "e" if liar != "e" else "d"
    world = warm()
    others = [n for n in NAMES if n != liar]

    def lie(report: Report) -> Report:
        every = [tag(n) for n in others]
        return msgspec.structs.replace(report, lost=every, silent=every, parted=every, link=True)

    world.lies[liar] = lie
    kept: list[Told] = []

    def look() -> None:
        for told in kept:  # replays of the dead one's last words, and a word in its name
            forged = msgspec.msgpack.decode(told.body, type=Report)
            forged = msgspec.structs.replace(forged, seq=forged.seq + 1000, epoch=forged.epoch + 1)
            for name in others:
                world.send(liar, name, told)
                world.send(liar, name, Told(msgspec.msgpack.encode(forged), liar.encode()))
        for name in others:
            if name in world.alive:
                states = world.states(name)
                assert all(states[n] == "wan-cut" for n in world.alive - {liar}), (name, states)

    world.run(30, look)
    world.alive.discard(dead)
    last = world.councils[liar]._others[dead].told
    assert last is not None
    kept.append(last)
    world.run(20, look)
    for name in world.alive - {liar}:
        assert world.states(name)[dead] == "dead"
        assert world.councils[name].gone == {dead}


@pytest.mark.parametrize(("voters", "state"), [("", "unknown"), ("b", "unknown"), ("bd", "dead"), ("bde", "dead")])
def test_more_than_half_must_miss_a_node(voters: str, state: str) -> None:
    """``a`` alone hears nothing of ``c`` and nobody passes it on: its own vote and those of others are counted."""
    world = warm()
    council = world.councils["a"]
    world.hears = lambda a, b: False
    for _ in range(20):
        world.run(1)
        for name in "bde":
            lost = [tag("c")] if name in voters else []
            report = world.councils[name].report(world.now, world.steady(name))
            report = msgspec.structs.replace(report, lost=lost, silent=[])
            council.take(report, told_of(report), name, world.now, world.steady("a"))
    assert world.states("a") == {**dict.fromkeys("abde", "wan-cut"), "c": state}


def test_a_liar_that_says_all_is_well_keeps_no_dead_node_alive() -> None:
    world = warm()
    world.lies["a"] = lambda r: msgspec.structs.replace(r, lost=[], silent=[])
    world.alive -= {"e"}
    world.run(16)
    assert all(world.states(n)["e"] == "dead" for n in "bcd")


@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_loss_of_30_percent_and_a_slow_link_never_flap(nodes: int) -> None:
    """An hour of a network that loses 30 % and takes 0.6 s one way: no verdict changes, at any of the nodes."""
    for seed in range(6):
        world = World(NAMES[:nodes], delay=0.6, loss=0.3, seed=seed)
        world.links(NAMES)
        world.run(20)

        def look(world: World = world) -> None:
            for name in world.names:
                assert set(world.states(name).values()) == {"healthy"}, (name, world.now)

        world.run(600, look)


def test_clocks_may_be_wrong_by_hours_and_by_years() -> None:
    world = World()
    world.skew = {"a": 3600.0, "b": -3600.0, "c": 0.0, "d": 3e8, "e": -3e8}
    world.run(8)
    assert all(set(world.states(n).values()) == {"wan-cut"} for n in NAMES)
    world.alive -= {"e"}
    world.run(16)
    for name in world.alive:
        assert world.states(name) == {**dict.fromkeys("abcd", "wan-cut"), "e": "dead"}


def test_links_of_one_way_do_not_matter() -> None:
    """A hears B, B does not hear A: the others pass it on; all stay as they are."""
    world = warm()
    deaf = {("a", "b"), ("a", "c"), ("d", "a"), ("e", "a"), ("b", "d")}
    world.hears = lambda a, b: (a, b) not in deaf

    def look() -> None:
        for name in NAMES:
            assert set(world.states(name).values()) == {"wan-cut"}, (name, world.now)

    world.run(60, look)
    assert world.verdicts("b")["a"].heard.startswith("via ")
    world.alive -= {"a"}
    world.run(16)
    assert all(world.states(n)["a"] == "dead" for n in "bcde")


def test_who_brings_a_nodes_reports_is_one_as_long_as_it_does() -> None:
    """What is shown goes to the hub whenever it is another: a path that is broken for good must not cost that."""
    world = warm()
    world.hears = lambda a, b: {a, b} != {"a", "b"}
    world.run(16)
    shown: set[str] = set()
    world.run(60, lambda: shown.add(world.verdicts("b")["a"].heard))
    assert len(shown) == 1 and shown <= {"via c", "via d", "via e"}
    bringer = shown.pop().removeprefix("via ")
    world.hears = lambda a, b: {a, b} != {"a", "b"} and bringer not in (a, b)
    world.run(16)
    assert world.verdicts("b")["a"].heard in {f"via {n}" for n in {"c", "d", "e"} - {bringer}}
    world.hears = lambda a, b: True
    world.run(16)
    assert world.verdicts("b")["a"].heard == "directly"


def test_a_chain_is_enough_also_for_nodes_that_start_in_it() -> None:
    world = World()
    beside = {frozenset(p) for p in itertools.pairwise(NAMES)}
    world.hears = lambda a, b: frozenset((a, b)) in beside
    world.run(40)
    assert all(set(world.states(n).values()) == {"wan-cut"} for n in NAMES)
    world.start("c")
    world.run(20)
    assert all(set(world.states(n).values()) == {"wan-cut"} for n in NAMES)


def test_a_dead_node_comes_back_only_when_it_is_heard_again_and_again() -> None:
    world = warm()
    world.alive -= {"e"}
    world.run(16)
    assert world.states("a")["e"] == "dead"
    world.start("e")
    world.act("e", world.councils["e"].tick(world.now))
    world.deliver(world.now + 0.1)
    assert world.states("a")["e"] == "dead", "one word is not enough"
    world.run(8)
    assert all(set(world.states(n).values()) == {"wan-cut"} for n in NAMES)
    assert not world.councils["a"].gone


def test_what_a_majority_decided_stands_when_it_is_lost() -> None:
    world = warm()
    world.alive -= {"d", "e"}
    world.run(16)
    assert world.states("a") == {**dict.fromkeys("abc", "wan-cut"), **dict.fromkeys("de", "dead")}
    world.alive -= {"c"}
    world.run(16)
    assert set(world.states("a").values()) == {"unknown"}
    assert world.councils["a"].gone == {"d", "e"}, "a minority moves nothing, back neither"
    # nor does it after a restart
    gone = world.councils["a"].gone
    world.start("a", gone=gone)
    world.run(90)
    assert set(world.states("a").values()) == {"unknown"}
    assert world.councils["a"].gone == {"d", "e"}
    world.start("c")
    world.run(16)
    assert world.states("a") == {**dict.fromkeys("abc", "wan-cut"), **dict.fromkeys("de", "dead")}


def test_slow_boots_are_waited_for() -> None:
    world = World(NAMES[:3])
    world.alive -= {"c"}
    world.run(40)
    assert world.states("a")["c"] == "unknown"
    world.run(40)
    assert world.states("a")["c"] == "dead", "but not for ever"


def test_a_site_of_two_decides_only_with_the_hub() -> None:
    world = World(("a", "b"))
    world.run(6)
    assert world.states("a") == {"a": "wan-cut", "b": "wan-cut"}
    world.alive -= {"b"}
    world.run(20)
    assert world.states("a") == {"a": "unknown", "b": "unknown"}
    world.links("a")
    world.councils["a"].parted = {"b"}  # the hub was asked
    assert world.states("a") == {"a": "healthy", "b": "dead"}
    world.links("")
    assert world.states("a") == {"a": "unknown", "b": "unknown"}
    assert world.councils["a"].gone == {"b"}


def test_what_the_hub_brings_counts_as_heard() -> None:
    """Two halves of a site that the hub hears: nobody is dead, whatever the site's own network does."""
    world = warm()
    world.hears = lambda a, b: (a == "a") == (b == "a")
    world.links(NAMES)

    def look() -> None:
        for name in NAMES:
            council = world.councils[name]
            for missing in council.missing() + [n for n in NAMES if n != name and (n == "a") != (name == "a")]:
                report = world.councils[missing].report(world.now, world.steady(missing), to_all=False)
                world.act(name, council.take(report, told_of(report), HUB, world.now, world.steady(name)))
            assert set(world.states(name).values()) <= {"healthy", "wan-cut"}, world.states(name)

    world.run(40, look)
    assert set(world.states("a").values()) == {"healthy"}
    assert world.verdicts("b")["a"].heard == "by the hub"


def test_what_a_node_took_over_is_known_to_all_as_long_as_it_is_heard() -> None:
    world = warm()
    world.councils["b"].holds = [(7, tag("a"))]
    world.councils["b"].runs = [(7, 40)]
    world.run(4)
    for name in NAMES:
        council = world.councils[name]
        assert council.held() == {"b": [(7, tag("a"))]}
        assert (council.ran("b", 7), council.ran("a", 7)) == (40, 0)
        assert not council.missed()
    b = world.councils["b"]
    world.alive -= {"b"}
    world.run(16)
    assert all(world.states(n)["b"] == "dead" for n in "acde")
    assert world.councils["a"].held() == {}
    world.alive.add("b")
    b.forgive(16, world.now)
    seen: list[bool] = []
    world.run(4, lambda: seen.append(b.missed()))
    assert any(seen), "it was taken for dead, so others may have taken over since"


def test_a_site_of_one_speaks_for_itself() -> None:
    world = World(("a",))
    assert world.states("a") == {"a": "wan-cut"}
    world.links("a")
    assert world.states("a") == {"a": "healthy"}


def seated() -> tuple[Council, Report]:
    council = Council("a", "plant", 1, 1000.0)
    council.members("ab", 1000.0)
    report = Report("b", "plant", 5, 10, 50.0, link=True)
    assert council.take(report, told_of(report), "b", 1001.0, 7000.0) == []
    assert council.counters["taken"] == 1
    return council, report


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, "replayed"),
        ({"seq": 9}, "replayed"),
        ({"epoch": 4, "seq": 99}, "replayed"),
        ({"seq": 11, "at": 50.0 + AHEAD + 2}, "future"),
        ({"seq": 11, "at": 50.0 - 20}, "stale"),
        ({"seq": 11, "site": "ship"}, "strange"),
        ({"seq": 11, "node": "x"}, "strange"),
    ],
)
def test_what_is_refused_and_counted(change: dict[str, object], refused: str) -> None:
    council, report = seated()
    bad = msgspec.structs.replace(report, **change)
    council.take(bad, told_of(bad), "b", 1002.0, 7001.0)
    assert council.counters[refused] == 1
    assert council.counters["taken"] == 1


def test_a_first_word_that_another_one_brings_must_answer_us() -> None:
    """Else who kept a dead node's words could play them to a node that just started."""
    council = Council("a", "plant", 3, 1000.0)
    council.members("abc", 1000.0)
    old = Report("b", "plant", 5, 10, 50.0, link=True)
    council.take(old, told_of(old), "c", 1001.0, 7000.0)
    before = msgspec.structs.replace(old, answers=[(tag("a"), 2)])  # an answer to the run before this one
    council.take(before, told_of(before), "c", 1001.0, 7000.0)
    assert council.counters["unproven"] == 2
    new = msgspec.structs.replace(old, answers=[(tag("a"), 3)])
    council.take(new, told_of(new), "c", 1001.0, 7000.0)
    assert council.present() == ["a", "b"]


def test_the_words_of_a_hundred_nodes_fit_a_datagram() -> None:
    names = [f"a-node-with-a-rather-long-name-{n}" for n in range(100)]
    council = Council(names[0], "plant", 2**40, 0.0)
    council.members(names, 0.0)
    report = council.report(1000.0, 1.7e9)
    assert len(report.lost) == 99
    assert len(msgspec.msgpack.encode([Told(msgspec.msgpack.encode(report), bytes(64))])) < 1100


def test_who_stood_still_blames_nobody() -> None:
    world = warm()
    council = world.councils["a"]
    world.now += 3600
    council.forgive(3600, world.now)
    council.tick(world.now)
    assert set(world.states("a").values()) == {"wan-cut"}


def test_twenty_nodes_say_little() -> None:
    """Datagrams a second that one of twenty sends while nothing happens."""
    world = World([f"n{k:02}" for k in range(20)])
    world.run(10)
    world.sent = 0
    world.run(60)
    assert world.sent / 60 / 20 < 4.2
