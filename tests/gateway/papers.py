"""Authorities and certificates for tests of TLS, made anew for each."""

from __future__ import annotations

import base64
import datetime
import ipaddress
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgeward.core.certs import key_pem, pem
from edgeward.gateway.listens import CertConfig, ListenerConfig, TlsConfig
from edgeward.gateway.pems import read_pair

BEGIN = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
END = datetime.datetime(2090, 1, 1, tzinfo=datetime.UTC)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Authority:
    """Signs; ``pem`` is what trusts it."""

    def __init__(self, name: str = "tests") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        builder = self._builder(self.name, self.key.public_key(), BEGIN, END)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self.cert = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.pem = pem(self.cert)

    def _builder(self, subject: x509.Name, key: Any, begin: Any, end: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )

    def issue(self, *names: str, common: str = "", begin: Any = BEGIN, end: Any = END) -> tuple[str, str]:
        """``(chain, key)`` in PEM, for servers and clients alike."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert = self.certify(key.public_key(), *names, common=common, begin=begin, end=end)
        return pem(cert), key_pem(key).decode()

    def certify(self, key: Any, *names: str, common: str = "", begin: Any = BEGIN, end: Any = END) -> x509.Certificate:
        sans: list[x509.GeneralName] = []
        for name in names:
            try:
                sans.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                sans.append(x509.DNSName(name))
        builder = self._builder(_name(common or (names[0] if names else "x")), key, begin, end)
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return (
            builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )


def certificate(chain: str, key: str, *hosts: str, source: str = "Secret/x") -> CertConfig:
    """As the agent hands it to the plane, but sealed by nobody (:func:`unsealed` opens it)."""
    pair = read_pair(chain, key)
    sealed = base64.b64encode(pair.pem.encode()).decode()
    return CertConfig(source, hosts or pair.names, pair.digest, sealed, ends=pair.ends)


def unsealed(sealed: bytes, place: str) -> bytes:
    return sealed


def listener(port: int, *certificates: CertConfig, key: str = "default/tls", **more: Any) -> ListenerConfig:
    tls = {k: more.pop(k) for k in ("client_ca", "client_optional", "min_version", "http2") if k in more}
    return ListenerConfig(key, "127.0.0.1", port, TlsConfig(certificates, **tls) if certificates else None, **more)


def plain(config: ListenerConfig) -> Any:
    return msgspec.to_builtins(config)
