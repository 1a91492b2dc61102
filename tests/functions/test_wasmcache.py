"""Machine code on the disk: bounded, marked, and sealed once it is in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeward.functions import wasmcache
from edgeward.functions.wasmcache import Cache


def cache(tmp_path: Path, config: str = "c", **more: int) -> Cache:
    return Cache(tmp_path / "wasm", tmp_path / "wasm.key", config, **more)


def content(code: wasmcache.Code | None) -> bytes | None:
    if code is None:
        return None
    try:
        return os.pread(code.fd, code.size, 0)
    finally:
        os.close(code.fd)


def test_what_is_kept_is_found_by_another(tmp_path: Path) -> None:
    c = cache(tmp_path)
    name = c.name("ab")
    assert c.find(name) is None
    assert content(c.keep(name, b"code")) == b"code"
    assert content(c.held(name)) == b"code"
    other = cache(tmp_path)
    assert other.held(name) is None
    assert content(other.find(name)) == b"code"
    assert content(other.held(name)) == b"code"
    c.close()
    other.close()


def test_other_settings_have_another_name(tmp_path: Path) -> None:
    assert cache(tmp_path).name("ab") == cache(tmp_path).name("ab")
    assert cache(tmp_path).name("ab") != cache(tmp_path, "other").name("ab")


def test_code_of_another_name_or_key_is_thrown_away(tmp_path: Path) -> None:
    c = cache(tmp_path)
    one, two = c.name("1"), c.name("2")
    content(c.keep(one, b"one"))
    path = tmp_path / "wasm" / two
    path.write_bytes((tmp_path / "wasm" / one).read_bytes())
    assert cache(tmp_path).find(two) is None
    assert not path.exists()
    (tmp_path / "wasm.key").unlink()
    assert cache(tmp_path).find(one) is None


def test_what_is_in_memory_cannot_be_changed(tmp_path: Path) -> None:
    c = cache(tmp_path)
    code = c.keep(c.name("1"), b"code")
    for change in (
        lambda: os.pwrite(code.fd, b"x", 0),
        lambda: os.ftruncate(code.fd, 1),
        lambda: os.write(os.open(f"/proc/self/fd/{code.fd}", os.O_RDWR), b"x"),
    ):
        with pytest.raises(OSError):
            change()
    assert content(code) == b"code"


def test_the_folder_is_bounded_and_the_longest_unused_goes(tmp_path: Path) -> None:
    c = cache(tmp_path, folder_bytes=300)
    names = [c.name(str(n)) for n in range(4)]
    for n, name in enumerate(names[:3]):
        content(c.keep(name, bytes(64)))
        os.utime(tmp_path / "wasm" / name, (n, n))
    content(cache(tmp_path).find(names[0]))  # used just now
    content(c.keep(names[3], bytes(64)))
    assert {p.name for p in (tmp_path / "wasm").iterdir()} == {names[0], names[2], names[3]}
    content(c.keep(c.name("large"), bytes(1000)))
    assert [p.name for p in (tmp_path / "wasm").iterdir()] == [c.name("large")], "the newest stays, whatever it has"


def test_what_is_held_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasmcache, "MAX_HELD", 100)
    c = cache(tmp_path)
    for n in range(5):
        content(c.keep(c.name(str(n)), bytes(40)))
    assert [content(c.held(c.name(str(n)))) is not None for n in range(5)] == [False, False, False, True, True]
    assert content(c.find(c.name("0"))) == bytes(40)


def test_a_disk_that_is_full_is_no_reason_not_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = cache(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wasmcache, "write_atomic", full)
    assert content(c.keep(c.name("1"), b"code")) == b"code"
    assert cache(tmp_path).find(c.name("1")) is None
