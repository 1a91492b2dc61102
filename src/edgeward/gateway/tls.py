"""TLS as a listener shows it: contexts made of its certificates, chosen for each handshake by the name asked for.

A configuration becomes a :class:`Front`, whole, and is never changed: the next one takes its place for the handshakes
that come then, and connections that are there keep theirs. OpenSSL reads keys from files only, so a key goes through a
file that is in memory and has no name.
"""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from edgeward.core.errors import EdgewardError
from edgeward.gateway.listens import CertConfig, TlsConfig, by_host, find, place
from edgeward.gateway.peer import Peer, peer_of

#: ``(sealed, place)`` to what was sealed; raises ``EdgewardError``.
Unseal = Callable[[bytes, str], bytes]
#: RFC 9113, section 9.2.2 forbids what is not ephemeral and authenticated; so do we everywhere.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


@contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """A path that holds ``data`` for a moment."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
        try:
            os.write(fd, data)
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)
    else:
        fd, path = tempfile.mkstemp()  # 0600
        try:
            os.write(fd, data)
            yield path
        finally:
            os.close(fd)
            Path(path).unlink()


def _context(pem: bytes, config: TlsConfig) -> ssl.SSLContext:
    """Raises ``ssl.SSLError``, ``OSError``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if config.min_version == "1.3" else ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["h2", "http/1.1"] if config.http2 else ["http/1.1"])
    if config.client_ca:
        context.load_verify_locations(cadata=config.client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL if config.client_optional else ssl.CERT_REQUIRED
    with _in_memory(pem) as path:
        context.load_cert_chain(path, password=lambda: b"")  # nobody is asked for one at a terminal
    return context


class Shown(NamedTuple):
    """One certificate at work. ``problem``: why it is not the one that is declared."""

    config: CertConfig
    pem: bytes
    context: ssl.SSLContext
    problem: str = ""


class Front:
    """What one listener shows. ``context`` is for the handshake of a connection; None: there is no certificate."""

    def __init__(self, key: str, config: TlsConfig, unseal: Unseal, old: Front | None) -> None:
        self.config = config
        self.shown: list[Shown] = []
        #: Certificates that are not there, with the reason.
        self.missing: list[tuple[CertConfig, str]] = []
        before = {s.config.source: s for s in old.shown} if old is not None else {}
        for cert in config.certificates:
            self._take(key, cert, unseal, before.get(cert.source))
        self._contexts = by_host((s.config.hosts, s.context) for s in self.shown)
        self.context = self.shown[0].context if self.shown else None
        if self.context is not None:
            self.context.sni_callback = self._choose

    def _take(self, key: str, cert: CertConfig, unseal: Unseal, before: Shown | None) -> None:
        """The certificate that is declared; where that is not to be had, the one before it, while it lasts."""
        why = cert.waiting
        if cert.sealed:
            try:
                pem = unseal(base64.b64decode(cert.sealed, validate=True), place(key, cert.digest))
                self.shown.append(Shown(cert, pem, _context(pem, self.config)))
                return
            except (EdgewardError, binascii.Error, ssl.SSLError, OSError) as e:
                why = f"cannot be used: {e}"
        if before is not None:
            why = f"{why}; the one before it is shown"
            self.shown.append(Shown(before.config, before.pem, _context(before.pem, self.config), why))
        else:
            self.missing.append((cert, why))

    def _choose(self, ssl_object: Any, name: str | None, _: ssl.SSLContext) -> int | None:
        if name is None:
            return None  # no name: the first one
        context = find(self._contexts, name.lower())
        if context is None:
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        ssl_object.context = context
        return None

    def takes(self, host: str) -> bool:
        """Whether requests for that host are answered here."""
        return find(self._contexts, host) is not None


def protocol_of(ssl_object: Any) -> tuple[str, Peer | None]:
    """What a handshake agreed on: ``h2`` or not, and who the client is."""
    peer = None
    said, der = ssl_object.getpeercert(), ssl_object.getpeercert(True)
    if said and der:  # the first only of one that was verified
        peer = peer_of(said, der)
    return ssl_object.selected_alpn_protocol() or "", peer
