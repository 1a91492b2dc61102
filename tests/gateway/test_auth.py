"""Who is let in: keys, tokens, certificates, and what each refusal says. Pure."""

from __future__ import annotations

from typing import Any

import pytest
from tests.core.test_jws import JWKS, jwk_for, sign

from edgeward.core.errors import Invalid
from edgeward.core.jws import Jwk
from edgeward.core.resource import Resource, decode
from edgeward.core.vault import Vault
from edgeward.gateway import rules
from edgeward.gateway.auth import AuthConfig, Denied, Guard, JwtConfig, digest
from edgeward.gateway.auth_edge import Auths, place
from edgeward.gateway.edge import section
from edgeward.gateway.http1 import parse_request
from edgeward.gateway.jwt import Issuer
from edgeward.gateway.peer import Peer
from edgeward.hub.kinds import load

load()

NOW = 1_800_000_000.0
KEY = "k" * 20


def asked(*headers: str) -> Any:
    return parse_request(("GET / HTTP/1.1\r\nHost: h\r\n" + "".join(f"{h}\r\n" for h in headers) + "\r\n").encode())


def by_key(**more: Any) -> Guard:
    keys = {"alice": digest(KEY, "d/r"), "bob": digest("b" * 20, "d/r")}
    return Guard("d/r", AuthConfig(header="x-api-key", **more), keys, None)


JWT = JwtConfig("https://issuer", ("edge", "other"))


def by_token(config: JwtConfig = JWT, keys: Any = None, **more: Any) -> Guard:
    known = [Jwk({**JWKS["R"], "kid": "r"}), Jwk({**JWKS["ES256"], "kid": "e"})]
    issuer = Issuer(config, keys or (lambda unknown: known))
    return Guard("d/r", AuthConfig(jwt=config, **more), {}, issuer)


def claims(**more: Any) -> dict[str, Any]:
    found = {"iss": "https://issuer", "aud": "edge", "exp": NOW + 60, "sub": "u", **more}
    return {k: v for k, v in found.items() if v is not None}


def bearer(alg: str = "RS256", kid: str = "r", **more: Any) -> Any:
    return asked("Authorization: Bearer " + sign(alg, claims(**more), kid=kid))


def denied(guard: Guard, request: Any, now: float = NOW) -> Denied:
    with pytest.raises(Denied) as caught:
        guard.admit(request, now)
    return caught.value


def test_keys() -> None:
    guard = by_key()
    identity = guard.admit(asked(f"X-Api-Key: {KEY}"), NOW)
    assert identity.fields == [("x-edgeward-identity", "alice"), ("x-edgeward-auth", "apiKey")]
    assert guard.admit(asked("x-api-key: " + "b" * 20), NOW).name == "bob"
    for wrong in (
        [],
        ["X-Api-Key: x"],
        [f"X-Api-Key: {KEY}", f"X-Api-Key: {KEY}"],
        [f"X-Api-Key: {digest(KEY, 'd/r')}"],
    ):
        got = denied(guard, asked(*wrong))
        assert got.status == 401
        assert got.headers == [("www-authenticate", 'ApiKey realm="d/r", header="x-api-key"')]
        assert KEY not in got.why
    assert digest(KEY, "d/r") != digest(KEY, "d/other")


def test_a_genuine_token() -> None:
    guard = by_token()
    for alg, kid in (("RS256", "r"), ("PS256", "r"), ("ES256", "e")):
        assert guard.admit(bearer(alg, kid), NOW).name == "u"
    assert guard.admit(bearer(kid=""), NOW).how == "jwt"
    assert guard.admit(bearer(aud=["x", "other"]), NOW)
    assert guard.admit(bearer(exp=NOW - 59, nbf=NOW + 59), NOW)  # clocks differ
    got = guard.admit(bearer(scope="read write", sub="é\n/"), NOW)
    assert ("x-edgeward-identity", "%C3%A9%0A/") in got.fields
    assert ("x-edgeward-scope", "read write") in got.fields


def _bad() -> dict[str, Any]:
    whole = bearer().fields["authorization"].removeprefix("Bearer ")
    head, body, mark = whole.split(".")
    other = sign("RS256", claims(sub="admin")).split(".")[1]
    return {
        "none at all": asked(),
        "basic": asked("Authorization: Basic dTpw"),
        "no token": asked("Authorization: Bearer"),
        "junk": asked("Authorization: Bearer junk"),
        "unsigned": asked(f"Authorization: Bearer {head}.{body}."),
        "swapped": asked(f"Authorization: Bearer {head}.{other}.{mark}"),
        "twice": asked(f"Authorization: Bearer {whole}", f"Authorization: Bearer {whole}"),
        "unknown kid": bearer(kid="x"),
        "shared": bearer("HS256"),
        "issuer": bearer(iss="https://issuer.evil"),
        "audience": bearer(aud="edge2"),
        "no audience": bearer(aud=None),
        "audience object": bearer(aud={"edge": 1}),
        "expired": bearer(exp=NOW - 61),
        "no exp": bearer(exp=None),
        "exp text": bearer(exp="9999999999"),
        "exp true": bearer(exp=True),
        "exp huge": bearer(exp=1e300),
        "not yet": bearer(nbf=NOW + 61),
        "of the future": bearer(iat=NOW + 61),
        "nobody": bearer(sub=None),
        "crit": asked("Authorization: Bearer " + sign("RS256", claims(), kid="r", crit=["x"])),
    }


