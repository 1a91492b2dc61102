"""Files that survive: old or new, never half, for their owner only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeward.core.errors import Invalid
from edgeward.core.files import ensure_dir, read_json, remove, sha256_of, write_atomic, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
    max_leaves=8,
)  # fmt: skip


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_json_comes_back_as_it_was(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "v.json"
    write_json(path, value)
    assert read_json(path) == value
    assert list(tmp_path.iterdir()) == [path], "nothing temporary stays"


def test_a_write_replaces_content_and_mode_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("old")
    path.chmod(0o644)
    old = os.umask(0o077)
    try:
        write_atomic(path, b"\0new")
        assert (path.read_bytes(), mode(path)) == (b"\0new", 0o600)
        write_atomic(path, "ä", mode=0o644)
        assert (path.read_bytes(), mode(path)) == ("ä".encode(), 0o644)
        assert mode(ensure_dir(tmp_path / "a" / "b")) == 0o700
        os.umask(0o022)
        assert mode(ensure_dir(tmp_path / "c" / "d" / "e")) == 0o700
        assert (mode(tmp_path / "c"), mode(tmp_path / "c" / "d")) == (0o700, 0o700), "parents too"
    finally:
        os.umask(old)


def test_a_write_through_a_link_replaces_the_link_not_its_target(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("theirs")
    link.symlink_to(target)
    write_atomic(link, "mine")
    assert (target.read_text(), link.read_text(), link.is_symlink()) == ("theirs", "mine", False)


def test_a_failed_write_leaves_the_old_and_no_rubbish(tmp_path: Path) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    (folder / "x").touch()
    with pytest.raises(OSError, match="director"):  # a folder with content cannot be replaced
        write_atomic(folder, "new")
    assert list(tmp_path.iterdir()) == [folder]
    path = tmp_path / "w"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, object())
    assert read_json(path) == 1
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "gone" / "x", "new")


def test_a_missing_file_and_a_damaged_one_are_two_things(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    assert read_json(path, None) is None
    with pytest.raises(FileNotFoundError):
        read_json(path)
    for damaged, line in (
        (b"", 1),
        (b'{"a": 1,\n "b"', 2),
        (b"\0" * 64, 1),
        (b'{\n"a": "\xff"}', 2),
        (b"[" * 100_000, 0),
    ):
        path.write_bytes(damaged)
        with pytest.raises(Invalid) as caught:
            read_json(path, {"never": "guessed"})
        e = caught.value
        assert (e.file, e.line) == (str(path), line)
        assert "backup" in e.remedy


def test_remove_and_ensure_dir_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    assert [remove(path), remove(path)] == [True, False]
    folder = ensure_dir(tmp_path / "d")
    folder.chmod(0o755)
    assert mode(ensure_dir(folder)) == 0o755, "a folder that is there keeps its mode"
    with pytest.raises(FileExistsError):
        ensure_dir(_touched(tmp_path / "file"))


def _touched(path: Path) -> Path:
    path.touch()
    return path


def test_parents_made_on_the_way_are_closed_too(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        ensure_dir(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(old)
    assert [mode(tmp_path / p) for p in ("a", "a/b", "a/b/c")] == [0o700] * 3


def test_a_files_hash_is_that_of_all_of_it(tmp_path: Path) -> None:
    data = b"x" * (3 << 20) + b"y"
    (tmp_path / "f").write_bytes(data)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(data).hexdigest()
