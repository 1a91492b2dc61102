"""Real podman for tests: a store of its own below the test's folder, and an image of busybox that is made here.

Where podman, busybox or the kernel do not let a container run, the tests that need one are skipped and say why.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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

    def has(self, image: str) -> bool:
        """Asked so that an image that is just being taken away is no error."""
        argv = ["podman", *options(podman.facts()), "image", "exists", image]
        return subprocess.run(argv, env=os.environ | self.env, capture_output=True, timeout=60).returncode == 0

    def names(self) -> list[str]:
        return self.podman("ps", "--all", "--format", "{{.Names}}").split()

    def close(self) -> None:
        self.podman("rm", "--force", "--all", "--time", "0", "--volumes")
        # conmon of what was run inside by the API stays for five minutes, so that its status can be asked for
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes()
                if words.split(b"\0")[0].endswith(b"conmon") and f"{self.root}/".encode() in words:
                    os.kill(int(process.name), 9)
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


class Registry:
    """The reading half of a registry (the distribution project's protocol), over HTTP on the loopback: images that a
    store saves are there under ``place/NAME:TAG``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tags: dict[str, str] = {}
        self.asked: list[str] = []
        self.broken = False
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.answer(self)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.place = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def conf(self) -> str:
        """A file for CONTAINERS_REGISTRIES_CONF."""
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / "registries.conf"
        file.write_text(f'[[registry]]\nlocation = "{self.place}"\ninsecure = true\n')
        return str(file)

    def take(self, store: Store, image: str, name: str) -> str:
        """Puts a store's image under ``name:tag``; the digest of its manifest."""
        folder = self.root / "layout"
        shutil.rmtree(folder, ignore_errors=True)
        store.podman("save", "--quiet", "--format", "oci-dir", "--output", str(folder), image)
        shutil.copytree(folder / "blobs" / "sha256", self.root / "blobs", dirs_exist_ok=True)
        digest = str(json.loads((folder / "index.json").read_text())["manifests"][0]["digest"])
        self.tags[name] = digest
        return digest

    def answer(self, ask: BaseHTTPRequestHandler) -> None:
        self.asked.append(ask.path)
        words = ask.path.strip("/").split("/")
        ref = words[-1]
        if len(words) > 3 and words[-2] == "manifests":
            ref = self.tags.get(f"{'/'.join(words[1:-2])}:{ref}", ref)
        file = self.root / "blobs" / ref.removeprefix("sha256:")
        found = self.broken is False and (words == ["v2"] or file.is_file())
        data = b"{}" if words == ["v2"] or not found else file.read_bytes()
        ask.send_response(200 if found else 503 if self.broken else 404)
        kind = "vnd.oci.image.manifest.v1+json" if words[-2:-1] == ["manifests"] else "octet-stream"
        ask.send_header("Content-Type", f"application/{kind}")
        ask.send_header("Content-Length", str(len(data)))
        if found and words != ["v2"]:
            ask.send_header("Docker-Content-Digest", ref)
        ask.end_headers()
        if ask.command == "GET":
            ask.wfile.write(data)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(30)
