"""``auth`` of a Route: who may ask, as it is declared. Pure.

Each way that is named admits by itself; one of them is enough. What is checked, and how, is in ``auth.py``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from msgspec import Meta

from edgeward.core.declared import Declared
from edgeward.core.errors import Invalid
from edgeward.core.fetch import safe
from edgeward.core.quantity import DURATION_PATTERN, parse_duration
from edgeward.core.registry import Ref
from edgeward.core.resource import NAME_PATTERN
from edgeward.gateway.http1 import CLAIMS, HOP

Duration = Annotated[str, Meta(pattern=DURATION_PATTERN)] | float | int
Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA", "HS256", "HS384", "HS512"
]
_FIELD = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_PRINT = re.compile(r"[0-9a-f]{64}")
#: Fields that mean something else to the gateway or to the protocol.
_TAKEN = HOP | CLAIMS | {
    "host", "content-length", "content-type", "cookie", "cache-control", "range", "origin", "via", "vary", "age",
    "accept-encoding", "expect", "date",
}  # fmt: skip


class ApiKeys(Declared):
    """Keys that clients send in a header field."""

    secret: Annotated[str, Meta(description="A Secret of the namespace: names of clients, and the key of each")]
    header: Annotated[str, Meta(description="The field that the key comes in")] = "x-api-key"


class Jwks(Declared):
    """Where the issuer's keys come from (a JWK set, RFC 7517). Exactly one."""

    keys: Annotated[list[dict[str, Any]], Meta(description="The public keys themselves", max_length=64)] = []
    config: Annotated[str, Meta(description="A Config of the namespace that holds the set")] = ""
    secret: Annotated[str, Meta(description="A Secret that holds it; shared keys (HS256) only come from one")] = ""
    entry: Annotated[str, Meta(description="Which entry of the Config or Secret")] = "jwks.json"
    url: Annotated[
        str,
        Meta(description="https: each node fetches it, and keeps it while the link is cut", max_length=1024),
    ] = ""


class Jwt(Declared):
    """Signed tokens (RFC 7519) of an issuer, in ``Authorization: Bearer``."""

    issuer: Annotated[str, Meta(description="What iss must be", min_length=1, max_length=1024)]
    audience: Annotated[list[str], Meta(description="One of them must be among aud", min_length=1, max_length=16)]
    jwks: Annotated[Jwks, Meta(description="The issuer's keys")]
    algorithms: Annotated[
        list[Algorithm], Meta(description="Only these; empty: what the keys are for. A key decides, never a token")
    ] = []
    claims: Annotated[
        dict[str, str | int | bool | list[str]],
        Meta(description="What other claims must be, or one of what they must hold"),
    ] = {}
    scopes: Annotated[list[str], Meta(description="All of them must be in scope (or scp)", max_length=32)] = []
    skew: Annotated[Duration, Meta(description="How far the clocks may differ")] = "60s"


class Mtls(Declared):
    """A client certificate that a TLS listener has verified; nothing named: any of them. One that fits is enough."""

    subjects: Annotated[list[str], Meta(description="e.g. CN=till-7,O=Shop (RFC 4514)", max_length=256)] = []
    sans: Annotated[
        list[str],
        Meta(description="Alternative names: dns:till-7.shop, uri:spiffe://..., ip:..., email:...", max_length=256),
    ] = []
    fingerprints: Annotated[list[str], Meta(description="SHA-256 of the certificate, hex", max_length=256)] = []


class Auth(Declared):
    """Who may ask. Each way that is named admits by itself."""

    apiKeys: Annotated[ApiKeys | None, Meta(description="Keys")] = None
    jwt: Annotated[Jwt | None, Meta(description="Signed tokens")] = None
    mtls: Annotated[Mtls | None, Meta(description="Client certificates")] = None
    forward: Annotated[bool, Meta(description="The key or token goes on to the target; else it ends here")] = False


def _bad(what: str, where: str, remedy: str = "") -> Invalid:
    return Invalid(what, field=f"$.spec.auth.{where}", remedy=remedy)


