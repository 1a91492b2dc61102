"""What kinds of several rooms declare alike: a struct that takes no unknown field, a placement, an environment. Pure.

Whether a placement takes a node is decided in ``scope.py``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class Declared(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a kind's spec: what it does not know is refused, what is at its default is not written."""


class Placement(Declared):
    """Where it is to be; empty: at every site."""

    site: Annotated[str, Meta(description="Only at this site")] = ""
    nodeSelector: Annotated[dict[str, str], Meta(description="Only on nodes with these labels")] = {}


class EnvFrom(Declared):
    """All keys of a Config or Secret as environment variables."""

    config: Annotated[str, Meta(description="A Config of the namespace")] = ""
    secret: Annotated[str, Meta(description="A Secret of the namespace")] = ""
