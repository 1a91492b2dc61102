"""Quotas: what a namespace may add up to, at admission; racing writes share one quota."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core import kinds as _kinds
from edgeward.core import quota
from edgeward.core.audit import Audit
from edgeward.core.errors import EdgewardError, Invalid, Refused
from edgeward.core.registry import kinds
from edgeward.core.resource import Key, Resource, decode
from edgeward.core.resources import Resources
from edgeward.core.store_sqlite import SqliteStore
from edgeward.streams import spec as _streams
from edgeward.workloads import spec as _workloads

assert _kinds, (_streams, _workloads)


def made(kind: str, name: str, spec: dict[str, Any], namespace: str = "") -> Resource:
    meta = {"name": name} | ({"namespace": namespace} if namespace else {})
    return decode({"apiVersion": "edgeward/v1", "kind": kind, "metadata": meta, "spec": spec})


def app(name: str, replicas: int = 1, **limits: Any) -> Resource:
    return made("App", name, {"process": {"command": ["x"]}, "replicas": replicas, "limits": limits}, "line")


def test_sums_are_checked_and_the_refusal_says_all() -> None:
    present = [app("a", 2, memory="64Mi", cpu=0.5), app("b", 1, memory="64Mi", cpu=1)]
    limits = {"memory": 256 * 2**20, "cpu": 2.5, "apps": 3}
    quota.check("line", limits, present, app("c", 1, memory="64Mi", cpu=0.5))
    with pytest.raises(Refused) as caught:
        quota.check("line", limits, present, app("c", 2, memory="64Mi", cpu=0.25))
    assert str(caught.value) == (
        "App/line/c: namespace 'line' may have 256.0 MiB of memory, it has 192.0 MiB and this would take 128.0 MiB "
        "(lower limits.memory or replicas, or ask for a higher quota)"
    )
    with pytest.raises(Refused, match=r"may have 2\.5 of cpu, it has 2 and this would take 0\.75"):
        quota.check("line", limits, present, app("c", 1, memory="1Mi", cpu=0.75))
    with pytest.raises(Refused, match="may have 2 of apps"):
        quota.check("line", {"apps": 2}, present, app("c"))


def test_what_is_the_same_everywhere_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand sites that one App names cost no more looks at the others than one."""
    kind, looks = kinds.get("App"), 0

    def usage(r: Resource) -> Any:
        nonlocal looks
        looks += r.metadata.name != "wide"
        return kind.usage(r)

    wide = made("App", "wide", {"process": {"command": ["x"]}, "limits": {"memory": "64Mi"}}, "line")
    wide.spec.perSite = {f"s{n}": {"replicas": 2} for n in range(100)}
    present = [app(f"a{n}", 1, memory="64Mi") for n in range(10)]
    monkeypatch.setitem(kinds._kinds, "App", dataclasses.replace(kind, usage=usage))
    quota.check("line", {"memory": 12 * 64 * 2**20}, [*present, wide], wide)
    assert looks == len(present)
    with pytest.raises(Refused, match=r"may have 704\.0 MiB of memory at site s0, it has 640\.0 MiB"):
        quota.check("line", {"memory": 11 * 64 * 2**20}, present, wide)


def test_what_has_no_limit_cannot_be_counted() -> None:
    with pytest.raises(
        Invalid, match=r"App/line/c: \$\.spec\.limits\.memory: is required: namespace 'line' has a quota"
    ):
        quota.check("line", {"memory": 1}, [], app("c"))
    quota.check("line", {"apps": 1}, [], app("c"))
    quota.check("line", {}, [], app("c"))
    quota.check("line", {"memory": 1}, [], made("Config", "c", {}, "line"))


def test_an_older_self_is_not_counted_and_a_lowered_quota_refuses_growth_only() -> None:
    present = [app("a", 4, memory="64Mi"), app("b", 1, memory="64Mi")]
    limits = {"memory": 128 * 2**20}  # less than is there
    quota.check("line", limits, present, app("a", 4, memory="64Mi"))
    quota.check("line", limits, present, app("a", 3, memory="64Mi"))
    with pytest.raises(Refused):
        quota.check("line", limits, present, app("a", 5, memory="64Mi"))
    quota.check("line", {"apps": 2}, present, app("a"))


def test_exports_count_with_what_they_may_keep() -> None:
    def export(name: str, size: str) -> Resource:
        spec = {"from": {"mqtt": "x/#"}, "to": {"hub": {"stream": "s"}}, "bounds": {"bytes": size}}
        return made("Export", name, spec, "line")

    quota.check("line", {"bytes": 2 * 2**20}, [export("a", "1Mi")], export("b", "1Mi"))
    with pytest.raises(Refused, match=r"it has 1\.0 MiB and this would take 1\.5 MiB"):
        quota.check("line", {"bytes": 2 * 2**20}, [export("a", "1Mi")], export("b", "1.5Mi"))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50)), max_size=12))
def test_whatever_is_admitted_never_exceeds_the_quota(wanted: list[tuple[int, int]]) -> None:
    present: dict[Key, Resource] = {}
    for n, (replicas, size) in enumerate(wanted):
        one = app(f"a{n % 5}", replicas, memory=size * 4096)
        try:
            quota.check("line", {"memory": 100 * 4096, "apps": 4}, present.values(), one)
        except EdgewardError:
            continue
        present[one.key] = one
        used = quota.used(present.values())
        assert used["memory"] <= 100 * 4096
        assert used["apps"] <= 4


def test_of_racing_writes_only_what_fits_is_taken() -> None:
    async def main() -> None:
        resources = Resources(SqliteStore(), Audit())
        await resources.create(made("Namespace", "line", {"quota": {"apps": 3}}), actor="t")

        async def create(n: int) -> bool:
            try:
                await resources.create(app(f"a{n}"), actor="t")
            except Refused:
                return False
            return True

        assert sum(await asyncio.gather(*(create(n) for n in range(10)))) == 3
        assert len(resources.store.items("App", "line")) == 3
        await resources.delete(resources.store.items("App", "line")[0].key, actor="t")
        assert await create(99)
        refused = [a for a in resources.audit.items() if a["outcome"].startswith("Refused")]
        assert len(refused) == 7

    asyncio.run(main())


def test_a_quota_must_be_readable() -> None:
    with pytest.raises(Invalid, match=r"Namespace/line.*quota"):
        made("Namespace", "line", {"quota": {"memory": "9999999999999Ti"}})
    with pytest.raises(Invalid, match=r"quota\.messages"):
        made("Namespace", "line", {"quota": {"messages": 0}})
