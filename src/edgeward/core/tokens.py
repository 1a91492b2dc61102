"""Tokens of the API: their text, their making, and who bears one.

A token is shown once, when it is made; what is kept is the SHA-256 of its 256 random bits. It names its own
AccessToken (``ew_<name>_<secret>``), so finding it is one look-up, at the hub as in a node's replica.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable

from edgeward.core import clock
from edgeward.core.authz import ANY, BUILT_IN, Principal, Rule, token_name
from edgeward.core.errors import EdgewardError, Invalid, Unauthorized
from edgeward.core.quantity import parse_duration
from edgeward.core.resource import CLUSTER, Key
from edgeward.core.store import Store

LONGEST_TTL = 3653 * 86400.0
DEFAULT_TTL = "90d"
#: Seconds between two writes of one token's last use.
USE_PERIOD = 60.0


def make_token(name: str) -> tuple[str, str]:
    """A new token of that name, and the hash to keep."""
    token = f"ew_{name}_{secrets.token_urlsafe(32)}"
    return token, hashlib.sha256(token.encode()).hexdigest()


def expiry(ttl: object) -> str:
    """When a token of that life ends. Raises ``Invalid``."""
    if isinstance(ttl, bool) or not isinstance(ttl, str | int | float):
        raise Invalid("is no duration", field="$.ttl", remedy=f"write e.g. {DEFAULT_TTL}")
    try:
        seconds = parse_duration(ttl)
    except ValueError as e:
        raise Invalid(str(e), field="$.ttl") from None
    if not 0 < seconds <= LONGEST_TTL:
        raise Invalid("is not within bounds", field="$.ttl", remedy="more than 0, at most 10 years (3653d)")
    return clock.timestamp(clock.now() + seconds)


def rules_of(store: Store, role: str) -> tuple[Rule, ...] | None:
    """The rules of a role; None when there is no such."""
    if role in BUILT_IN:
        return BUILT_IN[role]  # never what a store says of them
    found = store.find(Key("Role", CLUSTER, role))
    return None if found is None else tuple(found.spec.rules)


class AccessTokens:
    """Finds who a token stands for, and keeps when it was last used."""

    def __init__(self, store: Store, *, site: str = "", now: Callable[[], float] = clock.now) -> None:
        """``site``: only tokens that are meant for this site too; ``now``: the hub's time, as far as it is known."""
        self._store, self._site, self._now = store, site, now
        self._used: dict[str, str] = {}
        self._wake = asyncio.Event()

    def verify(self, token: str) -> Principal:
        """Who bears it. Raises ``Unauthorized`` without saying more than the bearer may know."""
        name = token_name(token)
        found = self._store.find(Key("AccessToken", CLUSTER, name)) if name else None
        known = found.spec.hash if found is not None else "0" * 64
        same = hmac.compare_digest(hashlib.sha256(token.encode()).hexdigest(), known)
        if found is None or not same or found.metadata.deletionTimestamp:
            raise Unauthorized("the token is wrong", remedy="get a new one: edgeward token create --role ROLE")
        spec = found.spec
        if self._now() >= clock.parse_timestamp(spec.expires):
            raise Unauthorized(f"the token {name} expired at {spec.expires}", remedy="get a new one")
        if self._site and not {ANY, self._site} & set(spec.sites):
            raise Unauthorized(f"the token {name} is not for this site", remedy="make one with --sites")
        rules = rules_of(self._store, spec.role)
        if rules is None:
            raise Unauthorized(f"the role {spec.role} of token {name} is gone", remedy="get a new token")
        self._used[name] = clock.timestamp()
        self._wake.set()
        return Principal(name, "person", spec.role, rules, spec.expires)

    async def run(self, write: Callable[[Key, dict[str, object]], Awaitable[None]]) -> None:
        """Writes last uses, each at most once in :data:`USE_PERIOD`."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            used, self._used = self._used, {}
            for name, at in used.items():
                found = self._store.find(Key("AccessToken", CLUSTER, name))
                if found is not None:
                    try:
                        await write(found.key, {**found.status, "lastUsed": at})
                    except EdgewardError:  # the store is away, or the token was deleted meanwhile
                        self._used.setdefault(name, at)
            await asyncio.sleep(USE_PERIOD)
