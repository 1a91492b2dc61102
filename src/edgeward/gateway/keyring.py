"""Issuers' keys that are fetched: each address once for all routes, kept on disk for when the link is cut.

Keys are looked for anew when they are an hour old and used, or when a token names one that is not among them, at most
every half minute; meanwhile, and as long as the issuer cannot be reached, the last ones hold.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeward.core import clock
from edgeward.core.files import ensure_dir, write_atomic

if TYPE_CHECKING:
    from edgeward.core.jws import Jwk

log = logging.getLogger("edgeward.gateway")

KEEP, AGAIN = 3600.0, 30.0

Spawn = Callable[[Coroutine[Any, Any, None]], object]
#: Told the address and what went wrong; empty: nothing any more.
Say = Callable[[str, str], None]


class Keys:
    """The keys of one address."""

    def __init__(self, url: str, file: Path, spawn: Spawn, say: Say) -> None:
        self.url, self._file, self._spawn, self._say = url, file, spawn, say
        self.keys: list[Jwk] | None = None
        self._asked = -KEEP
        self._got = -KEEP
        self._asking = False
        try:
            self.keys = _read(file.read_bytes())
        except (OSError, ValueError) as e:
            if not isinstance(e, FileNotFoundError):
                log.warning("what was kept of %s is not used: %s", url, e)
        if self.keys is None:
            self._ask()

    def __call__(self, unknown: bool) -> list[Jwk] | None:
        """The keys as far as they are known. ``unknown``: the one that is wanted is not among them; None then: it may
        be in a moment."""
        now = clock.monotonic()
        if now - self._got > KEEP or unknown or self.keys is None:
            self._ask()
        return None if unknown and self._asking else self.keys

    def _ask(self) -> None:
        now = clock.monotonic()
        if self._asking or now - self._asked < AGAIN:
            return
        self._asking, self._asked = True, now
        self._spawn(self._fetch())

    async def _fetch(self) -> None:
        from edgeward.core.fetch import WAIT, fetch  # urllib and ssl: only where there is something to fetch

        try:
            async with asyncio.timeout(WAIT + 5):
                data = await asyncio.to_thread(fetch, self.url, None)
            found = _read(data)
            self._got = clock.monotonic()
            await asyncio.to_thread(self._keep, data)
        except (OSError, TimeoutError, ValueError) as e:
            log.warning("keys cannot be fetched from %s: %s", self.url, e or type(e).__name__)
            self._say(self.url, str(e) or "it does not answer")
        else:
            self.keys = found
            self._say(self.url, "")
        finally:
            self._asking = False

    def _keep(self, data: bytes) -> None:
        try:
            ensure_dir(self._file.parent)
            write_atomic(self._file, data)
        except OSError as e:  # a full disk: they hold as long as this process
            log.warning("the keys of %s cannot be kept: %s", self.url, e)


def _read(data: bytes) -> list[Jwk]:
    """Raises ``ValueError``. Shared keys have no place where anybody can read them."""
    from edgeward.core.jws import key_set

    try:
        document = msgspec.json.decode(data)
    except msgspec.DecodeError:
        raise ValueError("is no JSON") from None
    found = [k for k in key_set(document) if not k.symmetric]
    if not found:
        raise ValueError("holds no public key")
    return found


class Keyring:
    def __init__(self, folder: Path, spawn: Spawn, say: Say) -> None:
        self._folder, self._spawn, self._say = folder, spawn, say
        self._known: dict[str, Keys] = {}

    def of(self, url: str) -> Keys:
        if url not in self._known:
            name = hashlib.sha256(url.encode()).hexdigest()[:32]
            self._known[url] = Keys(url, self._folder / f"{name}.json", self._spawn, self._say)
        return self._known[url]
