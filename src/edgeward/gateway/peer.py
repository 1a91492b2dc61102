"""Who a client is by its certificate: what TLS has verified, in plain words, and whether a Route lets it in. Pure.

A listener with ``tls.clientCA`` asks for a certificate; only one that those authorities vouch for becomes a peer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

_SHORT = {
    "commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU", "countryName": "C",
    "localityName": "L", "stateOrProvinceName": "ST", "domainComponent": "DC", "userId": "UID", "serialNumber": "SN",
}  # fmt: skip
_KINDS = {"DNS": "dns", "URI": "uri", "email": "email", "IP Address": "ip"}


class Peer(NamedTuple):
    """``subject``: as RFC 4514 writes it, in the certificate's order: ``CN=till-7,O=Shop``. ``sans``: ``dns:NAME``,
    ``uri:...``, ``email:...``, ``ip:...``. ``fingerprint``: SHA-256 of the DER form, hex."""

    subject: str
    sans: tuple[str, ...]
    fingerprint: str


def _escaped(value: str) -> str:
    """RFC 4514, section 2.4: a comma in a name is not the end of it."""
    text = "".join(f"\\{c}" if c in ',+"\\<>;' else f"\\{ord(c):02x}" if c < " " else c for c in value)
    if text[:1] in ("#", " "):
        text = "\\" + text
    return text[:-1] + "\\ " if text.endswith(" ") and len(text) > 1 else text


def peer_of(said: Mapping[str, Any], der: bytes) -> Peer:
    """Of what ``SSLObject.getpeercert`` gives, as fields and in DER form."""
    names = []
    for several in said.get("subject", ()):
        names.append("+".join(f"{_SHORT.get(k, k)}={_escaped(v)}" for k, v in several))
    sans = tuple(f"{_KINDS[k]}:{v}" for k, v in said.get("subjectAltName", ()) if k in _KINDS)
    return Peer(",".join(names), sans, hashlib.sha256(der).hexdigest())


def allows(
    peer: Peer | None,
    subjects: Collection[str] = (),
    sans: Collection[str] = (),
    fingerprints: Collection[str] = (),
) -> bool:
    """Whether a Route that names these lets the client in: by any of them; without any, every verified one."""
    if peer is None:
        return False
    if not (subjects or sans or fingerprints):
        return True
    return peer.subject in subjects or peer.fingerprint in fingerprints or any(s in sans for s in peer.sans)
