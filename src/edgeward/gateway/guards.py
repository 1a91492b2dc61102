"""The guards of all routes: made of the plane's configuration, with the node's vault and the issuers' keys.

A guard goes on over a change of other routes, and with it the tokens that it knows. One that cannot be made is there
all the same and lets nobody in.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeward.core.errors import EdgewardError
from edgeward.gateway.auth import AuthConfig, Guard, place
from edgeward.gateway.keyring import Keyring, Say, Spawn
from edgeward.gateway.match import Table
from edgeward.gateway.rules import RouteConfig, Rule

if TYPE_CHECKING:
    from edgeward.core.jws import Jwk
    from edgeward.core.vault import Vault
    from edgeward.gateway.jwt import Issuer


class Guards:
    def __init__(self, data: Path, spawn: Spawn, say: Say) -> None:
        """``data``: the node's folder."""
        self._data = data
        self._vault: Vault | None = None
        self._keyring = Keyring(data / "gateway" / "jwks", spawn, say)

    def of(self, routes: Iterable[RouteConfig], old: Table[Rule]) -> dict[str, Guard]:
        known = {r.key: r.guard for r in old.rules if r.guard is not None}
        found = {}
        for route in routes:
            if route.auth is not None:
                kept = known.get(route.key)
                same = kept is not None and kept.config == route.auth and kept.broken == route.auth.waiting
                found[route.key] = kept if same and kept is not None else self._made(route.key, route.auth)
        return found

    def _made(self, route: str, config: AuthConfig) -> Guard:
        if config.waiting:
            return Guard(route, config, {}, None)
        try:
            secret = self._opened(route, config)
            keys = msgspec.convert(secret.get("keys", []), list[tuple[str, str]])
            issuer = self._issuer(config, secret) if config.jwt is not None else None
        except (EdgewardError, ValueError, msgspec.ValidationError) as e:
            return Guard(route, config, {}, None, broken=str(e))
        return Guard(route, config, dict(keys), issuer)

    def _opened(self, route: str, config: AuthConfig) -> dict[str, Any]:
        if not config.sealed:
            return {}
        from edgeward.core.vault import Vault  # some megabytes that a node without such secrets does not need

        self._vault = self._vault or Vault.open(self._data / "identity")
        try:
            sealed = base64.b64decode(config.sealed, validate=True)
        except binascii.Error:
            raise EdgewardError("its keys are damaged", resource=f"Route/{route}") from None
        return msgspec.json.decode(self._vault.unseal(sealed, place(route)), type=dict[str, Any])

    def _issuer(self, config: AuthConfig, secret: dict[str, Any]) -> Issuer | None:
        from edgeward.core.jws import key_set
        from edgeward.gateway.jwt import Issuer

        jwt = config.jwt
        if jwt is None:
            return None
        if jwt.url:
            return Issuer(jwt, self._keyring.of(jwt.url))
        shared = "jwks" in secret
        try:
            keys = [k for k in key_set(secret["jwks"] if shared else jwt.jwks) if shared or not k.symmetric]
        except ValueError as e:
            raise ValueError(f"the JWK set {e}") from None
        if not keys:
            raise ValueError("the JWK set has no public key; shared keys belong into a Secret")

        def known(unknown: bool) -> list[Jwk] | None:
            return keys

        return Issuer(jwt, known)
