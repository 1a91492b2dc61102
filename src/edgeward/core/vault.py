"""Secrets at rest: what a kind declares secret goes onto disks and into streams only sealed with this machine's key.

In go the stored form of a resource (or any bytes) and the place where it will lie, out comes the same with its secret
fields sealed (ChaCha20-Poly1305, RFC 8439; the place is authenticated, so a sealed value cannot be moved to another
object). A value that lies there in plain, from a release before this one, is read as it is and sealed with the next
write. The key is looked for where the system keeps such things and is made as a file where it has none; who holds both
the file and the disk reads the secrets, which is why :attr:`Vault.source` is reported. Nothing here logs a value.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hashlib
import logging
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from edgeward.core.errors import EdgewardError, Invalid
from edgeward.core.files import ensure_dir, read_json, write_atomic, write_json
from edgeward.core.registry import replace_at, secret_paths
from edgeward.core.resource import (
    CLUSTER,
    Key,
    Resource,
    decode_stored,
    from_stored,
    read_stored,
    to_stored,
    write_stored,
)

log = logging.getLogger("edgeward.vault")

KEY_BYTES = 32
#: Name of the key among systemd's credentials and in the kernel's keyring.
CREDENTIAL, KEYRING = "edgeward-vault", b"edgeward:vault"
_MARK = "$sealed"
_NONCE = 12
# (request_key, keyctl) of the kernel; KEYCTL_READ is 11
_SYSCALLS = {"x86_64": (249, 250), "aarch64": (218, 219)}


class Vault:
    """One machine's key. Make it with :meth:`open`; ``Vault(key)`` is for tests and restores."""

    def __init__(self, key: bytes, source: str = "given") -> None:
        if len(key) != KEY_BYTES:
            raise Invalid(f"a vault's key has {KEY_BYTES} bytes, this one {len(key)}", resource=source)
        self._key = key
        self._cipher = ChaCha20Poly1305(key)
        #: Where the key came from: ``systemd credential``, ``kernel keyring`` or ``file``.
        self.source = source
        #: Names the key without telling it.
        self.id = hashlib.sha256(b"edgeward vault id" + key).hexdigest()[:16]

    @classmethod
    def open(cls, directory: Path) -> Vault:
        """The key of the store in ``directory``: systemd's credential, the kernel's keyring, else a file made here.

        Raises ``Invalid`` when the key found is not the one that the store was sealed with.
        """
        vault = cls._found(directory)
        record = ensure_dir(directory) / "vault.json"
        known = read_json(record, {}).get("key")
        if known is None:
            write_json(record, {"key": vault.id})
        elif known != vault.id:
            raise Invalid(
                f"the key from {vault.source} is not the one that this store was sealed with",
                resource=str(directory),
                remedy="put the former key back (a backup holds it)",
            )
        return vault

    @classmethod
    def of_file(cls, path: Path) -> Vault:
        """The key in a key file, wherever the machine has its own. Raises ``Invalid``, ``OSError``."""
        return cls(_decoded(path), "file")

    @classmethod
    def _found(cls, directory: Path) -> Vault:
        folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
        credential = Path(folder) / CREDENTIAL
        if folder and credential.is_file():
            return cls(_decoded(credential), "systemd credential")
        from_keyring = _keyring()
        if from_keyring is not None:
            return cls(from_keyring, "kernel keyring")
        path = directory / "vault.key"
        if not path.exists():
            if (directory / "vault.json").exists():
                raise Invalid(
                    "the key that this store was sealed with is gone",
                    file=str(path),
                    remedy="restore it from a backup, or bring back the credential that held it",
                )
            ensure_dir(directory)
            write_atomic(path, base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode() + "\n")
        return cls(_decoded(path), "file")

    def export(self) -> str:
        """The key in the form of the key file: for a backup, which is sealed itself."""
        return base64.b64encode(self._key).decode()

    def __repr__(self) -> str:
        return f"Vault({self.id} from {self.source})"

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def seal(self, data: bytes, place: str) -> bytes:
        """``data`` for this ``place`` only; :meth:`unseal` gives it back."""
        nonce = secrets.token_bytes(_NONCE)
        return nonce + self._cipher.encrypt(nonce, data, place.encode())

    def unseal(self, sealed: bytes, place: str) -> bytes:
        try:
            return self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], place.encode())
        except (InvalidTag, ValueError):
            raise EdgewardError(
                "cannot be unsealed: it was sealed with another key, for another object, or is damaged",
                resource=place,
                remedy="is the vault's key the right one? else write the secret anew",
            ) from None

    # -- resources -------------------------------------------------------------------------------------------------

    def encode(self, resource: Resource) -> bytes:
        """:func:`~edgeward.core.resource.encode_stored` with its secret values sealed."""
        stored = to_stored(resource)
        paths = secret_paths(stored.kind, stored.spec)
        for path in paths:
            place = _place(resource.key, path)

            def sealed(value: Any, place: str = place) -> dict[str, str]:
                return {_MARK: base64.b64encode(self.seal(msgspec.json.encode(value), place)).decode()}

            stored.spec = replace_at(stored.spec, path, sealed)
        return write_stored(stored, str(resource.key), slack=2 if paths else 1)

    def decode(self, data: bytes, status: dict[str, Any] | None = None) -> Resource:
        """The inverse of :meth:`encode`; also reads what was stored in plain."""
        stored = read_stored(data)
        key = Key(stored.kind, stored.metadata.namespace or CLUSTER, stored.metadata.name)
        for path in secret_paths(stored.kind, stored.spec):
            place = _place(key, path)

            def unsealed(value: Any, place: str = place) -> Any:
                if not _is_sealed(value):
                    return value
                try:
                    raw = base64.b64decode(value[_MARK], validate=True)
                except binascii.Error:
                    raw = b""
                return msgspec.json.decode(self.unseal(raw, place))

            stored.spec = replace_at(stored.spec, path, unsealed)
        return from_stored(stored, status)

    def is_plain(self, data: bytes) -> bool:
        """Whether a stored resource holds secret values that are not sealed."""
        stored = read_stored(data)
        plain = False

        def look(value: Any) -> Any:
            nonlocal plain
            plain = plain or not _is_sealed(value)
            return value

        for path in secret_paths(stored.kind, stored.spec):
            replace_at(stored.spec, path, look)
        return plain


