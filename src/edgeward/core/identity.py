"""Who is who: certificates for the listener, keys and JWTs for NATS, tokens for people.

The hub makes everything it signs with on its first start and keeps it: a certificate authority and the listener's
certificate (X.509), an operator, two accounts and its own users (NATS nkeys and JWTs), the first token. A node
makes one key of its own, shows the public half when it enrols, and gets back a user JWT that names the only subjects it
may use; its seed never leaves it. The formats are in :mod:`edgeward.core.nkeys`. Nothing in this module talks to the
network or logs a secret.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import ssl
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgeward.core.errors import Invalid, NotFound, Refused
from edgeward.core.files import ensure_dir, read_json, write_atomic, write_json
from edgeward.core.nkeys import KeyPair, NatsUser, claims_of, creds_text, mint, public_raw

CA_LIFE = timedelta(days=3652)
SERVER_LIFE = timedelta(days=397)  # what browsers accept
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
#: A node's name is one token of a subject and one label of a host name.
NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def inbox_prefix(node: str) -> str:
    """Where answers to a node's requests go; nobody else may listen there."""
    return f"_INBOX_{node}"


def node_permissions(node: str) -> dict[str, Any]:
    """The subjects a node may use at the hub, as the ``pub`` and ``sub`` members of a user JWT."""
    if not NODE_NAME.fullmatch(node):
        raise Invalid(
            f"{node!r} is not a node name",
            field="$.metadata.name",
            remedy="use a-z, 0-9 and '-', at most 63 characters",
        )
    publish = [
        f"ew.hub.*.{node}",
        f"ew.hub.reply.{node}.>",
        f"ew.data.*.{node}.>",
        f"$JS.hub.API.DIRECT.GET.*.ew.data.*.{node}.>",
    ]
    return {"pub": {"allow": publish}, "sub": {"allow": [f"ew.node.{node}.>", f"{inbox_prefix(node)}.>"]}}


# A server answers to whatever reply subject a request names, with its own rights. So a node in the same account as the
# streams could have an acknowledgement or a stored message of its own written anywhere: another node's data, desired
# state, JetStream's API. Each node therefore has an account of its own that holds nothing, and imports from FLEET just
# what it may use; an answer comes back into the node's account and can reach no further than that node's own subjects.
_EXPORTS = [
    {"name": "hub", "subject": "ew.hub.>", "type": "service"},
    {"name": "data", "subject": "ew.data.>", "type": "service"},
    {"name": "last", "subject": "$JS.API.DIRECT.GET.>", "type": "service"},
    {"name": "node", "subject": "ew.node.>", "type": "stream"},
]


def _imports(node: str, fleet: str) -> list[dict[str, str]]:
    last = f"*.ew.data.*.{node}.>"
    service = {"account": fleet, "type": "service"}
    return [
        {**service, "name": "hub", "subject": f"ew.hub.*.{node}"},
        {**service, "name": "reply", "subject": f"ew.hub.reply.{node}.>"},
        {**service, "name": "data", "subject": f"ew.data.*.{node}.>"},
        {
            **service,
            "name": "last",
            "subject": f"$JS.API.DIRECT.GET.{last}",
        },
        {"account": fleet, "type": "stream", "name": "node", "subject": f"ew.node.{node}.>"},
    ]


_NO_LIMIT = {"subs": -1, "data": -1, "payload": -1}
_ACCOUNT_LIMITS = {**_NO_LIMIT, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
_JETSTREAM_LIMITS = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1, "max_ack_pending": -1}


