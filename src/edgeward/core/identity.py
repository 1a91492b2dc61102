"""Who is who: certificates for the listener, keys and JWTs for NATS, tokens for people.

The hub makes everything it signs with on its first start and keeps it: a certificate authority and the listener's
certificate (X.509), an operator, two accounts and its own users (NATS nkeys and JWTs), the first token. A node
makes one key of its own, shows the public half when it enrols, and gets back a user JWT that names the only subjects it
may use; its seed never leaves it. The formats are in :mod:`edgeward.core.nkeys`. Nothing in this module talks to the
network or logs a secret. X.509 is in :mod:`edgeward.core.certs`, who may join in ``nodes/enrol.py``.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import ssl
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cryptography import x509

from edgeward.core.certs import Authority, fingerprint
from edgeward.core.errors import Invalid, NotFound, Refused
from edgeward.core.files import ensure_dir, read_json, remove, write_atomic, write_json
from edgeward.core.nkeys import KeyPair, NatsUser, claims_of, creds_text, mint, public_raw

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
        self.authority = Authority(directory)
        #: All CAs to trust, the signing one first.
        self.ca_file = self.authority.file
        #: Certificate and key in one file, so that they are replaced together.
        self.tls_file = directory / "tls.pem"
        self.tokens = Tokens(directory / "tokens.json")
        self._keys = keys
        #: What :meth:`issue_node` keeps; the hub itself keeps its nodes in the store (``nodes/enrol_cloud.py``).
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
    def own_accounts(self) -> dict[str, str]:
        """The hub's two accounts, public key to JWT: what nats-server's resolver is loaded with."""
        return {self.system_account: self._keys["system_jwt"], self.account: self._keys["account_jwt"]}

    @property
    def accounts(self) -> dict[str, str]:
        """The hub's own accounts, and those of :meth:`issue_node`."""
        return self.own_accounts | {KeyPair.from_seed(n["seed"]).public: n["jwt"] for n in self._nodes.values()}

    @property
    def ca_pem(self) -> str:
        return self.ca_file.read_text()

    @property
    def ca_fingerprint(self) -> str:
        """SHA-256 of the signing CA's certificate (DER), hex: what a join token pins."""
        return fingerprint(self.authority.cert).hex()

    def ensure_certificate(self, names: Iterable[str] = ()) -> bool:
        """See :meth:`Authority.server`: True when the listener's certificate is new: load it again."""
        return self.authority.server(self.tls_file, names)

    def derived(self, purpose: str) -> bytes:
        """A secret of this hub for one purpose, the same in all its processes."""
        return hmac.digest(self._operator.seed.encode(), b"edgeward " + purpose.encode(), "sha256")

    def server_context(self) -> ssl.SSLContext:
        """TLS for the hub's listener."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.tls_file)
        return context

    def user_jwt(self, name: str, seed: str, public_key: str, *, issued: int = 0, expires: int = 0) -> str:
        """For a node's public key: opens leaf connections only, on that node's subjects only.

        ``seed`` is of the node's account; nats-server must know its JWT (:meth:`account_jwt`), or nobody is let in.
        """
        public_raw(public_key, "user")
        nats = {**node_permissions(name), **_NO_LIMIT, "type": "user"}
        nats["allowed_connection_types"] = ["LEAFNODE", "LEAFNODE_WS"]
        return mint(KeyPair.from_seed(seed), public_key, name, nats, issued=issued, expires=expires)

    def account_jwt(self, name: str, seed: str, barred: Mapping[str, int], *, after: str = "") -> str:
        """The node's own account: what it imports, and the keys (with the time) that are not let in again.

        ``after``: the JWT before this one. Servers of a cluster keep the later of two, and tell seconds only.
        """
        issued = max(int(time.time()), int(claims_of(after)["iat"]) + 1) if after else 0
        claims = {
            "type": "account",
            "limits": _ACCOUNT_LIMITS,
            "imports": _imports(name, self.account),
            # whatever a key was given, when the hub's clock was ahead too; `*` is for those whose key is not known
            "revocations": {key: at if key == "*" else _EVER for key, at in barred.items()},
        }
        return mint(self._operator, KeyPair.from_seed(seed).public, f"NODE {name}", claims, issued=issued)

    def account_rules(self, name: str) -> str:
        """A digest of what we let a node do: when it changes, its account needs a new JWT."""
        said = repr((_ACCOUNT_LIMITS, _imports(name, self.account), _EVER))
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def issue_node(self, name: str, public_key: str, *, expires: int = 0) -> str:
        """A user JWT without an enrolment, for benchmarks and tests; the account is kept in a file.

        A new node brings a new entry in ``accounts``: apply it to nats-server, or the node is not let in.
        """
        node_permissions(name)
        public_raw(public_key, "user")
        entry = self._nodes.get(name)
        if entry is None:
            entry = {"seed": KeyPair.create("account").seed, "revocations": {}}
        if public_key in entry["revocations"]:
            raise Refused("this key was revoked", resource=f"Node {name}", remedy="make a new key on the node")
        if name not in self._nodes:
            self._save_node(name, entry)
        return self.user_jwt(name, entry["seed"], public_key, expires=expires)

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
        entry["jwt"] = self.account_jwt(name, entry["seed"], entry["revocations"])
        write_json(ensure_dir(self.directory / "nodes") / f"{name}.json", entry)
        self._nodes[name] = entry

    def take_files(self) -> dict[str, dict[str, Any]]:
        """What an earlier release kept of its nodes in files (account seed, JWT, revocations): the store's now."""
        return dict(self._nodes)

    def drop_files(self) -> None:
        """After the store has them."""
        for name in tuple(self._nodes):
            remove(self.directory / "nodes" / f"{name}.json")
            del self._nodes[name]

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


