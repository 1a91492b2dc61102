"""Certificates and keys as texts: what a Secret, the hub or an ACME authority gave, read strictly. Pure.

Out comes one PEM text with the key first and then the chain, the names in it and its end; or what is wrong with it, in
words that hold nothing of the key.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from edgeward.core.errors import Invalid
from edgeward.gateway.listens import find

#: Certificates in a chain, and of client authorities.
CHAIN, AUTHORITIES = 10, 64
_BYTES = 256 * 1024


class Pair(msgspec.Struct, frozen=True):
    #: Secret: the key, then the chain.
    pem: str
    names: tuple[str, ...]
    begins: float
    ends: float
    digest: str

    def missing(self, hosts: Iterable[str]) -> list[str]:
        """The hosts that it is not for."""
        mine = dict.fromkeys(self.names, True)
        return [h for h in hosts if not find(mine, h)]

    def due(self, now: float) -> bool:
        """Two thirds of its life are over."""
        return now >= self.begins + (self.ends - self.begins) * 2 / 3


def names_of(cert: x509.Certificate) -> tuple[str, ...]:
    """Its subject alternative names, lower case; the common name counts for nothing (RFC 9525)."""
    try:
        san = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    found = [str(n).lower() for n in san.get_values_for_type(x509.DNSName)]
    return (*found, *(str(a) for a in san.get_values_for_type(x509.IPAddress)))


def _chain(text: str, what: str) -> list[x509.Certificate]:
    if len(text) > _BYTES:
        raise Invalid(f"{what} has more than {_BYTES} characters")
    try:
        found = x509.load_pem_x509_certificates(text.encode())
    except (ValueError, UnicodeError):
        raise Invalid(f"{what} holds no certificate in PEM form") from None
    if len(found) > CHAIN:
        raise Invalid(f"{what} holds more than {CHAIN} certificates")
    return found


def read_pair(chain: str, key: str) -> Pair:
    """Raises ``Invalid``. The chain begins with the server's own certificate."""
    certs = _chain(chain, "the chain")
    try:
        private = serialization.load_pem_private_key(key.encode(), None)
    except TypeError:
        raise Invalid("the key wants a password", remedy="store it without one: the Secret is sealed") from None
    except (ValueError, UnicodeError, UnsupportedAlgorithm):
        raise Invalid("the key is no private key in PEM form") from None
    if not isinstance(
        private, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey
    ):
        raise Invalid("the key is of a kind that TLS does not use", remedy="use EC P-256 or RSA 2048")
    if isinstance(private, rsa.RSAPrivateKey) and private.key_size < 2048:
        raise Invalid("the key has fewer than 2048 bits")
    if private.public_key() != certs[0].public_key():
        raise Invalid("the key is not that of the first certificate", remedy="put the server's own certificate first")
    for lower, upper in itertools.pairwise(certs):
        try:
            lower.verify_directly_issued_by(upper)
        except (ValueError, TypeError, InvalidSignature):
            raise Invalid("the chain is broken", remedy="each certificate is followed by its issuer's") from None
    plain = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    pem = plain + "".join(c.public_bytes(serialization.Encoding.PEM).decode() for c in certs)
    return Pair(
        pem,
        names_of(certs[0]),
        certs[0].not_valid_before_utc.timestamp(),
        certs[0].not_valid_after_utc.timestamp(),
        hashlib.sha256(pem.encode()).hexdigest()[:32],
    )


def read_authorities(text: str) -> str:
    """Certificates of authorities, written anew. Raises ``Invalid``."""
    if len(text) > _BYTES:
        raise Invalid(f"has more than {_BYTES} characters")
    try:
        found = x509.load_pem_x509_certificates(text.encode())
    except (ValueError, UnicodeError):
        raise Invalid("holds no certificate in PEM form") from None
    if len(found) > AUTHORITIES:
        raise Invalid(f"holds more than {AUTHORITIES} certificates")
    return "".join(c.public_bytes(serialization.Encoding.PEM).decode() for c in found)
