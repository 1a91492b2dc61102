"""The index says what the plain rule says, and a node that follows its differences ends where a full sync would."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tests.nodes.fleet import app, config, doc

from edgeward.core.resource import Key, Resource
from edgeward.core.scope import NodeView, view
from edgeward.core.store import Entry
from edgeward.hub.kinds import load
from edgeward.nodes import views as module
from edgeward.nodes.views import STATUS_DOWN, Views

load()

SITES = ("a", "b", "c")


class Store:
    """The cache of a store: entries by key, one growing revision, and the index told within each change."""

    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}
        self.revision = 0
        self.views = Views(self.entries.get)

    def put(self, r: Resource) -> set[str] | None:
        self.revision += 1
        self.entries[r.key] = Entry(r, self.revision, self.revision)
        return self.views.change(r.key, r)

    def remove(self, key: Key) -> set[str] | None:
        self.revision += 1
        del self.entries[key]
        return self.views.change(key, None)

    def status(self, key: Key) -> set[str] | None:
        self.revision += 1
        old = self.entries[key]
        self.entries[key] = Entry(old.resource, old.revision, self.revision)
        return self.views.change(key, old.resource, status_only=True)

    def all(self) -> list[Resource]:
        return [e.resource for _, e in sorted(self.entries.items())]

    def plain(self, site: str) -> dict[Key, int]:
        """What the rule says, looking at everything."""
        labels = tuple(r.metadata.labels for r in self.all() if r.kind == "Node" and r.spec.site == site)
        return {k: self.entries[k].revision for k in view(NodeView("x", site, labels), self.all())}


def service(name: str, of: str, *allowed: str) -> Resource:
    return doc("Service", name, {"app": of, "port": "http", "allowFrom": list(allowed)})


def some_change(rng: random.Random, store: Store) -> set[str] | None:
    """Anything that a person or a controller may do."""
    n = rng.randrange(6)
    site = rng.choice(SITES)
    what = rng.randrange(9)
    ports = {"ports": [{"name": "http", "env": "PORT"}]}
    if what == 0:
        return store.put(app(f"app{n}", rng.choice((site, "")), rng.choice(("", f"c{rng.randrange(3)}")), **ports))
    if what == 1:
        selector: dict[str, Any] = {"placement": {"nodeSelector": {"n": str(rng.randrange(2))}}}
        own = {"perSite": {site: {"envFrom": [{"config": f"c{rng.randrange(3)}"}]}}} if rng.randrange(2) else {}
        return store.put(app(f"app{n}", "", "", **ports, **selector, **own))
    if what == 2:
        return store.put(config(f"c{rng.randrange(3)}", str(rng.random())))
    if what == 3:
        return store.put(service(f"s{n}", f"app{rng.randrange(6)}", *rng.sample(SITES, rng.choice((0, 0, 1, 2)))))
    if what == 4:
        labels = {"n": str(rng.randrange(2))}
        return store.put(doc("Node", f"n{n}", {"site": site}, labels=labels))
    if what == 5:
        return store.put(doc("Site", site, {"displayName": str(rng.random())}))
    if what == 6:
        return store.put(doc("Namespace", f"ns{n}", {}))
    if store.entries:
        key = rng.choice(sorted(store.entries))
        return store.remove(key) if what == 7 else store.status(key)
    return set()


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_plain_rule_and_differences_lead_there(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if seed % 3 == 0:
        monkeypatch.setattr(module, "REMEMBERED", 3)  # so that a node was away for too much
    rng = random.Random(seed)
    store = Store()
    held: dict[str, dict[Key, int]] = {s: {} for s in SITES}
    at = dict.fromkeys(SITES, 0)
    told = set(SITES)  # and has not asked since
    for step in range(300):
        before = {s: store.plain(s) for s in SITES}
        touched = some_change(rng, store)
        for site in SITES:
            after = store.plain(site)
            if touched is None or site in touched:
                told.add(site)
            if after != before[site]:
                assert site in told, f"step {step}: {site} changed and nobody was told"
            if rng.random() < 0.2:
                mine = store.views.of(site, store.revision)
                told.discard(site)
                assert {k: r for k, (r, _) in mine.entries.items()} == after
                difference = mine.since(at[site])
                for key in difference.gone:
                    held[site].pop(key, None)
                if difference.names is not None:
                    held[site] = {k: r for k, r in held[site].items() if k in set(difference.names)}
                for key in difference.changed:
                    held[site][key] = store.entries[key].revision
                    assert key in after
                if difference.names is not None and held[site] != after:
                    # what came into the view unchanged while nobody remembered: the fingerprint tells, all is sent
                    assert set(held[site]) < set(after)
                    held[site] = after
                assert held[site] == after, f"step {step}"
                assert mine.changed <= store.revision
                at[site] = store.revision
        if rng.random() < 0.01:  # another hub process: it knows the present and nothing of the past
            store.views = Views(store.entries.get)
            store.views.load(store.all())
            told = set(SITES)  # whoever comes back compares fingerprints


def test_a_site_that_is_allowed_gets_the_service_and_nothing_that_it_is_of() -> None:
    store = Store()
    store.put(app("orders", "a", "c-a", ports=[{"name": "http", "env": "PORT"}]))
    store.put(config("c-a", "1"))
    assert store.put(service("orders", "orders", "b")) == {"a", "b"}
    assert [k.kind for k in store.views.of("b", store.revision).entries] == ["Service"]
    assert not store.views.of("c", store.revision).entries
    assert store.put(service("orders", "orders", "c")) == {"a", "b", "c"}
    assert not store.views.of("b", store.revision).entries
    assert [k.kind for k in store.views.of("c", store.revision).entries] == ["Service"]


def test_a_change_concerns_its_site_alone() -> None:
    store = Store()
    for site in SITES:
        store.put(doc("Site", site, {}))
        store.put(doc("Node", f"n-{site}", {"site": site}))
        store.put(app(f"app-{site}", site, f"c-{site}"))
        store.put(config(f"c-{site}", "1"))
        store.put(service(f"s-{site}", f"app-{site}"))
        store.views.of(site, store.revision)
    assert store.put(app("app-a", "a", "c-a", replicas=2)) == {"a"}
    assert store.put(config("c-a", "2")) == {"a"}
    assert store.put(service("s-a", "app-a")) == {"a"}
    assert store.put(config("nobody", "2")) == set()
    assert store.status(Key("App", "default", "app-a")) == set(), "made of reports: no node needs it"
    for kind, ns, name in (("Service", "default", "s-a"), ("Node", "_", "n-a"), ("Site", "_", "a")):
        assert kind in STATUS_DOWN
        assert store.status(Key(kind, ns, name)) == {"a"}
    assert store.put(app("app-a", "b")) == {"a", "b"}, "it moves: both are told"
    assert store.put(app("everywhere")) is None
    assert store.remove(Key("App", "default", "everywhere")) is None
    assert store.views.elsewhere(Key("App", "default", "app-c"), "c", SITES, store.revision) is False
    assert store.views.elsewhere(Key("App", "default", "app-c"), "a", SITES, store.revision) is True
    assert store.views.elsewhere(Key("Config", "default", "c-c"), "c", SITES, store.revision) is False
    store.put(app("too", "b", "c-c"))
    assert store.views.elsewhere(Key("Config", "default", "c-c"), "c", SITES, store.revision) is True


def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 5)
    store = Store()
    store.put(doc("Site", "a", {}))
    store.views.of("a", store.revision)
    start = store.revision
    for n in range(20):
        store.put(app(f"x{n}", "a"))
        store.views.of("a", store.revision)
        store.remove(Key("App", "default", f"x{n}"))
        mine = store.views.of("a", store.revision)
    assert len(mine.left) == 5 and len(mine.came) <= 5
    assert mine.since(start).names == [Key("Site", "_", "a")], "so long ago that all it may keep is named"
    recent = mine.since(store.revision - 1)
    assert recent.names is None and list(recent.gone) == [Key("App", "default", "x19")]
