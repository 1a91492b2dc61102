"""The agent gets certificates from ACME authorities, keeps them sealed, and renews them at two thirds of their life.

One order at a time. The proofs that an authority looks for are given to the plane, whose plain doors answer them. What
is there is served until it ends, whatever becomes of its renewal; an authority that refuses is asked again after a
pause that grows and survives a restart: it counts how often it is asked. Messages are in ``acme.py``.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import http.client
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
from cryptography.hazmat.primitives import serialization

from edgeward.core import clock
from edgeward.core.backoff import backoff
from edgeward.core.certs import key_pem, new_key
from edgeward.core.errors import EdgewardError, Invalid, Refused, Unreachable
from edgeward.core.files import ensure_dir, read_json, write_json
from edgeward.gateway import acme
from edgeward.gateway.certificates import Wish
from edgeward.gateway.pems import Pair, read_pair

log = logging.getLogger("edgeward.acme")

#: Seconds for one request, for an authority to make up its mind, and between two looks at it.
REQUEST, PATIENCE, LOOK = 20.0, 180.0, 1.0
#: After a failure, doubled each time; and between two looks at what is due.
RETRY, RETRY_MOST, AGAIN = 60.0, 6 * 3600.0, 3600.0
_BYTES = 256 * 1024
_NONCES = 3


class Seals(Protocol):
    def seal(self, data: bytes, place: str) -> bytes: ...
    def unseal(self, sealed: bytes, place: str) -> bytes: ...


class Kept(msgspec.Struct, omit_defaults=True):
    """What lies on the disk of a wish. ``sealed``: chain and key. ``after``: not before that time (seconds since 1970)
    is it tried again; ``why``."""

    sealed: str = ""
    after: float = 0.0
    failed: int = 0
    why: str = ""


class Answer(msgspec.Struct, frozen=True):
    status: int
    body: bytes
    nonce: str = ""
    location: str = ""
    wait: float = 0.0


def _ask(context: ssl.SSLContext, method: str, url: str, body: bytes | None) -> Answer:
    """One request; blocking. Raises ``Unreachable``, ``Invalid``. Redirects are not followed."""
    parts = urlsplit(acme.secure(url))
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = http.client.HTTPSConnection(str(parts.hostname), parts.port or 443, timeout=REQUEST, context=context)
    headers = {"User-Agent": "edgeward", "Accept": "*/*"}
    if body is not None:
        headers["Content-Type"] = "application/jose+json"
    try:
        connection.request(method, target, body, headers)
        got = connection.getresponse()
        data = got.read(_BYTES + 1)
        if len(data) > _BYTES:
            raise Invalid(f"the authority's answer has more than {_BYTES} bytes")
        fields = got.headers
        return Answer(
            got.status, data, fields.get("Replay-Nonce", ""), fields.get("Location", ""),
            acme.retry_after(fields.get("Retry-After")),
        )  # fmt: skip
    except (OSError, http.client.HTTPException) as e:
        raise Unreachable(f"the authority {parts.netloc} does not answer: {e or type(e).__name__}") from None
    finally:
        connection.close()


class Client:
    """One account at one authority. ``kid``: the account's URL, once known."""

    def __init__(self, directory: str, ca: str, key: acme.Key) -> None:
        self._directory, self._key = directory, key
        self._context = ssl.create_default_context(cadata=ca or None)
        self._urls: acme.Directory | None = None
        self._nonce = ""
        self._kid = ""

    async def _get(self, method: str, url: str, body: bytes | None = None) -> Answer:
        got = await asyncio.to_thread(_ask, self._context, method, url, body)
        self._nonce = got.nonce or self._nonce
        return got

    async def _directory_of(self) -> acme.Directory:
        if self._urls is None:
            got = await self._get("GET", self._directory)
            if got.status != 200:
                raise Refused(f"the authority has no directory at {self._directory} ({got.status})")
            self._urls = acme.read(got.body, acme.Directory)
        return self._urls

    async def post(self, url: str, payload: object) -> Answer:
        """A signed request; with a stale nonce once more (section 6.5). Raises what the authority says."""
        urls = await self._directory_of()
        for left in reversed(range(_NONCES)):
            if not self._nonce:
                await self._get("HEAD", urls.newNonce)
            nonce, self._nonce = self._nonce, ""
            kid = "" if url == urls.newAccount else self._kid
            got = await self._get("POST", url, acme.signed(self._key, url, nonce, payload, kid))
            if 200 <= got.status < 300:
                return got
            kind, error = acme.refusal(got.status, got.body, got.wait)
            if kind != "badNonce" or not left:
                raise error
        raise Refused("the authority takes no nonce of its own")

    async def open(self, contact: Sequence[str], agreed: bool) -> None:
        """Makes the account, or finds it again."""
        urls = await self._directory_of()
        ask: dict[str, Any] = {"termsOfServiceAgreed": True} if agreed else {}
        got = await self.post(urls.newAccount, ask | ({"contact": list(contact)} if contact else {}))
        self._kid = acme.secure(got.location)

    async def order(self, hosts: Sequence[str], publish: Callable[[dict[str, str]], Awaitable[None]]) -> Pair:
        """A new key and its certificate. ``publish``: what is to be found under which path from now on."""
        urls = await self._directory_of()
        got = await self.post(urls.newOrder, {"identifiers": acme.identifiers(hosts)})
        where, order = acme.secure(got.location), acme.read(got.body, acme.Order)
        try:
            async with asyncio.timeout(PATIENCE):
                await self._prove(order, publish)
                return await self._finish(where, hosts)
        except TimeoutError:
            raise Unreachable(f"the authority has not decided within {PATIENCE:g} s") from None
        finally:
            await publish({})

    async def _prove(self, order: acme.Order, publish: Callable[[dict[str, str]], Awaitable[None]]) -> None:
        waiting: list[tuple[str, acme.Challenge]] = []
        for url in order.authorizations[:100]:
            found = acme.read((await self.post(url, None)).body, acme.Authorization)
            if found.status == "pending":
                waiting.append((url, found.http()))
            elif found.status != "valid":
                raise Refused(found.why())
        await publish({acme.PROOFS + c.token: acme.proof(c.token, self._key) for _, c in waiting})
        for _, challenge in waiting:
            await self.post(challenge.url, {})
        for url, _ in waiting:
            while (found := acme.read((await self._look(url)).body, acme.Authorization)).status == "pending":
                pass
            if found.status != "valid":
                raise Refused(found.why())

    async def _look(self, url: str) -> Answer:
        """How something stands; it takes the authority's time, or ours, before it may be asked again."""
        got = await self.post(url, None)
        doc = acme.read(got.body, dict[str, Any])
        if doc.get("status") in ("pending", "processing"):
            await asyncio.sleep(min(got.wait, 30.0) or LOOK)  # the protocol's own way: polling (section 7.5.1)
        return got

    async def _finish(self, where: str, hosts: Sequence[str]) -> Pair:
        order = acme.read((await self._look(where)).body, acme.Order)
        key = new_key()
        if order.status == "ready":
            order = acme.read((await self.post(order.finalize, {"csr": acme.csr(key, hosts)})).body, acme.Order)
        while order.status in ("pending", "processing"):
            order = acme.read((await self._look(where)).body, acme.Order)
        if order.status != "valid" or not order.certificate:
            raise Refused(f"the order is {order.status}: {order.error.text if order.error else 'no reason given'}")
        chain = (await self.post(order.certificate, None)).body
        pair = read_pair(chain.decode("latin-1"), key_pem(key).decode())
        if missing := pair.missing(hosts):
            raise Refused(f"the authority's certificate is not for {', '.join(missing)}")
        return pair


