"""Short-lived numbers that a stranger must sign, so that nothing signed before can be sent again.

A nonce says when it was made and carries the hub's own seal, so nothing is kept for those that never come back; one
that came back is remembered until it has run out. Any process of a hub takes any process's nonces. Time is an argument.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from itertools import islice

from edgeward.core.errors import Refused

_SEEN_MOST = 200_000


class Nonces:
    def __init__(self, key: bytes, life: float) -> None:
        self._key = hashlib.sha256(b"edgeward nonce 1\0" + key).digest()
        self._life = life
        self._seen: dict[bytes, float] = {}

    def make(self, now: float) -> str:
        body = int(now * 1000).to_bytes(8, "big") + secrets.token_bytes(16)
        return base64.urlsafe_b64encode(body + self._seal(body)).decode()

    def _seal(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")[:16]

    def check(self, nonce: str, now: float) -> None:
        """Whether it is ours and fresh; it stays usable until :meth:`use`."""
        try:
            raw = base64.b64decode(nonce, b"-_", True)
        except (ValueError, binascii.Error):
            raw = b""
        body = raw[:24]
        # one way to write it: base64 ignores the last bits, so the same bytes have other spellings (RFC 4648, 3.5)
        if (
            len(raw) != 40
            or base64.urlsafe_b64encode(raw).decode() != nonce
            or not hmac.compare_digest(self._seal(body), raw[24:])
        ):
            raise Refused("the nonce is not this hub's", field="$.nonce", remedy="ask for one: GET /api/v1/nonce")
        age = now - int.from_bytes(body[:8], "big") / 1000
        if not -1 <= age <= self._life or body in self._seen:
            raise Refused("the nonce has run out or was used", field="$.nonce", remedy="ask for a new one")

    def use(self, nonce: str, now: float) -> None:
        """Takes it out of use. Called behind a good signature, so strangers cannot fill the memory."""
        self.check(nonce, now)
        body = base64.b64decode(nonce, b"-_", True)[:24]
        if len(self._seen) >= _SEEN_MOST:
            raise Refused("the hub is asked by too many at once", remedy="try again in two minutes")
        # insertion order is the order of time, but for what waited: the oldest go first
        for old, at in list(islice(self._seen.items(), 8)):
            if now - at > self._life + 1:
                del self._seen[old]
        self._seen[body] = now
