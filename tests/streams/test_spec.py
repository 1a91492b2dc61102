"""What an Export may say; every refusal names the resource, the field and mostly the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from edgeward.core.errors import Invalid
from edgeward.core.registry import kinds
from edgeward.core.resource import decode
from edgeward.hub.kinds import load

load()


def export(stream: str = "line1", keep: Any = None, topic: str = "s/#", **spec: Any) -> Any:
    hub = {"stream": stream} | ({} if keep is None else {"keep": keep})
    doc = {"apiVersion": "edgeward/v1", "kind": "Export", "metadata": {"name": "e"}}
    return decode(doc | {"spec": {"from": {"mqtt": topic}, "to": {"hub": hub}} | spec})


@pytest.mark.parametrize(
    ("spec", "field", "says"),
    [
        ({"topic": "#"}, "$.spec.from.mqtt", r"would be everything \(name a first level"),
        ({"topic": ""}, "$.spec.from.mqtt", r"is empty \(at least 1"),
        ({"topic": "a" * 1025}, "$.spec.from.mqtt", "at most 1024"),
        ({"stream": "Line"}, "$.spec.to.hub.stream", "lower-case letters.*at most 63"),
        ({"stream": "a.b"}, "$.spec.to.hub.stream", "lower-case letters.*at most 63"),
        ({"stream": "a" * 64}, "$.spec.to.hub.stream", "lower-case letters.*at most 63"),
        ({"stream": "a-"}, "$.spec.to.hub.stream", "lower-case letters.*at most 63"),
        ({"identity": "id"}, "$.spec.identity", r"'id' is no path \(write it as \$\.id"),
        ({"identity": "$"}, "$.spec.identity", "is no path"),
        ({"identity": "$.a[0]"}, "$.spec.identity", "is no path"),
        ({"identity": "$.a..b"}, "$.spec.identity", "is no path"),
        ({"identityWindow": 0}, "$.spec.identityWindow", "too small .at least 1"),
        ({"identityWindow": 1_000_001}, "$.spec.identityWindow", "too large .at most 1000000"),
        ({"priority": 10}, "$.spec.priority", "too large .at most 9"),
        ({"priority": -1}, "$.spec.priority", "too small .at least 0"),
        ({"keep": 2**20 - 1}, "$.spec.to.hub.keep", r"1048575 bytes \(from 1Mi to 4Gi"),
        ({"keep": "4.1Gi"}, "$.spec.to.hub.keep", "from 1Mi to 4Gi"),
        ({"keep": -1}, "$.spec.to.hub.keep", "-1 is negative"),
        ({"bounds": {"bytes": "63Ki"}}, "$.spec.bounds.bytes", r"64512 bytes are too few \(at least 64Ki"),
        ({"bounds": {"bytes": -1}}, "$.spec.bounds.bytes", "-1 is negative"),
        ({"bounds": {"age": -1}}, "$.spec.bounds.age", "-1 is negative"),
        ({"bounds": {"onFull": "stop"}}, "$.spec.bounds.onFull", "one of: dropOldest"),
        (
            {"topic": "a/+/b", "bounds": {"onFull": "refuse"}},
            "$.spec.bounds.onFull",
            "cannot refuse 'a/\\+/b'.*dropNewest",
        ),
        ({"topic": "+/a/#", "bounds": {"onFull": "refuse"}}, "$.spec.bounds.onFull", "name a whole branch"),
        ({"topic": "a/$b", "bounds": {"onFull": "refuse"}}, "$.spec.bounds.onFull", "name a whole branch"),
        ({"bounds": {"age": float("inf")}}, "$.spec.bounds.age", "is no duration"),
        ({"rate": "9" * 400}, "$.spec.rate", "is no size"),
        ({"rate": -1}, "$.spec.rate", "-1 is negative"),
        ({"rate": "fast"}, "$.spec.rate", "no size"),
        ({"sink": 1}, "$.spec.sink", "unknown field"),
        ({"form": {"mqtt": "a"}}, "$.spec.form", "did you mean 'from'"),
    ],
)
def test_refusals(spec: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(Invalid, match=says) as caught:
        export(**spec)
    assert (caught.value.resource, caught.value.field) == ("Export/e", field)


def test_what_is_taken() -> None:
    for keep in ("1Mi", "4Gi", 2**20):
        assert export(keep=keep, identity="$.meta.i-d_2", bounds={"bytes": "64Ki", "age": "1h", "onFull": "refuse"})
    placed = export(stream="a" * 63, rate="64Ki", placement={"site": "plant"})
    assert [(r.kind, r.name, r.path) for r in kinds.get("Export").refs(placed)] == [
        ("Site", "plant", "$.spec.placement.site")
    ]
    assert kinds.get("Export").refs(export()) == []
    assert placed.document()["spec"]["from"] == {"mqtt": "s/#"}, "called so for people, whatever Python calls it"
    assert decode(placed.document()) == placed


def test_columns_and_example() -> None:
    kind = kinds.get("Export")
    d = export(priority=7).document() | {"status": {"nodes": {"a": {"pending": 2}, "b": {"pending": 3}, "c": {}}}}
    shown = {c.title: c.value(d) for c in kind.columns}
    assert shown == {
        "FROM": "s/#", "STREAM": "line1", "PHASE": "Pending", "PRIORITY": 7, "NODES": 3, "PENDING": 5,
    }  # fmt: skip
    assert {c.title: c.value(export().document()) for c in kind.columns}["PENDING"] == 0
    decode(yaml.safe_load(kind.example))
