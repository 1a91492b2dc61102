"""What docs/operations.md promises of upgrades, held against the previous release: the wheel in tests/data/previous.

A kind or field that the previous release does not know must say from which level on it is known, or its agents would
choke on it: their whole sync stops at the first object that they cannot read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.previous import ROOT, environment, unpacked

from edgeward.core.registry import kinds
from edgeward.core.resource import Metadata
from edgeward.hub.kinds import load
from edgeward.nodes import enrol, wire
from edgeward.nodes.wire import LEVEL

load()

_ASK = """
import json, msgspec
from edgeward.hub.kinds import load
load()
from edgeward.core.registry import kinds
from edgeward.core.resource import Metadata
from edgeward.nodes.wire import LEVEL
from edgeward.nodes import enrol, wire
print(json.dumps({
    "wire": {n: [(f.name, f.required) for f in msgspec.structs.fields(s)] for m in (wire, enrol)
             for n, s in vars(m).items() if isinstance(s, type) and issubclass(s, msgspec.Struct)},
    "level": LEVEL,
    "metadata": list(Metadata.__struct_fields__),
    "kinds": {k.name: {"schema": k.schema, "spec": msgspec.json.schema(k.spec)} for k in kinds},
}))
"""


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    release = unpacked(tmp_path_factory.mktemp("previous"))
    done = subprocess.run(
        [sys.executable, "-c", _ASK],
        env=environment(release), cwd=release, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    doc: dict[str, Any] = json.loads(done.stdout)
    return doc


def fields(schema: dict[str, Any]) -> dict[str, str]:
    """Each field's path below the spec, and its form in short."""
    found: dict[str, str] = {}

    def walk(part: Any, at: str, seen: tuple[str, ...]) -> None:
        for one in [part, *part.get("anyOf", [])]:
            ref = one.get("$ref", "").rpartition("/")[2]
            if ref and ref not in seen:
                walk(schema["$defs"][ref], at, (*seen, ref))
            for name, inner in one.get("properties", {}).items():
                path = f"{at}.{name}".lstrip(".")
                needed = " required" if name in one.get("required", []) else ""
                found[path] = json.dumps(inner.get("enum"), sort_keys=True) + needed
                walk(inner, path, seen)
            if isinstance(one.get("items"), dict):
                walk(one["items"], at, seen)

    walk(schema, "", ())
    return found


def test_what_the_previous_release_does_not_know_says_its_level(previous: dict[str, Any]) -> None:
    old_level, wrong = previous["level"], []
    assert old_level < LEVEL, "raise LEVEL in nodes/wire.py with the release"
    for kind in kinds:
        known = previous["kinds"].get(kind.name)
        if known is None:
            if not old_level < kind.level <= LEVEL:
                wrong.append(f"{kind.name}: new, so it needs level={LEVEL}")
            continue
        if kind.level > old_level:
            wrong.append(f"{kind.name}: the previous release knows it, so its level is at most {old_level}")
        if kind.schema != known["schema"]:
            wrong.append(f"{kind.name}: agents of the previous release cannot read schema {kind.schema}")
        now, then = fields(msgspec.json.schema(kind.spec)), fields(known["spec"])
        for path in now.keys() - then.keys():
            parts = path.split(".")
            if not any(kind.newer.get(".".join(parts[:n]), 0) > old_level for n in range(1, len(parts) + 1)):
                wrong.append(f"{kind.name} $.spec.{path}: new, so Kind.newer needs {path!r}: {LEVEL}")
        wrong += [f"{kind.name} $.spec.{path}: is gone; what is stored has it" for path in then.keys() - now.keys()]
        wrong += [
            f"{kind.name} $.spec.{path}: was {then[path]}, is {now[path]}: the other side reads it otherwise"
            for path in now.keys() & then.keys()
            if now[path] != then[path]
        ]
    later = set(Metadata.__struct_fields__) - set(previous["metadata"])
    wrong += [f"metadata.{name}: an older agent cannot read it" for name in sorted(later)]
    assert not wrong, "\n".join(wrong)


def test_what_goes_over_the_link_is_read_by_both(previous: dict[str, Any]) -> None:
    """Fields may be added that may be left out, none taken away; in what a box signs not even that."""
    for name, then in previous["wire"].items():
        struct = getattr(wire, name, None) or getattr(enrol, name)
        now = {f.name: f.required for f in msgspec.structs.fields(struct)}
        was = dict(then)
        assert was.keys() <= now.keys(), f"{name} lost {sorted(was.keys() - now.keys())}: the other side sends it"
        new = [field for field in now if field not in was]
        assert not [f for f in new if now[f]], f"{name}: {new} must have defaults, the other side does not send them"
        if struct.__struct_config__.forbid_unknown_fields or struct.__struct_config__.array_like:
            assert not new, f"{name}: {new} would be refused by the other side"


def test_the_page_says_how_it_is_tested() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert "## Upgrading" in page
    for name in ("tests/scenarios/test_upgrade.py", "notTold", "notUnderstood"):
        assert name in page, name
    (wheel,) = (Path(ROOT) / "tests" / "data" / "previous").glob("*.whl")
    assert wheel.stat().st_size < 700_000