BAD = _bad()


@pytest.mark.parametrize("what", BAD)
def test_tokens_that_are_not(what: str) -> None:
    got = denied(by_token(), BAD[what])
    assert got.status == 401
    (challenge,) = got.headers
    error = "" if what == "none at all" else ', error="invalid_token"'
    assert challenge == ("www-authenticate", f'Bearer realm="d/r"{error}')


def test_scopes_claims_and_algorithms() -> None:
    wanted = (("role", ("admin", "7")), ("ok", ("true",)))
    strict = JwtConfig("https://issuer", ("edge",), scopes=("read",), claims=wanted, algorithms=("ES256",))
    guard = by_token(strict)
    good = {"alg": "ES256", "kid": "e", "scope": "write read", "role": ["x", 7], "ok": True}
    assert guard.admit(bearer(**good), NOW)
    assert guard.admit(bearer(**{**good, "scope": None, "scp": ["read"]}), NOW)
    for more in ({"scope": "reads"}, {"role": "user"}, {"role": None}, {"ok": 1}, {"ok": "True"}):
        got = denied(guard, bearer(**{**good, **more}))
        assert got.status == 403
        assert got.headers == [("www-authenticate", 'Bearer realm="d/r", error="insufficient_scope", scope="read"')]
    assert denied(guard, bearer(**{**good, "alg": "RS256", "kid": "r"})).status == 401


def test_a_remembered_token_ends_all_the_same_and_with_its_key() -> None:
    current = [[Jwk({**JWKS["R"], "kid": "r"})]]
    guard = by_token(keys=lambda unknown: current[0])
    token = bearer(exp=NOW + 10)
    assert guard.admit(token, NOW)
    assert guard.admit(token, NOW + 69)
    assert "expired" in denied(guard, token, now=NOW + 71).why
    assert guard.admit(token, NOW)
    current[0] = [Jwk({**JWKS["R"], "kid": "new"})]
    assert denied(guard, token).status == 401


def test_keys_that_are_on_their_way() -> None:
    asked_for: list[bool] = []

    def keys(unknown: bool) -> Any:
        asked_for.append(unknown)
        return None

    got = denied(by_token(keys=keys), bearer())
    assert (got.status, got.headers) == (503, [("retry-after", "2")])
    assert asked_for[-1] is True


def shown(*headers: str) -> Any:
    request = asked(*headers)
    request.peer = Peer("CN=x", ("dns:a.example", "uri:spiffe://b"), "ab" * 32)
    return request


def certified(**more: Any) -> Guard:
    return Guard("d/r", AuthConfig(mtls=True, **more), {}, None)


def test_certificates() -> None:
    assert certified().admit(shown(), NOW).name == "CN=x"
    got = denied(certified(), asked())
    assert (got.status, got.headers[0][0]) == (401, "www-authenticate")
    assert certified(sans=("uri:spiffe://b",)).admit(shown(), NOW).name == "uri:spiffe://b"
    assert certified(fingerprints=("ab" * 32,)).admit(shown(), NOW)
    assert certified(subjects=("CN=x",)).admit(shown(), NOW)
    assert denied(certified(sans=("dns:b",), subjects=("CN=y",)), shown()).status == 403


def test_one_of_several_ways_is_enough() -> None:
    config = AuthConfig(header="x-api-key", jwt=JWT, mtls=True)
    guard = Guard("d/r", config, {"alice": digest(KEY, "d/r")}, by_token().issuer)
    assert guard.ways == ["apiKeys", "jwt", "mtls"]
    assert guard.admit(asked(f"x-api-key: {KEY}", "Authorization: Bearer junk"), NOW).how == "apiKey"
    assert guard.admit(bearer(), NOW).how == "jwt"
    assert guard.admit(shown(), NOW).how == "mtls"
    got = denied(guard, asked())
    assert [v.partition(" ")[0] for _, v in got.headers] == ["ApiKey", "Bearer"]
    assert guard.dropped == {"x-api-key", "authorization"}
    assert by_key(forward=True).dropped == frozenset()
    assert denied(Guard("d/r", config, {}, None, broken="the keys are not here"), asked()).status == 503


# -- what is declared -------------------------------------------------------------------------------------------------


