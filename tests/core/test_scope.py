"""What a node gets: all that it needs, and nothing of other sites."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core.errors import Invalid, Refused
from edgeward.core.resource import Key, Resource, decode
from edgeward.core.scope import NodeView, check_local, fingerprint, matches, placed_sites, site_of, takes, view
from edgeward.hub.kinds import load

load()


def make(kind: str, name: str, spec: dict[str, Any], namespace: str = "") -> Resource:
    meta = {"name": name, **({"namespace": namespace} if namespace else {})}
    return decode({"apiVersion": "edgeward/v1", "kind": kind, "metadata": meta, "spec": spec})


def app(name: str, placement: dict[str, Any], **spec: Any) -> Resource:
    return make("App", name, {"process": {"command": ["true"]}, "placement": placement, **spec})


NODE = NodeView("plant-1", "plant", ({"gpu": "yes"}, {"disk": "big", "os": "linux"}))
WORLD = [
    make("Namespace", "line-3", {}),
    make("Site", "plant", {}),
    make("Site", "port", {}),
    make("Node", "plant-1", {"site": "plant"}),
    make("Node", "plant-2", {"site": "plant"}),
    make("Node", "port-1", {"site": "port"}),
    make("Override", "here", {"target": {"kind": "Site", "name": "plant"}, "site": "plant", "patch": {}}),
    make("Override", "there", {"target": {"kind": "Site", "name": "port"}, "site": "port", "patch": {}}),
    app("everywhere", {}, envFrom=[{"config": "shared"}]),
    app("here", {"site": "plant"}, envFrom=[{"secret": "mine"}]),
    app("there", {"site": "port"}, envFrom=[{"secret": "theirs"}, {"config": "shared"}]),
    make("Config", "shared", {"data": {}}),
    make("Config", "unused", {"data": {}}),
    make("Config", "shared", {"data": {}}, "line-3"),
    make("Secret", "mine", {"data": {}}),
    make("Secret", "theirs", {"data": {}}),
    make("Service", "here", {"app": "here", "port": "http"}),
    make("Service", "there", {"app": "there", "port": "http"}),
]


def names(node: NodeView) -> set[str]:
    return {str(k) for k in view(node, WORLD)}


def test_a_node_gets_what_concerns_it_and_nothing_of_other_sites() -> None:
    assert names(NODE) == {
        "Namespace/line-3", "Site/plant", "Node/plant-1", "Node/plant-2", "Override/here",
        "App/everywhere", "App/here", "Config/shared", "Secret/mine", "Service/here",
    }  # fmt: skip
    assert names(NodeView("new", "nowhere")) == {"Namespace/line-3", "App/everywhere", "Config/shared"}


def test_the_order_of_the_resources_does_not_matter() -> None:
    assert view(NODE, WORLD) == view(NODE, reversed(WORLD))
    assert all(key == r.key for key, r in view(NODE, WORLD).items())


def test_what_a_node_may_use_it_gets_in_the_namespace_of_the_user_only() -> None:
    got = view(NODE, WORLD)
    assert Key("Config", "default", "shared") in got
    assert Key("Config", "line-3", "shared") not in got


def test_a_selector_needs_one_node_with_all_its_labels() -> None:
    for selector, taken in (
        ({}, True),
        ({"gpu": "yes"}, True),
        ({"disk": "big", "os": "linux"}, True),
        ({"gpu": "yes", "disk": "big"}, False),  # each true of one node, both of none
        ({"gpu": "no"}, False),
        ({"gone": ""}, False),
    ):
        placement = app("a", {"nodeSelector": selector}).spec.placement
        assert matches(placement, NODE) is taken, selector
        other = app("a", {"site": "port", "nodeSelector": selector}).spec.placement
        assert not matches(other, NODE)
    assert matches(None, NODE), "a kind without a placement goes to all"
    assert not matches(app("a", {"nodeSelector": {"gpu": "yes"}}).spec.placement, NodeView("n", "plant"))


def test_the_site_that_a_resource_names() -> None:
    by = {str(r.key): r for r in WORLD}
    assert [site_of(by[k]) for k in ("Site/port", "Node/port-1", "Override/here", "Config/unused")] == [
        "port", "port", "plant", "",
    ]  # fmt: skip
    assert [placed_sites(by[k]) for k in ("App/everywhere", "App/there", "Config/unused")] == ["", "port", ""]


REVISIONS = st.dictionaries(
    st.builds(Key, st.sampled_from(["App", "Config"]), st.sampled_from(["_", "default"]), st.sampled_from("abc")),
    st.integers(1, 9),
    max_size=6,
)


@given(REVISIONS, REVISIONS, st.randoms(use_true_random=False))
def test_fingerprints_are_equal_when_the_views_are(a: dict[Key, int], b: dict[Key, int], random: Any) -> None:
    shuffled = list(a.items())
    random.shuffle(shuffled)
    assert fingerprint(shuffled) == fingerprint(a.items())
    assert (fingerprint(a.items()) == fingerprint(b.items())) is (a == b)


def test_what_a_site_may_write_and_delete() -> None:
    here, there, everywhere = (app("x", p) for p in ({"site": "plant"}, {"site": "shop"}, {}))
    config, node = make("Config", "x", {"data": {}}), make("Node", "x", {"site": "plant"})
    mine, other = make("Site", "plant", {}), make("Site", "shop", {})
    for may in (here, everywhere, config, mine):
        check_local(may, None, "plant")
    for may in (here, config):
        check_local(None, may, "plant")
    named = make("Site", "plant", {"displayName": "P", "prefixes": ["10.0.0.0/8"]})
    check_local(named, make("Site", "plant", {"prefixes": ["10.0.0.0/8"]}), "plant")
    for old in (mine, None):
        with pytest.raises(Invalid, match=r"Site/plant: \$\.spec\.prefixes: is the hub's to say.*change it at the hub"):
            check_local(named, old, "plant")
    with pytest.raises(Invalid, match=r"App/x: \$\.spec\.placement\.site: names site 'shop'.*place it at this site"):
        check_local(there, None, "plant")
    with pytest.raises(Invalid, match=r"names site 'shop'"):
        check_local(None, there, "plant")
    with pytest.raises(Refused, match=r"App/x: .*every site.*replicas: 0"):
        check_local(None, everywhere, "plant")
    for never in (node, other):
        with pytest.raises(Invalid, match=r"write it at the hub"):
            check_local(never, None, "plant")
    with pytest.raises(Invalid, match="cannot delete a Site"):
        check_local(None, mine, "plant")


def test_a_placement_takes_this_very_node_and_not_its_neighbour() -> None:
    def node(name: str, site: str, **labels: str) -> Resource:
        meta = {"name": name, "labels": labels}
        return decode({"apiVersion": "edgeward/v1", "kind": "Node", "metadata": meta, "spec": {"site": site}})

    fast, slow = node("a", "plant", cpu="fast"), node("b", "plant", cpu="slow")
    for placement, found in (
        ({}, [True, True]),
        ({"site": "plant"}, [True, True]),
        ({"site": "shop"}, [False, False]),
        ({"nodeSelector": {"cpu": "fast"}}, [True, False]),
        ({"site": "plant", "nodeSelector": {"cpu": "slow"}}, [False, True]),
        ({"nodeSelector": {"cpu": "slow", "gpu": "yes"}}, [False, False]),
    ):
        assert [takes(app("x", placement), n) for n in (fast, slow)] == found, placement