#: nats-server refuses what was issued to a revoked key until then (9999-12-31).
_EVER = 253_402_300_799

#: Behind a directory's name: where the next identity is made while there is one.
NEW = ".new"
#: The files of an identity; the credentials come last, they say that it is complete.
_OWN = ("node.seed", "token", "node.pem", "urls.json", "ca.crt", "trust.crt", "node.creds")


def _succeed(new: Path, old: Path) -> None:
    """Moves a complete identity in. What is killed in between is done again: ``new`` stays until all is there."""
    if not (new / "node.creds").exists():
        return
    for name in (*_OWN, "proxy-ca.crt"):
        if (new / name).exists():
            write_atomic(ensure_dir(old) / name, (new / name).read_bytes())
    for name in reversed((*_OWN, "proxy-ca.crt")):
        if name != "node.creds":
            remove(new / name)
    remove(new / "node.creds")
    new.rmdir()


class NodeIdentity:
    """A node's own key, and what the hub gave it: credentials, a certificate, the CAs to trust."""

    def __init__(self, directory: Path, key: KeyPair) -> None:
        self.directory = directory
        self.creds_file = directory / "node.creds"
        #: The hub's CAs.
        self.ca_file = directory / "ca.crt"
        #: Certificate and its key in one file.
        self.tls_file = directory / "node.pem"
        #: What the node trusts on the way to the hub: ``ca.crt``, and the CA of a proxy that looks into TLS.
        self.trust_file = directory / "trust.crt"
        self.proxy_ca_file = directory / "proxy-ca.crt"
        self._key = key

    @classmethod
    def open(cls, directory: Path) -> NodeIdentity:
        """Load or create the key; a successor that is complete takes the place of what is there."""
        _succeed(directory.with_name(directory.name + NEW), directory)
        ensure_dir(directory)
        path = directory / "node.seed"
        if not path.exists():
            write_atomic(path, KeyPair.create("user").seed + "\n")
        return cls(directory, KeyPair.from_seed(path.read_text()))

    @property
    def public_key(self) -> str:
        return self._key.public

    def sign(self, data: bytes) -> bytes:
        """With the device key: what proves to the hub that it is this box."""
        return self._key.sign(data)

    @property
    def enrolled(self) -> bool:
        return self.creds_file.exists() and self.ca_file.exists()

    @property
    def jwt(self) -> str:
        """The user JWT that the hub gave; empty before."""
        return self.creds_file.read_text().splitlines()[1] if self.creds_file.exists() else ""

    @property
    def name(self) -> str:
        """The name the hub enrolled this node under; empty before."""
        return str(claims_of(self.jwt)["name"]) if self.jwt else ""

    @property
    def token(self) -> str:
        """The name of the join token that was last tried with this key."""
        file = self.directory / "token"
        return file.read_text().strip() if file.exists() else ""

    def remember(self, token: str) -> None:
        write_atomic(self.directory / "token", token + "\n")

    @property
    def lease(self) -> tuple[float, float]:
        """When the credentials were issued, and when they end (0: never)."""
        claims = claims_of(self.jwt)
        return float(claims["iat"]), float(claims.get("exp", 0))

    @property
    def certificate(self) -> str:
        """The certificate (PEM); empty when there is none."""
        text = self.tls_file.read_text() if self.tls_file.exists() else ""
        return text[text.find("-----BEGIN CERTIFICATE-----") :] if text else ""

    def trusted(self) -> list[x509.Certificate]:
        return x509.load_pem_x509_certificates(self.ca_file.read_bytes())

    @property
    def urls(self) -> list[str]:
        """Where the hub said that it is, or will be; empty when it did not say."""
        found: list[str] = read_json(self.directory / "urls.json", [])
        return found

    def accept(
        self, jwt: str, ca_pem: str, *, key_pem: bytes = b"", certificate: str = "", urls: Iterable[str] = ()
    ) -> bool:
        """Keep the hub's answer to an enrolment; True when what is trusted, or where the hub is, changed.

        Refuses one that was made for another key. The credentials are written last: they mark it as complete.
        """
        if claims_of(jwt)["sub"] != self.public_key:
            raise Invalid("these credentials are for another key", remedy="enrol the node again")
        x509.load_pem_x509_certificates(ca_pem.encode())
        if certificate:
            write_atomic(self.tls_file, key_pem + certificate.encode())
        changed = self.trust(ca_pem)
        if self.urls != list(urls):
            write_json(self.directory / "urls.json", list(urls))
            changed = True
        write_atomic(self.creds_file, creds_text(jwt, self._key))
        return changed

    def trust(self, ca_pem: str = "", proxy_ca: str | None = None) -> bool:
        """Keep the hub's CAs, or (``proxy_ca``, "" for none) that of a proxy. True when that changed something."""
        if ca_pem and not (self.ca_file.exists() and self.ca_file.read_text() == ca_pem):
            write_atomic(self.ca_file, ca_pem, 0o644)
        if proxy_ca:
            write_atomic(self.proxy_ca_file, proxy_ca, 0o644)
        elif proxy_ca is not None:
            remove(self.proxy_ca_file)
        proxy = self.proxy_ca_file.read_text() if self.proxy_ca_file.exists() else ""
        both = (self.ca_file.read_text() if self.ca_file.exists() else "") + proxy
        if self.trust_file.exists() and self.trust_file.read_text() == both:
            return False
        write_atomic(self.trust_file, both, 0o644)
        return True

    def forget(self) -> None:
        """The node leaves its fleet: everything but the directory goes, the key too."""
        for name in (*reversed(_OWN), "proxy-ca.crt"):
            remove(self.directory / name)

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
