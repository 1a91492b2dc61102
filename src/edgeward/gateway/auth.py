"""Who asks: a request in, an identity or a refusal out. Pure; time is an argument.

The door asks before it looks at anything else of a request: before a body is read, before the cache answers, before a
target hears of it. Each way that a Route declares admits by itself. Keys are compared as hashes, all of them, in
constant time. What is known of the client goes on in fields that no client can send (``http1.is_claim``); the key or
token itself ends here, unless the Route says ``forward``.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from edgeward.gateway.http1 import Headers, Request
from edgeward.gateway.peer import Peer, allows

if TYPE_CHECKING:
    from edgeward.gateway.jwt import Issuer

#: The shortest key that is taken: a shorter one could be found by trying, from its hash or at the door.
SHORTEST = 16
KEYS = 1024
IDENTITY, HOW, SCOPE = "x-edgeward-identity", "x-edgeward-auth", "x-edgeward-scope"
_SCOPE = re.compile(r"[\x20-\x7e]{0,1024}")


class JwtConfig(msgspec.Struct, frozen=True):
    issuer: str
    audience: tuple[str, ...]
    #: The JWK set; None: it is sealed, or fetched from ``url``.
    jwks: dict[str, Any] | None = None
    url: str = ""
    algorithms: tuple[str, ...] = ()
    claims: tuple[tuple[str, tuple[str, ...]], ...] = ()
    scopes: tuple[str, ...] = ()
    skew: float = 60.0


class AuthConfig(msgspec.Struct, frozen=True):
    """``auth`` of one route in ``plane.json``."""

    #: The field of API keys; empty: none are taken.
    header: str = ""
    jwt: JwtConfig | None = None
    mtls: bool = False
    subjects: tuple[str, ...] = ()
    sans: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    forward: bool = False
    #: ``{keys: [[name, hash]], jwks: {...}}`` in JSON, sealed with the node's vault, in base64.
    sealed: str = ""
    #: What is not on this node yet; nobody is admitted by it.
    waiting: str = ""


class Identity(msgspec.Struct, frozen=True):
    """Who asks. ``how``: apiKey, jwt or mtls."""

    how: str
    name: str
    scope: str = ""

    @property
    def fields(self) -> Headers:
        """As the target gets it."""
        found = [(IDENTITY, quote(self.name, safe="!#$&'()*+,-./:;=?@[]^_`{|}~ ")[:1024].strip()), (HOW, self.how)]
        if self.scope and _SCOPE.fullmatch(self.scope):
            found.append((SCOPE, self.scope))
        return found


class Denied(Exception):
    """A request that is not let in: 401, 403, or 503 while its keys are not here."""

    def __init__(self, status: int, why: str, headers: Headers) -> None:
        super().__init__(why)
        self.status, self.why, self.headers = status, why, headers


class Refusal(Exception):
    """Why one way does not admit. ``error``: RFC 6750's word; ``later``: what is needed may be here in a moment."""

    def __init__(self, why: str, *, error: str = "invalid_token", later: int = 0) -> None:
        super().__init__(why)
        self.why, self.error, self.later = why, error, later

    @property
    def status(self) -> int:
        return 503 if self.later else 403 if self.error == "insufficient_scope" else 401


def digest(key: str, route: str) -> str:
    """How a key lies in memory and in files: the same key of two routes does not look the same."""
    return hashlib.sha256(f"edgeward route key\n{route}\n{key}".encode("latin-1", "backslashreplace")).hexdigest()


def place(route: str) -> str:
    """Where a route's secrets are sealed for."""
    return f"Route/{route}/auth"


class Guard:
    """What one route asks of those who ask."""

    def __init__(
        self, route: str, config: AuthConfig, keys: Mapping[str, str], issuer: Issuer | None, broken: str = ""
    ) -> None:
        """``keys``: names to hashes. ``broken``: why nobody is admitted for now."""
        self.route, self.config, self.broken = route, config, broken or config.waiting
        self._keys = tuple((name, hashed) for name, hashed in keys.items())
        self.issuer = issuer
        mine = {config.header} if config.header else set()
        if config.jwt is not None:
            mine.add("authorization")
        #: Fields that end here.
        self.dropped: frozenset[str] = frozenset() if config.forward else frozenset(mine)

    @property
    def ways(self) -> list[str]:
        given = (("apiKeys", self.config.header), ("jwt", self.config.jwt), ("mtls", self.config.mtls))
        return [name for name, there in given if there]

    def admit(self, request: Request, now: float) -> Identity:
        """Raises :class:`Denied`."""
        config = self.config
        if self.broken:
            raise Denied(503, f"nobody can be let in: {self.broken}", [("retry-after", "5")])
        refused: list[Refusal] = []
        error = ""
        if config.header:
            try:
                return self._by_key(request.fields.get(config.header))
            except Refusal as e:
                refused.append(e)
        if self.issuer is not None:
            try:
                return self.issuer.admit(request.fields.get("authorization"), now)
            except Refusal as e:
                refused.append(e)
                error = e.error if request.fields.get("authorization") else ""
        if config.mtls:
            try:
                return self._by_certificate(request.peer)
            except Refusal as e:
                refused.append(e)
        worst = max(refused, key=lambda r: (r.status == 503, r.status))
        status = worst.status
        if status == 503:
            raise Denied(503, worst.why, [("retry-after", str(worst.later))])
        why = "; ".join(dict.fromkeys(r.why for r in refused)) if status == 401 else worst.why
        raise Denied(status, why, self._challenges(status, error))

    def _challenges(self, status: int, error: str) -> Headers:
        found: Headers = []
        if self.config.header and status == 401:
            found.append(("www-authenticate", f'ApiKey realm="{self.route}", header="{self.config.header}"'))
        if self.config.jwt is not None:
            challenge = f'Bearer realm="{self.route}"' + (f', error="{error}"' if error else "")
            if status == 403 and self.config.jwt.scopes:
                challenge += f', scope="{" ".join(self.config.jwt.scopes)}"'
            found.append(("www-authenticate", challenge))
        if not found and status == 401:
            found.append(("www-authenticate", f'Mutual realm="{self.route}"'))
        return found

    def _by_key(self, given: str | None) -> Identity:
        if not given:
            raise Refusal(f"a key is needed ({self.config.header})")
        mine = digest(given, self.route)
        found = ""
        for name, hashed in self._keys:  # all of them, whichever it is
            if hmac.compare_digest(hashed, mine):
                found = name
        if not found:
            raise Refusal("the key is not known")
        return Identity("apiKey", found)

    def _by_certificate(self, peer: Peer | None) -> Identity:
        if peer is None:
            raise Refusal("a client certificate is needed")
        config = self.config
        if not allows(peer, config.subjects, config.sans, config.fingerprints):
            raise Refusal("the client certificate is not one of those let in", error="insufficient_scope")
        named = [n for n in peer.sans if n in config.sans]
        return Identity("mtls", (named or [peer.subject or peer.fingerprint])[0])
