"""A Route's files at work: what is small and asked for again comes from memory, the rest is streamed from its file.

A file that was read is believed for a second; then it is opened anew, beneath its folder, whatever the folder is then
(a folder that is swapped by a symbolic link is found swapped). A file's own ``.br`` or ``.gz`` beside it is given in
its place where the client takes that and it is not older.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from edgeward.core import clock
from edgeward.gateway.cache import http_date
from edgeward.gateway.coding import compressible, ranked
from edgeward.gateway.cors import CorsConfig, with_cors
from edgeward.gateway.exchange import Exchange
from edgeward.gateway.files import NotCached, open_beneath, read_cached
from edgeward.gateway.http1 import Headers, Request, write_response
from edgeward.gateway.rules import RouteConfig
from edgeward.gateway.squeeze import CompressConfig, Press, eligible, press, pressed, takes
from edgeward.gateway.static import Facts, StaticConfig, headers_of, name_of, plan, type_of

#: Bytes of a file that is kept in memory, and of all of one route; seconds that it is believed.
SMALL = 64 * 1024
KEPT = 8 * 1024**2
BELIEVED = 1.0
_BESIDE = {"br": ".br", "gzip": ".gz"}
_GONE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EXDEV,
     errno.EINVAL, errno.EILSEQ}
)  # fmt: skip


class Kept:
    """A small file in memory."""

    __slots__ = ("body", "facts", "fields", "until", "wire", "zipped")

    def __init__(self, body: bytes, facts: Facts, fields: Headers, until: float) -> None:
        self.body, self.facts, self.fields, self.until = body, facts, fields, until
        #: The whole answer as it was written last, and for which second.
        self.wire: tuple[int, bytes] = (-1, b"")
        #: The same compressed, once somebody took it so.
        self.zipped: Kept | None = None

    def answer(self, now: float) -> bytes:
        """The whole answer to a plain request. Made once a second: nothing in it is finer than that."""
        second = int(now)
        if self.wire[0] != second:
            fields = [*self.fields, ("content-length", str(len(self.body))), ("date", http_date(second))]
            self.wire = second, write_response(200, fields) + self.body
        return self.wire[1]


class Opened(NamedTuple):
    fd: int
    facts: Facts


class Site:
    """The files of one route."""

    def __init__(
        self, config: StaticConfig, prefix: str, problem: str = "", compress: CompressConfig | None = None
    ) -> None:
        """``problem``: why there are none."""
        self.config, self.prefix, self.problem, self.compress = config, prefix, problem, compress
        self._kept: dict[tuple[str, tuple[str, ...]], Kept] = {}
        self._size = 0
        self._fixed = config.files is not None
        for name, text in (config.files or {}).items():
            body = text.encode()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            facts = Facts(len(body), etag, 0.0, type_of(name))
            facts = facts._replace(varies=self.shrinks(facts))
            self._kept[name, ()] = Kept(body, facts, headers_of(facts, config.cache_control), float("inf"))

    def name(self, request: Request) -> str | None:
        """The file that is meant; None: there can be none."""
        name = name_of(self.prefix, request.path)
        if name is not None and (not name or name.endswith("/")):
            return name + self.config.index
        return name

    def codings(self, name: str, request: Request) -> tuple[str, ...]:
        """The codings that the client would take, of those that may lie beside a file."""
        accept = request.fields.get("accept-encoding")
        return ranked(accept, ("br", "gzip")) if accept and not self._fixed and compressible(type_of(name)) else ()

    def kept(self, name: str, codings: tuple[str, ...], now: float) -> Kept | None:
        found = self._kept.get((name, codings))
        return found if found is not None and found.until > now else None

    def shrinks(self, facts: Facts) -> bool:
        """Whether the file is given compressed by the gateway."""
        config = self.compress
        return (
            config is not None and not facts.coding and eligible(config, 200, {"content-type": facts.type}, facts.size)
        )

    def squeezed(self, kept: Kept, request: Request) -> Kept:
        """What is in memory, as the client takes it. Compressed once, while the client waits: it is small."""
        if not self.shrinks(kept.facts) or not takes(request):
            return kept
        if kept.zipped is None:
            body = press(kept.body)
            facts = kept.facts._replace(size=len(body), etag=f"W/{kept.facts.etag}", coding="gzip")
            kept.zipped = Kept(body, facts, pressed(kept.fields), kept.until)
        return kept.zipped

    def is_folder(self, name: str) -> bool:
        """Of texts: whether there are some below the name."""
        return self._fixed and f"{name}/{self.config.index}" in (self.config.files or ())

    # -- opening -----------------------------------------------------------------------------------------------------

    def open(self, name: str, codings: tuple[str, ...], *, cached: bool) -> Opened | None:
        """The file, or what lies compressed beside it; None: a folder. ``cached``: only where no disk is needed.

        Raises ``OSError``, ``NotCached``, ``ValueError``.
        """
        if self._fixed:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        root = os.open(self.config.folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = open_beneath(root, name, cached=cached)
            try:
                st = os.fstat(fd)
                if stat.S_ISDIR(st.st_mode):
                    os.close(fd)
                    return None
                if not stat.S_ISREG(st.st_mode):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                coding, beside = "", None
                for coding in codings:
                    if (beside := self._beside(root, name, coding, st, cached=cached)) is not None:
                        break
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(fd)
                raise
            if beside is not None:
                os.close(fd)
                fd, st = beside
            etag = f'"{st.st_mtime_ns:x}-{st.st_size:x}{"-" + coding if beside else ""}"'
            facts = Facts(st.st_size, etag, st.st_mtime, type_of(name), coding if beside else "")
            varies = compressible(facts.type) or self.shrinks(facts)
            return Opened(fd, facts._replace(varies=varies))
        finally:
            os.close(root)

    @staticmethod
    def _beside(
        root: int, name: str, coding: str, plain: os.stat_result, *, cached: bool
    ) -> tuple[int, os.stat_result] | None:
        try:
            fd = open_beneath(root, name + _BESIDE[coding], cached=cached)
        except OSError:
            return None
        st = os.fstat(fd)
        if stat.S_ISREG(st.st_mode) and st.st_mtime_ns >= plain.st_mtime_ns:
            return fd, st
        os.close(fd)
        return None

    def keep(self, name: str, codings: tuple[str, ...], opened: Opened, now: float) -> Kept | None:
        """Takes a small file into memory, where the kernel has it in its own; None: it is not."""
        if opened.facts.size > SMALL:
            return None
        body = read_cached(opened.fd, opened.facts.size, 0) if opened.facts.size else b""
        if body is None or len(body) != opened.facts.size:
            return None
        fields = headers_of(opened.facts, self.config.cache_control)
        made = Kept(body, opened.facts, fields, now + BELIEVED)
        if self._size + len(body) + 1024 > KEPT:
            self._kept.clear()
            self._size = 0
        old = self._kept.get((name, codings))
        self._size += len(body) + 1024 if old is None else len(body) - len(old.body)
        self._kept[name, codings] = made
        return made


def answer_of(
    request: Request, kept: Kept, site: Site, cors: CorsConfig | None, now: float
) -> tuple[int, Headers, bytes]:
    """``(status, fields, body)`` of a file in memory, as the request asks for it."""
    made = plan(request, kept.facts, site.config.cache_control, secrets.token_hex(12))
    body = b"".join(before + kept.body[start:end] for before, start, end in made.parts) + made.tail
    return made.status, framed(request, made.headers, cors, now), b"" if request.method == "HEAD" else body


def framed(request: Request, fields: Headers, cors: CorsConfig | None, now: float) -> Headers:
    """With what is of this answer: its date, its connection, the word for pages of other origins."""
    found = [*with_cors(cors, request, fields), ("date", http_date(now))]
    if not request.keep:
        found.append(("connection", "close"))
    elif request.minor == 0:
        found.append(("connection", "keep-alive"))
    return found


def is_gone(error: OSError) -> bool:
    """Whether it is the client's to know as 404."""
    return error.errno in _GONE


