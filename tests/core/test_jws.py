"""Signatures and the keys that they are checked with: every algorithm, and every way to choose another one."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from edgeward.core.jws import ASYMMETRIC, SYMMETRIC, Jwk, Token, key_set

RSA = rsa.generate_private_key(65537, 2048)
P256, P384 = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
ED = ed25519.Ed25519PrivateKey.generate()
SHARED = b"s" * 64


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _n(number: int, size: int = 0) -> str:
    return b64(number.to_bytes(size or (number.bit_length() + 7) // 8, "big"))


def _point(key: ec.EllipticCurvePrivateKey, curve: str, size: int) -> dict[str, Any]:
    p = key.public_key().public_numbers()
    return {"kty": "EC", "crv": curve, "x": _n(p.x, size), "y": _n(p.y, size)}


_PUBLIC = RSA.public_key().public_numbers()
JWKS: dict[str, dict[str, Any]] = {
    "R": {"kty": "RSA", "n": _n(_PUBLIC.n), "e": _n(_PUBLIC.e)},
    "ES256": _point(P256, "P-256", 32),
    "ES384": _point(P384, "P-384", 48),
    "EdDSA": {"kty": "OKP", "crv": "Ed25519", "x": b64(ED.public_key().public_bytes_raw())},
    "H": {"kty": "oct", "k": b64(SHARED)},
}


def jwk_for(alg: str) -> dict[str, Any]:
    return JWKS["R" if alg[:2] in ("RS", "PS") else "H" if alg[:2] == "HS" else alg]


def sign(alg: str, claims: dict[str, Any], secret: bytes = SHARED, **header: Any) -> str:
    head = b64(json.dumps({"alg": alg, **header}).encode())
    data = f"{head}.{b64(json.dumps(claims).encode())}".encode()
    made = {"256": hashes.SHA256, "384": hashes.SHA384, "512": hashes.SHA512}.get(alg[2:], hashes.SHA256)()
    if alg[:2] == "HS":
        mark = hmac.digest(secret, data, getattr(hashlib, f"sha{alg[2:]}"))
    elif alg[:2] == "RS":
        mark = RSA.sign(data, padding.PKCS1v15(), made)
    elif alg[:2] == "PS":
        mark = RSA.sign(data, padding.PSS(padding.MGF1(made), made.digest_size), made)
    elif alg[:2] == "ES":
        key, size = (P256, 32) if alg == "ES256" else (P384, 48)
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(made)))
        mark = r.to_bytes(size, "big") + s.to_bytes(size, "big")
    else:
        mark = ED.sign(data)
    return f"{data.decode()}.{b64(mark)}"


@pytest.mark.parametrize("alg", [*ASYMMETRIC, *SYMMETRIC])
def test_what_a_key_signed_is_its_own_and_nothing_else_is(alg: str) -> None:
    token = Token(sign(alg, {"a": 1}, kid="k"))
    assert (token.alg, token.kid, token.claims) == (alg, "k", {"a": 1})
    assert Jwk(jwk_for(alg)).signed(token)
    assert Jwk({**jwk_for(alg), "alg": alg}).signed(token)
    for jwk in JWKS.values():
        if jwk is not jwk_for(alg):
            assert not Jwk(jwk).signed(token)
    head, body, mark = sign(alg, {"a": 1}).split(".")
    assert not Jwk(jwk_for(alg)).signed(Token(f"{head}.{b64(b'{}')}.{mark}"))
    assert not Jwk(jwk_for(alg)).signed(Token(f"{head}.{body}."))


def test_a_token_does_not_choose_how_it_is_checked() -> None:
    pem = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    key = Jwk(JWKS["R"])
    assert not key.signed(Token(sign("HS256", {}, secret=pem)))
    data = ".".join(sign("RS256", {}).split(".")[1:])
    for alg in ("none", "None", "", "RS", "HS256", "EdDSA", "ES256", "RS1024"):
        assert not key.signed(Token(f"{b64(json.dumps({'alg': alg}).encode())}.{data}"))
    assert not Jwk({**JWKS["R"], "alg": "RS512"}).signed(Token(sign("RS256", {})))


@pytest.mark.parametrize(
    "jwk",
    [
        {}, {"kty": "RSA"}, {"kty": "EC", "crv": "P-521"}, {"kty": "oct", "k": b64(b"short")}, {"kty": "OKP", "x": "!"},
        {**JWKS["R"], "use": "enc"}, {**JWKS["R"], "alg": "HS256"}, {**JWKS["H"], "alg": "RS256"},
        {**JWKS["ES256"], "x": b64(b"\1" * 32)}, {"kty": "RSA", "n": _n(3 << 1000), "e": "AQAB"},
    ],
    ids=range(10),
)  # fmt: skip
def test_keys_that_are_none(jwk: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Jwk(jwk)


def test_a_set_is_what_can_be_used_of_it() -> None:
    assert len(key_set({"keys": [{"kty": "new"}, JWKS["R"], 7, JWKS["H"]]})) == 2
    for bad in ({}, [], {"keys": {}}, {"keys": []}, {"keys": [{"kty": "new"}]}, None):
        with pytest.raises(ValueError, match=r"."):
            key_set(bad)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.b",
        "a.b.c.d",
        "..",
        "e30.W10.",
        "é.e30.",
        "e30.e30.!",
        "A" * 20_000 + ".e30.",
        pytest.param(f"{b64(b'[' * 9000)}.e30.", id="nested"),
        pytest.param(f"e30.{b64(b'[' * 9000)}.", id="nested claims"),
    ],
)
def test_tokens_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Token(text)
