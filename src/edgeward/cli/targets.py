"""Which resources a command line means: ``app web``, ``app/web site/plant``, ``apps,nodes``.

Words in, kinds and names out, or a usage error that shows the right form. No I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeward.cli.kinds import find_kind
from edgeward.cli.session import UsageError
from edgeward.core.errors import Invalid
from edgeward.core.registry import Kind
from edgeward.core.resource import check_name


@dataclass(frozen=True, slots=True)
class Target:
    """A kind, or with a name one resource of it."""

    kind: Kind
    name: str | None = None


def parse_targets(words: Sequence[str]) -> list[Target]:
    """The targets of the words behind a command."""
    if not words:
        raise UsageError("what? give KIND, KIND NAME or KIND/NAME, e.g. app web")
    if any("/" in w for w in words):
        return [_slash(w) for w in words]
    found = [find_kind(k) for k in words[0].split(",") if k]
    if not found:
        raise UsageError(f"{words[0]!r} names no kind")
    names = words[1:]
    if names and len(found) > 1:
        raise UsageError("names go with one kind; for several write KIND/NAME KIND/NAME")
    if not names:
        return [Target(k) for k in {k.name: k for k in found}.values()]
    return [Target(found[0], _name(found[0], n)) for n in names]


def _slash(word: str) -> Target:
    kind, slash, name = word.partition("/")
    if not slash or not kind or not name:
        raise UsageError(f"{word!r} is not KIND/NAME, and the two forms do not mix")
    found = find_kind(kind)
    return Target(found, _name(found, name))


def _name(kind: Kind, name: str) -> str:
    try:
        return check_name(name, "NAME", kind.name)
    except Invalid as e:
        e.field = ""
        raise


def one_target(words: Sequence[str]) -> tuple[Kind, str]:
    """The one resource that a command is about."""
    targets = parse_targets(words)
    if len(targets) != 1 or targets[0].name is None:
        raise UsageError("name one resource: KIND NAME or KIND/NAME")
    return targets[0].kind, targets[0].name
