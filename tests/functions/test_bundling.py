"""A bundle is fetched by a real pip from a folder of real wheels; what cannot be had is named."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from tests.functions.making import wheel

from edgeward.cli.uploads import target_of
from edgeward.core.errors import EdgewardError, Invalid
from edgeward.functions.bundling import Source, command, failure, make
from edgeward.functions.stock import place, run_unpack

PLAIN = {"tiny.py": "VALUE = 1\n"}


def _make(lock: str, wheels: Path, tmp_path: Path, arch: str = "x86_64") -> tuple[bytes, list[str]]:
    source = Source(find_links=str(wheels))
    (tmp_path / "made").mkdir(exist_ok=True)
    names = asyncio.run(make(lock, target_of("3.11", arch, 28), source, tmp_path / "made" / "bundle"))
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["bundle"], "nothing is left beside it"
    return (tmp_path / "made" / "bundle").read_bytes(), names


def test_the_same_wheels_are_the_same_bundle(tmp_path: Path) -> None:
    lock = wheel(tmp_path / "w", "tiny", PLAIN) + wheel(tmp_path / "w", "other", {"other/__init__.py": ""})
    lock += "windows==1 ; sys_platform == 'win32' --hash=sha256:" + "0" * 64 + "\n"
    data, names = _make(lock, tmp_path / "w", tmp_path)
    assert names == ["other-1.0-py3-none-any.whl", "tiny-1.0-py3-none-any.whl"]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        held = {e.name: tar.extractfile(e).read() for e in tar}  # type: ignore[union-attr]
    assert held == {n: (tmp_path / "w" / n).read_bytes() for n in names}, "as they were"
    assert _make(lock, tmp_path / "w", tmp_path)[0] == data


def test_what_cannot_be_had_is_named(tmp_path: Path) -> None:
    lock = wheel(tmp_path / "w", "tiny", PLAIN, tag="cp311-cp311-manylinux_2_17_x86_64")
    with pytest.raises(Invalid, match=r"tiny 1\.0 has no wheel for Python 3\.11 on manylinux_2_28_aarch64"):
        _make(lock, tmp_path / "w", tmp_path, "aarch64")
    with pytest.raises(Invalid, match="its file is not the one that the lock file names"):
        _make("tiny==1.0 --hash=sha256:" + "0" * 64, tmp_path / "w", tmp_path)


def test_a_source_archive_is_never_run(tmp_path: Path) -> None:
    """pip would run its setup.py, were it asked to."""
    folder, proof = tmp_path / "w", tmp_path / "proof"
    folder.mkdir()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, text in (
            ("setup.py", f"open({str(proof)!r}, 'w')"),
            ("PKG-INFO", "Metadata-Version: 1.0\nName: evil\n"),
        ):
            entry = tarfile.TarInfo(f"evil-1.0/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    (folder / "evil-1.0.tar.gz").write_bytes(made.getvalue())
    lock = f"evil==1.0 --hash=sha256:{hashlib.sha256(made.getvalue()).hexdigest()}"
    with pytest.raises(Invalid, match=r"evil 1\.0 has no wheel"):
        _make(lock, folder, tmp_path)
    assert not proof.exists()


def test_pip_is_told_to_take_wheels_by_hash_only(tmp_path: Path) -> None:
    words = command(
        target_of("3.12", "aarch64", 17), Source(index="https://packages.example/simple"), tmp_path, tmp_path
    )
    for word in (
        "--only-binary=:all:",
        "--require-hashes",
        "--no-deps",
        "--platform=manylinux2014_aarch64",
        "--abi=cp312",
    ):
        assert word in words
    assert Source.read({"findLinks": "/w"}).options() == ["--find-links=/w", "--no-index"]
    assert Source.read(None).options() == []


def test_pip_that_is_not_there_or_says_nothing_is_told() -> None:
    target = target_of("3.11", "x86_64", 28)
    assert "install pip" in failure("/usr/bin/python: No module named pip", target).remedy
    assert "cannot be fetched" in str(failure("", target))


def _place(data: bytes, lock: str, tmp_path: Path) -> Path:
    file, target = tmp_path / "bundle", tmp_path / "packages" / "x"
    file.write_bytes(data)
    asyncio.run(place("packages", file, target, lock))
    return target


def test_a_bundle_is_laid_out_as_an_installer_would(tmp_path: Path) -> None:
    lock = wheel(
        tmp_path / "w", "tiny",
        {**PLAIN, "tiny-1.0.data/purelib/more.py": "", "tiny-1.0.data/scripts/run": "", "tiny_model/m.bin": b"\0\1"},
    )  # fmt: skip
    data, _ = _make(lock, tmp_path / "w", tmp_path)
    at = _place(data, lock, tmp_path)
    there = {p.relative_to(at).as_posix() for p in at.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert {"tiny.py", "more.py", "tiny_model/m.bin", "tiny-1.0.dist-info/METADATA"} <= there
    assert not any("scripts" in p for p in there)
    assert list((at / "__pycache__").glob("tiny.*.pyc")), "compiled beforehand"
    assert (at / "tiny.py").stat().st_mode & 0o222 == 0


def test_a_bundle_with_another_wheel_is_refused(tmp_path: Path) -> None:
    lock = wheel(tmp_path / "w", "tiny", PLAIN)
    data, _ = _make(lock, tmp_path / "w", tmp_path)
    evil = wheel(tmp_path / "evil", "tiny", {"tiny.py": "VALUE = 666\n"})
    bad, _ = _make(evil, tmp_path / "evil", tmp_path)
    with pytest.raises(EdgewardError, match="is not what the lock file names"):
        _place(bad, lock, tmp_path)
    assert not (tmp_path / "packages" / "x").exists()
    two = lock + wheel(tmp_path / "w", "second", {"second.py": ""})
    with pytest.raises(EdgewardError, match=r"second 1\.0 has no wheel in the bundle"):
        _place(data, two, tmp_path)
    assert list((tmp_path / "packages").iterdir()) == [], "nothing is left"


def test_a_node_says_what_it_is() -> None:
    said = asyncio.run(run_unpack("target"))
    assert said["python"].startswith("3.") and said["platforms"] and said["environment"]["sys_platform"]
