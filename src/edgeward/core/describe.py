"""What a route is for, said next to its handler: the API's document is made of it (``openapi.py``). Pure.

``@described(...)`` stands at the handler; the check around it (``access.py``) carries it on. A test compares what is
served with what is described, so a route without a description does not stay one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

H = TypeVar("H", bound=Callable[..., Any])

Form = Literal["string", "integer", "boolean"]
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class About:
    """``query``: parameter to form and meaning. ``body``, ``answer``: structs, or None for an object of any form."""

    summary: str
    query: Mapping[str, tuple[Form, str]] = field(default_factory=dict)
    body: Any = None
    answer: Any = None
    media: str = JSON
    code: int = 200
    #: Other answers that are no problem documents.
    more: Mapping[str, str] = field(default_factory=dict)


def described(
    summary: str,
    *,
    query: Mapping[str, tuple[Form, str]] | None = None,
    body: Any = None,
    answer: Any = None,
    media: str = JSON,
    code: int = 200,
    more: Mapping[str, str] | None = None,
) -> Callable[[H], H]:
    """Puts the description at a handler."""
    about = About(summary, query or {}, body, answer, media, code, more or {})

    def put(handler: H) -> H:
        handler.about = about  # type: ignore[attr-defined]
        return handler

    return put


def about_of(handler: object) -> About | None:
    """The description of a handler, or of one behind its check."""
    found = getattr(handler, "about", None)
    return found if isinstance(found, About) else None


#: Queries that several routes have.
RECORDS: Mapping[str, tuple[Form, str]] = {
    "since": ("integer", "Only records behind this number"),
    "limit": ("integer", "At most the last so many"),
}
FOLLOW: Mapping[str, tuple[Form, str]] = {"follow": ("boolean", "Go on with what comes")}
#: Of a node's own API; the hub's has ``node`` beside.
LOGS: Mapping[str, tuple[Form, str]] = {
    "instance": ("string", "Of this instance only"),
    "tail": ("integer", "So many last lines of each"),
    "since": ("string", "From this time on, RFC 3339"),
    **FOLLOW,
}
