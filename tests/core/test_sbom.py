"""The bill of materials names everything that is installed, and is the same each time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgeward.core.sbom import Package, document, locked, text

ROOT = Path(__file__).parents[2]
SERIAL = re.compile(r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def check(doc: dict[str, Any]) -> None:
    """What the CycloneDX 1.5 schema asks for of the members that are used here."""
    assert (doc["bomFormat"], doc["specVersion"], doc["version"]) == ("CycloneDX", "1.5", 1)
    assert SERIAL.fullmatch(doc["serialNumber"])
    inner = [c for component in doc["components"] for c in component.get("components", [])]
    refs = [doc["metadata"]["component"]["bom-ref"], *(c["bom-ref"] for c in [*doc["components"], *inner])]
    assert len(refs) == len(set(refs))
    for component in [doc["metadata"]["component"], *doc["components"], *inner]:
        assert component["type"] in ("application", "library")
        assert component["name"] and component["version"]
        assert re.fullmatch(r"pkg:[a-z]+/[^\s@]+@[^\s@]+", component["purl"])
        for one in component.get("hashes", []):
            assert one["alg"] == "SHA-256" and re.fullmatch(r"[0-9a-f]{64}", one["content"])
        for one in component.get("licenses", []):
            assert set(one["license"]) in ({"id"}, {"name"})
    assert {d["ref"] for d in doc["dependencies"]} <= set(refs)
    for dependency in doc["dependencies"]:
        assert set(dependency["dependsOn"]) <= set(refs)


def test_a_lock_file_is_read_whole_or_not_at_all() -> None:
    good = "# c\nA_b==1.0 ; sys_platform != 'win32' \\\n    --hash=sha256:" + "a" * 64 + "\n\nc==2\n"
    assert locked(good) == [
        Package("a-b", "1.0", ("a" * 64,), "sys_platform != 'win32'"),
        Package("c", "2"),
    ]
    for bad in ("a>=1\n", "-e .\n", "    --hash=sha256:" + "a" * 64 + "\n", "a @ file:///x\n"):
        with pytest.raises(ValueError, match="line 1"):
            locked(bad)


def test_a_document_depends_on_its_content_alone() -> None:
    packages = [Package("b", "1", needs=("A",)), Package("a", "2", ("f" * 64,), licence="MIT")]
    doc = document("1.0", packages, ["b", "not-here"])
    check(doc)
    assert text(doc) == text(document("1.0", reversed(packages), ["not-here", "b"]))
    assert doc["serialNumber"] != document("1.1", packages)["serialNumber"]
    edges = {d["ref"]: d["dependsOn"] for d in doc["dependencies"]}
    assert edges["pkg:pypi/edgeward@1.0"] == ["pkg:pypi/b@1"]
    assert edges["pkg:pypi/b@1"] == ["pkg:pypi/a@2"]


@pytest.mark.slow
def test_the_wheel_carries_it(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        doc = json.loads(z.read("edgeward/sbom.cdx.json"))
        # what `edgeward sbom` shows when it runs from there
        z.extractall(tmp_path / "installed")
    check(doc)
    pinned = locked((ROOT / "requirements.lock").read_text())
    assert {(c["name"], c["version"]) for c in doc["components"]} == {(p.name, p.version) for p in pinned}
    assert all(c["hashes"] for c in doc["components"])
    assert any(c["name"] == "nats-server" for d in doc["components"] for c in d.get("components", []))
    direct = next(d for d in doc["dependencies"] if d["ref"] == doc["metadata"]["component"]["bom-ref"])
    assert any("cryptography" in ref for ref in direct["dependsOn"])
    shown = subprocess.run(
        [sys.executable, "-m", "edgeward", "sbom"], capture_output=True, text=True, timeout=60, check=True,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""}, cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(shown.stdout) == doc


def test_what_is_installed_here() -> None:
    argv = [sys.executable, "-m", "edgeward", "sbom", "--installed"]
    doc = json.loads(subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout)
    check(doc)
    by_name = {c["name"]: c for c in doc["components"]}
    assert {"cryptography", "nats-py", "uvicorn", "cffi"} <= set(by_name)
    assert "pytest" not in by_name  # is here, but is no part of it
    assert by_name["starlette"]["licenses"]
