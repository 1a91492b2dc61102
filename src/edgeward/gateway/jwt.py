"""Tokens of one issuer: whether one is genuine, for us, of now, and says what the Route asks for. Pure.

The issuer's keys are given, or come from whoever fetches them (``keyring.py``); a key that is not known makes that one
look again, and the client is told to come back in a moment. What was found genuine is remembered by its hash, so that a
client that goes on with the same token costs no signature each time; its times are looked at every time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from edgeward.core import jws
from edgeward.gateway.auth import Identity, JwtConfig, Refusal

#: Tokens that are remembered.
REMEMBERED = 1024
#: Keys that are tried for a token that names none.
_TRIED = 8

#: The keys, newest known; called with True when a token names one that is not among them. None: there are none yet.
Keys = Callable[[bool], list[jws.Jwk] | None]


class Issuer:
    def __init__(self, config: JwtConfig, keys: Keys) -> None:
        self._config, self._keys = config, keys
        self._known: dict[bytes, tuple[float, float, Identity]] = {}
        self._known_by: list[jws.Jwk] | None = None

    def admit(self, authorization: str | None, now: float) -> Identity:
        """Raises ``Refusal``."""
        scheme, _, text = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not text:
            raise Refusal("a token is needed (Authorization: Bearer)")
        text = text.strip(" ")
        if (keys := self._keys(False)) is not self._known_by:  # what was found genuine by others is looked at again
            self._known_by = keys
            self._known.clear()
        mark = hashlib.sha256(text.encode("latin-1", "replace")).digest()
        known = self._known.get(mark)
        if known is None:
            known = self._judge(text)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[mark] = known
        begins, ends, identity = known
        if now >= ends + self._config.skew:
            self._known.pop(mark, None)
            raise Refusal("the token is expired")
        if now < begins - self._config.skew:
            raise Refusal("the token is of the future: look at the clocks")
        return identity

    def _judge(self, text: str) -> tuple[float, float, Identity]:
        """``(good from, good until, who)`` of a genuine token."""
        try:
            token = jws.Token(text)
        except ValueError:
            raise Refusal("the token is malformed") from None
        config = self._config
        if "crit" in token.header or (config.algorithms and token.alg not in config.algorithms):
            raise Refusal("the token is signed in a way that is not taken")
        self._genuine(token)
        claims = token.claims
        if claims.get("iss") != config.issuer:
            raise Refusal("the token is of another issuer")
        named = claims.get("aud")
        if not {a for a in (named if isinstance(named, list) else [named]) if isinstance(a, str)} & {*config.audience}:
            raise Refusal("the token is for somebody else")
        ends = _time(claims, "exp", None)
        begins = max(_time(claims, "nbf", 0.0), _time(claims, "iat", 0.0))
        scope = _scope(claims)
        self._enough(claims, scope)
        subject = claims.get("sub", claims.get("client_id", claims.get("azp")))
        if not isinstance(subject, str) or not 0 < len(subject) <= 255:
            raise Refusal("the token names nobody")
        return begins, ends, Identity("jwt", subject, scope)

    def _genuine(self, token: jws.Token) -> None:
        keys = self._keys(False)
        fit = [k for k in keys or () if not token.kid or not k.kid or k.kid == token.kid]
        if not fit:
            keys = self._keys(True)
            if keys is None:
                raise Refusal("the issuer's keys are not here; they are being fetched", later=2)
            raise Refusal("the token is signed by a key that is not known")
        if not any(k.signed(token) for k in fit[:_TRIED]):
            raise Refusal("the token is not signed by the issuer")

    def _enough(self, claims: dict[str, Any], scope: str) -> None:
        missing = set(self._config.scopes) - set(scope.split())
        if missing:
            raise Refusal(f"the token has not the scope {min(missing)}", error="insufficient_scope")
        for name, wanted in self._config.claims:
            has = claims.get(name)
            values = {_plain(v) for v in (has if isinstance(has, list) else [has])}
            if not values & set(wanted):
                raise Refusal(f"the token's {name} is not enough", error="insufficient_scope")


def _plain(value: object) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int) else None


def _scope(claims: dict[str, Any]) -> str:
    found = claims.get("scope", claims.get("scp", ""))
    words = found if isinstance(found, list) else [found]
    return " ".join(w for w in words if isinstance(w, str))


def _time(claims: dict[str, Any], name: str, default: float | None) -> float:
    value = claims.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**53:
        raise Refusal(f"the token has no {name}")
    return float(value)
