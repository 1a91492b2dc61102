"""Every refusal a user can meet, in one place.

An error names the resource, the field and the remedy. The same object becomes an HTTP problem document (RFC 9457)
at the API and an exit code at the command line, so what a script sees does not depend on where it asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class EdgewardError(Exception):
    """A failure with a name for machines and a remedy for people."""

    reason: ClassVar[str] = "Failed"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(
        self, message: str, *, resource: str = "", field: str = "", remedy: str = "", file: str = "", line: int = 0
    ) -> None:
        super().__init__(message)
        self.message = message
        self.resource = resource
        self.field = field
        self.remedy = remedy
        self.file = file
        self.line = line

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        what = f"{self.resource}: " if self.resource else ""
        field = f"{self.field}: " if self.field else ""
        remedy = f" ({self.remedy})" if self.remedy else ""
        return f"{where}{what}{field}{self.message}{remedy}"

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 problem document; empty members are left out."""
        doc: dict[str, Any] = {"title": self.reason, "status": self.status, "detail": self.message}
        for name in ("resource", "field", "remedy", "file", "line"):
            value = getattr(self, name)
            if value:
                doc[name] = value
        return doc


class Invalid(EdgewardError):
    reason, status, exit_code = "Invalid", 422, 3


class Refused(EdgewardError):
    """Understood and well formed, but not allowed in the present state."""

    reason, status, exit_code = "Refused", 400, 3


class Unauthorized(EdgewardError):
    reason, status, exit_code = "Unauthorized", 401, 3


class Forbidden(EdgewardError):
    """``members``: further members of the problem document; the API names verb, kind and name there."""

    reason, status, exit_code = "Forbidden", 403, 3

    def __init__(self, message: str, *, members: Mapping[str, str] | None = None, **where: Any) -> None:
        super().__init__(message, **where)
        self.members = {k: v for k, v in (members or {}).items() if v}

    def problem(self) -> dict[str, Any]:
        return {**super().problem(), **self.members}


class TooSlow(EdgewardError):
    reason, status, exit_code = "TooSlow", 408, 1


class TooMany(EdgewardError):
    """Too many tries from one place; ``after`` seconds later it may try again."""

    reason, status, exit_code = "TooMany", 429, 3

    def __init__(self, message: str, *, after: float = 1.0, **where: Any) -> None:
        super().__init__(message, **where)
        self.after = after


class NotFound(EdgewardError):
    reason, status, exit_code = "NotFound", 404, 5


class Conflict(EdgewardError):
    reason, status, exit_code = "Conflict", 409, 4


class Gone(EdgewardError):
    """The revision asked for was compacted away; list again."""

    reason, status, exit_code = "Gone", 410, 1


class TooLarge(EdgewardError):
    reason, status, exit_code = "TooLarge", 413, 3


class Unreachable(EdgewardError):
    reason, status, exit_code = "Unreachable", 503, 6


_BY_REASON: dict[str, type[EdgewardError]] = {
    cls.reason: cls
    for cls in (
        EdgewardError,
        Invalid,
        Refused,
        Unauthorized,
        Forbidden,
        NotFound,
        Conflict,
        Gone,
        TooLarge,
        TooMany,
        TooSlow,
        Unreachable,
    )
}


def from_problem(doc: Mapping[str, Any], status: int = 500) -> EdgewardError:
    """The error that a problem document stands for (the client's side of :meth:`EdgewardError.problem`)."""
    cls = _BY_REASON.get(str(doc.get("title", "")))
    if cls is None:
        cls = next((c for c in _BY_REASON.values() if c.status == status), EdgewardError)
    return cls(
        str(doc.get("detail") or f"HTTP status {status}"),
        resource=str(doc.get("resource", "")),
        field=str(doc.get("field", "")),
        remedy=str(doc.get("remedy", "")),
        file=str(doc.get("file", "")),
        line=int(doc.get("line", 0) or 0),
    )
