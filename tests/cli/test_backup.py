"""What comes of a backup whose stream ends early, whose disk is full, whose hub lies: nothing that looks like one."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgeward.core.seal import RecoveryKey, Sealer, SealingKey, new_keys
from edgeward.hub.archive import FORMAT, End, Meta, encode

if TYPE_CHECKING:
    from .conftest import FakeHub, Program

PATH = "/api/v1/backup"
META = Meta(FORMAT, "1.0", "2026-11-25T10:00:00.000Z", "e", 7, "hub", False)


def sealed(filler: int = 0) -> tuple[bytes, RecoveryKey]:
    recovery, sealing = new_keys()
    return written(sealing, filler), recovery


def written(sealing: SealingKey, filler: int) -> bytes:
    sealer = Sealer(sealing, {"made": META.made, "revision": 7, "version": "1.0"})
    from edgeward.hub.archive import Data, File

    entries: list[Any] = [META]
    entries += [File("f", 0o600, filler), *(Data(b"x" * 1000) for _ in range(filler // 1000))] if filler else []
    entries.append(End(1 if filler else 0, 0, 0))
    return b"".join(sealer.update(encode(e)) for e in entries) + sealer.finish()


def test_a_whole_one_gets_its_name(hub: FakeHub, edgeward: Program, tmp_path: Path) -> None:
    raw, recovery = sealed(300_000)
    hub.streams[PATH] = [raw[:7], raw[7:90_000], raw[90_000:]]
    target = tmp_path / "b"
    said = edgeward("backup", "create", str(target)).stdout
    assert target.read_bytes() == raw
    assert recovery.id in said and "revision 7" in said
    # an older one is replaced by a whole one only
    hub.streams[PATH] = [raw[:1000]]
    edgeward("backup", "create", str(target), code=3)
    assert target.read_bytes() == raw


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_a_stream_that_ends_early_leaves_no_file(part: float, hub: FakeHub, edgeward: Program, tmp_path: Path) -> None:
    raw, _ = sealed(300_000)
    hub.streams[PATH] = [raw[: int(len(raw) * part)] or b"", b""]
    folder = tmp_path / "out"
    folder.mkdir()
    assert "too early" in edgeward("backup", "create", str(folder / "b"), code=3).stderr
    assert list(folder.iterdir()) == []


def test_a_full_disk_leaves_no_file(hub: FakeHub, edgeward: Program, tmp_path: Path) -> None:
    raw, _ = sealed(300_000)
    hub.streams[PATH] = [raw]
    folder = tmp_path / "out"
    folder.mkdir()
    done = subprocess.run(
        edgeward.command("backup", "create", str(folder / "b")), env=edgeward.env, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)), timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "too large" in done.stderr
    assert list(folder.iterdir()) == []


def test_where_the_key_is_found(edgeward: Program, tmp_path: Path) -> None:
    raw, recovery = sealed()
    other, _ = new_keys()
    backup = tmp_path / "b"
    backup.write_bytes(raw)
    good, wrong, none = (tmp_path / n for n in ("good", "wrong", "none"))
    good.write_text(f"# keep\n{recovery.text()}\n")
    wrong.write_text(other.text())
    none.write_text("nothing")
    assert "signature fits" in edgeward("backup", "verify", str(backup)).stdout
    for args, env in ((("--key", str(good)), {}), ((), {"EDGEWARD_RECOVERY_KEY": str(good)})):
        assert "0 files" in edgeward("backup", "verify", str(backup), *args, **env).stdout
    for bad, words in ((wrong, recovery.id), (none, "no recovery key")):
        failed = edgeward("backup", "verify", str(backup), "--key", str(bad), code=3)
        assert words in failed.stderr
        assert other.text() not in failed.stderr
    edgeward("backup", "verify", str(backup), "--key", str(tmp_path / "missing"), code=5)
    # a restore asks for it, and says which
    assert recovery.id in edgeward("backup", "restore", str(backup), "--data", str(tmp_path / "d"), code=3).stderr
    assert not (tmp_path / "d").exists()
