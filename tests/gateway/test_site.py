"""Files at the gateway: what is there comes whole, in parts and fast; what is not below the folder is not there."""

from __future__ import annotations

import gzip
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.gateway.rig import PATIENCE, Client, Rig

from edgeward.gateway import files, site
from edgeward.gateway.rules import GatewayConfig
from edgeward.gateway.static import StaticConfig

Connect = Callable[[], Client]
BIG = bytes(range(256)) * 4096  # 1 MiB: it is streamed
PAGE = b"<h1>here</h1>"


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site, and beside it what must not be seen."""
    top = tmp_path_factory.mktemp("srv")
    root = top / "site"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    (top / "secret").write_bytes(b"secret")
    (root / ".git" / "config").write_bytes(b"secret")
    (root / "index.html").write_bytes(PAGE)
    (root / "sub" / "index.html").write_bytes(b"sub")
    (root / "big.bin").write_bytes(BIG)
    (root / "empty.txt").write_bytes(b"")
    (root / "a b.txt").write_bytes(b"space")
    return root


def serve(rig: Rig, folder: Path, path: str = "/s/", **more: object) -> None:
    static = StaticConfig(folder=str(folder), **more)  # type: ignore[arg-type]
    rig.route(path, to="static", target="Folder/site", static=static)


@pytest.fixture(params=["openat2", "walk"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to open: the kernel's, and the one for kernels that have it not."""
    if request.param == "walk":
        monkeypatch.setattr(files, "_libc", None)
    return str(request.param)


def test_files_and_folders(rig: Rig, client: Connect, folder: Path, way: str) -> None:
    serve(rig, folder, cache_control="max-age=60")
    c = client()
    for _ in range(3):  # from the file, then from memory
        got = c.get("/s/")
        assert (got.status, got.body) == (200, PAGE)
        assert got.headers["content-type"] == "text/html; charset=utf-8"
        assert got.headers["cache-control"] == "max-age=60"
        assert got.headers["x-content-type-options"] == "nosniff"
        assert "date" in got.headers
    assert c.get("/s/sub/").body == b"sub"
    folder_ = c.get("/s/sub?x=1")
    assert (folder_.status, folder_.headers["location"]) == (301, "/s/sub/?x=1")
    assert (c.get("/s/empty.txt").status, c.get("/s/empty.txt").body) == (200, b"")
    assert c.get("/s/a%20b.txt").body == b"space"
    big = c.get("/s/big.bin")
    assert (big.body == BIG, big.headers["content-type"]) == (True, "application/octet-stream")
    for path in ("/s/none", "/s/none/x", "/s/index.html/x", "/s/.git/config", "/s/" + "n" * 300):
        assert c.get(path).status == 404
    assert c.get("/s/", method="POST").headers["allow"] == "GET, HEAD"
    assert client().get("/s/", method="POST", body=b"x").status == 405
    head = c.get("/s/big.bin", method="HEAD")
    assert (head.status, head.headers["content-length"], head.body) == (200, str(len(BIG)), b"")
    assert c.get("/s/").status == 200


def test_nothing_leads_out(rig: Rig, client: Connect, folder: Path, way: str) -> None:
    (folder / "out").symlink_to("../secret")
    (folder / "away").symlink_to("/etc")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    (folder / "fd").symlink_to("/proc/self/fd")
    (folder / "in").symlink_to("index.html")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(folder / "sock"))
        serve(rig, folder)
        c = client()
        for name in ("out", "away/passwd", "up/secret", "loop", "fd/0", "pipe", "sock", "away", "up/site/index.html"):
            got = c.get(f"/s/{name}")
            assert (got.status, b"secret" in got.body) == (404, False), name
        for path in ("/s/../secret", "/s/%2e%2e/secret", "/s/..%2fsecret", "/s/sub/../../secret"):
            assert client().get(path).status == 400
    # a link that stays inside is followed where the kernel watches over it, and nowhere else
    assert c.get("/s/in").status == (200 if way == "openat2" else 404)


def test_conditions_and_ranges(rig: Rig, client: Connect, folder: Path) -> None:
    serve(rig, folder)
    c = client()
    for name, data in (("index.html", PAGE), ("big.bin", BIG)):
        path = f"/s/{name}"
        for _ in range(2):
            first = c.get(path)
            tag, since = first.headers["etag"], first.headers["last-modified"]
            assert c.get(path, f"If-None-Match: {tag}").status == 304
            assert c.get(path, f"If-Modified-Since: {since}").status == 304
            assert c.get(path, 'If-Match: "x"').status == 412
            part = c.get(path, "Range: bytes=2-5")
            assert (part.status, part.body) == (206, data[2:6])
            assert c.get(path, "Range: bytes=2-5", 'If-Range: "x"').body == data
            assert c.get(path, "Range: bytes=-3", f"If-Range: {tag}").body == data[-3:]
            assert c.get(path, f"Range: bytes={len(data)}-").status == 416
            several = c.get(path, "Range: bytes=0-1,4-5")
            assert several.status == 206
            assert several.headers["content-type"].startswith("multipart/byteranges; boundary=")
            assert data[:2] in several.body and data[4:6] in several.body
    assert c.get("/s/").body == PAGE


