"""One declaration, many sites: what each has, what is refused, and what becomes of a canary."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core import quota
from edgeward.core.audit import Audit
from edgeward.core.errors import Invalid, NotFound, Refused
from edgeward.core.registry import kinds
from edgeward.core.resource import Key, Resource, decode, merge_patch
from edgeward.core.resources import Resources
from edgeward.core.scope import NodeView, view
from edgeward.core.store_sqlite import SqliteStore
from edgeward.hub.kinds import load
from edgeward.nodes.reach import check_refs
from edgeward.workloads.cloud import fold
from edgeward.workloads.persite import dropped, effective, promoted, replicas_at
from edgeward.workloads.placement import share

load()


def made(kind: str, name: str, spec: dict[str, Any]) -> Resource:
    return decode({"apiVersion": "edgeward/v1", "kind": kind, "metadata": {"name": name}, "spec": spec})


def app(per_site: dict[str, Any], **spec: Any) -> Resource:
    return made("App", "web", {"process": {"command": ["v1"]}, **spec, "perSite": per_site})


def nodes(*names: str) -> list[Resource]:
    return [made("Node", n, {"site": n.split("-")[0]}) for n in names]


def test_a_site_has_its_own_and_the_others_the_plain_spec() -> None:
    web = app(
        {"berlin": {"replicas": 3, "process": {"env": {"MODE": "x"}}, "limits": {"cpu": None}}, "bonn": {}},
        limits={"cpu": 1, "memory": "64Mi"},
    )
    here, there = effective(web, "berlin"), effective(web, "paris")
    assert (here.spec.replicas, here.spec.process.env, here.spec.process.command) == (3, {"MODE": "x"}, ["v1"])
    assert (here.spec.limits.cpu, here.spec.limits.memory) == (None, "64Mi"), "null takes away"
    assert (there.spec.replicas, there.spec.process.env, there.spec.limits.cpu) == (1, {}, 1)
    assert not here.spec.perSite
    assert not there.spec.perSite
    assert here.metadata is web.metadata
    plain = made("App", "web", {"process": {"command": ["v1"]}})
    assert effective(plain, "berlin") is plain
    assert effective(effective(web, "berlin"), "berlin").spec == here.spec
    assert [replicas_at(web, s) for s in ("berlin", "bonn", "paris")] == [3, 1, 1]
    assert replicas_at(app({"berlin": {"replicas": None}}, replicas=5), "berlin") == 1, "null: the default"


def test_what_other_sites_have_makes_no_new_version_here() -> None:
    one, two = app({"bonn": {"replicas": 2}}), app({"bonn": {"process": {"command": ["v2"]}}})
    assert effective(one, "berlin").spec == effective(two, "berlin").spec


@pytest.mark.parametrize(
    ("per_site", "spec", "field"),
    [
        ({"berlin": {"replicas": -1}}, {}, "$.spec.perSite.berlin.replicas"),
        ({"berlin": {"replcas": 1}}, {}, "$.spec.perSite.berlin.replcas"),
        ({"berlin": {"process": {"command": "v2"}}}, {}, "$.spec.perSite.berlin.process.command"),
        ({"berlin": {"process": None}}, {}, "$.spec.perSite.berlin.process"),
        ({"berlin": {"health": {"http": {"port": "web"}}}}, {}, "$.spec.perSite.berlin.health.http.port"),
        ({"berlin": {"placement": {"site": "bonn"}}}, {}, "$.spec.perSite.berlin.placement"),
        ({"berlin": {"perSite": {}}}, {}, "$.spec.perSite.berlin.perSite"),
        ({"berlin": {}}, {"placement": {"site": "bonn"}}, "$.spec.perSite.berlin"),
        ({"Berlin": {}}, {}, "$.spec.perSite.Berlin"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_field(per_site: dict[str, Any], spec: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        app(per_site, **spec)
    assert caught.value.field == field, str(caught.value)


def test_what_another_release_wrote_and_does_not_fit_counts_for_nothing() -> None:
    web = app({}, replicas=2)
    odd = msgspec.structs.replace(
        web, spec=msgspec.structs.replace(web.spec, perSite={"berlin": {"replicas": 3, "novel": {"x": 1}}})
    )
    assert effective(odd, "berlin").spec == web.spec


def test_a_new_site_is_filled_by_itself_and_each_site_counts_its_own() -> None:
    web = app({"berlin": {"replicas": 4}, "bonn": {"replicas": 0}}, replicas=1)
    at = {"berlin": nodes("berlin-1", "berlin-2", "berlin-3"), "bonn": nodes("bonn-1"), "paris": nodes("paris-1")}
    counts = {s: sum(share(web, ns, n.metadata.name) for n in ns) for s, ns in at.items()}
    assert counts == {"berlin": 4, "bonn": 0, "paris": 1}


def test_its_status_says_what_is_where() -> None:
    web = app({"berlin": {"replicas": 2}, "rome": {"process": {"command": ["v2"]}}}, replicas=0)
    up = {"phase": "Running", "version": "v1", "instances": [{"phase": "Running", "id": "1"}]}
    got = fold(web, nodes("berlin-1", "bonn-1"), {"berlin-1": up, "bonn-1": {"phase": "Stopped", "instances": []}})
    assert got["sites"] == {
        "berlin": {"wanted": 2, "running": 1, "version": "v1"},
        "bonn": {"wanted": 0, "running": 0, "version": ""},
    }
    assert got["phase"] == "Degraded"
    assert "message" not in got, "nothing is wanted at rome"
    got = fold(app({"rome": {"replicas": 1}}, replicas=0), nodes("bonn-1"), {})
    assert got["phase"] == "Pending"
    assert "no node at rome (named in perSite)" in got["message"]


def test_a_site_gets_what_it_uses_and_not_what_another_one_does() -> None:
    web = app(
        {"berlin": {"envFrom": [{"secret": "b"}]}, "bonn": {"envFrom": [{"secret": "o"}]}}, envFrom=[{"secret": "all"}]
    )
    world = [web, *(made("Secret", n, {"data": {}}) for n in ("b", "o", "all"))]

    def secrets(site: str) -> set[str]:
        return {k.name for k in view(NodeView("n", site), world) if k.kind == "Secret"}

    assert [secrets(s) for s in ("berlin", "bonn", "paris")] == [{"b"}, {"o"}, {"all"}]
    refs = {(r.kind, r.name): r.path for r in kinds.get("App").refs(web)}
    assert refs["Secret", "o"] == "$.spec.perSite.bonn.envFrom[0].secret", "all must be there when it is written"
    assert refs["Secret", "all"] == "$.spec.envFrom[0].secret"
    assert refs["Site", "berlin"] == "$.spec.perSite.berlin"


def test_a_quota_is_kept_at_each_site() -> None:
    one = app({"berlin": {"replicas": 3}}, limits={"cpu": 1})
    two = made(
        "App",
        "two",
        {"process": {"command": ["x"]}, "limits": {"cpu": 1}, "perSite": {"bonn": {"replicas": 3}}},
    )
    quota.check("default", {"cpu": 4}, [one, two], two)  # 4 at berlin, 4 at bonn, 2 elsewhere
    more = msgspec.structs.replace(two, spec=msgspec.structs.replace(two.spec, perSite={"berlin": {"replicas": 2}}))
    with pytest.raises(Refused, match=r"may have 4 of cpu at site berlin, it has 3 and this would take 2"):
        quota.check("default", {"cpu": 4}, [one, two], more)
    free = app({"berlin": {"limits": {"cpu": None}}}, limits={"cpu": 1})
    with pytest.raises(Invalid, match=r"is required at site berlin"):
        quota.check("default", {"cpu": 4}, [], free)


def test_a_site_changes_what_other_sites_have_too_without_their_secrets() -> None:
    web = app({"berlin": {"envFrom": [{"secret": "b"}]}, "bonn": {"envFrom": [{"secret": "o"}]}})

    async def write(site: str, *there: str) -> None:
        resources = Resources(SqliteStore(), Audit(), site=site)
        for name in there:
            await resources.create(made("Secret", name, {"data": {}}), actor="t")
        await resources.create(web, actor="t")

    asyncio.run(write("berlin", "b"))
    check_refs(web, "berlin", {Key("Secret", "default", "b")}.__contains__, lambda _: False)
    for site, there in (("berlin", ["o"]), ("", ["b", "o"])):  # the hub knows of both secrets, and of no such sites
        with pytest.raises(Invalid, match="there is no"):
            asyncio.run(write(site, *there))


# -- a canary ----------------------------------------------------------------------------------------------------------


def test_a_canary_is_made_everybodys_or_taken_back() -> None:
    spec = {
        "process": {"command": ["v1"]},
        "perSite": {
            "berlin": {"replicas": 2, "process": {"command": ["v2"]}},
            "bonn": {"process": {"command": ["v2"]}},
            "rome": {"process": {"env": {"A": "1"}}},
        },
    }
    assert promoted(spec, "berlin") == {
        "process": {"command": ["v2"]},
        "perSite": {"berlin": {"replicas": 2}, "rome": {"process": {"env": {"A": "1"}}}},
    }
    assert "berlin" not in dropped(spec, "berlin")["perSite"]
    assert dropped({"perSite": {"berlin": {}}, "replicas": 1}, "berlin") == {"replicas": 1}
    for change in (promoted, dropped):
        with pytest.raises(NotFound, match="sites: berlin, bonn, rome"):
            change(spec, "oslo")


_VALUES = st.one_of(st.integers(0, 3), st.dictionaries(st.sampled_from("xyz"), st.integers(0, 3), max_size=3))
_SPECS = st.dictionaries(st.sampled_from("abc"), _VALUES, max_size=3)


@given(_SPECS, st.dictionaries(st.sampled_from(["berlin", "bonn", "rome"]), _SPECS, min_size=1, max_size=3))
def test_a_promotion_changes_no_site_that_said_otherwise(plain: dict[str, Any], sites: dict[str, Any]) -> None:
    """The promoted site is as it was, and every other one has its own on top of what is now said for all."""
    canary = sorted(sites)[0]
    made = promoted({**plain, "perSite": sites}, canary)
    left = made.pop("perSite", {})
    assert made == merge_patch(plain, sites[canary])
    for name, own in sites.items():
        assert merge_patch(made, left.get(name, {})) == merge_patch(made, own)
