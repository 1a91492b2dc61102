"""The registry: found by every word a person may use, never two things under one word, upgrades in order."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgeward.core.errors import Invalid, NotFound
from edgeward.core.registry import Extensions, Kind, Kinds, kinds
from edgeward.hub.kinds import load

load()


class Spec(msgspec.Struct):
    pass


def test_a_kind_is_found_by_name_plural_and_short_name_in_any_case() -> None:
    known = Kinds()
    app = known.add(Kind("App", "apps", Spec, short=("a",)))
    box = known.add(Kind("Box", "boxes", Spec))
    assert [known.find(w) for w in ("app", "Apps", "APP", "a", "box", "boxes")] == [app] * 4 + [box] * 2
    assert known.get("App") is app
    assert known.by_plural("apps") is app
    assert [known.by_plural(w) for w in ("app", "a", "App", "gone")] == [None] * 4, "the API's paths have one spelling"
    assert (known.names(), list(known)) == (["App", "Box"], [app, box])


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    known = Kinds()
    known.add(Kind("App", "apps", Spec))
    with pytest.raises(Invalid) as invalid:
        known.get("app")
    assert (invalid.value.field, invalid.value.remedy) == ("$.kind", "known kinds: App")
    with pytest.raises(NotFound) as missing:
        known.find("gone")
    assert "'gone'" in missing.value.message
    assert missing.value.remedy == "known kinds: App"


@pytest.mark.parametrize(
    "second",
    [Kind("App", "x", Spec), Kind("X", "apps", Spec), Kind("X", "xs", Spec, short=("a",)), Kind("A", "b", Spec)],
)
def test_one_word_means_one_kind_and_a_refused_kind_leaves_nothing_behind(second: Kind) -> None:
    known = Kinds()
    app = known.add(Kind("App", "apps", Spec, short=("a",)))
    with pytest.raises(ValueError, match=r"twice|already means App"):
        known.add(second)
    assert list(known) == [app]
    with pytest.raises(NotFound):
        known.find("x")


def test_upgrades_run_in_order_from_the_stored_version() -> None:
    def step(n: int) -> Any:
        return lambda spec: {"steps": [*spec["steps"], n]}

    kind = Kind("App", "apps", Spec, schema=3, upgrades={1: step(1), 2: step(2)})
    assert kind.upgrade({"steps": []}, 1) == {"steps": [1, 2]}
    assert kind.upgrade({"steps": []}, 2) == {"steps": [2]}
    assert kind.upgrade({"steps": []}, 3) == {"steps": []}
    with pytest.raises(Invalid) as caught:
        kind.upgrade({}, 4)
    assert (caught.value.resource, "newer release" in caught.value.remedy) == ("App", True)


@pytest.mark.parametrize("kind", list(kinds), ids=lambda k: k.name)
def test_what_every_kind_of_the_product_promises(kind: Kind) -> None:
    assert kind.doc
    assert set(kind.upgrades) == set(range(1, kind.schema)), "what any earlier release stored can be read"
    fields = {f.encode_name for f in msgspec.structs.fields(kind.spec)}
    assert set(kind.secret_fields) <= fields
    assert kinds.by_plural(kind.plural) is kind
    assert kinds.find(kind.name) is kind


def test_extensions_by_role_and_name() -> None:
    ext = Extensions()
    ext.add("runtime", "process", 1)
    ext.add("sink", "process", 2)
    ext.add("runtime", "none", 3)
    assert (ext.get("runtime", "process"), ext.get("sink", "process")) == (1, 2)
    assert ext.names("runtime") == ["none", "process"]
    with pytest.raises(ValueError, match="runtime/process is registered twice"):
        ext.add("runtime", "process", 4)
    assert ext.get("runtime", "process") == 1
    with pytest.raises(Invalid) as caught:
        ext.get("runtime", "wasm")
    assert caught.value.remedy == "this release has: none, process"
    with pytest.raises(Invalid) as caught:
        ext.get("driver", "modbus")
    assert caught.value.remedy == "this release has: none"