def check_auth(auth: Auth) -> None:
    """Raises ``Invalid``."""
    if auth.apiKeys is None and auth.jwt is None and auth.mtls is None:
        raise Invalid("admits nobody", field="$.spec.auth", remedy="name one or more of apiKeys, jwt, mtls")
    if auth.apiKeys is not None:
        header = auth.apiKeys.header.lower()
        if not _FIELD.fullmatch(header) or header in _TAKEN or header.startswith("x-edgeward-"):
            raise _bad(f"{header[:64]!r} cannot hold a key", "apiKeys.header", "write e.g. x-api-key")
        if auth.jwt is not None and header == "authorization":
            raise _bad("authorization holds the token", "apiKeys.header", "write e.g. x-api-key")
        _name(auth.apiKeys.secret, "apiKeys.secret")
    if auth.jwt is not None:
        _check_jwt(auth.jwt)
    for at, san in enumerate(auth.mtls.sans if auth.mtls is not None else []):
        if san.partition(":")[0] not in ("dns", "uri", "email", "ip"):
            raise _bad(f"{san[:80]!r} does not say what it is", f"mtls.sans[{at}]", "write e.g. dns:till-7.shop")
    for n, print_ in enumerate(auth.mtls.fingerprints if auth.mtls is not None else []):
        if not _PRINT.fullmatch(print_.lower().replace(":", "")):
            raise _bad("is no SHA-256 in hex", f"mtls.fingerprints[{n}]", "openssl x509 -fingerprint -sha256")


def _name(name: str, where: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        raise _bad(f"{name[:63]!r} is no name", where)


def _check_jwt(jwt: Jwt) -> None:
    jwks = jwt.jwks
    given = [n for n in ("keys", "config", "secret", "url") if getattr(jwks, n)]
    if len(given) != 1:
        what = f"more than one source: {', '.join(given)}" if given else "no keys"
        raise _bad(what, "jwt.jwks", "name exactly one of keys, config, secret, url")
    if jwks.url and not safe(jwks.url):
        raise _bad("is no https address", "jwt.jwks.url", "keys that anybody on the way can change are none")
    for n in ("config", "secret"):
        if getattr(jwks, n):
            _name(getattr(jwks, n), f"jwt.jwks.{n}")
    for at, key in enumerate(jwks.keys):
        if key.get("kty") == "oct" or "d" in key:
            raise _bad("a secret key in the open", f"jwt.jwks.keys[{at}]", "put the set into a Secret: jwks.secret")
    shared = [a for a in jwt.algorithms if a.startswith("HS")]
    if shared and not jwks.secret:
        raise _bad(f"{shared[0]} needs a shared key", "jwt.algorithms", "put the key into a Secret: jwks.secret")
    for name in jwt.claims:
        if name in ("iss", "aud", "exp", "nbf", "iat") or not name:
            raise _bad("is looked at anyway, or is no claim", f"jwt.claims.{name[:64]}", "remove it")
    if len(jwt.claims) > 16:
        raise _bad("more than 16 claims", "jwt.claims")
    for at, scope in enumerate(jwt.scopes):
        if not re.fullmatch(r"[\x21\x23-\x5b\x5d-\x7e]{1,128}", scope):
            raise _bad(f"{scope[:64]!r} is no scope", f"jwt.scopes[{at}]", "one word each (RFC 6749, 3.3)")
    try:
        skew = parse_duration(jwt.skew)
    except ValueError as e:
        raise _bad(str(e), "jwt.skew") from None
    if not 0 <= skew <= 600:
        raise _bad(f"{jwt.skew} is out of range", "jwt.skew", "from 0 to 10m")


def auth_refs(auth: Auth, namespace: str) -> list[Ref]:
    """The Secrets and Configs that the nodes must have for it."""
    found = []
    if auth.apiKeys is not None:
        found.append(Ref("Secret", namespace, auth.apiKeys.secret, "$.spec.auth.apiKeys.secret"))
    if auth.jwt is not None:
        for kind in ("config", "secret"):
            if name := getattr(auth.jwt.jwks, kind):
                found.append(Ref(kind.capitalize(), namespace, name, f"$.spec.auth.jwt.jwks.{kind}"))
    return found
