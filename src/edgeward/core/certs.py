"""The hub's certificate authority, and what it signs: the listener's certificate, the nodes', its own successors.

A directory goes in; certificates, signatures and the set of trusted CAs come out. A CA is replaced in three steps that
leave no gap: *rotate* makes the next one and has the present one vouch for it (a :class:`Link`), *activate* signs with
it from then on while the old one stays trusted, *retire* ends the trust in the old one. Whoever trusted an older CA,
however long it was away, follows the links (:func:`follow`) and needs no visit. Nothing here talks to the network.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgeward.core.errors import Conflict, Invalid, Refused
from edgeward.core.files import ensure_dir, remove, write_atomic

CA_LIFE = timedelta(days=3652)
SERVER_LIFE = timedelta(days=397)
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
#: A node's certificate is for NAME and this: a node that is called like the hub's host must not pass for it.
NODE_DOMAIN = ".node.edgeward.internal"
#: Bounds of what strangers send.
MAX_PEM = 8192
MAX_LINKS = 64
#: When all certificates begin. A box without a battery wakes up in 1970 and must get in to hear the time, and one whose
#: zone was mistaken is hours behind. A beginning protects from nothing here; the end counts.
BEGIN = datetime(1970, 1, 1, tzinfo=UTC)
#: This release was made later. A hub whose clock says less was never set: its certificates end as if it were now.
MADE = datetime(2026, 1, 1, tzinfo=UTC)


class Link(msgspec.Struct, omit_defaults=True):
    """The holder of the CA ``old`` vouches for the CA ``new`` (both PEM)."""

    old: str
    new: str
    signature: bytes


class Trust(msgspec.Struct, omit_defaults=True):
    """What a hub tells of its CAs: those to trust now (the signing one first), and the links that lead to them."""

    trusted: list[str]
    links: list[Link] = []


def fingerprint(cert: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's DER form: what a join token pins."""
    return cert.fingerprint(hashes.SHA256())


def pem(cert: x509.Certificate) -> str:
    return cert.public_bytes(serialization.Encoding.PEM).decode()


def load_pem(text: str) -> x509.Certificate:
    """One certificate. Raises ``Invalid``."""
    if len(text) > MAX_PEM:
        raise Invalid(f"a certificate of {len(text)} characters", remedy=f"at most {MAX_PEM}")
    try:
        return x509.load_pem_x509_certificate(text.encode())
    except ValueError:
        raise Invalid("not a certificate in PEM form") from None


def _vouch(old: x509.Certificate, new: x509.Certificate) -> bytes:
    return b"edgeward ca 1\0" + fingerprint(old) + fingerprint(new)


def verify(cert: x509.Certificate, data: bytes, signature: bytes) -> bool:
    """Whether the holder of the certificate's (EC) key signed ``data``."""
    key = cert.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def follow(known: Iterable[x509.Certificate], trust: Trust) -> list[x509.Certificate]:
    """Of what a hub says, the CAs that those we trust vouch for (or are). Raises ``Refused`` when there is none."""
    if len(trust.links) > MAX_LINKS or len(trust.trusted) > MAX_LINKS:
        raise Refused("the hub names too many CAs", remedy="is it our hub?")
    good = {fingerprint(c) for c in known}
    links = [(load_pem(x.old), load_pem(x.new), x.signature) for x in trust.links]
    grew = True
    while grew:
        grew = False
        for old, new, signature in links:
            if fingerprint(old) in good and fingerprint(new) not in good and verify(old, _vouch(old, new), signature):
                good.add(fingerprint(new))
                grew = True
    found = [c for c in map(load_pem, trust.trusted) if fingerprint(c) in good]
    if not found:
        raise Refused(
            "the hub's certificate authority is not the one that we know, nor one that it vouched for",
            remedy="somebody may be in between; otherwise join again with a new token",
        )
    return found


