"""The process that opens what came from elsewhere can do nothing but that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tests.functions.making import wheel

from edgeward.functions import landlock
from edgeward.functions.archive import pack

TRIES = """
import os, socket, subprocess, sys
from pathlib import Path
from edgeward.functions import sandbox

folder, file, other = sys.argv[1:]
missing = sandbox.shut_in(folder, [file])
(Path(folder) / "made").write_text("x")
assert Path(file).read_text() == "given"
done = []
for name, attempt in {
    "read": lambda: Path(other).read_text(),
    "write": lambda: Path(other).write_text("x"),
    "beside": lambda: (Path(folder).parent / "beside").write_text("x"),
    "link": lambda: os.link(other, Path(folder) / "linked"),
    "socket": lambda: socket.socket(socket.AF_UNIX),
    "program": lambda: subprocess.run(["/bin/true"]),
}.items():
    try:
        attempt()
        done.append(name)
    except OSError:
        pass
print(missing, done)
"""


def test_it_has_shut_itself_in(tmp_path: Path) -> None:
    folder, file, other = tmp_path / "folder", tmp_path / "file", tmp_path / "other"
    folder.mkdir()
    file.write_text("given")
    other.write_text("secret")
    words = [sys.executable, "-c", TRIES, str(folder), str(file), str(other)]
    said = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    if landlock.abi() < 1:
        pytest.skip(f"this kernel has no Landlock: {said.stdout}")
    assert said.stdout.strip() == "[] []"


def _unpack(*words: object) -> dict[str, object]:
    argv = [sys.executable, "-m", "edgeward.functions.unpack", *map(str, words)]
    done = subprocess.run(argv, capture_output=True, timeout=240)
    return msgspec.json.decode(done.stdout, type=dict[str, object])


def test_code_that_cannot_be_compiled_is_there_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").write_text("x = 1\n")
    (tmp_path / "src" / "wrong.py").write_text("x = (\n")
    (tmp_path / "src" / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000)
    (tmp_path / "src" / "nul.py").write_bytes(b"x = 1\0\n")
    file, target = tmp_path / "a", tmp_path / "code" / "x"
    file.write_bytes(pack(tmp_path / "src")[0])
    target.parent.mkdir()
    assert _unpack("archive", file, target)["files"] == 5
    assert [p.name.partition(".")[0] for p in (target / "__pycache__").iterdir()] == ["main"]
    assert [p.name for p in target.parent.iterdir()] == ["x"]


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text(wheel(tmp_path / "w", "tiny", {"tiny.py": ""}))
    (tmp_path / "packages").mkdir()
    for n, data in enumerate((b"", b"no tar", pack(tmp_path / "w")[0])):
        file = tmp_path / f"b{n}"
        file.write_bytes(data)
        assert "error" in _unpack("bundle", file, tmp_path / "packages" / "x", lock)
    assert list((tmp_path / "packages").iterdir()) == []
