"""What the nodes of a site say to one another by datagram, and what makes it theirs alone. Pure.

A run of an agent has one key of its own (X25519), shown to others on a *card* that the device key signed. From two
cards each side makes the same two keys, one for each way; all else that passes is sealed by them (ChaCha20-Poly1305,
RFC 8439). So what was captured in another run opens nowhere, a stranger's flood ends at a dictionary look-up, and one
signature serves for all the datagrams of two runs. What is done with them is decided in ``mesh_links.py``.

``card``:     ``EM 1 flags signature(64) msgpack [node, site, epoch, key]``
``sealed``:   ``EM 2 link(8) sequence(8) ciphertext``; inside ``time(8, double) topic-length(1) topic payload``
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping

import msgspec
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edgeward.core.errors import Invalid
from edgeward.core.nkeys import public_raw
from edgeward.core.spans import host_port

#: Bytes that one datagram carries for its topic, and in all: no link of a site cuts it in two.
SAY_MOST, DATAGRAM = 1100, 1200
_CARD, _SEALED = b"EM\x01", b"EM\x02"
_HEAD = struct.Struct(">3s8sQ")
_TIME = struct.Struct(">d")
#: The other side is asked for its card.
ASKS = 1
#: What a device key puts its name to: each has a beginning of its own, and none is the enrolment's.
_SIGNED_CARD = b"edgeward mesh card 1\0"
_SIGNED_REPORT = b"edgeward mesh report 1\0"
_SIGNED_TLS = b"edgeward mesh tls 1\0"
_TOPIC = re.compile(r"[a-z0-9][a-z0-9.-]{0,31}")
_CARD_MOST = 360
#: Sequence numbers behind the newest one that are told apart.
_WINDOW = 1024

Address = tuple[str, int]


class Known(msgspec.Struct, frozen=True):
    """One other node of the site, by the hub's word. ``key``: the raw device key."""

    node: str
    key: bytes
    address: Address | None = None


class PeerInfo(msgspec.Struct, frozen=True):
    """What this node knows of another one of its site.

    ``address``: where it was last heard, or is said to be. ``heard``: monotonic seconds of its last authenticated word,
    -inf before. ``rtt``: seconds there and back, 0.0 before it was measured. ``linked``: datagrams pass.
    """

    node: str
    address: Address | None
    heard: float
    rtt: float
    linked: bool


class Heard(msgspec.Struct, frozen=True):
    """How a datagram came. ``age``: seconds since it was said, as measured; ``at``: monotonic, when it arrived."""

    epoch: int
    seq: int
    age: float
    at: float
    address: Address


class Card(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Who speaks in this run. ``epoch`` grows with each run of a node; ``key``: X25519, 32 bytes."""

    node: str
    site: str
    epoch: int
    key: bytes


class Opened(msgspec.Struct, frozen=True):
    seq: int
    time: float
    topic: str
    data: bytes


def address_of(text: object) -> Address | None:
    """``host:port`` as a Node's status says it; None for anything else."""
    if not isinstance(text, str) or len(text) > 300:
        return None
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536):
        return None
    return host.strip("[]"), int(port)


def text_of(address: Address) -> str:
    return host_port(*address)


def known_of(node: str, status: Mapping[str, object]) -> Known | None:
    """A node by the status that the hub gave it; None: it was revoked, or the hub does not say by which key it is."""
    said = status.get("credentials")
    key = said.get("publicKey") if isinstance(said, Mapping) else None
    if status.get("revoked") or not isinstance(key, str):
        return None
    try:
        return Known(node, public_raw(key, "user"), address_of(status.get("mesh")))
    except Invalid:
        return None


def check_topic(topic: str) -> bytes:
    if not _TOPIC.fullmatch(topic):
        raise Invalid(f"{topic[:40]!r} is no topic", remedy="a-z, 0-9, '.' and '-', at most 32 characters")
    return topic.encode()


# --- signatures -------------------------------------------------------------------------------------------------------


def to_sign_report(data: bytes) -> bytes:
    return _SIGNED_REPORT + data


def to_sign_certificate(fingerprint: bytes) -> bytes:
    """What binds a certificate to a device key: the hub may have made others for that name, for other boxes."""
    return _SIGNED_TLS + fingerprint