def route(**auth: Any) -> Resource:
    meta = {"name": "r", "namespace": "shop"}
    spec = {"to": {"upstream": "http://h"}, "auth": auth}
    return decode({"apiVersion": "edgeward/v1", "kind": "Route", "metadata": meta, "spec": spec})


KEYS = {"secret": "keys"}
TOKENS = {"issuer": "https://i", "audience": ["a"], "jwks": {"keys": [jwk_for("RS256")]}}


@pytest.mark.parametrize(
    ("auth", "field"),
    [
        ({}, "auth"),
        ({"apiKeys": {**KEYS, "header": "cookie"}}, "auth.apiKeys.header"),
        ({"apiKeys": {**KEYS, "header": "X-Edgeward-Identity"}}, "auth.apiKeys.header"),
        ({"apiKeys": {"secret": "A b"}}, "auth.apiKeys.secret"),
        ({"apiKeys": {**KEYS, "header": "authorization"}, "jwt": TOKENS}, "auth.apiKeys.header"),
        ({"jwt": {**TOKENS, "jwks": {}}}, "auth.jwt.jwks"),
        ({"jwt": {**TOKENS, "jwks": {"config": "c", "secret": "s"}}}, "auth.jwt.jwks"),
        ({"jwt": {**TOKENS, "jwks": {"url": "http://issuer/keys"}}}, "auth.jwt.jwks.url"),
        ({"jwt": {**TOKENS, "jwks": {"keys": [jwk_for("HS256")]}}}, "auth.jwt.jwks.keys[0]"),
        ({"jwt": {**TOKENS, "algorithms": ["HS256"]}}, "auth.jwt.algorithms"),
        ({"jwt": {**TOKENS, "algorithms": ["none"]}}, "auth.jwt.algorithms[0]"),
        ({"jwt": {**TOKENS, "audience": []}}, "auth.jwt.audience"),
        ({"jwt": {**TOKENS, "claims": {"aud": "x"}}}, "auth.jwt.claims.aud"),
        ({"jwt": {**TOKENS, "scopes": ["a b"]}}, "auth.jwt.scopes[0]"),
        ({"jwt": {**TOKENS, "skew": "1h"}}, "auth.jwt.skew"),
        ({"mtls": {"sans": ["till-7"]}}, "auth.mtls.sans[0]"),
        ({"mtls": {"fingerprints": ["xx"]}}, "auth.mtls.fingerprints[0]"),
    ],
    ids=range(17),
)
def test_what_cannot_be_is_refused(auth: dict[str, Any], field: str) -> None:
    from edgeward.core.registry import kinds

    with pytest.raises(Invalid) as caught:
        made = route(**auth)
        kinds.get("Route").check(made)
    assert caught.value.field == f"$.spec.{field}"


def auths(values: dict[tuple[str, str], dict[str, str]]) -> tuple[Auths, Vault]:
    vault = Vault(b"v" * 32)
    known = {k: (v, "1") for k, v in values.items()}
    return Auths(lambda kind, _, name: known.get((kind, name)), vault), vault


def test_no_key_stands_in_the_planes_file() -> None:
    import base64

    import msgspec

    shared = msgspec.json.encode({"keys": [jwk_for("HS256")]}).decode()
    made, vault = auths({("Secret", "keys"): {"alice": KEY + "\n"}, ("Secret", "set"): {"jwks.json": shared}})
    both = route(apiKeys=KEYS, jwt={**TOKENS, "jwks": {"secret": "set"}})
    doc = section("n", [both], lambda *_: [], {}, [], auths=made)
    text = msgspec.json.encode(doc).decode()
    for secret in (KEY, digest(KEY, "shop/r"), jwk_for("HS256")["k"], "alice"):
        assert secret not in text
    assert section("n", [both], lambda *_: [], {}, [], auths=made) == doc  # the same bytes: nothing is told anew
    (config,) = rules.decode(doc).routes
    assert config.auth is not None
    opened = msgspec.json.decode(vault.unseal(base64.b64decode(config.auth.sealed), place("shop/r")))
    assert opened["keys"] == [["alice", digest(KEY, "shop/r")]]


@pytest.mark.parametrize(
    "values",
    [{}, {("Secret", "keys"): {}}, {("Secret", "keys"): {"a": "short"}}, {("Secret", "keys"): {"a": "é" * 20}}],
    ids=range(4),
)
def test_what_is_missing_lets_nobody_in(values: dict[tuple[str, str], dict[str, str]]) -> None:
    (config,) = rules.decode(section("n", [route(apiKeys=KEYS)], lambda *_: [], {}, [], auths=auths(values)[0])).routes
    assert config.auth is not None
    assert "Secret/keys" in config.auth.waiting
    assert "short" not in config.auth.waiting
    assert denied(Guard("shop/r", config.auth, {}, None), asked(f"x-api-key: {KEY}")).status == 503
