"""Keys, certificates and tokens: the formats, and what is kept over a restart."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from edgeward.core import certs
from edgeward.core.errors import Invalid, NotFound, Refused
from edgeward.core.files import read_json, remove, write_atomic, write_json
from edgeward.core.identity import HubIdentity, NodeIdentity, Tokens, node_permissions
from edgeward.core.nkeys import KeyPair, claims_of, creds_text, mint, public_raw


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# The example pair of docs.nats.io, "NKeys authentication".
def test_nkeys_known_pair() -> None:
    key = KeyPair.from_seed("SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY")
    assert key.public == "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4"
    assert key.seed == "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"


@pytest.mark.parametrize(("kind", "letter"), [("operator", "O"), ("account", "A"), ("user", "U"), ("server", "N")])
def test_nkeys_letters(kind: str, letter: str) -> None:
    key = KeyPair.create(kind)
    assert key.public[0] == letter
    assert key.seed.startswith("S" + letter)
    assert KeyPair.from_seed(key.seed).public == key.public
    assert len(public_raw(key.public, kind)) == 32
    assert key.seed not in repr(key)


def test_nkeys_damage_is_refused() -> None:
    public = KeyPair.create("user").public
    other = "A" if public[10] != "A" else "B"
    for bad in (public[:10] + other + public[11:], "", "U", "not base32!", KeyPair.create("account").public):
        with pytest.raises(Invalid):
            public_raw(bad, "user")
    with pytest.raises(Invalid):
        KeyPair.from_seed(public)


def test_jwt_signature_is_checked() -> None:
    key = KeyPair.create("account")
    jwt = mint(key, KeyPair.create("user").public, "x", {"type": "user"}, expires=4_000_000_000)
    claims = claims_of(jwt)
    assert claims["iss"] == key.public
    assert claims["nats"] == {"type": "user", "version": 2}
    head, body, sig = jwt.split(".")
    forged = (
        base64.urlsafe_b64encode(base64.urlsafe_b64decode(body + "==").replace(b'"x"', b'"y"')).decode().rstrip("=")
    )
    for bad in (f"{head}.{forged}.{sig}", "", "a.b.c", jwt[:-4]):
        with pytest.raises(Invalid):
            claims_of(bad)


def test_hub_identity_is_kept(tmp_path: Path) -> None:
    hub = HubIdentity.open(tmp_path / "id", ["hub.example", "10.1.2.3"])
    again = HubIdentity.open(tmp_path / "id", ["hub.example", "10.1.2.3"])
    assert (again.operator_jwt, again.accounts, again.user.jwt) == (hub.operator_jwt, hub.accounts, hub.user.jwt)
    assert again.ca_fingerprint == hub.ca_fingerprint
    assert not again.ensure_certificate(["10.1.2.3"])
    assert mode(tmp_path / "id") == 0o700
    for name in ("ca.key", "tls.pem", "nats.json"):
        assert mode(tmp_path / "id" / name) == 0o600
    cert = x509.load_pem_x509_certificate(hub.tls_file.read_bytes())
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"localhost", "hub.example"}
    assert set(map(str, names.get_values_for_type(x509.IPAddress))) == {"127.0.0.1", "::1", "10.1.2.3"}
    hub.server_context()


def test_certificate_gets_missing_names_and_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = HubIdentity.open(tmp_path, ["one.example"])
    ca = hub.ca_pem
    assert hub.ensure_certificate(["two.example"])
    cert = x509.load_pem_x509_certificate(hub.tls_file.read_bytes())
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"one.example", "two.example"} <= set(names.get_values_for_type(x509.DNSName))
    assert ipaddress.ip_address("127.0.0.1") in names.get_values_for_type(x509.IPAddress)

    monkeypatch.setattr(certs, "SERVER_LIFE", datetime.timedelta(days=100))
    assert hub.ensure_certificate(["three.example"])
    monkeypatch.undo()
    assert hub.ensure_certificate()
    assert not hub.ensure_certificate()
    assert hub.ca_pem == ca

    hub.tls_file.write_bytes(b"half a fi")
    assert hub.ensure_certificate()
    hub.server_context()


def test_a_lost_ca_key_is_not_replaced_silently(tmp_path: Path) -> None:
    HubIdentity.open(tmp_path)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(Invalid, match="restore it"):
        HubIdentity.open(tmp_path)


def test_enrolment(tmp_path: Path) -> None:
    hub = HubIdentity.open(tmp_path / "hub")
    node = NodeIdentity.open(tmp_path / "node")
    assert not node.enrolled
    assert NodeIdentity.open(tmp_path / "node").public_key == node.public_key
    jwt = hub.issue_node("pump-1", node.public_key)
    node.accept(jwt, hub.ca_pem)
    assert node.enrolled
    assert node.name == "pump-1"
    assert mode(node.creds_file) == mode(tmp_path / "node" / "node.seed") == 0o600
    assert "BEGIN NATS USER JWT" in node.creds_file.read_text()
    assert isinstance(node.client_context(), ssl.SSLContext)
    claims = claims_of(jwt)
    assert claims["iss"] in hub.accounts
    assert claims["iss"] not in (hub.account, hub.system_account)
    assert claims["nats"]["allowed_connection_types"] == ["LEAFNODE", "LEAFNODE_WS"]
    assert all("pump-1" in s for s in claims["nats"]["pub"]["allow"] + claims["nats"]["sub"]["allow"])

    other = NodeIdentity.open(tmp_path / "other")
    with pytest.raises(Invalid, match="another key"):
        other.accept(jwt, hub.ca_pem)
    assert not other.enrolled


@pytest.mark.parametrize("name", ["", "*", ">", "a.b", "a b", "A", "-a", "a" * 64, "a\n"])
def test_a_node_name_cannot_widen_its_subjects(name: str) -> None:
    with pytest.raises(Invalid):
        node_permissions(name)


def test_revocation_is_kept(tmp_path: Path) -> None:
    hub = HubIdentity.open(tmp_path)
    key = KeyPair.create("user")
    account = claims_of(hub.issue_node("a", key.public))["iss"]
    before = hub.accounts[account]
    assert hub.revoke_node("a", key.public)
    assert not hub.revoke_node("a", key.public)
    with pytest.raises(NotFound):
        hub.revoke_node("b", key.public)
    assert hub.accounts[account] != before
    again = HubIdentity.open(tmp_path)
    assert again.accounts == hub.accounts
    assert key.public in claims_of(again.accounts[account])["nats"]["revocations"]
    with pytest.raises(Refused, match="revoked"):
        again.issue_node("a", key.public)
    assert claims_of(again.issue_node("a", KeyPair.create("user").public))["iss"] == account


def test_a_later_account_jwt_says_that_it_is_later(tmp_path: Path) -> None:
    hub = HubIdentity.open(tmp_path)
    seed = KeyPair.create("account").seed
    first = hub.account_jwt("a", seed, {})
    second = hub.account_jwt("a", seed, {"K": 1}, after=first)
    third = hub.account_jwt("a", seed, {}, after=second)
    times = [claims_of(j)["iat"] for j in (first, second, third)]
    assert times == sorted(set(times))


def test_tokens(tmp_path: Path) -> None:
    hub = HubIdentity.open(tmp_path)
    token = hub.admin_token()
    assert token.startswith("ew_")
    assert HubIdentity.open(tmp_path).admin_token() == token
    assert token not in (tmp_path / "tokens.json").read_text()
    assert mode(tmp_path / "tokens.json") == mode(tmp_path / "admin.token") == 0o600
    assert hub.tokens.verify(token) == "admin"
    assert hub.tokens.verify(token + "x") is None
    assert hub.tokens.verify("") is None
    tokens = Tokens(tmp_path / "tokens.json")
    ci = tokens.create("ci")
    assert (tokens.verify(ci), tokens.verify(token)) == ("ci", "admin")
    assert tokens.revoke("ci")
    assert Tokens(tmp_path / "tokens.json").verify(ci) is None


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": "ä"})
    assert read_json(path) == {"x": "ä"}
    assert mode(path) == 0o600
    write_atomic(path, b"{\n nonsense", 0o644)
    assert mode(path) == 0o644
    with pytest.raises(Invalid, match=r"a\.json:2"):
        read_json(path)
    assert remove(path)
    assert not remove(path)
    assert read_json(path, 7) == 7
    with pytest.raises(FileNotFoundError):
        read_json(path)
    assert list(tmp_path.iterdir()) == []
    assert creds_text("JWT", KeyPair.create("user")).count("-----BEGIN") == 2
