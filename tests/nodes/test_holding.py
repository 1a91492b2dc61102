"""A site that holds: the last word counts at every node, and what passes all the same."""

from __future__ import annotations

from edgeward.core.resource import Key
from edgeward.nodes.holding import of_site, parted, said, status
from edgeward.nodes.siblings import Hold
from edgeward.nodes.wire import HubObject


def test_the_later_word_counts_whatever_the_clocks_say() -> None:
    held = said(True, Hold(), 2e9, "a", "ann")
    released = said(False, held, 1e9, "b", "bob")
    assert released.later(held) and not held.later(released) and not held.later(held)
    assert held.later(Hold())
    one, two = said(True, Hold(), 1e9, "a", "ann"), said(False, Hold(), 1e9, "b", "bob")
    assert two.later(one) and not one.later(two), "by name where the times are the same"


def test_who_may_come_in_is_no_matter_of_holding() -> None:
    objects = [HubObject(kind, "_", "x", 1) for kind in ("AccessToken", "App", "Role", "Site", "Node", "Rollout")]
    taken, waiting = parted(objects)
    assert [o.kind for o in taken] == ["AccessToken", "Role", "Node"]
    assert [o.kind for o in waiting] == ["App", "Site", "Rollout"]


def test_what_people_see_of_it() -> None:
    hold = Hold(True, 1e9, "a", "ann")
    assert status(Hold(), [], "") == {}
    assert status(hold, [], "2001") == {"since": "2001", "by": "ann", "waiting": 0}
    many = status(hold, [Key("App", "default", f"a{n:02}") for n in range(30)], "2001")
    assert many["waiting"] == 30 and many["changes"][0] == "App/a00" and many["changes"][-1] == "and 10 more"
    few = status(hold, [Key("App", "default", "web")], "2001")
    assert of_site([{}, {"hold": few}, {"hold": many}, {"hold": "?"}]) == many
    assert of_site([{}, {"hold": {}}]) == {}