def signed(key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether the holder of the raw device key signed ``data``."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


# --- cards ------------------------------------------------------------------------------------------------------------


def to_sign_card(packed: bytes) -> bytes:
    return _SIGNED_CARD + packed


def show(packed: bytes, signature: bytes, *, asks: bool) -> bytes:
    """The datagram that shows a card."""
    return _CARD + bytes([ASKS if asks else 0]) + signature + packed


def shown(data: bytes) -> tuple[Card, bytes, bytes, bool] | None:
    """(card, its packed form, signature, whether an answer is asked for); None: this is none."""
    if not data.startswith(_CARD) or not 68 < len(data) <= _CARD_MOST:
        return None
    packed = data[68:]
    try:
        card = msgspec.msgpack.decode(packed, type=Card)
    except (msgspec.DecodeError, ValueError):
        return None
    if len(card.key) != 32 or len(card.node) > 63 or not 0 < card.epoch < 1 << 63:
        return None
    return card, packed, data[4:68], bool(data[3] & ASKS)


# --- links ------------------------------------------------------------------------------------------------------------


class Window:
    """Which sequence numbers were taken: none is taken twice, nor one that is too far behind (RFC 4303, 3.4.3)."""

    def __init__(self) -> None:
        self.newest = 0
        self._taken = 0  # bit n: newest - n

    def fresh(self, seq: int) -> bool:
        behind = self.newest - seq
        return behind < 0 or (behind < _WINDOW and not self._taken >> behind & 1)

    def take(self, seq: int) -> None:
        ahead = seq - self.newest
        if ahead > 0:
            self._taken = ((self._taken << ahead) & ((1 << _WINDOW) - 1) if ahead < _WINDOW else 0) | 1
            self.newest = seq
        else:
            self._taken |= 1 << -ahead


class Link:
    """The keys of two runs. ``own``, ``other``: the packed cards. Raises ``ValueError`` for a key that is none."""

    def __init__(self, key: X25519PrivateKey, own: bytes, other: bytes, card: Card, me: str) -> None:
        self.card, self.packed = card, other
        shared = key.exchange(X25519PublicKey.from_public_bytes(card.key))
        first = me < card.node
        # both whole cards are in the keys: nobody can be made to believe that he speaks with somebody else
        salt = hashlib.sha256(own + other if first else other + own).digest()
        made = HKDF(hashes.SHA256(), 80, salt, b"edgeward mesh link 1").derive(shared)
        keys, ids = (made[:32], made[32:64]), (made[64:72], made[72:80])
        mine, theirs = (0, 1) if first else (1, 0)
        self._out, self._in = ChaCha20Poly1305(keys[mine]), ChaCha20Poly1305(keys[theirs])
        self.out_id, self.in_id = ids[mine], ids[theirs]
        self._seq = 0
        self.window = Window()

    def seal(self, now: float, topic: bytes, data: bytes) -> bytes:
        """A datagram; ``now``: this run's monotonic seconds."""
        self._seq += 1
        head = _HEAD.pack(_SEALED, self.out_id, self._seq)
        inside = _TIME.pack(now) + bytes([len(topic)]) + topic + data
        # a key serves for one way of two runs, and no number is used twice in it
        return head + self._out.encrypt(self._seq.to_bytes(12, "big"), inside, head)

    def open(self, datagram: bytes) -> Opened | None:
        """What is in it; None: it was not made by the other run. Whether it is fresh is the window's to say."""
        _, _, seq = _HEAD.unpack_from(datagram)
        try:
            inside = self._in.decrypt(seq.to_bytes(12, "big"), datagram[_HEAD.size :], datagram[: _HEAD.size])
        except (InvalidTag, ValueError):
            return None
        n = inside[8] if len(inside) > 8 else 255
        if len(inside) < 9 + n:
            return None
        (time,) = _TIME.unpack_from(inside)
        try:
            return Opened(seq, time, inside[9 : 9 + n].decode(), inside[9 + n :])
        except UnicodeDecodeError:
            return None


def sealed(data: bytes) -> tuple[bytes, int] | None:
    """(which link, sequence number) of a sealed datagram; None: this is none."""
    if not data.startswith(_SEALED) or not _HEAD.size + 16 < len(data) <= DATAGRAM:
        return None
    _, link, seq = _HEAD.unpack_from(data)
    return link, seq
