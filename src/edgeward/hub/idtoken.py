"""ID tokens of an OpenID Connect issuer: whether one is genuine and for us, and which role it brings. Pure.

In go the token's text, the issuer's keys (JWK set), what the hub's configuration says, and the time; out come the
claims, or a refusal. Only RS256 and ES256 are taken, and the key decides which of them (RFC 8725): a token cannot
choose how it is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgeward.core import jws
from edgeward.core.errors import Forbidden, Invalid, Unauthorized
from edgeward.core.fetch import safe

#: Seconds that clocks may differ, and that a token may be old when it is brought.
LEEWAY, FRESH = 60.0, 600.0


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """``oidc`` of hub.json."""

    issuer: str
    clientId: str
    #: Value of the claim -> role; the first that is among the bearer's counts, ``*`` is everybody known to the issuer.
    roles: dict[str, str]
    claim: str = "groups"
    #: The claim that people are called by in the audit.
    name: str = "email"
    scopes: str = "openid email groups"
    ttl: str = "12h"
    #: File with the CAs to trust for the issuer; else the system's.
    ca: str = ""


class Claims(msgspec.Struct):
    """What is used of a genuine token."""

    subject: Annotated[str, Meta(max_length=255)]
    name: str
    values: list[str]


def _refused(why: str) -> Unauthorized:
    return Unauthorized(f"the ID token {why}", remedy="sign in again: edgeward login")


def _token(text: str) -> jws.Token:
    try:
        return jws.Token(text)
    except ValueError:
        raise _refused("is malformed") from None


def key_id(token: str) -> str:
    """The ``kid`` of the token's header, so that its keys can be fetched anew when it is not known."""
    return _token(token).kid


def _genuine(jwk: Mapping[str, Any], token: jws.Token) -> bool:
    """Whether the key made the signature; the key's type says by which algorithm."""
    try:
        return jws.Jwk(jwk).signed(token)
    except ValueError:
        return False


def verify(token: str, keys: Sequence[Mapping[str, Any]], settings: Settings, now: float) -> Claims:
    """The claims of a genuine token for us. Raises ``Unauthorized``."""
    given = _token(token)
    if given.alg not in ("RS256", "ES256") or "crit" in given.header:
        raise _refused("is signed in a way that is not taken (RS256 and ES256 are)")
    fit = [k for k in keys if not given.kid or k.get("kid", given.kid) == given.kid]
    if not any(_genuine(k, given) for k in fit[:8]):
        raise _refused("is not signed by the issuer")
    claims = given.claims
    if claims.get("iss") != settings.issuer:
        raise _refused("is of another issuer")
    audience = claims.get("aud")
    named = audience if isinstance(audience, list) else [audience]
    if settings.clientId not in named:
        raise _refused("is for another client")
    if (len(named) > 1 or "azp" in claims) and claims.get("azp") != settings.clientId:
        raise _refused("was given to another client")
    exp, iat, nbf = (_time(claims, n, d) for n, d in (("exp", None), ("iat", None), ("nbf", 0.0)))
    if now > exp + LEEWAY:
        raise _refused("is expired")
    if iat > now + LEEWAY or nbf > now + LEEWAY:
        raise _refused("is of the future: look at the clocks")
    if now - iat > FRESH + LEEWAY:
        raise _refused("is too old to be brought now")
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= 255:
        raise _refused("names nobody")
    values = claims.get(settings.claim, [])
    values = values if isinstance(values, list) else [values]
    name = claims.get(settings.name)
    shown = name if isinstance(name, str) and name and name.isprintable() else subject
    return Claims(subject, shown[:128], [v for v in values if isinstance(v, str)])


def _time(claims: Mapping[str, Any], name: str, default: float | None) -> float:
    value = claims.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused(f"has no {name}")
    return float(value)


def role_of(claims: Claims, settings: Settings) -> str:
    """The first role, in the configuration's order, that the bearer's claim brings. Raises ``Forbidden``."""
    for value, role in settings.roles.items():
        if value == "*" or value in claims.values:
            return role
    raise Forbidden(
        f"{claims.name} is known to the issuer, but none of its {settings.claim} has a role here",
        remedy="an administrator adds it under oidc.roles in hub.json",
    )


def check(settings: Settings) -> Settings:
    """Raises ``Invalid`` that names the field."""
    if not safe(settings.issuer):
        raise Invalid("is no https address", field="$.oidc.issuer")
    if not settings.roles:
        raise Invalid("maps nobody", field="$.oidc.roles", remedy='e.g. {"platform-team": "admin", "*": "viewer"}')
    return settings
