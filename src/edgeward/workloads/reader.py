"""What an app wrote on this node, for who asks: all its instances' outputs as one stream of lines.

``logs.py`` reads one instance's files; here they are chosen (by instance, by age, by who is alive), told apart by a
mark before each line, and followed over updates, which bring new instances. A reader that was cut off goes on behind
the mark of the last piece that it got.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path

from edgeward.core.errors import EdgewardError, NotFound
from edgeward.core.quantity import parse_duration
from edgeward.core.streaming import Piece
from edgeward.workloads.ground import Ground
from edgeward.workloads.live import AppKey, Live
from edgeward.workloads.logs import GAP, Marked, Output, changed_since

_KEPT_LOGS = 4


class LogReader:
    """``apps``: the instances of each app of this node, as they are at any moment."""

    def __init__(self, ground: Ground, apps: Mapping[AppKey, Mapping[str, Live]]) -> None:
        self._ground, self._apps = ground, apps

    async def read(
        self,
        namespace: str,
        name: str,
        *,
        tail: int = 200,
        follow: bool = False,
        since: str = "",
        instance: str = "",
        after: Mapping[str, str] | None = None,
    ) -> AsyncIterator[bytes]:
        """The last lines that the app wrote, then (``follow``) what it writes, of all its instances here. ``after``:
        the mark of the last :class:`Piece` of a call that broke off, to go on behind it."""
        known = after or {}
        shown, several = self._shown(namespace, name, since, instance, known)
        outputs = {path: Output(path) for path in shown}
        marks = {path: Marked(f"[{path.stem}] ".encode() if several else b"") for path in shown}
        at = dict(known)
        try:
            for path, output in outputs.items():
                if known:
                    there = output.resume(known.get(path.stem, ""))
                    data = marks[path].feed(GAP) if path.stem in known and not there else b""
                else:
                    data = marks[path].feed(output.tail(tail))
                    at[path.stem] = output.mark(marks[path].begun)
                if data:
                    yield Piece(data, dict(at))
                if not follow and (data := marks[path].rest()):
                    yield data
            if not follow:
                return
            pieces = self._followed((namespace, name), outputs, marks, several, not instance)
            async with contextlib.aclosing(pieces):
                async for stem, data, mark in pieces:
                    at[stem] = mark or at.get(stem, "")
                    yield Piece(data, dict(at))
        finally:
            for output in outputs.values():
                output.close()

    def _shown(
        self, namespace: str, name: str, since: str, instance: str, known: Mapping[str, str]
    ) -> tuple[list[Path], bool]:
        """The files to show, and whether their lines are to be told apart."""
        folder = self._ground.logs / namespace / name
        files = sorted(folder.glob("*.log"), key=lambda p: p.stat().st_mtime) if folder.is_dir() else []
        if instance:
            files = [f for f in files if f.stem == instance]
        if not files:
            raise NotFound("wrote nothing on this node", resource=f"App/{name}", remedy="see: edgeward describe app")
        if since:
            try:
                seconds = parse_duration(since)
            except ValueError as e:
                raise EdgewardError(str(e), field="?since") from None
            files = [f for f in files if changed_since(f, seconds) or f.stem in known]
        wanted = {i.row.id for i in self._apps.get((namespace, name), {}).values() if i.alive} | known.keys()
        shown = files if len(files) == 1 else [f for f in files if f.stem in wanted] or files[-1:]
        return shown, len(shown) > 1

    async def _followed(
        self, key: AppKey, outputs: dict[Path, Output], marks: dict[Path, Marked], several: bool, more: bool
    ) -> AsyncGenerator[tuple[str, bytes, str]]:
        """What the outputs give, and (``more``) those of instances that come later: instance, data, mark."""
        queue: asyncio.Queue[tuple[str, bytes, str]] = asyncio.Queue(64)

        async def one(path: Path) -> None:
            async for piece in outputs[path].follow():
                if data := marks[path].feed(piece):
                    await queue.put((path.stem, data, outputs[path].mark(marks[path].begun)))

        tasks = {p: asyncio.create_task(one(p)) for p in outputs}
        try:
            while True:
                # an update brings new instances: follow them too
                for i in list(self._apps.get(key, {}).values()):
                    path = self._ground.log_file(i.row)
                    if path not in tasks and more and path.exists():
                        outputs[path] = Output(path)
                        outputs[path].resume("")
                        marks[path] = Marked(f"[{path.stem}] ".encode() if several else b"")
                        tasks[path] = asyncio.create_task(one(path))
                got = None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        got = await queue.get()
                if got is not None:  # given outside of the timeout, which would cancel a slow reader
                    yield got
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    def trim(self, key: AppKey) -> None:
        """Keeps what the last few instances that are gone wrote."""
        folder = self._ground.logs / key[0] / key[1]
        keep = self._apps.get(key, {})
        dead = []
        for path in folder.glob("*.log"):
            with contextlib.suppress(FileNotFoundError):
                if path.stem not in keep:
                    dead.append((path.stat().st_mtime, path))
        for _, path in sorted(dead)[:-_KEPT_LOGS]:
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".1").unlink(missing_ok=True)
