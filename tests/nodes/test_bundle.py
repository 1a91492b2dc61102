"""One file for a box without internet; and what is handed out as one without being one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from edgeward.core.errors import Invalid
from edgeward.nodes import bundle as module
from edgeward.nodes.bundle import Bundle, read, write
from edgeward.nodes.enrol import Token, encode_token

TOKEN = encode_token(Token(1, "t", "box", "plant", ["https://hub"], bytes(32), bytes(32)))


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_what_is_packed_is_read(tmp_path: Path) -> None:
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"wheel")
    packed = Bundle(TOKEN, node="box", site="plant", proxy="http://p:1", proxyCa="x")
    file = tmp_path / "box.tar"
    assert write(file, packed, tmp_path.glob("*.whl")) == 1
    assert file.stat().st_mode & 0o777 == 0o600
    assert read(file) == packed
    with tarfile.open(file) as tar:
        assert tar.getnames() == ["join.json", "install.sh", "wheels/a-1-py3-none-any.whl"]
        tar.extract("join.json", tmp_path, filter="data")
    assert read(tmp_path / "join.json") == packed


def test_the_script_is_one(tmp_path: Path) -> None:
    (tmp_path / "install.sh").write_text(module.INSTALL)
    assert subprocess.run(["sh", "-n", str(tmp_path / "install.sh")]).returncode == 0
    done = subprocess.run(["sh", str(tmp_path / "install.sh")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: sh install.sh DIR" in done.stderr


def test_the_script_installs_without_a_network_and_joins(tmp_path: Path) -> None:
    """With a wheel that is a program in edgeward's place and says what it was asked."""
    said = tmp_path / "said"
    code = f"import sys, pathlib\ndef main(): pathlib.Path({str(said)!r}).write_text(' '.join(sys.argv[1:]))\n"
    wheel = tmp_path / "edgeward-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as whl:
        whl.writestr("fake.py", code)
        whl.writestr("edgeward-9.dist-info/METADATA", "Metadata-Version: 2.1\nName: edgeward\nVersion: 9\n")
        whl.writestr("edgeward-9.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        whl.writestr("edgeward-9.dist-info/entry_points.txt", "[console_scripts]\nedgeward = fake:main\n")
        whl.writestr("edgeward-9.dist-info/RECORD", "")
    box = tmp_path / "a box"
    box.mkdir()
    write(box / "box.tar", Bundle(TOKEN, node="box", site="plant"), [wheel])
    subprocess.run(["tar", "xf", "box.tar"], cwd=box, check=True)
    argv = ["sh", str(box / "install.sh"), "no de", "--enrol-only"]
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    assert said.read_text() == f"join --bundle {box}/join.json --data no de --enrol-only"
    assert (tmp_path / "no de").stat().st_mode & 0o777 == 0o700
    # a Python that is too old is named, before anything is made
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o700)
    argv[2] = "other"
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env={**env, "PYTHON": str(old)})
    assert done.returncode == 1 and "is not Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "other").exists()


def test_what_is_no_bundle_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    config = b'{"token":"%b"}' % TOKEN.encode()
    link = tarfile.TarInfo("join.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("join.json")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../etc/passwd"
    bad = [
        archive(tmp_path / "empty.tar"),
        archive(tmp_path / "link.tar", (link, b"")),
        archive(tmp_path / "hard.tar", (hard, b"")),
        archive(tmp_path / "up.tar", (tarfile.TarInfo("../join.json"), config)),
        archive(tmp_path / "big.tar", (tarfile.TarInfo("join.json"), b"{" + b" " * 300_000 + b"}")),
        archive(tmp_path / "other.tar", (tarfile.TarInfo("join.json"), b'{"token":"ewj_x"}')),
        archive(tmp_path / "more.tar", (tarfile.TarInfo("join.json"), config[:-1] + b',"run":"rm"}')),
        archive(tmp_path / "many.tar", *((tarfile.TarInfo(f"x{n}"), b"") for n in range(1100)),
                (tarfile.TarInfo("join.json"), config)),
    ]  # fmt: skip
    for name, data in (("junk", b"\x00" * 5000), ("text", b"hello"), ("json", b"{" * 9), ("none", b"")):
        (tmp_path / name).write_bytes(data)
        bad.append(tmp_path / name)
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "other.tar").read_bytes()[:700])
    before = sorted(tmp_path.rglob("*"))
    for file in [*bad, cut, tmp_path / "missing"]:
        with pytest.raises(Invalid):
            read(file)
    assert sorted(tmp_path.rglob("*")) == before