def test_what_lies_compressed_beside_is_given(rig: Rig, client: Connect, folder: Path) -> None:
    squeezed = gzip.compress(PAGE)
    (folder / "index.html.gz").write_bytes(squeezed)
    (folder / "big.bin.gz").write_bytes(b"not for binaries")
    (folder / "old.txt").write_bytes(b"new")
    (folder / "old.txt.gz").write_bytes(b"older")
    os.utime(folder / "old.txt.gz", (1, 1))
    serve(rig, folder)
    c = client()
    plain = c.get("/s/")
    got = c.get("/s/", "Accept-Encoding: gzip, br")
    assert (got.body, got.headers["content-encoding"], got.headers["vary"]) == (squeezed, "gzip", "accept-encoding")
    assert got.headers["content-type"] == "text/html; charset=utf-8"
    assert got.headers["etag"] != plain.headers["etag"]
    assert (plain.body, plain.headers["vary"]) == (PAGE, "accept-encoding")
    assert c.get("/s/", "Accept-Encoding: gzip;q=0").body == PAGE
    (folder / "index.html.br").write_bytes(b"brotli")
    assert client().get("/s/sub/", "Accept-Encoding: br").body == b"sub"
    assert "content-encoding" not in c.get("/s/big.bin", "Accept-Encoding: gzip").headers
    assert c.get("/s/old.txt", "Accept-Encoding: gzip").body == b"new"


def test_changes_are_seen(rig: Rig, client: Connect, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "BELIEVED", 0.0)
    link = folder.parent / "current"
    link.symlink_to(folder)
    serve(rig, link)
    c = client()
    assert c.get("/s/").body == PAGE
    (folder / "new").write_bytes(b"2")
    (folder / "new").replace(folder / "index.html")
    assert c.get("/s/").body == b"2"
    other = folder.parent / "other"
    other.mkdir()
    (other / "index.html").write_bytes(b"3")
    (folder.parent / "next").symlink_to(other)
    (folder.parent / "next").replace(link)  # as deployments do
    assert c.get("/s/").body == b"3"


def test_a_file_that_shrinks_breaks_off(
    rig: Rig, client: Connect, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(rig, folder)
    huge = folder / "huge.bin"
    with huge.open("wb") as f:
        f.truncate(64 * 1024**2)
    c = client()
    c.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    c.send(b"GET /s/huge.bin HTTP/1.1\r\nHost: h\r\n\r\n")
    c.until(b"\r\n\r\n")
    os.truncate(huge, 0)
    assert len(c.rest()) < 64 * 1024**2  # and the end of the connection says so
    assert client().get("/s/").body == PAGE


def test_texts_of_a_config(rig: Rig, client: Connect) -> None:
    texts = {"index.html": "<p>é</p>", "docs/index.html": "docs", "site.css": "b{}"}
    rig.route("/s/", to="static", target="Config/site", static=StaticConfig(files=texts))
    c = client()
    got = c.get("/s/")
    assert (got.body.decode(), "last-modified" in got.headers) == ("<p>é</p>", False)
    assert c.get("/s/", f"If-None-Match: {got.headers['etag']}").status == 304
    assert c.get("/s/site.css").headers["content-type"] == "text/css; charset=utf-8"
    assert c.get("/s/docs").headers["location"] == "/s/docs/"
    assert c.get("/s/docs/").body == b"docs"
    assert c.get("/s/none").status == 404
    assert c.get("/s/", "Range: bytes=0-2").body == b"<p>"


def test_folders_that_are_none(rig: Rig, client: Connect, tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    for n, path in enumerate(("/", str(rig.folder), str(rig.folder / "node"), str(rig.folder.parent), "/none/at/all")):
        rig.route(f"/{n}/", key=f"default/x{n}", to="static", target="Folder/x", static=StaticConfig(folder=path))
        got = client().get(f"/{n}/plane.json")
        assert (got.status, "retry-after" in got.headers) == (503, True)
        assert (rig.heard.statuses[f"default/x{n}"] or {})["phase"] == "NoFiles"


def test_what_is_kept_is_bounded(rig: Rig, client: Connect, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "KEPT", 20_000)
    for n in range(40):
        (folder / f"{n}.txt").write_bytes(b"x" * 1000)
    serve(rig, folder)
    c = client()
    for n in range(40):
        assert len(c.get(f"/s/{n}.txt").body) == 1000
    made = rig.gate.table.rules[0].site
    assert made is not None
    assert sum(len(k.body) for k in made._kept.values()) <= 20_000
    assert isinstance(rig.gate.config, GatewayConfig)
    assert PATIENCE
