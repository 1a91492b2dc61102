"""ID tokens: the genuine ones, and all the ways in which one is not."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from tests.hub.issuer import Key, b64

from edgeward.core.errors import Forbidden, Invalid, Unauthorized
from edgeward.hub.idtoken import Claims, Settings, check, role_of, verify

NOW = 1_800_000_000.0
SETTINGS = Settings("https://issuer.example", "edgeward", {"ops": "operator", "*": "viewer"})
RSA, EC, OTHER = Key("r"), Key("e", "ES256"), Key("r")
SMALL = Key("s", bits=1024)


def claims(**more: Any) -> dict[str, Any]:
    found = {"iss": SETTINGS.issuer, "aud": "edgeward", "iat": NOW, "exp": NOW + 300, "sub": "u", "groups": ["ops"]}
    return {k: v for k, v in (found | more).items() if v is not None}


KEYS = [RSA.jwk, EC.jwk, SMALL.jwk]


@pytest.mark.parametrize("key", [RSA, EC], ids=["RS256", "ES256"])
def test_a_genuine_token(key: Key) -> None:
    found = verify(key.sign(claims(email="eve@x.org")), KEYS, SETTINGS, NOW)
    assert found == Claims("u", "eve@x.org", ["ops"])
    assert verify(key.sign(claims(email="a\nb", groups="ops")), KEYS, SETTINGS, NOW).name == "u"
    assert verify(key.sign(claims(aud=["x", "edgeward"], azp="edgeward")), KEYS, SETTINGS, NOW)


def _none(c: dict[str, Any], alg: str) -> str:
    return f"{b64(json.dumps({'alg': alg, 'kid': 'r'}).encode())}.{b64(json.dumps(c).encode())}."


def _confused() -> str:
    """HS256 with the public key as the secret: the classic."""
    assert RSA.rsa is not None
    pem = RSA.rsa.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    start = b64(json.dumps({"alg": "HS256", "kid": "r"}).encode())
    head = f"{start}.{b64(json.dumps(claims()).encode())}"
    return f"{head}.{b64(hmac.digest(pem, head.encode(), hashlib.sha256))}"


def _swapped(one: str, two: str) -> str:
    head, _, mark = one.split(".")
    return f"{head}.{two.split('.')[1]}.{mark}"


GENUINE = RSA.sign(claims())
BAD = {
    "none": _none(claims(), "none"),
    "None": _none(claims(), "None"),
    "confused": _confused(),
    "other key": OTHER.sign(claims()),
    "unknown kid": Key("x").sign(claims()),
    "small key": SMALL.sign(claims()),
    "critical": RSA.sign(claims(), crit=["exp"]),
    "ec as rsa": EC.sign(claims(), alg="RS256"),
    "swapped body": _swapped(GENUINE, RSA.sign(claims(sub="admin"))),
    "cut": GENUINE[:-4],
    "issuer": RSA.sign(claims(iss="https://issuer.example.evil")),
    "audience": RSA.sign(claims(aud="other")),
    "no audience": RSA.sign(claims(aud=None)),
    "azp": RSA.sign(claims(aud=["edgeward", "x"])),
    "azp other": RSA.sign(claims(azp="x")),
    "expired": RSA.sign(claims(exp=NOW - 61)),
    "no exp": RSA.sign(claims(exp=None)),
    "exp text": RSA.sign(claims(exp="never")),
    "exp true": RSA.sign(claims(exp=True)),
    "future": RSA.sign(claims(iat=NOW + 61)),
    "not yet": RSA.sign(claims(nbf=NOW + 61)),
    "stale": RSA.sign(claims(iat=NOW - 661)),
    "nobody": RSA.sign(claims(sub=None)),
    "long": RSA.sign(claims(x="y" * 20_000)),
    "text": "no token",
    "dots": "..",
    "list": f"{b64(b'[]')}.{b64(b'[]')}.{b64(b'x')}",
    "jti junk": base64.b64encode(b"\xff" * 40).decode() + "." * 2,
}


@pytest.mark.parametrize("what", BAD)
def test_a_token_that_is_not(what: str) -> None:
    with pytest.raises(Unauthorized):
        verify(BAD[what], KEYS, SETTINGS, NOW)


def test_the_first_role_that_is_configured_counts() -> None:
    roles = {"boss": "admin", "ops": "operator"}
    strict = Settings("https://i", "c", roles)
    assert role_of(Claims("u", "u", ["ops", "boss"]), strict) == "admin"
    assert role_of(Claims("u", "u", ["ops"]), strict) == "operator"
    assert role_of(Claims("u", "u", []), SETTINGS) == "viewer"
    with pytest.raises(Forbidden):
        role_of(Claims("u", "u", ["*"[:0], "dev"]), strict)


def test_settings_that_make_no_sense_are_refused() -> None:
    check(SETTINGS)
    check(Settings("http://127.0.0.1:99", "c", {"*": "viewer"}))
    for issuer in ("http://issuer.example", "http://127.0.0.1.evil.example", "file:///etc", "x"):
        with pytest.raises(Invalid) as caught:
            check(Settings(issuer, "c", {"*": "viewer"}))
        assert caught.value.field == "$.oidc.issuer"
    with pytest.raises(Invalid):
        check(Settings("https://i", "c", {}))
