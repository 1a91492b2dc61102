"""A folder is the same archive every time, and no archive gets out of its folder."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.core.errors import EdgewardError, Invalid, TooLarge
from edgeward.functions.archive import Bounds, pack, unpack


def _fill(folder: Path) -> Path:
    (folder / "lib").mkdir(parents=True)
    (folder / "main.py").write_text("x = 1\n")
    (folder / "lib" / "a.bin").write_bytes(bytes(range(256)))
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    return folder


def test_the_same_content_is_the_same_digest(tmp_path: Path) -> None:
    one, two = _fill(tmp_path / "one"), _fill(tmp_path / "two")
    for ignored in (".git", "__pycache__", ".venv"):
        (two / ignored).mkdir()
        (two / ignored / "x").write_text("of the workshop")
    (two / "lib" / "a.pyc").write_text("compiled")
    os.utime(two / "main.py", (1, 1))
    (two / "main.py").chmod(0o600)
    assert pack(one) == pack(two)
    (two / "main.py").write_text("x = 2\n")
    assert pack(one)[1] != pack(two)[1]


def test_what_was_packed_is_unpacked(tmp_path: Path) -> None:
    data, _ = pack(_fill(tmp_path / "src"))
    file, root = tmp_path / "a.tar.gz", tmp_path / "root"
    file.write_bytes(data)
    root.mkdir()
    made = unpack(file, root)
    assert sorted(made.files) == ["lib/a.bin", "main.py", "run.sh"]
    assert (root / "lib" / "a.bin").read_bytes() == bytes(range(256))
    assert (root / "run.sh").stat().st_mode & 0o777 == 0o555
    assert (root / "main.py").stat().st_mode & 0o777 == 0o444


def test_the_document_that_declares_a_folder_may_lie_in_it(tmp_path: Path) -> None:
    src = _fill(tmp_path / "src")
    data = pack(src)
    (src / "function.yaml").write_text("x")
    assert pack(src, src / "lib" / ".." / "function.yaml") == data != pack(src)


def test_a_tar_with_a_zip_at_its_end_is_a_tar(tmp_path: Path) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        inner = _zip(("other.py", 0o100644))
        entry = tarfile.TarInfo("inner.zip")
        entry.size = len(inner)
        tar.addfile(entry, io.BytesIO(inner))
    file, root = tmp_path / "a.tar", tmp_path / "root"
    file.write_bytes(made.getvalue())
    root.mkdir()
    assert unpack(file, root).files == ["inner.zip"]


def test_links_that_lead_out_are_not_packed(tmp_path: Path) -> None:
    src = _fill(tmp_path / "src")
    (src / "inner.py").symlink_to("main.py")
    assert pack(src)[0] != b""
    (src / "secret").symlink_to("/etc/hostname")
    with pytest.raises(Invalid, match="secret is a link that leads out"):
        pack(src)
    (src / "secret").unlink()
    (src / "lib" / "again").symlink_to("..")
    with pytest.raises(Invalid, match="lib/again is a link to what it is in"):
        pack(src)
    (src / "lib" / "again").unlink()
    os.mkfifo(src / "pipe")
    with pytest.raises(Invalid, match="pipe is no regular file"):
        pack(src)
    with pytest.raises(Invalid, match="is no folder"):
        pack(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Invalid, match="has no file"):
        pack(tmp_path / "empty")


def _tar(*entries: tuple[str, bytes, str]) -> bytes:
    """(name, type, link target)"""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, kind, target in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            data = b"inside" if kind == tarfile.REGTYPE else b""
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def _zip(*entries: tuple[str, int]) -> bytes:
    """(name, mode)"""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, mode in entries:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, "inside")
    return made.getvalue()


FILE = tarfile.REGTYPE
ESCAPES: dict[str, Callable[[], bytes]] = {
    "tar-absolute": lambda: _tar(("/escaped", FILE, "")),
    "tar-up": lambda: _tar(("../escaped", FILE, "")),
    "tar-up-inside": lambda: _tar(("a/../../escaped", FILE, "")),
    "tar-symlink": lambda: _tar(("link", tarfile.SYMTYPE, ".."), ("link/escaped", FILE, "")),
    "tar-symlink-within": lambda: _tar(("main.py", FILE, ""), ("link", tarfile.SYMTYPE, "main.py")),
    "tar-hardlink": lambda: _tar(("passwd", tarfile.LNKTYPE, "/etc/passwd")),
    "tar-device": lambda: _tar(("zero", tarfile.CHRTYPE, "")),
    "tar-fifo": lambda: _tar(("pipe", tarfile.FIFOTYPE, "")),
    "tar-folder-up": lambda: _tar(("../escaped", tarfile.DIRTYPE, "")),
    "tar-twice": lambda: _tar(("main.py", FILE, ""), ("main.py", FILE, "")),
    "tar-file-as-folder": lambda: _tar(("a", FILE, ""), ("a/b", FILE, "")),
    "tar-newline": lambda: _tar(("a\nb", FILE, "")),
    "tar-backslash": lambda: _tar(("..\\escaped", FILE, "")),
    "zip-up": lambda: _zip(("../escaped", 0o100644)),
    "zip-absolute": lambda: _zip(("/escaped", 0o100644)),
    "zip-symlink": lambda: _zip(("link", 0o120777)),
    "zip-device": lambda: _zip(("zero", 0o020666)),
    "zip-twice": lambda: _zip(("main.py", 0o100644), ("./main.py", 0o100644)),
    "damaged": lambda: _tar(("main.py", FILE, ""))[:-20],
    "nothing": lambda: b"no archive at all",
    "empty": lambda: b"",
}


@pytest.mark.parametrize("case", sorted(ESCAPES))
def test_no_archive_gets_out(case: str, tmp_path: Path) -> None:
    file, root = tmp_path / "a", tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    file.write_bytes(ESCAPES[case]())
    with pytest.raises(Invalid):
        unpack(file, root)
    assert sorted(tmp_path.rglob("*escaped*")) == []
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


def test_bombs_are_stopped_early(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    made = io.BytesIO()
    with gzip.GzipFile(fileobj=made, mode="wb") as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        entry = tarfile.TarInfo("big")
        entry.size = 4 << 20
        tar.addfile(entry, io.BytesIO(bytes(4 << 20)))
    file = tmp_path / "bomb.tar.gz"
    file.write_bytes(made.getvalue())
    with pytest.raises(TooLarge):
        unpack(file, root, Bounds(free=1 << 20, ratio=10))
    assert (root / "big").stat().st_size <= 2 << 20
    many = tmp_path / "many.zip"
    many.write_bytes(_zip(*((f"f{n}", 0o100644) for n in range(20))))
    with pytest.raises(TooLarge):
        unpack(many, tmp_path, Bounds(files=10))


@given(
    st.binary(max_size=400), st.sampled_from(["tar-up", "zip-symlink", "tar-twice", "tar-symlink"]), st.integers(0, 400)
)
@settings(max_examples=60)
def test_broken_bytes_are_a_refusal_and_nothing_else(noise: bytes, case: str, at: int) -> None:
    import tempfile

    good = bytearray(ESCAPES[case]())
    good[at : at + len(noise)] = noise
    with tempfile.TemporaryDirectory() as folder:
        root, file = Path(folder) / "root", Path(folder) / "a"
        root.mkdir()
        file.write_bytes(bytes(good))
        try:
            unpack(file, root)
        except EdgewardError:
            pass
        assert not any(p.is_symlink() for p in root.rglob("*"))
