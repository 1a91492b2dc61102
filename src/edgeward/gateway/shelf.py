"""The cache's memory: answers by their key, with a bound in bytes; the least recently used goes first. Pure.

A key is the host asked for (with ``https://`` before it where TLS brought the request: a target may answer otherwise)
and the path with its query; below it lie the variants that Vary makes, each with the route
whose target it came from: what one target said is never another one's answer. Purges go by key, by
prefix and by tag (``Cache-Tag`` of the answer). What may be kept and given is decided in ``cache.py``.
"""

from __future__ import annotations

from collections import OrderedDict

from edgeward.gateway.cache import Stored, varied
from edgeward.gateway.http1 import Headers, Request, write_response

#: Variants of one key; a Vary that names a field of random values must not fill the memory.
VARIANTS = 16
NAME = "edgeward"
SECURE = "https://"

Key = tuple[str, str]


def key_of(request: Request) -> Key:
    authority = request.authority.lower()
    return authority if request.scheme == "http" else SECURE + authority, request.path + request.query


class Shelf:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.evicted = 0
        self._items: OrderedDict[Key, list[Stored]] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._items

    def has(self, key: Key, owner: str, varied: tuple[tuple[str, str], ...]) -> bool:
        """Whether this very variant is kept."""
        return any(s.owner == owner and s.varied == varied for s in self._items.get(key, ()))

    def __len__(self) -> int:
        return len(self._items)

    def find(self, key: Key, request: Request, owner: str) -> tuple[Stored | None, bool]:
        """The variant that fits the request, and whether there are others."""
        variants = self._items.get(key)
        if variants is None:
            return None, False
        self._items.move_to_end(key)
        return self._fitting(variants, request, owner)

    def peek(self, key: Key, request: Request, owner: str) -> tuple[Stored | None, bool]:
        """As :meth:`find`, without counting as a use."""
        variants = self._items.get(key)
        return (None, False) if variants is None else self._fitting(variants, request, owner)

    @staticmethod
    def _fitting(variants: list[Stored], request: Request, owner: str) -> tuple[Stored | None, bool]:
        mine = [s for s in variants if s.owner == owner] if len(variants) > 1 else variants
        for stored in mine:
            if stored.owner != owner:
                continue
            if not stored.varied or stored.varied == varied(request, tuple(n for n, _ in stored.varied)):
                return stored, False
        return None, bool(mine) and mine[0].owner == owner

    def put(self, key: Key, stored: Stored) -> bool:
        """Keeps it in place of the variant that it replaces. False when it is larger than a quarter of the whole."""
        size = stored.size
        if size > self.limit // 4:
            return False
        variants = self._items.setdefault(key, [])
        self._items.move_to_end(key)
        for n, old in enumerate(variants):
            if old.varied == stored.varied and old.owner == stored.owner:
                self.used -= old.size
                del variants[n]
                break
        if len(variants) >= VARIANTS:
            self.used -= variants.pop(0).size
        variants.append(stored)
        self.used += size
        self._shrink()
        return True

    def grew(self, key: Key, stored: Stored, by: int) -> None:
        """Something was added to what is kept, if it still is."""
        if any(s is stored for s in self._items.get(key, ())):
            self.used += by
            self._shrink()

    def _shrink(self) -> None:
        while self.used > self.limit and self._items:
            _, gone = self._items.popitem(last=False)
            self.used -= sum(s.size for s in gone)
            self.evicted += 1

    def drop(self, key: Key) -> int:
        """All variants of a key; gives how many there were."""
        gone = self._items.pop(key, ())
        self.used -= sum(s.size for s in gone)
        return len(gone)

    def purge(self, *, host: str = "", path: str = "", prefix: str = "", tag: str = "") -> int:
        """Drops by exact path, by prefix or by tag, of one host or of all; gives how many answers went."""
        n = 0
        for key in [k for k in self._items if not host or k[0].removeprefix(SECURE) == host.lower()]:
            if tag:
                keep = [s for s in self._items[key] if tag not in s.tags]
                n += len(self._items[key]) - len(keep)
                self.used -= sum(s.size for s in self._items[key] if tag in s.tags)
                if keep:
                    self._items[key] = keep
                else:
                    del self._items[key]
            elif (path and key[1] == path) or (prefix and key[1].startswith(prefix)):
                n += self.drop(key)
        return n


def hit_fields(stored: Stored, now: float) -> Headers:
    """The fields of a whole answer from the store."""
    return [
        *stored.headers,
        *([] if stored.status in (204, 304) else [("content-length", str(stored.length))]),
        ("age", str(int(stored.age(now)))),
        ("cache-status", f"{NAME}; hit; ttl={int(stored.ttl(now))}"),
    ]


def hit_head(stored: Stored, now: float) -> bytes:
    """Its head in HTTP/1.1. Made once a second: nothing in it is finer than that."""
    second = int(now)
    if stored.written[0] != second:
        stored.written = second, write_response(stored.status, hit_fields(stored, now), stored.reason)
    return stored.written[1]