class SiteExchange(Exchange):
    """An exchange whose target is a file of this machine."""

    def attempt(self) -> None:
        site, request = self.rule.site, self.request
        self.deadline = self.gate.loop.time() + self.rule.config.idle
        if site is None or site.problem:
            self._refuse(503, site.problem if site is not None else "no files here", [("retry-after", "5")])
        elif request.method not in ("GET", "HEAD"):
            self._refuse(405, "files are read: GET and HEAD", [("allow", "GET, HEAD")])
        elif request.length:
            self._refuse(400, "a request for a file has no body")
        elif (name := site.name(request)) is None:
            self._refuse(404, "there is no such file")
        else:
            self.task = self.gate.spawn(self, self._serve(site, name))

    async def _serve(self, site: Site, name: str) -> None:
        codings = site.codings(name, self.request)
        try:
            try:
                opened = site.open(name, codings, cached=True)
            except NotCached:
                opened = await self.gate.reader.run(lambda: site.open(name, codings, cached=False))
        except (OSError, ValueError) as e:
            if isinstance(e, OSError) and not is_gone(e):
                self._refuse(503, f"the file cannot be opened: {e.strerror}", [("retry-after", "1")])
            elif site.is_folder(name):
                self._redirect()
            else:
                self._refuse(404, "there is no such file")
            return
        if opened is None:
            self._redirect()
            return
        try:
            site.keep(name, codings, opened, self.gate.loop.time())
            await self._give(site, opened)
        except OSError as e:
            self.on_fail(502, f"the file cannot be read: {e.strerror}")
            return
        finally:
            os.close(opened.fd)
        self._done()

    def _redirect(self) -> None:
        """A folder's own name ends in a slash, or the names in its page would mean others."""
        self.answered, self.status = True, 301
        target = f"{self.request.path}/{self.request.query}"
        fields = [("location", target), ("content-length", "0")]
        if self.door is not None:
            self.door.head(301, self._framed(fields))
        self._done()

    def _framed(self, fields: Headers) -> Headers:
        if not self.request.keep and self.door is not None:
            self.door.closing = True
        return framed(self.request, fields, self.rule.cors, clock.now())

    async def _give(self, site: Site, opened: Opened) -> None:
        facts, run = opened.facts, self.gate.reader.run
        made = plan(self.request, facts, site.config.cache_control, secrets.token_hex(12))
        live = None
        if made.status == 200 and self.request.method == "GET" and site.shrinks(facts) and takes(self.request):
            live = Press(flush=False)
            made = made._replace(headers=pressed(made.headers))
            if self.request.minor == 1:
                self._chunked = True
                made.headers.append(("transfer-encoding", "chunked"))
        self.answered, self.status = True, made.status
        fields = self._framed(made.headers)
        if live is not None and self.request.minor == 0:  # its end is the connection's
            fields = [*(h for h in fields if h[0] != "connection"), ("connection", "close")]
        if self.door is not None:
            self.door.closing = self.door.closing or (live is not None and self.request.minor == 0)
            self.door.head(made.status, fields)
        if self.request.method == "HEAD":
            return
        for before, start, end in made.parts:
            self._piece(before)
            async for piece in self.gate.reader.pieces(opened.fd, start, end):
                self._piece(piece if live is None else await run(live.feed, piece))
                if self.door is None:
                    return
                await self.door.room()
        self._piece(made.tail if live is None else await run(live.end))
        if self._chunked and self.door is not None:
            self.door.write(b"0\r\n\r\n")


def sites(routes: Iterable[RouteConfig], old: Mapping[str, Site], data: Path) -> dict[str, Site]:
    """By route. A folder that would give away the node's own files, or all of the machine's, is none."""
    found: dict[str, Site] = {}
    for route in routes:
        config = route.static
        if config is None:
            continue
        kept, problem = old.get(route.key), _problem(config, data)
        now = (config, route.path, problem, route.compress)
        if kept is not None and (kept.config, kept.prefix, kept.problem, kept.compress) == now:
            found[route.key] = kept
        else:
            found[route.key] = Site(*now)
    return found


def _problem(config: StaticConfig, data: Path) -> str:
    if config.problem or config.files is not None:
        return config.problem
    folder = Path(os.path.realpath(config.folder))
    own = Path(os.path.realpath(data))
    if folder == Path("/") or own.is_relative_to(folder) or folder.is_relative_to(own):
        return f"{config.folder} holds more than a site: the node's own files, or the whole machine"
    return "" if folder.is_dir() else f"{config.folder} is no folder of this node"