class Orders:
    """``publish``: to the plane; ``changed``: there is a certificate, or another reason why not; ``event``: ``(type,
    reason, message, namespace, name, kind)``."""

    def __init__(
        self,
        folder: Path,
        vault: Seals,
        *,
        publish: Callable[[dict[str, str]], Awaitable[None]],
        changed: Callable[[], None],
        event: Callable[[str, str, str, str, str, str], None],
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._folder, self._vault, self._now = folder, vault, now
        self._publish, self._changed, self._event = publish, changed, event
        self._wishes: dict[str, Wish] = {}
        self._kept: dict[str, Kept] = {}
        self._pairs: dict[str, Pair] = {}
        self._wake = asyncio.Event()

    # -- what Listeners ask for (``certificates.Orders``) --------------------------------------------------------------

    def wanted(self, wishes: Sequence[Wish]) -> None:
        self._wishes = {self._id(w): w for w in wishes}
        self._wake.set()

    def found(self, wish: Wish) -> Pair | str:
        at = self._id(wish)
        kept = self._of(at)
        pair = self._pairs.get(at)
        if pair is not None:
            return pair
        where = urlsplit(wish.directory).netloc
        return f"{kept.why}; it is tried again" if kept.why else f"is asked for at {where}"

    @staticmethod
    def _id(wish: Wish) -> str:
        return hashlib.sha256("\n".join((wish.directory, *sorted(wish.hosts))).encode()).hexdigest()[:32]

    def _of(self, at: str) -> Kept:
        if at not in self._kept:
            try:
                kept = msgspec.convert(read_json(self._folder / f"{at}.json", {}), Kept)
                if kept.sealed:
                    chain, key = msgspec.json.decode(self._unseal(kept.sealed, at), type=tuple[str, str])
                    self._pairs[at] = read_pair(chain, key)
            except (EdgewardError, msgspec.DecodeError, msgspec.ValidationError) as e:
                log.warning("a kept certificate is not readable and is asked for anew: %s", e)
                kept = Kept()
            self._kept[at] = kept
        return self._kept[at]

    def _unseal(self, text: str, at: str) -> bytes:
        try:
            return self._vault.unseal(base64.b64decode(text, validate=True), f"acme/{at}")
        except binascii.Error:
            raise Invalid("is damaged", resource=f"acme/{at}") from None

    def _seal(self, data: bytes, at: str) -> str:
        return base64.b64encode(self._vault.seal(data, f"acme/{at}")).decode()

    # -- getting them ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            wait = AGAIN
            for at, wish in list(self._wishes.items()):
                wait = min(wait, await self._look_after(at, wish))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    async def _look_after(self, at: str, wish: Wish) -> float:
        """Gets it if it is due; seconds until it is to be looked at again."""
        now, kept, pair = self._now(), self._of(at), self._pairs.get(at)
        if pair is not None and not pair.due(now):
            return AGAIN
        if now < kept.after <= now + RETRY_MOST * 4:  # else the clock was set back meanwhile
            return min(AGAIN, kept.after - now)
        namespace, _, name = wish.key.partition("/")
        try:
            made = await self._get(wish)
        except (EdgewardError, ssl.SSLError, OSError) as e:
            text = e.message if isinstance(e, EdgewardError) else str(e)
            pause = backoff(kept.failed + 1, RETRY, RETRY_MOST)
            if isinstance(e, acme.Limited):
                pause = max(pause, e.wait)
            self._keep(at, msgspec.structs.replace(kept, after=now + pause, failed=kept.failed + 1, why=text))
            log.warning("no certificate for %s: %s", ", ".join(wish.hosts), text)
            self._event("Warning", "CertificateFailed", f"{', '.join(wish.hosts)}: {text}", namespace, name, "Listener")
            self._changed()
            return min(AGAIN, pause)
        self._pairs[at] = made
        split = made.pem.index("-----BEGIN CERTIFICATE")
        self._keep(at, Kept(self._seal(msgspec.json.encode((made.pem[split:], made.pem[:split])), at)))
        text = f"{', '.join(wish.hosts)}: until {clock.timestamp(made.ends)}"
        self._event("Normal", "CertificateIssued", text, namespace, name, "Listener")
        self._changed()
        return AGAIN

    async def _get(self, wish: Wish) -> Pair:
        client = Client(wish.directory, wish.ca, self._account(wish.directory))
        await client.open(wish.contact, wish.agreed)
        return await client.order(wish.hosts, self._publish)

    def _account(self, directory: str) -> acme.Key:
        """This node's account at that authority: a key that is made once."""
        at = f"account-{hashlib.sha256(directory.encode()).hexdigest()[:32]}"
        file = self._folder / f"{at}.json"
        kept = read_json(file, {}).get("sealed")
        if kept:
            key = serialization.load_pem_private_key(self._unseal(str(kept), at), None)
            if isinstance(key, acme.Key):
                return key
        key = new_key()
        write_json(ensure_dir(self._folder) / file.name, {"sealed": self._seal(key_pem(key), at)})
        return key

    def _keep(self, at: str, kept: Kept) -> None:
        self._kept[at] = kept
        write_json(ensure_dir(self._folder) / f"{at}.json", msgspec.to_builtins(kept))
