"""The agent's side of ``auth``: what is declared, with its Secrets and Configs, becomes what the plane checks by.

Keys become hashes here. They, and shared keys of tokens, go into the plane's file sealed with the node's own key. What
is not on the node yet lets nobody in: a Route is never open because something is missing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from edgeward.core.quantity import parse_duration
from edgeward.core.resource import Resource
from edgeward.gateway.auth import KEYS, SHORTEST, AuthConfig, JwtConfig, digest, place
from edgeward.gateway.auth_spec import Auth, Jwt

#: (kind, namespace, name) -> (data, revision), or None
Values = Callable[[str, str, str], tuple[dict[str, str], str] | None]


class Seals(Protocol):
    def seal(self, data: bytes, place: str) -> bytes: ...


class _Missing(Exception):
    pass


class Auths:
    """Makes ``auth`` of the routes: the same bytes as long as nothing changed."""

    def __init__(self, values: Values, vault: Seals) -> None:
        self._values, self._vault = values, vault
        self._sealed: dict[tuple[str, bytes], str] = {}

    def all(self, routes: Iterable[Resource]) -> dict[str, AuthConfig]:
        """By the key of the Route, of those that have one."""
        known, self._sealed = self._sealed, {}
        return {str(r.key): self._of(r, known) for r in routes if r.spec.auth is not None}

    def _of(self, route: Resource, known: dict[tuple[str, bytes], str]) -> AuthConfig:
        auth: Auth = route.spec.auth
        namespace, key = route.metadata.namespace, f"{route.metadata.namespace}/{route.metadata.name}"
        secret: dict[str, Any] = {}
        waiting: list[str] = []
        jwt = None
        try:
            if auth.apiKeys is not None:
                secret["keys"] = self._keys(namespace, auth.apiKeys.secret, key)
        except _Missing as e:
            waiting.append(str(e))
        try:
            if auth.jwt is not None:
                jwt = self._jwt(namespace, auth.jwt, secret)
        except _Missing as e:
            waiting.append(str(e))
        mtls = auth.mtls
        return AuthConfig(
            header=auth.apiKeys.header.lower() if auth.apiKeys is not None else "",
            jwt=jwt,
            mtls=mtls is not None,
            subjects=tuple(mtls.subjects) if mtls is not None else (),
            sans=tuple(mtls.sans) if mtls is not None else (),
            fingerprints=tuple(f.lower().replace(":", "") for f in mtls.fingerprints) if mtls is not None else (),
            forward=auth.forward,
            sealed=self._seal(key, secret, known) if secret else "",
            waiting="; ".join(waiting),
        )

    def _seal(self, key: str, secret: dict[str, Any], known: dict[tuple[str, bytes], str]) -> str:
        plain = msgspec.json.encode(secret, order="deterministic")
        at = (key, hashlib.sha256(plain).digest())
        if at not in known:
            known[at] = base64.b64encode(self._vault.seal(plain, place(key))).decode()
        self._sealed[at] = known[at]
        return known[at]

    def _data(self, kind: str, namespace: str, name: str) -> dict[str, str]:
        found = self._values(kind, namespace, name)
        if found is None:
            raise _Missing(f"{kind}/{name} is not here yet")
        return found[0]

    def _keys(self, namespace: str, name: str, route: str) -> list[tuple[str, str]]:
        data = self._data("Secret", namespace, name)
        found = []
        for client, given in sorted(data.items()):
            value = given.strip()
            if len(value) < SHORTEST or not value.isascii() or not value.isprintable():
                raise _Missing(
                    f"the key of {client!r} in Secret/{name} has fewer than {SHORTEST} characters, or others than ASCII"
                )
            found.append((client, digest(value, route)))
        if not found or len(found) > KEYS:
            raise _Missing(f"Secret/{name} has {len(found)} keys, not 1 to {KEYS}")
        return found

    def _jwt(self, namespace: str, jwt: Jwt, secret: dict[str, Any]) -> JwtConfig:
        jwks = jwt.jwks
        document: dict[str, Any] | None = {"keys": jwks.keys} if jwks.keys else None
        for kind in ("config", "secret"):
            if name := getattr(jwks, kind):
                data = self._data(kind.capitalize(), namespace, name)
                if jwks.entry not in data:
                    raise _Missing(f"{kind.capitalize()}/{name} has no entry {jwks.entry!r}")
                try:
                    document = msgspec.json.decode(data[jwks.entry], type=dict[str, Any])
                except msgspec.DecodeError:
                    raise _Missing(f"{jwks.entry} of {kind.capitalize()}/{name} is no JWK set") from None
        if jwks.secret:
            secret["jwks"], document = document, None
        claims = {
            n: [str(x) for x in v] if isinstance(v, list) else [str(v).lower() if isinstance(v, bool) else str(v)]
            for n, v in jwt.claims.items()
        }
        return JwtConfig(
            issuer=jwt.issuer,
            audience=tuple(jwt.audience),
            jwks=document,
            url=jwks.url,
            algorithms=tuple(jwt.algorithms),
            claims=tuple(sorted((n, tuple(v)) for n, v in claims.items())),
            scopes=tuple(jwt.scopes),
            skew=parse_duration(jwt.skew),
        )
