"""Sealed files: what only the holder of a recovery key can read, and what anybody can see to be whole.

In: bytes and the public half of a recovery key; out: a file of one header, authenticated chunks and a signature.
Reading goes the other way. Every changed byte and every cut is found, with the key or without it. This module never
opens a file, never keeps a private key in a sealed one, and asks no clock.

Layout (integers big-endian)::

    16  "EDGEWARD SEALED\\n"
    2   version of this layout
    4   length of the header          at most 64 KiB
    n   header, JSON: recipient, signer, ephemeral (base64), and what the writer notes in the clear
    then frames: 1 type, 4 length, body
        1  chunk        ChaCha20-Poly1305 ciphertext of at most 64 KiB
        2  last chunk   the same; exactly one, and it may be empty
        3  signature    Ed25519 over SHA-256 of all before this frame; nothing follows

The key is HKDF-SHA256 of an X25519 exchange between a key made for this file and the recovery key, bound to the
header's digest; the nonce is the chunk's number and whether it is the last one (the STREAM construction of Hoang,
Reyhanitabar, Rogaway and Vizar, 2015). So chunks cannot be left out, swapped, or taken from another file. The signature
is made by the hub, whose public key the recovery key carries: anybody may encrypt to a public key, but only the hub's
own backup is restored.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edgeward.core.b64url import b64, unb64
from edgeward.core.errors import Invalid, Refused

MAGIC = b"EDGEWARD SEALED\n"
VERSION = 1
CHUNK = 64 * 1024
_TAG = 16
_HEADER_MOST = 64 * 1024
_PART, _LAST, _SIGNATURE = 1, 2, 3
_SIGNED = b"edgeward sealed file 1\n"
_DAMAGED = "it was cut short or changed; use another copy"
_KEY_WORD = "ewr_"


class Readable(Protocol):
    """What :func:`unseal` reads from: a binary file."""

    def read(self, size: int, /) -> bytes: ...


def _raw(text: object, size: int) -> bytes:
    """Decodes what :func:`b64` made. Raises ``ValueError``."""
    if not isinstance(text, str) or len(text) > 4 * size:
        raise ValueError("no key")
    raw = unb64(text)
    if len(raw) != size or b64(raw) != text:
        raise ValueError("no key")
    return raw


# --- keys ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecoveryKey:
    """What the operator keeps: the private half that reads, and the public half of the hub that wrote."""

    private: bytes = field(repr=False)
    signer: bytes

    @property
    def recipient(self) -> bytes:
        return X25519PrivateKey.from_private_bytes(self.private).public_key().public_bytes_raw()

    @property
    def id(self) -> str:
        return key_id(self.recipient)

    def text(self) -> str:
        """One word, with a check sum, that survives paper."""
        body = self.private + self.signer
        return _KEY_WORD + b64(body + hashlib.sha256(body).digest()[:4])

    @classmethod
    def parse(cls, text: str, *, file: str = "") -> RecoveryKey:
        """The key in a text that holds its word. Raises ``Invalid``; the text itself is never repeated."""
        for word in text.split():
            if not word.startswith(_KEY_WORD):
                continue
            try:
                raw = _raw(word.removeprefix(_KEY_WORD), 68)
            except (ValueError, binascii.Error):
                raise Invalid("the recovery key is not whole", file=file, remedy="copy it again, all of it") from None
            if hashlib.sha256(raw[:64]).digest()[:4] != raw[64:]:
                raise Invalid("the recovery key has a wrong letter", file=file, remedy="copy it again")
            return cls(raw[:32], raw[32:64])
        raise Invalid(f"has no recovery key in it (a word that begins with {_KEY_WORD})", file=file)


@dataclass(frozen=True)
class SealingKey:
    """What the hub keeps: it can write sealed files and not read them."""

    recipient: bytes
    seed: bytes = field(repr=False)

    @property
    def signer(self) -> bytes:
        return Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw()

    @property
    def id(self) -> str:
        return key_id(self.recipient)

    def document(self) -> dict[str, str]:
        return {"recipient": b64(self.recipient), "signer": b64(self.signer), "seed": b64(self.seed)}

    @classmethod
    def parse(cls, doc: object, *, file: str = "") -> SealingKey:
        doc = doc if isinstance(doc, Mapping) else {}
        try:
            return cls(_raw(doc.get("recipient"), 32), _raw(doc.get("seed"), 32))
        except (ValueError, binascii.Error):
            raise Invalid("is no sealing key", file=file, remedy="restore the file from a backup") from None


def key_id(recipient: bytes) -> str:
    """A short name of a recovery key, safe to show."""
    return hashlib.sha256(b"edgeward recovery\n" + recipient).hexdigest()[:16]


def new_keys() -> tuple[RecoveryKey, SealingKey]:
    private = X25519PrivateKey.generate()
    seed = Ed25519PrivateKey.generate().private_bytes_raw()
    sealing = SealingKey(private.public_key().public_bytes_raw(), seed)
    return RecoveryKey(private.private_bytes_raw(), sealing.signer), sealing


def _cipher(shared: bytes, ephemeral: bytes, recipient: bytes, start: bytes) -> ChaCha20Poly1305:
    info = b"edgeward seal 1\n" + hashlib.sha256(start).digest()
    kdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=ephemeral + recipient, info=info)
    return ChaCha20Poly1305(kdf.derive(shared))


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


# --- writing ------------------------------------------------------------------------------------------------------


class Sealer:
    """Feed :meth:`update`, end with :meth:`finish`; what they give, in order, is the file."""

    def __init__(self, key: SealingKey, notes: Mapping[str, Any]) -> None:
        """``notes`` stand in the clear (and signed) in the header: nothing secret belongs there."""
        ephemeral = X25519PrivateKey.generate()
        public = ephemeral.public_key().public_bytes_raw()
        header = json.dumps(
            {
                **notes,
                "recipient": b64(key.recipient),
                "signer": b64(key.signer),
                "ephemeral": b64(public),
            },
            sort_keys=True,
        ).encode()
        if len(header) > _HEADER_MOST:
            raise Invalid("too many notes for a header")
        self._start = MAGIC + struct.pack(">HI", VERSION, len(header)) + header
        shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(key.recipient))
        self._cipher = _cipher(shared, public, key.recipient, self._start)
        self._seed = key.seed
        self._digest = hashlib.sha256()
        self._buffer = bytearray()
        self._number = 0
        self._begun = False

    def _out(self, raw: bytes) -> bytes:
        self._digest.update(raw)
        return raw

    def _frame(self, plain: bytes, *, last: bool) -> bytes:
        body = self._cipher.encrypt(_nonce(self._number, last), plain, None)
        self._number += 1
        return self._out(struct.pack(">BI", _LAST if last else _PART, len(body)) + body)

    def update(self, data: bytes) -> bytes:
        out = bytearray()
        if not self._begun:
            self._begun = True
            out += self._out(self._start)
        self._buffer += data
        while len(self._buffer) > CHUNK:  # a full buffer may still be the last one
            out += self._frame(bytes(self._buffer[:CHUNK]), last=False)
            del self._buffer[:CHUNK]
        return bytes(out)

    def finish(self) -> bytes:
        out = self.update(b"")
        out += self._frame(bytes(self._buffer), last=True)
        signature = Ed25519PrivateKey.from_private_bytes(self._seed).sign(_SIGNED + self._digest.digest())
        return out + struct.pack(">BI", _SIGNATURE, len(signature)) + signature


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """The clear part of a sealed file."""

    notes: dict[str, Any]
    recipient: bytes
    signer: bytes
    ephemeral: bytes
    raw: bytes = field(repr=False)

    @property
    def key_id(self) -> str:
        return key_id(self.recipient)


def _exactly(source: Readable, size: int, file: str) -> bytes:
    got = bytearray()
    while len(got) < size:
        piece = source.read(size - len(got))
        if not piece:
            raise Invalid("ends too early", file=file, remedy=_DAMAGED)
        got += piece
    return bytes(got)


def read_header(source: Readable, *, file: str = "") -> Header:
    """The header alone, not yet vouched for. Raises ``Invalid``, and ``Refused`` for a later layout."""
    start = _exactly(source, len(MAGIC), file)
    if start != MAGIC:
        raise Invalid("is no sealed file of Edgeward", file=file, remedy="is it the right file? " + _DAMAGED)
    fixed = _exactly(source, 6, file)
    version, size = struct.unpack(">HI", fixed)
    if version > VERSION:
        raise Refused(
            f"was written in layout {version}, this release knows {VERSION}",
            file=file,
            remedy="use the release of Edgeward that wrote it, or a later one",
        )
    if version < 1 or size > _HEADER_MOST:
        raise Invalid("has a damaged beginning", file=file, remedy=_DAMAGED)
    raw = _exactly(source, size, file)
    try:
        doc = json.loads(raw)
        recipient, signer, ephemeral = (_raw(doc.pop(name), 32) for name in ("recipient", "signer", "ephemeral"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
        raise Invalid("has a damaged header", file=file, remedy=_DAMAGED) from None
    return Header(doc, recipient, signer, ephemeral, raw=start + fixed + raw)


def unseal(
    source: Readable, header: Header, *, key: RecoveryKey | None = None, file: str = "", signer: bytes = b""
) -> Iterator[bytes]:
    """What follows the header: the plain chunks with ``key``, else nothing but the check of every byte.

    Run it to its end before trusting what it gave: the signature comes last. ``signer``: the hub's public key, where
    another than the recovery key's own is known. Raises ``Invalid`` where a byte was changed, and ``Refused`` for the
    wrong key.
    """
    cipher = None
    if key is not None:
        if key.recipient != header.recipient:
            raise Refused(
                f"needs the recovery key {header.key_id}, this one is {key.id}", file=file, remedy="give it by --key"
            )
        signer = signer or key.signer
        try:
            own = X25519PrivateKey.from_private_bytes(key.private)
            shared = own.exchange(X25519PublicKey.from_public_bytes(header.ephemeral))
        except ValueError:
            raise Invalid("has a damaged header", file=file, remedy=_DAMAGED) from None
        cipher = _cipher(shared, header.ephemeral, header.recipient, header.raw)
    if signer and signer != header.signer:
        raise Refused("was not written by the hub that this key belongs to", file=file, remedy="do not restore it")
    digest = hashlib.sha256(header.raw)
    number, ended = 0, False
    while True:
        head = _exactly(source, 5, file)
        sort, size = struct.unpack(">BI", head)
        if sort == _SIGNATURE and ended and size == 64:
            break
        if ended or sort not in (_PART, _LAST) or not _TAG <= size <= CHUNK + _TAG:
            raise Invalid(f"is damaged behind chunk {number}", file=file, remedy=_DAMAGED)
        body = _exactly(source, size, file)
        digest.update(head + body)
        if cipher is not None:
            try:
                plain = cipher.decrypt(_nonce(number, sort == _LAST), body, None)
            except InvalidTag:
                raise Invalid(f"is damaged in chunk {number}", file=file, remedy=_DAMAGED) from None
            if plain:
                yield plain
        number, ended = number + 1, sort == _LAST
    signature = _exactly(source, 64, file)
    if source.read(1):
        raise Invalid("goes on behind its end", file=file, remedy=_DAMAGED)
    try:
        Ed25519PublicKey.from_public_bytes(header.signer).verify(signature, _SIGNED + digest.digest())
    except (InvalidSignature, ValueError):
        raise Invalid("its signature does not fit: a byte was changed", file=file, remedy=_DAMAGED) from None
