"""NATS's key and token formats, on ``cryptography`` alone: nkeys in, signatures and JWTs out.

An nkey is an ed25519 key written as base32 of prefix, key and CRC-16 (``O...`` operator, ``A...`` account, ``U...``
user; seeds ``SO...``, ``SA...``, ``SU...``). A NATS JWT v2 is a JWT whose algorithm is ``ed25519-nkey``. Nothing here
touches a file, says whom to trust or shows a seed; who holds which key is :mod:`edgeward.core.identity`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edgeward.core.b64url import b64, unb64
from edgeward.core.errors import Invalid

_PREFIX = {"operator": 14 << 3, "account": 0, "user": 20 << 3, "server": 13 << 3}
_SEED = 18 << 3


def _b32(raw: bytes) -> str:
    return base64.b32encode(raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")).decode().rstrip("=")


def _unb32(text: str) -> bytes:
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError) as exc:
        raise Invalid("not a NATS key: bad base32") from exc
    if len(raw) < 3 or binascii.crc_hqx(raw[:-2], 0) != int.from_bytes(raw[-2:], "little"):
        raise Invalid("not a NATS key: bad checksum")
    return raw[:-2]


def public_raw(public: str, kind: str) -> bytes:
    """The 32 bytes of a public nkey of that kind (``user``, ``account``, ...). Raises ``Invalid``."""
    raw = _unb32(public)
    if len(raw) != 33 or raw[0] != _PREFIX[kind]:
        raise Invalid(f"not a public NATS key of a {kind}", field="$.publicKey")
    return raw[1:]


def verify(public: str, data: bytes, signature: bytes, kind: str = "user") -> bool:
    """Whether the holder of that public nkey signed ``data``. Raises ``Invalid`` when it is no such key."""
    try:
        Ed25519PublicKey.from_public_bytes(public_raw(public, kind)).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


class KeyPair:
    """An nkey: an ed25519 key with its NATS names. Its ``repr`` shows the public half only."""

    def __init__(self, kind: str, raw: bytes) -> None:
        self.kind = kind
        self._raw = raw
        self._key = Ed25519PrivateKey.from_private_bytes(raw)
        self.public = _b32(bytes([_PREFIX[kind]]) + self._key.public_key().public_bytes_raw())

    @classmethod
    def create(cls, kind: str) -> KeyPair:
        return cls(kind, secrets.token_bytes(32))

    @classmethod
    def from_seed(cls, seed: str) -> KeyPair:
        raw = _unb32(seed.strip())
        if len(raw) != 34 or raw[0] & 0xF8 != _SEED:
            raise Invalid("not a NATS seed")
        prefix = (raw[0] & 7) << 5 | raw[1] >> 3
        kind = next((k for k, p in _PREFIX.items() if p == prefix), None)
        if kind is None:
            raise Invalid("a NATS seed of an unknown kind")
        return cls(kind, raw[2:])

    @property
    def seed(self) -> str:
        prefix = _PREFIX[self.kind]
        return _b32(bytes([_SEED | prefix >> 5, (prefix & 31) << 3]) + self._raw)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"KeyPair({self.public})"


def mint(
    issuer: KeyPair, subject: str, name: str, nats: Mapping[str, Any], *, expires: int = 0, issued: int = 0
) -> str:
    """A NATS JWT v2. Times are in seconds since 1970; ``expires`` 0 is never, ``issued`` 0 is now."""
    claims: dict[str, Any] = {"iat": issued or int(time.time()), "iss": issuer.public, "name": name, "sub": subject}
    if expires:
        claims["exp"] = expires
    claims["nats"] = {**nats, "version": 2}
    claims["jti"] = base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).decode().rstrip("=")
    head = b64(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
    signed = f"{head}.{b64(json.dumps(claims).encode())}"
    return f"{signed}.{b64(issuer.sign(signed.encode()))}"


def claims_of(jwt: str) -> dict[str, Any]:
    """The claims of a NATS JWT whose signature by its stated issuer holds. Whom to trust is the caller's business."""
    try:
        head, body, sig = jwt.strip().split(".")
        claims: dict[str, Any] = json.loads(unb64(body))
        issuer = _unb32(claims["iss"])[1:]
        Ed25519PublicKey.from_public_bytes(issuer).verify(unb64(sig), f"{head}.{body}".encode())
    except (ValueError, KeyError, TypeError, InvalidSignature) as exc:
        raise Invalid("not a valid NATS JWT", remedy="enrol the node again") from exc
    return claims


def creds_text(jwt: str, key: KeyPair) -> str:
    """The content of a ``.creds`` file (secret: it holds the seed)."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{key.seed}\n------END USER NKEY SEED------\n"
    )


@dataclass(frozen=True)
class NatsUser:
    """What a NATS client of the hub needs: the JWT and the key that proves it is ours."""

    jwt: str
    key: KeyPair
