"""Signed tokens (RFC 7515) and the keys that they are checked with (RFC 7517): is this signature of this key? Pure.

A key says by itself which algorithms it may be used with: its type, its curve, its own ``alg``. What a token claims of
its algorithm is only compared with that (RFC 8725), so no token chooses how it is checked, ``none`` is no algorithm,
and a public key is never taken for a shared secret. What a token says, and to whom, is the caller's to judge.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from edgeward.core.b64url import unb64

MAX_TOKEN = 16 * 1024
ASYMMETRIC = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
SYMMETRIC = ("HS256", "HS384", "HS512")
_HASHES: dict[str, type[hashes.HashAlgorithm]] = {"256": hashes.SHA256, "384": hashes.SHA384, "512": hashes.SHA512}
_CURVES: dict[str, tuple[str, type[ec.EllipticCurve], int]] = {
    "P-256": ("ES256", ec.SECP256R1, 32),
    "P-384": ("ES384", ec.SECP384R1, 48),
}


def _object(text: str) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(unb64(text))
    except (msgspec.DecodeError, RecursionError):  # nested a thousandfold: nobody has signed it yet
        raise ValueError("is no JSON") from None
    if not isinstance(found, dict):
        raise ValueError("is no object")
    return found


class Token:
    """A token's parts, not yet believed. Raises ``ValueError`` for what is none."""

    __slots__ = ("claims", "header", "signature", "signed")

    def __init__(self, text: str) -> None:
        if len(text) > MAX_TOKEN or text.count(".") != 2 or not text.isascii():
            raise ValueError("is no signed token")
        head, body, mark = text.split(".")
        self.header = _object(head)
        self.claims = _object(body)
        self.signed, self.signature = f"{head}.{body}".encode(), unb64(mark)

    @property
    def alg(self) -> str:
        return str(self.header.get("alg", ""))

    @property
    def kid(self) -> str:
        return str(self.header.get("kid", ""))


class Jwk:
    """One key of a set. Raises ``ValueError`` for one that cannot be used for signatures, or must not be."""

    __slots__ = ("_key", "algorithms", "kid", "symmetric")

    def __init__(self, jwk: Mapping[str, Any]) -> None:
        kind = jwk.get("kty")
        self.kid = str(jwk.get("kid", ""))
        self.symmetric = kind == "oct"
        if jwk.get("use", "sig") != "sig":
            raise ValueError("is for another use")
        try:
            key, fit = self._public(jwk) if kind != "oct" else self._shared(jwk)
        except (KeyError, TypeError):
            raise ValueError("is not whole") from None
        self._key: Any = key
        named = jwk.get("alg")
        self.algorithms = frozenset(fit if named is None else [a for a in fit if a == named])
        if not self.algorithms:
            raise ValueError("is for an algorithm that it cannot be used with")

    @staticmethod
    def _public(jwk: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
        kind, curve = jwk.get("kty"), jwk.get("crv")
        if kind == "RSA":
            key = rsa.RSAPublicNumbers(_number(jwk["e"]), _number(jwk["n"])).public_key()
            if not 2048 <= key.key_size <= 8192:
                raise ValueError("has fewer than 2048 bits, or more than 8192")
            return key, tuple(a for a in ASYMMETRIC if a[:2] in ("RS", "PS"))
        if kind == "EC" and curve in _CURVES:
            alg, group, _ = _CURVES[curve]
            return ec.EllipticCurvePublicNumbers(_number(jwk["x"]), _number(jwk["y"]), group()).public_key(), (alg,)
        if kind == "OKP" and curve == "Ed25519":
            return ed25519.Ed25519PublicKey.from_public_bytes(unb64(str(jwk["x"]))), ("EdDSA",)
        raise ValueError("is of a kind that is not taken")

    @staticmethod
    def _shared(jwk: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
        key = unb64(str(jwk["k"]))
        fit = tuple(a for a in SYMMETRIC if len(key) * 8 >= int(a[2:]))  # RFC 7518, section 3.2
        if not fit:
            raise ValueError("has fewer than 256 bits")
        return key, fit

    def signed(self, token: Token) -> bool:
        """Whether this key made the token's signature."""
        alg = token.alg
        if alg not in self.algorithms:
            return False
        key = self._key
        data, mark = token.signed, token.signature
        try:
            if alg[:2] == "HS":
                return hmac.compare_digest(hmac.digest(key, data, getattr(hashlib, f"sha{alg[2:]}")), mark)
            if alg == "EdDSA":
                key.verify(mark, data)
            elif alg[:2] == "ES":
                size = 32 if alg == "ES256" else 48
                if len(mark) != 2 * size:
                    return False
                pair = int.from_bytes(mark[:size], "big"), int.from_bytes(mark[size:], "big")
                key.verify(encode_dss_signature(*pair), data, ec.ECDSA(_HASHES[alg[2:]]()))
            else:
                made = _HASHES[alg[2:]]()
                pad: Any = padding.PKCS1v15()
                if alg[:2] == "PS":
                    pad = padding.PSS(padding.MGF1(made), made.digest_size)
                key.verify(mark, data, pad, made)
        except (InvalidSignature, ValueError):
            return False
        return True


def _number(text: Any) -> int:
    return int.from_bytes(unb64(str(text)), "big")


def key_set(document: object, *, most: int = 64) -> list[Jwk]:
    """The keys of a JWK set that can be used; those that cannot be are left out, as RFC 7517 section 5 says.

    Raises ``ValueError`` when it is no set, or none of its keys can be used.
    """
    keys = document.get("keys") if isinstance(document, Mapping) else None
    if not isinstance(keys, list):
        raise ValueError('is no JWK set: expected {"keys": [...]}')
    found: list[Jwk] = []
    why = "is empty"
    for jwk in keys[:most]:
        try:
            found.append(Jwk(jwk if isinstance(jwk, Mapping) else {}))
        except ValueError as e:
            why = f"has no key that can be used: the last one {e}"
    if not found:
        raise ValueError(why)
    return found
