"""Signing in with an OpenID Connect issuer: a person's ID token comes in, an AccessToken of the hub goes out.

The command line gets the ID token by the device flow (RFC 8628) from the issuer itself; here its keys are fetched, the
token is checked (``idtoken.py``), and an AccessToken is made that lasts some hours. The issuer is asked for nothing
else, and a hub that cannot reach it goes on with the tokens that it has given.

An ID token is good once, whichever process of the hub it is brought to and however often that starts anew: the
AccessToken is named after it, and the store makes one of a name; one that was ended is remembered there, too.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeward.core import clock
from edgeward.core.access import opened, principal, signed_in
from edgeward.core.body import parse_body
from edgeward.core.describe import described
from edgeward.core.errors import Conflict, EdgewardError, Invalid, NotFound, Refused, TooMany, Unauthorized, Unreachable
from edgeward.core.fetch import WAIT, fetch
from edgeward.core.registry import kinds
from edgeward.core.resource import CLUSTER, Key, Metadata, Resource
from edgeward.core.resources import Resources
from edgeward.core.roles import AccessTokenSpec
from edgeward.core.streaming import json, read_body
from edgeward.core.throttle import Throttle, source_of
from edgeward.core.tokens import expiry, make_token, rules_of
from edgeward.hub.idtoken import Settings, check, key_id, role_of, verify

#: Seconds that keys are used for, and between two looks for a key that is not among them.
_KEEP, _AGAIN = 3600.0, 30.0
#: Sign-ins of one person that are good at a time.
_AT_ONCE = 8
LABEL = "signed-in-as"


class LoginAsk(msgspec.Struct):
    idToken: str


def mark(token: str) -> str:
    """What an ID token is known by: its signed part. A signature has several spellings (RFC 4648, 3.5; ECDSA's -s)."""
    return hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest()[:24]


def _brought_before() -> Unauthorized:
    return Unauthorized("the ID token was brought before", remedy="sign in again: edgeward login")


class SignIn:
    """The hub's side; without ``settings`` it says that there is none."""

    def __init__(self, resources: Resources, settings: Settings | None) -> None:
        self._resources = resources
        self._settings = settings
        self._document: dict[str, Any] = {}
        self._keys: list[dict[str, Any]] = []
        self._fetched = -_KEEP
        self._lock = asyncio.Lock()
        self._bad = Throttle(burst=10, rate=0.2)

    @staticmethod
    def settings(config: Any) -> Settings | None:
        """``oidc`` of hub.json. Raises ``Invalid``."""
        if not config:
            return None
        try:
            return check(msgspec.convert(config, Settings))
        except msgspec.ValidationError as e:
            raise Invalid(str(e), file="hub.json", field="$.oidc") from None

    def routes(self) -> list[Route]:
        return [
            Route("/api/v1/oidc", opened(self.about), methods=["GET"]),
            Route("/api/v1/oidc/login", opened(self.login), methods=["POST"]),
            Route("/api/v1/logout", signed_in(self.logout), methods=["POST"]),
        ]

    def _on(self) -> Settings:
        if self._settings is None:
            raise NotFound(
                "this hub knows no issuer to sign in with", remedy="use a token: edgeward token create --role ROLE"
            )
        return self._settings

    @described("Where and as which client people sign in")
    async def about(self, _: Request) -> Response:
        """Where and as which client to sign in."""
        settings = self._on()
        await self._look()
        ca = await asyncio.to_thread(Path(settings.ca).read_text) if settings.ca else ""
        return json(
            {
                "issuer": settings.issuer,
                "clientId": settings.clientId,
                "scopes": settings.scopes,
                "device": self._document.get("device_authorization_endpoint", ""),
                "token": self._document.get("token_endpoint", ""),
                "ca": ca,
            }
        )

    @described("An ID token of the issuer for an access token of the hub", body=LoginAsk, code=201)
    async def login(self, request: Request) -> Response:
        """``{idToken}`` -> an AccessToken, as ``issue/accesstoken`` gives it."""
        settings = self._on()
        doc = parse_body(await read_body(request, 32 * 1024), request.headers.get("content-type", "application/json"))
        token = doc.get("idToken") if isinstance(doc, dict) else None
        if not isinstance(token, str):
            raise Invalid("is required", field="$.idToken", remedy="use: edgeward login")
        source = request.client.host if request.client else "local"
        try:
            claims = verify(token, await self._keys_for(token), settings, clock.now())
        except Unauthorized:
            if wait := self._bad.take(source_of(source), clock.monotonic()):
                raise TooMany("too many wrong sign-ins from your address", after=wait, remedy="wait") from None
            raise
        role = role_of(claims, settings)
        if rules_of(self._resources.store, role) is None:
            raise Invalid(f"there is no Role {role!r}", field="oidc.roles", remedy="create it, or correct hub.json")
        who = hashlib.sha256(f"{settings.issuer}\n{claims.subject}".encode()).hexdigest()[:16]
        name = f"login-{who[:8]}-{mark(token)}"
        key = Key("AccessToken", CLUSTER, name)
        if self._resources.store.find(key) is not None or self._resources.store.deleted(key)[0]:
            raise _brought_before()
        await self._make_room(who)
        text, digest = make_token(name)
        spec = AccessTokenSpec(role, digest, expiry(settings.ttl), ["*"], f"signed in: {claims.name}")
        made = Resource(kind="AccessToken", metadata=Metadata(name=name, labels={LABEL: who}), spec=spec)
        kinds.get("AccessToken").check(made)
        try:
            await self._resources.create(made, actor=f"oidc:{claims.name}", source=source)
        except Conflict:  # to another process, or at the same moment
            raise _brought_before() from None
        return json({"token": text, "name": name, "role": role, "expires": spec.expires, "who": claims.name}, 201)

    @described("End the access token that this call is made with")
    async def logout(self, request: Request) -> Response:
        """Ends the token that this call was made with."""
        who = principal(request)
        key = Key("AccessToken", CLUSTER, who.name)
        if self._resources.store.find(key) is None:
            raise Refused("the hub's own token cannot be ended so", remedy="it is the way back in")
        source = request.client.host if request.client else "local"
        await self._resources.delete(key, actor=who.name, source=source)
        return json({"name": who.name})

    async def _make_room(self, who: str) -> None:
        """A person's expired sign-ins go, and the oldest when there are too many."""
        mine = [t for t in self._resources.store.items("AccessToken") if t.metadata.labels.get(LABEL) == who]
        mine.sort(key=lambda t: str(t.metadata.creationTimestamp))
        ended = [t for t in mine if clock.parse_timestamp(t.spec.expires) <= clock.now()]
        good = [t for t in mine if t not in ended]
        for old in [*ended, *good[: max(0, len(good) - _AT_ONCE + 1)]]:
            await self._resources.delete(old.key, actor="system")

    # -- the issuer ------------------------------------------------------------------------------------------------

    async def _keys_for(self, token: str) -> list[dict[str, Any]]:
        kid = key_id(token)
        age = clock.monotonic() - self._fetched
        known = any(k.get("kid") == kid for k in self._keys)
        if age > _KEEP or (not known and age > _AGAIN):
            await self._look(fresh=True)
        return self._keys

    async def _look(self, *, fresh: bool = False) -> None:
        """The issuer's description and keys, fetched where they are old."""
        async with self._lock:
            age = clock.monotonic() - self._fetched
            if age <= (_AGAIN if fresh else _KEEP) and self._document:
                return
            settings = self._on()
            document = await self._fetch(settings.issuer.rstrip("/") + "/.well-known/openid-configuration")
            if document.get("issuer") != settings.issuer:
                raise EdgewardError(
                    f"the issuer calls itself {str(document.get('issuer'))[:200]!r}",
                    remedy="write exactly that as oidc.issuer in hub.json, if it is right",
                )
            keys = await self._fetch(str(document.get("jwks_uri", "")))
            self._document = document
            self._keys = [k for k in keys.get("keys", []) if isinstance(k, dict)][:64]
            self._fetched = clock.monotonic()

    async def _fetch(self, url: str) -> dict[str, Any]:
        settings = self._on()
        try:
            async with asyncio.timeout(WAIT + 5):
                data = await asyncio.to_thread(fetch, url, None, settings.ca)
            found = msgspec.json.decode(data)
        except (OSError, TimeoutError, ValueError, msgspec.DecodeError) as e:
            raise Unreachable(f"the issuer cannot be asked at {url[:200]}: {e or type(e).__name__}") from None
        if not isinstance(found, dict):
            raise Unreachable(f"the issuer's answer at {url[:200]} is no object")
        return found
