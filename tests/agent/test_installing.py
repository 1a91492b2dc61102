"""A release is whole on the disk or not there."""

from __future__ import annotations

import io
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeward.agent.installing import check, install, tidy
from edgeward.cli.release import pack
from edgeward.core.errors import Invalid

MAIN = "edgeward/agent/__main__.py"


def wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        for name, text in files.items():
            z.writestr(name, text)
    return path


def archive(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    wheel(folder / "edgeward-1.0-py3-none-any.whl", files)
    version, data = pack(folder)
    assert version == "1.0"
    assert pack(folder)[1] == data, "the same bytes for the same wheels"
    file = folder / "archive"
    file.write_bytes(data)
    return file


def test_an_environment_of_its_own(tmp_path: Path) -> None:
    files = {
        "edgeward/__init__.py": "",
        "edgeward/agent/__init__.py": "",
        MAIN: "import sys\nassert '--check' in sys.argv\n",
        "edgeward-1.0.data/scripts/tool": "#!/bin/sh\necho works\n",
        "edgeward-1.0.data/purelib/more.py": "",
        "edgeward-1.0.data/headers/x.h": "",
    }
    target = tmp_path / "releases" / ("a" * 64)
    install(archive(tmp_path / "w", files), target)
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert subprocess.run([target / "bin" / "tool"], capture_output=True, check=True).stdout == b"works\n"
    asked = "import edgeward, more, sys; print(edgeward.__file__, sys.prefix)"
    done = subprocess.run(
        [target / "bin" / "python", "-I", "-c", asked], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout.split()[1] == str(target)
    assert done.stdout.startswith(str(target))
    check(target, tmp_path)
    (target / "bin" / "python").unlink()
    with pytest.raises(Invalid, match="does not load"):
        check(target, tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"edgeward/__init__.py": ""},
        {MAIN: "", "../out": ""},
        {MAIN: "", "edgeward-1.0.data/scripts/../../out": ""},
        {MAIN: "", "/out": ""},
    ],
)
def test_what_is_no_release(tmp_path: Path, files: dict[str, str]) -> None:
    target = tmp_path / "releases" / ("a" * 64)
    with pytest.raises(Invalid):
        install(archive(tmp_path / "w", files), target)
    assert list(target.parent.iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_what_is_no_archive(tmp_path: Path) -> None:
    target = tmp_path / "releases" / ("a" * 64)
    bad = tmp_path / "bad"
    bad.write_bytes(b"\x1f\x8b nothing of the sort")
    with pytest.raises(Invalid):
        install(bad, target)
    with tarfile.open(bad, "w") as tar:
        info = tarfile.TarInfo("../one.whl")
        tar.addfile(info, io.BytesIO())
    with pytest.raises(Invalid, match="no wheel"):
        install(bad, target)
    assert list(target.parent.iterdir()) == []


def garbled(whole: bytes, at: int) -> bytes:
    """Packed bytes that are none."""
    at += 30 + len("edgeward/long.py")
    return whole[:at] + b"\xff" * 16 + whole[at + 16 :]


def locked(whole: bytes, at: int) -> bytes:
    """An entry that asks for a password: a bit of its two heads."""
    found = bytearray(whole)
    found[at + 6] |= 1
    found[whole.rindex(b"PK\x01\x02") + 8] |= 1
    return bytes(found)


@pytest.mark.parametrize("damage", [garbled, locked])
def test_a_wheel_that_was_bad_before_it_was_packed(tmp_path: Path, damage: Callable[[bytes, int], bytes]) -> None:
    (tmp_path / "w").mkdir()
    path = wheel(tmp_path / "w" / "edgeward-1.0-py3-none-any.whl", {MAIN: ""})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as z:
        z.writestr("edgeward/long.py", "x" * 100_000)
        at = z.getinfo("edgeward/long.py").header_offset
    path.write_bytes(damage(path.read_bytes(), at))
    file = tmp_path / "archive"
    with tarfile.open(file, "w") as tar:
        tar.add(path, path.name)
    target = tmp_path / "releases" / ("a" * 64)
    with pytest.raises(Invalid, match="cannot be unpacked"):
        install(file, target)
    assert list(target.parent.iterdir()) == []


def test_what_is_kept(tmp_path: Path) -> None:
    current, used, old = ("a" * 64, "b" * 64, "c" * 64)
    for name in (current, used, old, ".unpack-left"):
        (tmp_path / name).mkdir()
    (tmp_path / "state.json").write_text("{}")
    process = subprocess.Popen(["/bin/sh", "-c", "read x", f"{tmp_path}/{used}/bin/python"], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while used.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes():  # an exec sets it a moment later
        assert time.monotonic() < deadline
    try:
        tidy(tmp_path, {current})
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([current, used, "state.json"])
    tidy(tmp_path, {current})
    assert not (tmp_path / used).exists()
