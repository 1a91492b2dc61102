"""The access log: one JSON line for each request, in a file that cannot grow beyond its bound.

Lines wait in memory for a moment and are written together; beyond a bound they are counted, not kept. The file before
the present one is kept as ``.1``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

from edgeward.core.clock import timestamp

log = logging.getLogger("edgeward.gateway")

#: Bytes of one file; two are kept. Lines that wait.
FILE_BYTES = 4 * 1024**2
WAITING = 20_000
FIELDS = ("time", "client", "method", "host", "path", "status", "bytes", "seconds", "route", "target", "cache")
#: Of Routes that have more places than one: which one it was, and why not one before it.
PLACES = ("place", "because")

Line = (
    tuple[float, str, str, str, str, int, int, float, str, str, str]
    | tuple[float, str, str, str, str, int, int, float, str, str, str, str, str]
)


class AccessLog:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.dropped = 0
        self._lines: list[Line] = []
        self._encoder = msgspec.json.Encoder()
        self._size = path.stat().st_size if path.exists() else 0

    def add(self, line: Line) -> None:
        if len(self._lines) < WAITING:
            self._lines.append(line)
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Writes what waits."""
        if not self._lines:
            return
        lines, self._lines = self._lines, []
        encode = self._encoder.encode
        self.write(b"".join([encode(self._doc(line)) + b"\n" for line in lines]))

    def write(self, data: bytes) -> None:
        """Lines as they are to stand there."""
        try:
            if self._size + len(data) > FILE_BYTES and self._size:
                self.path.replace(self.path.with_name(self.path.name + ".1"))
                self._size = 0
            with self.path.open("ab") as out:
                out.write(data)
            self._size += len(data)
        except OSError as e:
            self.dropped += data.count(b"\n")
            log.warning("the access log cannot be written: %s", e)

    @staticmethod
    def _doc(line: Line) -> dict[str, Any]:
        doc: dict[str, Any] = dict(zip(FIELDS + PLACES, line, strict=False))
        doc["time"] = timestamp(line[0])
        doc["seconds"] = round(line[7], 6)
        doc["path"] = line[4][:1024]
        return doc
