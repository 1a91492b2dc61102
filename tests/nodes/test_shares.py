"""Who carries, what is kept to be passed on, and what of it is believed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgeward.core.certs import Authority
from edgeward.nodes.shares import (
    CARRIER,
    COUNTS,
    KEPT_FOR,
    SILENT,
    Chain,
    Kept,
    Lead,
    Page,
    Want,
    Word,
    covered,
    judged,
    plain,
    to_sign,
)
from edgeward.nodes.wire import LEVEL, HubObject, SyncAnswer, SyncAsk


def word(online: bool = True, level: int = LEVEL, carrier: str = "a") -> Word:
    return Word(online, "e", 5, level, carrier)


class Hall:
    """Nodes that say their words as they should; some fall silent."""

    def __init__(self, *names: str) -> None:
        self.leads = {n: Lead(n, LEVEL) for n in names}
        self.words: dict[str, dict[str, tuple[Word, float]]] = {n: {} for n in names}
        self.said = dict.fromkeys(names, -100.0)
        self.online = dict.fromkeys(names, True)
        self.carrier = dict.fromkeys(names, "")
        self.dead: set[str] = set()
        self.now = 0.0

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            for name in self.leads.keys() - self.dead:
                self.carrier[name] = self.leads[name].choose(self.words[name], self.online[name], self.now)
                period = CARRIER if self.carrier[name] == name else 10.0
                if self.now - self.said[name] >= period:
                    self.said[name] = self.now
                    for other in self.leads.keys() - self.dead - {name}:
                        self.words[other][name] = word(self.online[name], carrier=self.carrier[name]), self.now
            self.now += 0.25

    def carriers(self) -> set[str]:
        return {self.carrier[n] for n in self.leads.keys() - self.dead}


def test_the_first_of_those_that_reach_the_hub_carries_and_a_dead_one_is_passed_over() -> None:
    hall = Hall("a", "b", "c", "d")
    hall.run(3.0)
    assert hall.carriers() == {"a"}
    hall.dead.add("a")
    hall.run(SILENT + 1.0)
    assert hall.carriers() == {"b"}, "within five seconds"
    hall.dead |= {"b"}
    hall.run(SILENT + 1.0)
    assert hall.carriers() == {"c"}
    hall.online["c"] = False
    hall.run(11.0)  # its next word
    assert hall.carriers() == {"d"}
    hall.dead.clear()
    hall.run(15.0)
    assert hall.carriers() == {"a"}
    hall.online = dict.fromkeys(hall.online, False)
    hall.run(12.0)
    assert hall.carriers() == {""}


def test_those_of_another_release_carry_for_nobody() -> None:
    lead = Lead("b", LEVEL)
    assert lead.choose({"a": (word(level=LEVEL + 1), 0.0)}, True, 0.0) == "b"
    assert lead.choose({"a": (word(level=LEVEL + 1), 0.0)}, False, 0.0) == ""
    words = {"a": (word(carrier="b"), 0.0), "c": (word(carrier="b", level=1), 0.0), "d": (word(), 0.0)}
    assert covered(words, "b", LEVEL, 1.0) == ["a"]
    assert covered(words, "b", LEVEL, COUNTS + 1.0) == []


def chain(since: int, revision: int, at: float = 0.0, size: int = 10) -> Chain:
    return Chain("e", since, revision, LEVEL, [Page(b"", bytes(size), b"")], at)


def test_what_is_kept_leads_on_without_a_gap_or_not_at_all() -> None:
    kept = Kept()
    for since, revision in ((0, 10), (10, 12), (12, 20)):
        kept.add(chain(since, revision))

    def leading(since: int, epoch: str = "e", level: int = LEVEL) -> list[int]:
        return [c.revision for c in kept.leading(Want(epoch, since, 0, level))]

    assert leading(0) == [10, 12, 20]
    assert leading(11) == [12, 20]
    assert leading(20) == leading(25) == leading(0, "other") == leading(0, level=1) == []
    kept.add(chain(25, 30))  # something was missed in between
    assert leading(0) == leading(12) == []
    assert leading(25) == leading(27) == [30]
    kept.add(chain(30, 31, at=KEPT_FOR + 1))
    assert leading(25) == []
    assert leading(30) == [31]
    for n in range(40):
        kept.add(chain(31 + n, 32 + n, at=KEPT_FOR + 1, size=1 << 20))
    assert sum(c.size for c in kept._chains) <= 16 << 20
    assert leading(70) == [71]


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def page(ca: Authority, ask: SyncAsk, answer: SyncAnswer, site: str = "plant") -> Page:
    packed = msgspec.msgpack.encode(answer)
    return Page(plain(ask), packed, ca.sign(to_sign(site, plain(ask), packed)))


def ask(since: int = 5, level: int = LEVEL, after: tuple[str, str, str] | None = None, epoch: str = "e") -> SyncAsk:
    return SyncAsk(since, epoch, after, level, share=["b", "c"])


def answer(revision: int = 9, *names: str, more: bool = False, epoch: str = "e") -> SyncAnswer:
    objects = [HubObject("Config", "default", n, revision) for n in names]
    return SyncAnswer(epoch, revision, False, objects, more, "" if more else "v", level=LEVEL)


def test_only_what_the_hub_said_to_this_site_and_is_news_is_believed(ca: Authority, tmp_path: Path) -> None:
    def believed(*pages: Page, since: int = 5, epoch: str = "e") -> bool:
        return judged(list(pages), "plant", epoch, since, LEVEL, ca.trusted) is not None

    good = page(ca, ask(), answer())
    assert believed(good)
    assert believed(good, since=7), "one that is further on may take it too"
    assert not believed(good, since=9), "what is older is no news"
    assert not believed(good, since=3), "something would be missing"
    assert not believed(good, epoch="f")
    assert not believed()
    assert not believed(page(ca, ask(), answer(), site="shop"))
    assert not believed(page(Authority(tmp_path), ask(), answer()))
    assert not believed(page(ca, ask(level=1), answer()))
    assert not believed(page(ca, ask(epoch="f"), answer()))
    assert not believed(page(ca, ask(), answer(epoch="f")))
    assert not believed(page(ca, ask(), SyncAnswer("e", 9, error="no")))
    # what the hub said to another question is no answer to this one
    assert not believed(Page(plain(ask(since=1)), good.answer, good.proof))
    assert not believed(Page(good.ask, msgspec.msgpack.encode(answer(10)), good.proof))
    assert not believed(Page(good.ask, good.answer, bytes(len(good.proof))))


def test_pages_are_believed_all_of_them_in_their_order(ca: Authority) -> None:
    one = page(ca, ask(), answer(9, "a", "b", more=True))
    two = page(ca, ask(after=("Config", "default", "b")), answer(9, "c", more=True))
    three = page(ca, ask(after=("Config", "default", "c")), answer(9, "d"))

    def believed(*pages: Page) -> bool:
        return judged(list(pages), "plant", "e", 5, LEVEL, ca.trusted) is not None

    assert believed(one, two, three)
    for wrong in ([one, two], [one, three], [two, three], [one, three, two], [three], [one, two, three, three]):
        assert not believed(*wrong)
    other = page(ca, ask(since=4, after=("Config", "default", "b")), answer(9, "c"))
    assert not believed(one, other), "of another sync"