class HubIdentity:
    """The hub's keys in one directory (0700). ``open`` makes what is missing and keeps what is there."""

    def __init__(self, directory: Path, keys: dict[str, Any]) -> None:
        self.directory = directory
        self.ca_file = directory / "ca.crt"
        #: Certificate and key in one file, so that they are replaced together.
        self.tls_file = directory / "tls.pem"
        self.tokens = Tokens(directory / "tokens.json")
        self._keys = keys
        #: Node to its account's seed, JWT and revoked keys; a file each, so that enrolling one of many stays cheap.
        self._nodes: dict[str, dict[str, Any]] = {
            path.stem: read_json(path) for path in sorted((directory / "nodes").glob("[!.]*.json"))
        }
        self._operator, self._system, self._account = (
            KeyPair.from_seed(keys[f"{who}_seed"]) for who in ("operator", "system", "account")
        )
        self.operator_jwt: str = keys["operator_jwt"]
        self.system_account = self._system.public
        self.account = self._account.public
        #: The hub's own user in FLEET (may do all there) and the one in SYS (server events and requests).
        self.user = NatsUser(keys["user_jwt"], KeyPair.from_seed(keys["user_seed"]))
        self.system_user = NatsUser(keys["system_user_jwt"], KeyPair.from_seed(keys["system_user_seed"]))

    @classmethod
    def open(cls, directory: Path, names: Iterable[str] = ()) -> HubIdentity:
        """Load or create. ``names`` are the DNS names and IPs under which nodes and people reach the hub."""
        ensure_dir(directory)
        path = directory / "nats.json"
        keys = read_json(path, None)
        if keys is None:
            keys = _new_hub_keys()
            write_json(path, keys)
        hub = cls(directory, keys)
        hub.ensure_certificate(names)
        return hub

    @property
    def accounts(self) -> dict[str, str]:
        """Account public key to account JWT: what nats-server's resolver is loaded with."""
        fixed = {self.system_account: self._keys["system_jwt"], self.account: self._keys["account_jwt"]}
        return fixed | {KeyPair.from_seed(n["seed"]).public: n["jwt"] for n in self._nodes.values()}

    @property
    def ca_pem(self) -> str:
        return self.ca_file.read_text()

    @property
    def ca_fingerprint(self) -> str:
        """SHA-256 of the CA certificate (DER), hex: what a join token pins."""
        return x509.load_pem_x509_certificate(self.ca_file.read_bytes()).fingerprint(hashes.SHA256()).hex()

    def ensure_certificate(self, names: Iterable[str] = ()) -> bool:
        """Make the CA and the listener's certificate if missing, damaged, near their end or short of a name.

        True when the listener's certificate is new: load it again. Names that the present one carries are kept.
        """
        names = tuple(names)
        ca_key, ca = _ensure_ca(self.directory)
        wanted = {_san(n) for n in (*LOCAL_NAMES, *names)}
        present = _load_server(self.tls_file, ca)
        if present is not None:
            have = set(present.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
            left = present.not_valid_after_utc - datetime.now(UTC)
            if wanted <= have and left > (present.not_valid_after_utc - present.not_valid_before_utc) / 3:
                return False
            wanted |= have
        key = ec.generate_private_key(ec.SECP256R1())
        common = next((n for n in names if n not in LOCAL_NAMES), "edgeward hub")[:64]
        cert = (
            _certificate(common, key, ca.subject, SERVER_LIFE)
            .add_extension(x509.SubjectAlternativeName(sorted(wanted, key=str)), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        write_atomic(self.tls_file, _pem(key) + cert.public_bytes(serialization.Encoding.PEM))
        return True

    def server_context(self) -> ssl.SSLContext:
        """TLS for the hub's listener."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.tls_file)
        return context

    def issue_node(self, name: str, public_key: str, *, expires: int = 0) -> str:
        """The user JWT for a node's public key. It opens leaf connections only, on that node's subjects only.

        A new node brings a new entry in ``accounts``: apply it to nats-server, or the node is not let in.
        """
        permissions = node_permissions(name)
        public_raw(public_key, "user")
        entry = self._nodes.get(name)
        if entry is None:
            entry = {"seed": KeyPair.create("account").seed, "revocations": {}}
        if public_key in entry["revocations"]:
            raise Refused("this key was revoked", resource=f"Node {name}", remedy="make a new key on the node")
        if name not in self._nodes:
            self._save_node(name, entry)
        account = KeyPair.from_seed(entry["seed"])
        nats = {**permissions, **_NO_LIMIT, "type": "user"}
        nats["allowed_connection_types"] = ["LEAFNODE", "LEAFNODE_WS"]
        return mint(account, public_key, name, nats, expires=expires)

    def revoke_node(self, name: str, public_key: str) -> bool:
        """Refuse that key from now on. False when it already was. Then apply the new ``accounts`` to nats-server."""
        public_raw(public_key, "user")
        entry = self._nodes.get(name)
        if entry is None:
            raise NotFound("was never enrolled", resource=f"Node {name}")
        if public_key in entry["revocations"]:
            return False
        self._save_node(name, {**entry, "revocations": {**entry["revocations"], public_key: int(time.time())}})
        return True

    def _save_node(self, name: str, entry: dict[str, Any]) -> None:
        claims = {
            "type": "account",
            "limits": _ACCOUNT_LIMITS,
            "imports": _imports(name, self.account),
            "revocations": entry["revocations"],
        }
        entry["jwt"] = mint(self._operator, KeyPair.from_seed(entry["seed"]).public, f"NODE {name}", claims)
        write_json(ensure_dir(self.directory / "nodes") / f"{name}.json", entry)
        self._nodes[name] = entry

    def admin_token(self) -> str:
        """The administrator's token, made once; the hub keeps its hash, this file (0600) is for the local context."""
        path = self.directory / "admin.token"
        token = path.read_text().strip() if path.exists() else ""
        if not token or self.tokens.verify(token) is None:
            token = self.tokens.create("admin")
            write_atomic(path, token + "\n")
        return token


def _new_hub_keys() -> dict[str, Any]:
    operator, system, account = KeyPair.create("operator"), KeyPair.create("account"), KeyPair.create("account")
    user, system_user = KeyPair.create("user"), KeyPair.create("user")
    fleet = {"type": "account", "limits": {**_ACCOUNT_LIMITS, **_JETSTREAM_LIMITS}, "exports": _EXPORTS}
    everything = {"pub": {}, "sub": {}, **_NO_LIMIT, "type": "user"}
    return {
        "operator_seed": operator.seed,
        "system_seed": system.seed,
        "account_seed": account.seed,
        "user_seed": user.seed,
        "system_user_seed": system_user.seed,
        "operator_jwt": mint(
            operator, operator.public, "edgeward", {"type": "operator", "system_account": system.public}
        ),
        "system_jwt": mint(operator, system.public, "SYS", {"type": "account", "limits": _ACCOUNT_LIMITS}),
        "account_jwt": mint(operator, account.public, "FLEET", fleet),
        "user_jwt": mint(account, user.public, "hub", everything),
        "system_user_jwt": mint(system, system_user.public, "hub", everything),
    }


# --- X.509 -----------------------------------------------------------------------------------------------------------


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate(
    common: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name | None, life: timedelta
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    begin = datetime.now(UTC) - timedelta(hours=1)  # an edge box's clock may be behind the hub's
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _ensure_ca(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key_file, cert_file = directory / "ca.key", directory / "ca.crt"
    if not key_file.exists():
        if cert_file.exists():
            raise Invalid("the CA's key is gone", file=str(key_file), remedy="restore it from a backup: nodes trust it")
        write_atomic(key_file, _pem(ec.generate_private_key(ec.SECP256R1())))
    key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Invalid("not an EC key", file=str(key_file))
    if not cert_file.exists():  # first start, or killed between the two writes
        ca = (
            _certificate(f"Edgeward hub CA {secrets.token_hex(4)}", key, None, CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.KeyUsage(
                    False, False, False, False, False, True, True, False, False
                ),  # signs certificates and CRLs
                critical=True,
            )
            .sign(key, hashes.SHA256())
        )
        write_atomic(cert_file, ca.public_bytes(serialization.Encoding.PEM), 0o644)
    return key, x509.load_pem_x509_certificate(cert_file.read_bytes())


def _load_server(path: Path, ca: x509.Certificate) -> x509.Certificate | None:
    """The certificate in ``path`` if the CA signed it; None asks for a new one."""
    try:
        cert = x509.load_pem_x509_certificate(path.read_bytes())
        cert.verify_directly_issued_by(ca)
    except (FileNotFoundError, ValueError, TypeError, InvalidSignature):
        return None
    return cert


class NodeIdentity:
    """A node's own key, and what the hub gave it: credentials and the CA to trust."""

    def __init__(self, directory: Path, key: KeyPair) -> None:
        self.directory = directory
        self.creds_file = directory / "node.creds"
        self.ca_file = directory / "ca.crt"
        self._key = key

    @classmethod
    def open(cls, directory: Path) -> NodeIdentity:
        """Load or create the key."""
        ensure_dir(directory)
        path = directory / "node.seed"
        if not path.exists():
            write_atomic(path, KeyPair.create("user").seed + "\n")
        return cls(directory, KeyPair.from_seed(path.read_text()))

    @property
    def public_key(self) -> str:
        return self._key.public

    @property
    def enrolled(self) -> bool:
        return self.creds_file.exists() and self.ca_file.exists()

    @property
    def name(self) -> str:
        """The name the hub enrolled this node under; empty before."""
        if not self.creds_file.exists():
            return ""
        return str(claims_of(self.creds_file.read_text().splitlines()[1])["name"])

    def accept(self, jwt: str, ca_pem: str) -> None:
        """Keep the hub's answer to an enrolment. Refuses one that was made for another key."""
        if claims_of(jwt)["sub"] != self.public_key:
            raise Invalid("these credentials are for another key", remedy="enrol the node again")
        x509.load_pem_x509_certificate(ca_pem.encode())
        write_atomic(self.ca_file, ca_pem, 0o644)
        write_atomic(self.creds_file, creds_text(jwt, self._key))

    def client_context(self) -> ssl.SSLContext:
        """TLS that trusts the hub's CA and nothing else."""
        return ssl.create_default_context(cafile=str(self.ca_file))


# --- tokens ----------------------------------------------------------------------------------------------------------


class Tokens:
    """API tokens by name. The file holds SHA-256 hashes: whoever reads it cannot call the API."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hashes: dict[str, str] = read_json(path, {})

    def create(self, name: str) -> str:
        """A new token of that name (an older one of the same name ends). It is shown once, here."""
        token = "ew_" + secrets.token_urlsafe(32)
        self._hashes[name] = hashlib.sha256(token.encode()).hexdigest()
        write_json(self.path, self._hashes)
        return token

    def verify(self, token: str) -> str | None:
        """The token's name, or None. Takes as long for a wrong token as for a right one."""
        digest = hashlib.sha256(token.encode()).hexdigest()
        found = None
        for name, known in self._hashes.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def revoke(self, name: str) -> bool:
        if self._hashes.pop(name, None) is None:
            return False
        write_json(self.path, self._hashes)
        return True
