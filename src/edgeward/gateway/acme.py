"""ACME (RFC 8555) in words: what is signed and sent to an authority, and what its answers say. Pure.

An account is a key; every request is signed by it over the URL and a nonce that is good once. An order names hosts; for
each the authority asks for a proof at ``http://HOST/.well-known/acme-challenge/TOKEN`` (HTTP-01); then it signs a
request for a fresh key. What an answer must hold is in the structs below, and what it holds besides is not read. The
steps in their order, and the network, are in ``orders.py``.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from edgeward.core.b64url import b64
from edgeward.core.errors import EdgewardError, Invalid, Refused
from edgeward.core.spans import is_address

Key = ec.EllipticCurvePrivateKey
T = TypeVar("T")
PROOFS = "/.well-known/acme-challenge/"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,256}")  # RFC 8555, section 8.3: 128 bits at least
_ERROR = "urn:ietf:params:acme:error:"
_WAIT_MOST = 86400.0


class Directory(msgspec.Struct):
    newNonce: str
    newAccount: str
    newOrder: str


class Identifier(msgspec.Struct, frozen=True):
    type: str
    value: str


class Problem(msgspec.Struct):
    """RFC 9457; ``type`` is one of section 6.7."""

    type: str = ""
    detail: str = ""

    @property
    def text(self) -> str:
        words = [w for w in (self.type.removeprefix(_ERROR), self.detail) if w]
        return ": ".join(words)[:300] or "no reason given"


class Challenge(msgspec.Struct):
    type: str
    url: str = ""
    token: str = ""
    status: str = ""
    error: Problem | None = None


class Authorization(msgspec.Struct):
    status: Literal["pending", "valid", "invalid", "deactivated", "expired", "revoked"]
    identifier: Identifier
    challenges: list[Challenge] = []

    def http(self) -> Challenge:
        """The challenge that we can meet. Raises ``Invalid``."""
        found = next((c for c in self.challenges if c.type == "http-01"), None)
        if found is None:
            offered = ", ".join(sorted({c.type[:20] for c in self.challenges})) or "nothing"
            raise Invalid(f"{self.identifier.value}: the authority offers no http-01, but {offered}")
        if not _TOKEN.fullmatch(found.token):
            raise Invalid(f"{self.identifier.value}: the authority's token is none")
        return found

    def why(self) -> str:
        """Why it did not become valid."""
        errors = [c.error.text for c in self.challenges if c.error is not None]
        return f"{self.identifier.value}: {errors[0] if errors else self.status}"


class Order(msgspec.Struct):
    status: Literal["pending", "ready", "processing", "valid", "invalid"]
    authorizations: list[str]
    finalize: str
    certificate: str = ""
    error: Problem | None = None


def read(body: bytes, form: type[T]) -> T:
    """An answer's document. Raises ``Invalid``."""
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.DecodeError as e:
        raise Invalid(f"the authority's {form.__name__.lower()} is not understood: {e}") from None


class Limited(Refused):
    """The authority wants to be left alone for a while."""

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(message)
        self.wait = wait


def refusal(status: int, body: bytes, wait: float) -> tuple[str, EdgewardError]:
    """``(type, error)`` of an answer that is none of 2xx."""
    try:
        problem = msgspec.json.decode(body, type=Problem)
    except msgspec.DecodeError:
        problem = Problem()
    kind = problem.type.removeprefix(_ERROR)
    text = f"the authority refuses ({status}): {problem.text}"
    if kind == "rateLimited" or status in (429, 503):
        return kind, Limited(text, wait or 3600.0)
    return kind, Refused(text)


def retry_after(value: str | None) -> float:
    """Seconds; 0: not said (a date is not understood: our own patience holds)."""
    return min(float(value), _WAIT_MOST) if value and re.fullmatch(r"[0-9]{1,9}", value) else 0.0


def secure(url: str) -> str:
    """Raises ``Invalid`` for what is no https URL: nothing signed goes anywhere else."""
    try:
        parts = urlsplit(url)
        good = parts.scheme == "https" and parts.hostname and parts.username is None and parts.port != 0
    except ValueError:
        good = False
    if not good or not re.fullmatch(r"[!-~]{1,2048}", url):
        raise Invalid(f"the authority names {url[:120]!r}, no https URL")
    return url


# --- signing ----------------------------------------------------------------------------------------------------------


def jwk(key: Key) -> dict[str, str]:
    numbers = key.public_key().public_numbers()
    return {
        "crv": "P-256",
        "kty": "EC",
        "x": b64(numbers.x.to_bytes(32, "big")),
        "y": b64(numbers.y.to_bytes(32, "big")),
    }


def thumbprint(key: Key) -> str:
    """RFC 7638: the members in their order, without a blank."""
    return b64(hashlib.sha256(msgspec.json.encode(jwk(key), order="sorted")).digest())


def proof(token: str, key: Key) -> str:
    """What is to be found at :data:`PROOFS` + token (section 8.1)."""
    return f"{token}.{thumbprint(key)}"


def signed(key: Key, url: str, nonce: str, payload: object, account: str = "") -> bytes:
    """The body of a request. ``payload`` None: POST-as-GET. ``account``: its URL; without one the key is shown."""
    head: dict[str, Any] = {"alg": "ES256", "nonce": nonce, "url": url}
    head |= {"kid": account} if account else {"jwk": jwk(key)}
    protected = b64(msgspec.json.encode(head))
    body = b64(msgspec.json.encode(payload)) if payload is not None else ""
    r, s = decode_dss_signature(key.sign(f"{protected}.{body}".encode(), ec.ECDSA(hashes.SHA256())))
    signature = b64(r.to_bytes(32, "big") + s.to_bytes(32, "big"))
    return msgspec.json.encode({"protected": protected, "payload": body, "signature": signature})


def identifiers(hosts: Sequence[str]) -> list[dict[str, str]]:
    """Names, and addresses as RFC 8738 has them."""
    return [{"type": "ip" if is_address(h) else "dns", "value": h} for h in hosts]


def csr(key: Key, hosts: Sequence[str]) -> str:
    """The request for a certificate, as ``finalize`` wants it."""
    sans = [x509.IPAddress(ipaddress.ip_address(h)) if is_address(h) else x509.DNSName(h) for h in hosts]
    made = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName(sans), critical=False)
        .sign(key, hashes.SHA256())
    )
    return b64(made.public_bytes(serialization.Encoding.DER))