def _is_sealed(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {_MARK} and isinstance(value[_MARK], str)


class Plain(Vault):
    """Seals nothing: for stores that live in memory, and for tests of other things."""

    def __init__(self) -> None:
        super().__init__(bytes(KEY_BYTES), "none")

    def seal(self, data: bytes, place: str) -> bytes:
        return data

    def unseal(self, sealed: bytes, place: str) -> bytes:
        return sealed

    def encode(self, resource: Resource) -> bytes:
        return write_stored(to_stored(resource), str(resource.key))

    def decode(self, data: bytes, status: dict[str, Any] | None = None) -> Resource:
        return decode_stored(data, status)

    def is_plain(self, data: bytes) -> bool:
        return False


def _place(key: Key, path: tuple[str, ...]) -> str:
    return "/".join((key.kind, key.namespace, key.name, *path))


def _decoded(path: Path) -> bytes:
    try:
        key = base64.b64decode(path.read_bytes().strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise Invalid(
            "is no vault key",
            file=str(path),
            remedy=f"it holds {KEY_BYTES} random bytes in base64: head -c {KEY_BYTES} /dev/urandom | base64",
        )
    return key


def _keyring() -> bytes | None:
    """The key ``edgeward:vault`` of the user's kernel keyring (keyctl(2)), or None where there is none."""
    numbers = _SYSCALLS.get(os.uname().machine)
    if numbers is None or not sys.platform.startswith("linux"):
        return None
    request_key, keyctl = numbers
    libc = ctypes.CDLL(None, use_errno=True)
    serial = libc.syscall(request_key, b"user", KEYRING, None, 0)
    if serial < 0:
        return None
    buffer = ctypes.create_string_buffer(256)
    size = libc.syscall(keyctl, 11, serial, buffer, len(buffer), 0)
    text = buffer.raw[: max(0, min(size, len(buffer)))]
    ctypes.memset(buffer, 0, len(buffer))
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise Invalid(
            "the kernel keyring's edgeward:vault is no vault key", remedy=f"it holds {KEY_BYTES} bytes in base64"
        )
    return key