# --- what nodes ask for and get ---------------------------------------------------------------------------------------


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Secret: PKCS 8 without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_csr(node: str, key: ec.EllipticCurvePrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def check_csr(text: str, node: str) -> x509.CertificateSigningRequest:
    """A node's request: signed by its own key (P-256), for its own name and nothing else. Extensions are ignored."""
    if len(text) > MAX_PEM:
        raise Invalid(f"has {len(text)} characters", field="$.csr", remedy=f"at most {MAX_PEM}")
    try:
        csr = x509.load_pem_x509_csr(text.encode())
        key, valid, subject = csr.public_key(), csr.is_signature_valid, list(csr.subject)
    except (ValueError, UnsupportedAlgorithm, InvalidSignature, TypeError):
        raise Invalid("not a certificate request in PEM form", field="$.csr") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Invalid("its key is not of the kind P-256", field="$.csr")
    if not valid:
        raise Refused("is not signed by its own key", field="$.csr")
    if len(subject) != 1 or subject[0].oid != NameOID.COMMON_NAME or subject[0].value != node:
        raise Refused(
            f"its subject is {csr.subject.rfc4514_string()[:120]!r}, not 'CN={node}'",
            field="$.csr",
            remedy="a node asks for its own name only",
        )
    return csr


def check_certificate(
    text: str, node: str, trusted: Sequence[x509.Certificate], now: float, *, expired: bool = False
) -> x509.Certificate:
    """A node's certificate: made by one of ``trusted`` for that node, and valid ``now`` unless ``expired`` may be."""
    cert = load_pem(text)
    for ca in trusted:
        try:
            cert.verify_directly_issued_by(ca)
        except (ValueError, TypeError, InvalidSignature):
            continue
        break
    else:
        raise Refused("this certificate was not made by this hub", resource=f"Node/{node}", field="$.certificate")
    names = [a.value for a in cert.subject if a.oid == NameOID.COMMON_NAME]
    if names != [node]:
        raise Refused(f"this certificate is {names}'s", resource=f"Node/{node}", field="$.certificate")
    if cert.not_valid_before_utc.timestamp() > now:
        raise Refused("this certificate is not valid yet", resource=f"Node/{node}", remedy="check the clocks")
    if cert.not_valid_after_utc.timestamp() < now and not expired:
        raise Refused(
            f"this certificate ended on {cert.not_valid_after_utc:%Y-%m-%d %H:%M} UTC",
            resource=f"Node/{node}",
            field="$.certificate",
            remedy="renew it",
        )
    return cert


# --- the authority ----------------------------------------------------------------------------------------------------


class Authority:
    """The CA in a directory (0700): ``ca.key`` signs, ``ca.crt`` is all that is trusted, the signing one first."""

    def __init__(self, directory: Path) -> None:
        ensure_dir(directory)
        self._directory = directory
        self.file = directory / "ca.crt"
        self._key_file = directory / "ca.key"
        self._next_file = directory / "ca-next.pem"
        self._links_file = directory / "ca-links.json"
        self._finish()
        self._load()

    def _load(self) -> None:
        if not self._key_file.exists():
            if self.file.exists():
                raise Invalid(
                    "the CA's key is gone",
                    file=str(self._key_file),
                    remedy="restore it from a backup: nodes trust it",
                )
            write_atomic(self._key_file, key_pem(new_key()))
        self._key = _load_key(self._key_file)
        if not self.file.exists():  # first start, or killed between the two writes
            write_atomic(self.file, pem(_new_ca(self._key)), 0o644)
        #: What is trusted; the first one signs.
        self.trusted = x509.load_pem_x509_certificates(self.file.read_bytes())
        if self.cert.public_key() != self._key.public_key():
            raise Invalid("the CA's key is another one's", file=str(self._key_file), remedy="restore both files")
        self.links = (
            msgspec.json.decode(self._links_file.read_bytes(), type=list[Link]) if self._links_file.exists() else []
        )

    @property
    def cert(self) -> x509.Certificate:
        return self.trusted[0]

    @property
    def next(self) -> x509.Certificate | None:
        """The CA that will sign after :meth:`activate`."""
        return x509.load_pem_x509_certificate(self._next_file.read_bytes()) if self._next_file.exists() else None

    def trust(self) -> Trust:
        following = self.next
        return Trust([pem(c) for c in (*self.trusted, *([following] if following else []))], self.links)

    def known(self) -> list[x509.Certificate]:
        """Every CA that ever signed here: a node that was away comes back with a certificate of an old one."""
        return [*self.trusted, *(load_pem(x.old) for x in self.links)]

    def sign(self, data: bytes) -> bytes:
        """Proof that the hub says ``data``; :func:`verify` checks it."""
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))

    # -- rotation ----------------------------------------------------------------------------------------------------

    def rotate(self) -> bool:
        """Makes the next CA, vouched for by the present one. False when there is one already."""
        if self._next_file.exists():
            return False
        key = new_key()
        cert = _new_ca(key)
        links = [*self.links[-(MAX_LINKS - 1) :], Link(pem(self.cert), pem(cert), self.sign(_vouch(self.cert, cert)))]
        # the link first: without the next CA it says nothing that is not so
        write_atomic(self._links_file, msgspec.json.encode(links), 0o644)
        write_atomic(self._next_file, key_pem(key) + pem(cert).encode())
        self._load()
        return True

    def activate(self) -> None:
        """Signs with the next CA from now on; the others stay trusted until :meth:`retire`."""
        if not self._next_file.exists():
            raise Conflict("there is no next CA", remedy="make one first: edgeward hub rotate-ca")
        write_atomic(self._key_file, key_pem(_load_key(self._next_file)))
        self._finish()
        self._load()

    def _finish(self) -> None:
        """The rest of an activation behind its first step; also that of one that was killed."""
        following = self.next
        if following is None or not self._key_file.exists():
            return
        if _load_key(self._key_file).public_key() != following.public_key():
            return
        old = x509.load_pem_x509_certificates(self.file.read_bytes())
        kept = [c for c in old if fingerprint(c) != fingerprint(following)]
        write_atomic(self.file, "".join(pem(c) for c in (following, *kept)), 0o644)
        remove(self._next_file)

    def retire(self) -> int:
        """Ends the trust in all CAs but the signing one; how many those were."""
        gone = len(self.trusted) - 1
        if gone:
            write_atomic(self.file, pem(self.cert), 0o644)
            self._load()
        return gone

    # -- certificates --------------------------------------------------------------------------------------------------

    def server(self, path: Path, names: Iterable[str], *, both: bool = False) -> bool:
        """Make the listener's certificate in ``path`` if it is missing, damaged, near its end or short of a name.

        True when it is new: load it again. Names that the present one carries are kept. ``both``: it is shown by a
        client too, as the servers of a cluster do to one another.
        """
        names = tuple(names)
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, *([ExtendedKeyUsageOID.CLIENT_AUTH] if both else [])]
        wanted = {_san(n) for n in (*LOCAL_NAMES, *names)}
        present = _load_issued(path, self.cert)
        if present is not None:
            have = set(present.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
            left = present.not_valid_after_utc - _now()
            if wanted <= have and left > SERVER_LIFE / 3:
                return False
        else:
            have = _names_of(path)
        wanted |= have
        key = new_key()
        common = next((n for n in names if n not in LOCAL_NAMES), "edgeward hub")[:64]
        cert = (
            _builder(common, key.public_key(), self.cert.subject, _now() + SERVER_LIFE)
            .add_extension(x509.SubjectAlternativeName(sorted(wanted, key=str)), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        write_atomic(path, key_pem(key) + pem(cert).encode())
        return True

    def node(
        self, csr: x509.CertificateSigningRequest, node: str, expires: float, names: Iterable[str] = ()
    ) -> x509.Certificate:
        """The certificate of a checked request: that node's name, nothing of what else the request asks for.

        ``names``: what the hub itself says that the node serves besides.
        """
        key = csr.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise Invalid("its key is not of the kind P-256", field="$.csr")
        end = datetime.fromtimestamp(expires, UTC)
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return (
            _builder(node, key, self.cert.subject, end)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(node + NODE_DOMAIN), *map(_san, names)]), critical=False
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _now() -> datetime:
    return max(datetime.now(UTC), MADE)


def _builder(
    common: str, key: ec.EllipticCurvePublicKey, issuer: x509.Name | None, end: datetime
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(BEGIN)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _new_ca(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    return (
        _builder(f"Edgeward hub CA {secrets.token_hex(4)}", key.public_key(), None, _now() + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(False, False, False, False, False, True, True, False, False),  # signs certificates and CRLs
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Invalid("not an EC key", file=str(path))
    return key


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _names_of(path: Path) -> set[x509.GeneralName]:
    """The names in a certificate that another CA signed: a new CA keeps them."""
    try:
        cert = x509.load_pem_x509_certificate(path.read_bytes())
        return set(cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (FileNotFoundError, ValueError, x509.ExtensionNotFound):
        return set()


def names_in(path: Path) -> set[str]:
    """The names of the certificate in ``path``, lower case."""
    return {str(n.value).lower() for n in _names_of(path)}


def _load_issued(path: Path, ca: x509.Certificate) -> x509.Certificate | None:
    """The certificate in ``path`` if the CA signed it; None asks for a new one."""
    try:
        cert = x509.load_pem_x509_certificate(path.read_bytes())
        cert.verify_directly_issued_by(ca)
    except (FileNotFoundError, ValueError, TypeError, InvalidSignature):
        return None
    return cert
