"""The service ``copy``: files and folders between an operator's machine and a node, either way.

In comes a stream, and the folder or file at this side; what is said on it is in ``copying.py``, what is done to the
file system in ``tree.py``, in a thread of its own. The same two coroutines serve both ways and both ends: :func:`give`
and :func:`take`. At the node files are touched as the user that node.json names; a node's answer is trusted as little
by the operator as the operator's wish by the node.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgeward.core import clock
from edgeward.core.errors import EdgewardError, Refused
from edgeward.tunnel import child, copying
from edgeward.tunnel.copying import Begin, Decoder, Done, End, Entry, Failed, Have, Listed, Message, Planned
from edgeward.tunnel.exec import Note
from edgeward.tunnel.flow import Stream
from edgeward.tunnel.framing import Open
from edgeward.tunnel.tree import Giver, Taker, become, why

T = TypeVar("T")
_BATCH = 256
_PIECE = 128 * 1024
_TOLD = 1000


class Result(msgspec.Struct):
    """What came of a copy. ``failed``: path and reason of what is not there; ``moved``: bytes that had to be sent."""

    files: int = 0
    bytes: int = 0
    moved: int = 0
    failed: list[tuple[str, str]] = []


#: Told of bytes that were moved, and of all there are to move when that is known.
Progress = Callable[[int, int], None]


def _silent(moved: int, total: int) -> None:
    pass


class Hand:
    """A thread for the file system, that does one thing after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "copy")

    async def __call__(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def close(self, *works: Callable[[], None]) -> None:
        """Does the last of it behind what is being done, and ends; waits for nothing."""
        for work in works:
            self._pool.submit(work)
        self._pool.shutdown(wait=False)


class _Wire:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._decoder = Decoder()
        self._found: deque[Message | bytes] = deque()

    async def next(self) -> Message | bytes:
        while not self._found:
            data = await self.stream.read()
            if not data:
                raise copying.broken("it ended in the middle")
            self._found += self._decoder.feed(data)
        return self._found.popleft()

    async def say(self, *messages: Message) -> None:
        for at in range(0, len(messages), _BATCH):
            await self.stream.write(b"".join(map(copying.message, messages[at : at + _BATCH])))


async def give(stream: Stream, giver: Giver, hand: Hand, progress: Progress = _silent) -> Result:
    """Sends what ``giver`` reads; gives what the taker says came of it."""
    wire, result = _Wire(stream), Result()
    entries: list[Entry] = []
    listing = giver.entries()
    while batch := await hand(lambda: list(islice(listing, _BATCH))):
        if len(entries) + len(batch) > copying.ENTRIES_MOST:
            raise Refused(f"more than {copying.ENTRIES_MOST} files and folders", remedy="copy an archive of them")
        entries += batch
        await wire.say(*batch)
    await wire.say(Listed(len(entries), giver.skipped[:_TOLD]))
    have: dict[int, Have] = {}
    while not isinstance(said := await wire.next(), Planned):
        if not isinstance(said, Have) or not 0 <= said.n < len(entries) or entries[said.n].kind != "file":
            raise copying.broken("a plan that fits no file")
        have[said.n] = said
    total = sum(e.size for e in entries if e.kind == "file")
    for n, entry in enumerate(entries):
        if entry.kind == "file":
            await _send(wire, giver, hand, n, entry, have.get(n), lambda size: progress(size, total))
    while not isinstance(said := await wire.next(), Done):
        if not isinstance(said, Failed):
            raise copying.broken("an end that is none")
        if len(result.failed) < _TOLD:
            result.failed.append((said.path, said.why))
    stream.end()
    result.failed = [*giver.skipped, *result.failed]
    result.files, result.bytes, result.moved = said.files, said.bytes, said.moved
    return result


async def _send(
    wire: _Wire, giver: Giver, hand: Hand, n: int, entry: Entry, have: Have | None, moved: Callable[[int], None]
) -> None:
    """One file, from where the taker has not got it. It is as long as it was when it was listed, or shorter."""
    try:
        await hand(giver.open, entry)
        offset = have.size if have is not None and 0 < have.size <= entry.size else 0
        found = await hand(giver.hash_first, offset)
        if have is not None and offset and found.hexdigest() != have.sha256:
            await hand(giver.rewind)
            offset, found = 0, await hand(giver.hash_first, 0)
        await wire.say(Begin(n, offset))
        moved(offset)
        left = entry.size - offset
        while left > 0 and (piece := await hand(giver.read, min(left, _PIECE))):
            found.update(piece)
            left -= len(piece)
            await wire.stream.write(copying.data(piece))
            moved(len(piece))
        await wire.say(End(found.hexdigest()))
    except OSError as e:
        await wire.say(Begin(n, 0), End(error=why(e)[:200] or "cannot be read"))
    finally:
        await hand(giver.close_file)


async def take(stream: Stream, taker: Taker, hand: Hand, progress: Progress = _silent) -> Result:
    """Keeps what comes; what it could not keep is told to the giver, and given here."""
    wire, result = _Wire(stream), Result()
    entries: list[Entry] = []
    seen: dict[tuple[str, ...], str] = {}
    room = copying.NAMES_MOST
    while not isinstance(said := await wire.next(), Listed):
        if not isinstance(said, Entry):
            raise copying.broken("an entry was expected")
        copying.check_entry(said, seen)
        room -= copying.size_of(said)
        if room < 0:
            raise Refused("the names of what is copied are too many and too long", remedy="copy an archive of them")
        entries.append(said)
    if said.count != len(entries) or not entries:
        raise copying.broken("entries are missing")
    skipped = said.skipped[:_TOLD]
    have = await hand(_plan, taker, entries, result)
    await wire.say(*(Have(n, size, sha256) for n, (size, sha256, _) in have.items()), Planned())
    total = sum(e.size for e in entries if e.kind == "file")
    for n, entry in enumerate(entries):
        if entry.kind == "file":
            await _receive(wire, taker, hand, n, entry, have.get(n), result, lambda size: progress(size, total))
    await hand(taker.finish)
    await wire.say(*(Failed(path, reason) for path, reason in result.failed[:_TOLD]))
    await wire.say(Done(result.files, result.bytes, result.moved))
    stream.end()
    while await stream.read():  # until the giver has heard it: who closes the tunnel now would take it away
        raise copying.broken("more than was asked for")
    result.failed = [*skipped, *result.failed]
    return result


def _plan(taker: Taker, entries: list[Entry], result: Result) -> dict[int, tuple[int, str, bool]]:
    """Folders and links are made; of files it is found out what is there already."""
    have: dict[int, tuple[int, str, bool]] = {}
    for n, entry in enumerate(entries):
        if entry.kind == "file":
            if (found := taker.have(entry)) is not None:
                have[n] = found
            continue
        try:
            taker.make(entry)
        except OSError as e:
            if not entry.parts:
                raise Refused(f"cannot be made: {why(e)}", resource=str(taker.target)) from None
            result.failed.append(("/".join(entry.parts), why(e)))
    return have


async def _receive(
    wire: _Wire,
    taker: Taker,
    hand: Hand,
    n: int,
    entry: Entry,
    have: tuple[int, str, bool] | None,
    result: Result,
    moved: Callable[[int], None],
) -> None:
    begin = await wire.next()
    if not isinstance(begin, Begin) or begin.n != n or begin.offset not in (0, have[0] if have else 0):
        raise copying.broken("another file than was asked for")
    there = have is not None and have[2] and begin.offset == entry.size and entry.size > 0
    problem, left = "", entry.size - begin.offset
    moved(begin.offset)

    async def doing(work: Callable[..., None], *args: Any) -> None:
        nonlocal problem
        if problem:
            return
        try:
            await hand(work, *args)
        except OSError as e:
            problem = why(e)
        except EdgewardError as e:
            problem = str(e)

    if not there:
        await doing(taker.begin, entry, 0 if have is not None and have[2] else begin.offset)
        if have is not None and have[2] and begin.offset:
            raise copying.broken("an offset in a file that is whole")
    while isinstance(said := await wire.next(), bytes):
        left -= len(said)
        if left < 0:
            raise copying.broken("more bytes than the file has")
        await doing(taker.write, said)
        result.moved += len(said)
        moved(len(said))
    if not isinstance(said, End):
        raise copying.broken("a file without an end")
    if said.error:
        problem = f"at the other side: {said.error[:200]}"
    elif there and have is not None:
        problem = "" if said.sha256 == have[1] else "what is there is not what was sent"
        await doing(taker.settle, entry)
    else:
        await doing(taker.keep, entry, said.sha256)
    if problem:
        await hand(taker.abandon)
        if len(result.failed) < _TOLD:
            result.failed.append(("/".join(entry.parts) or str(taker.target), problem))
    else:
        result.files += 1
        result.bytes += entry.size - max(left, 0)


@contextlib.asynccontextmanager
async def _opened(made: Callable[[], Giver | Taker], hand: Hand) -> AsyncIterator[Giver | Taker]:
    try:
        side = await hand(made)
    except BaseException:
        hand.close()
        raise
    try:
        yield side
    finally:
        hand.close(side.close)


async def copy_out(stream: Stream, path: str, progress: Progress = _silent) -> Result:
    """The operator gives ``path``."""
    hand = Hand()
    async with _opened(lambda: Giver(path), hand) as side:
        assert isinstance(side, Giver)  # noqa: S101 - for the type checker
        return await give(stream, side, hand, progress)


async def copy_in(stream: Stream, path: str, name: str, progress: Progress = _silent) -> Result:
    """The operator takes; in a folder that is there it is called ``name``."""
    hand = Hand()
    async with _opened(lambda: Taker(path, name), hand) as side:
        assert isinstance(side, Taker)  # noqa: S101 - for the type checker
        return await take(stream, side, hand, progress)


class Copy:
    """The node's side. ``user``: whom node.json names, else the agent's own account."""

    def __init__(self, *, user: str = "", note: Note | None = None) -> None:
        self._user, self._note = user, note

    async def __call__(self, open: Open, stream: Stream) -> None:
        began, outcome, result = clock.monotonic(), "done", Result()
        args: copying.CopyArgs | None = None
        try:
            args = copying.parse(open.args)
            result = await self._copy(args, stream)
        except asyncio.CancelledError:
            outcome = "cut: the session was ended"
            raise
        except EdgewardError as e:
            outcome = f"{e.reason}: {e.message}"
            raise
        finally:
            if self._note is not None:
                detail: dict[str, Any] = {"seconds": round(clock.monotonic() - began, 3)}
                if args is not None:
                    detail |= {"path": args.path[:1024], "to": "node" if args.take else "operator"}
                detail |= {"files": result.files, "bytes": result.bytes, "failed": len(result.failed)}
                record = {"verb": "copy", "who": open.who, "source": open.source}
                await self._note({**record, "detail": detail, "outcome": outcome})

    async def _copy(self, args: copying.CopyArgs, stream: Stream) -> Result:
        who = child.account(self._user)
        path = str(Path(who.home) / args.path) + ("/" if args.path.endswith("/") else "")
        hand = Hand()
        try:
            if who.uid is not None and who.gid is not None:
                await hand(become, who.uid, who.gid, who.groups)
            made: Callable[[], Giver | Taker] = (lambda: Taker(path, args.name)) if args.take else (lambda: Giver(path))
            async with _opened(made, hand) as side:
                stream.accept()
                if isinstance(side, Taker):
                    return await take(stream, side, hand)
                return await give(stream, side, hand)
        except OSError as e:
            raise Refused(f"the copy ended: {why(e)}") from None
        finally:
            hand.close()
