"""Real podman for tests: a store of its own below the test's folder, and an image of busybox that is made here.

Where podman, busybox or the kernel do not let a container run, the tests that need one are skipped and say why.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeward.workloads import podman
from edgeward.workloads.podman_argv import options

#: The image's name; it holds busybox alone.
BOX = "localhost/box:1"


class Store:
    """One store of images and containers. Its environment makes podman use it, in this process and its children."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        conf = root / "storage.conf"
        conf.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{root}/graph"\nrunroot = "{root}/run"\n')
        self.env = {"CONTAINERS_STORAGE_CONF": str(conf)}

    def podman(self, *words: str, data: bytes | None = None, timeout: float = 120) -> str:
        done = subprocess.run(
            ["podman", *options(podman.facts()), *words],
            input=data, env=os.environ | self.env, capture_output=True, timeout=timeout,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"podman {words[0]}: {done.stderr.decode('utf-8', 'replace').strip()}")
        return done.stdout.decode()

    def box(self, name: str = BOX, **files: str) -> str:
        """Makes an image of busybox and some files; its id."""
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            tar = Path(folder) / "box.tar"
            with tarfile.open(tar, "w") as out:
                out.add(_busybox(), "bin/busybox")
                for at, text in {"etc/passwd": "root:x:0:0::/:/bin/sh\n", **files}.items():
                    file = Path(folder) / "file"
                    file.write_text(text)
                    out.add(file, at)
                tmp = tarfile.TarInfo("tmp")
                tmp.type, tmp.mode = tarfile.DIRTYPE, 0o1777
                out.addfile(tmp)
                for applet in ("sh", "sleep", "cat", "httpd", "id", "env", "true", "false", "test", "touch", "tail"):
                    link = tarfile.TarInfo(f"bin/{applet}")
                    link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                    out.addfile(link)
            change = ["--change", "ENV PATH=/bin", "--change", 'ENTRYPOINT ["/bin/sh", "-c"]', "--change", "CMD id"]
            return self.podman("import", "--quiet", *change, str(tar), name).strip().removeprefix("sha256:")

    def names(self) -> list[str]:
        return self.podman("ps", "--all", "--format", "{{.Names}}").split()

    def close(self) -> None:
        self.podman("rm", "--force", "--all", "--time", "0", "--volumes")
        shutil.rmtree(self.root, ignore_errors=True)


def _busybox() -> str:
    return shutil.which("busybox") or "/bin/busybox"


@functools.cache
def missing() -> str:
    """Why no container can run here; "" when one did."""
    for program in ("podman", "busybox"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        try:
            store.box()
            rlimits = [f"--ulimit={k}={s}:{h}" for k, (s, h) in podman.facts().rlimits.items()]
            store.podman("run", "--rm", f"--network={podman.facts().network or 'none'}", *rlimits, BOX, "true")
        except (RuntimeError, subprocess.SubprocessError, OSError) as e:
            return f"podman cannot run a container here: {e}"
        finally:
            store.close()
    return ""


def a_store(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """For a fixture: an own store, made podman's for this process and its children."""
    if why := missing():
        pytest.skip(why)
    store = Store(root)
    for name, value in store.env.items():
        monkeypatch.setenv(name, value)
    store.box()
    yield store
    store.close()
