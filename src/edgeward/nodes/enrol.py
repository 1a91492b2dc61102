"""Who may join, renew, come back and leave: the rules. Pure: what is known and what is asked go in, a decision or an
error with its reason comes out; time and chance are arguments.

A node's *name* goes through these states, kept in its :class:`Member`:

    free --token--> held by a key --revoke--> barred --replace token--> held by another key
                    held by a key --node deleted or left--> free, that key barred

A **join token** is good for one name at one site, once, for a while. Its secret is the seed of a signing key: the box
proves that it has it without showing it, so neither a proxy that looks into TLS nor the hub's own store can use it. The
box's **device key** is made on the box and stays there; whoever signs with it is the node, whatever has expired. Each
key that held a name and lost it is barred for ever. Who signs what over HTTP is in ``enrol_cloud.py`` and
``enrol_edge.py``.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgeward.core.b64url import b64, unb64
from edgeward.core.backoff import backoff
from edgeward.core.errors import Forbidden, Invalid, NotFound, Refused
from edgeward.core.nkeys import KeyPair, verify

TOKEN_PREFIX = "ewj_"  # noqa: S105 - how every token begins
MAX_TOKEN = 2048
DEFAULT_TTL = 24 * 3600.0
MAX_TTL = 30 * 86400.0
DEFAULT_LIFE = 90 * 86400.0
#: Seconds that a hub's nonce is good for.
NONCE_LIFE = 120.0
#: Tokens that a name remembers as used; they all have expired long before this many were made.
_USED = 64


# --- the token --------------------------------------------------------------------------------------------------------


class Token(msgspec.Struct, frozen=True, array_like=True):
    """What stands in a token's text. ``pin``: SHA-256 of the hub's CA certificate; ``secret``: 32 random bytes."""

    version: int
    name: str
    node: str
    site: str
    urls: list[str]
    pin: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"Token({self.name}, node={self.node}, site={self.site})"

    @property
    def key(self) -> KeyPair:
        return KeyPair("user", self.secret)


def encode_token(token: Token) -> str:
    body = msgspec.msgpack.encode(token)
    check = hashlib.sha256(body).digest()[:4]
    return TOKEN_PREFIX + b64(check + body)


def decode_token(text: str) -> Token:
    """Raises ``Invalid``; never says what stands in it."""
    text = text.strip()
    if not text.startswith(TOKEN_PREFIX) or len(text) > MAX_TOKEN:
        raise Invalid(
            "that is no join token", remedy=f"it begins with {TOKEN_PREFIX}; `edgeward token create` prints it"
        )
    try:
        raw = unb64(text[len(TOKEN_PREFIX) :])
        if not hmac.compare_digest(hashlib.sha256(raw[4:]).digest()[:4], raw[:4]):
            raise ValueError
        version = msgspec.msgpack.decode(raw[4:])[0]
        if version != 1:
            raise Invalid(f"this join token is of version {version}", remedy="install a newer edgeward on this box")
        token = msgspec.msgpack.decode(raw[4:], type=Token)
        if len(token.secret) != 32 or len(token.pin) != 32 or not token.urls or len(token.urls) > 16:
            raise ValueError
    except (ValueError, msgspec.DecodeError, TypeError, LookupError):
        raise Invalid("the join token is damaged", remedy="copy all of it, or make a new one") from None
    return token


def digest(public_key: str) -> str:
    """What a hub keeps of a token: SHA-256 of its public key, hex."""
    return hashlib.sha256(public_key.encode()).hexdigest()


# --- what is signed and sent ------------------------------------------------------------------------------------------

Text = Annotated[str, Meta(max_length=256)]
Pem = Annotated[str, Meta(max_length=8192)]
Jwt = Annotated[str, Meta(max_length=8192)]
Signature = Annotated[bytes, Meta(max_length=128)]


class EnrolAsk(msgspec.Struct, forbid_unknown_fields=True):
    """``tokenKey``, ``key``: public keys of the token and of the device; both sign :func:`transcript`."""

    nonce: Text
    token: Text
    tokenKey: Text
    node: Text
    site: Text
    key: Text
    csr: Pem
    tokenSignature: Signature = b""
    signature: Signature = b""


class RenewAsk(msgspec.Struct, forbid_unknown_fields=True):
    """``certificate``: the last one, expired or not; ``jwt``: of a node whose enrolment knew no device key yet."""

    nonce: Text
    node: Text
    key: Text
    csr: Pem
    certificate: Pem = ""
    jwt: Jwt = ""
    signature: Signature = b""


class LeaveAsk(msgspec.Struct, forbid_unknown_fields=True):
    nonce: Text
    node: Text
    key: Text
    signature: Signature = b""


Ask = EnrolAsk | RenewAsk | LeaveAsk


class Grant(msgspec.Struct):
    """What the hub gives; it stands, encoded, in an :class:`Answer`. ``now``: the hub's time, seconds since 1970."""

    jwt: str
    certificate: str
    #: All CAs to trust, as one PEM text.
    ca: str
    site: str
    issued: float
    expires: float
    now: float
    #: All addresses of the hub, where its operator named them.
    urls: list[str] = []


class Answer(msgspec.Struct):
    """``signature`` is the CA's over :func:`answer_proof`: the hub's identity, whoever looks into TLS in between."""

    grant: bytes
    signature: bytes


def transcript(ask: Ask) -> bytes:
    """The bytes that the signatures of an ask are over: every other field, each with its length."""
    out = [b"edgeward ", type(ask).__name__.encode(), b" 1\0"]
    for field in msgspec.structs.fields(ask):
        if not field.name.lower().endswith("signature"):
            value = str(getattr(ask, field.name)).encode()
            out += [len(value).to_bytes(4, "big"), value]
    return b"".join(out)


def answer_proof(request: bytes, grant: bytes) -> bytes:
    """What the hub signs: this answer to this very request."""
    return b"edgeward answer 1\0" + hashlib.sha256(request).digest() + hashlib.sha256(grant).digest()


def _signed(ask: Ask, key: str, signature: bytes, who: str) -> None:
    try:
        good = verify(key, transcript(ask), signature)
    except Invalid:
        good = False
    if not good:
        raise Forbidden(f"the {who}'s signature is wrong", resource=f"Node/{ask.node[:63]}")


# --- the hub's decisions ----------------------------------------------------------------------------------------------


class Member(msgspec.Struct, omit_defaults=True):
    """What the hub keeps of a node's name, also when the Node is deleted. ``seed`` (its NATS account's) is secret."""

    seed: str
    #: The account's JWT as nats-server has it, and a digest of the rules it was made by.
    jwt: str = ""
    rules: str = ""
    #: The device key that is the node; empty: nobody.
    key: str = ""
    #: The name is barred until it is replaced.
    revoked: bool = False
    #: Keys that are not let in again: since when (seconds since 1970). ``*``: all that were issued until then.
    barred: dict[str, int] = {}
    #: The tokens that were used for it, by name, and the device key that used each.
    used: dict[str, str] = {}
    issued: float = 0.0
    expires: float = 0.0
    #: Serial number of the present certificate, hex.
    serial: str = ""
    #: A digest of the CAs that it was last given to trust, and of the hub's addresses.
    trusts: str = ""
    #: From an earlier release: a key is known by the user JWT that it got.
    legacy: bool = False


class TokenFacts(msgspec.Struct, frozen=True):
    """A JoinToken as the rules need it; ``expires`` in seconds since 1970."""

    name: str
    node: str
    site: str
    digest: str
    expires: float
    replace: bool = False


def check_ttl(ttl: float) -> float:
    if not 1.0 <= ttl <= MAX_TTL:
        raise Invalid(f"{ttl:g} s is out of range", field="$.ttl", remedy="1s to 30d; 24h unless said")
    return ttl


def may_issue(member: Member | None, node: str, site: str, present_site: str | None, *, replace: bool) -> None:
    """Whether a token for that name may be made. ``present_site``: of the Node, None when there is none."""
    what = f"Node/{node}"
    if present_site is not None and present_site != site:
        raise Refused(f"it stands in site {present_site!r}", resource=what, field="$.site", remedy="name that site")
    if replace:
        if member is None or not (member.key or member.revoked or member.legacy):
            raise Refused(
                "no box has this name yet", resource=what, remedy=f"edgeward token create --site {site} --node {node}"
            )
        return
    if member is not None and member.revoked:
        raise Refused(
            "is revoked", resource=what, remedy=f"to give its name to another box: edgeward node replace {node}"
        )
    if member is not None and (member.key or member.legacy):
        raise Refused(
            "is enrolled: its name cannot be taken by another box",
            resource=what,
            remedy=f"if that box is lost or was set up anew: edgeward node replace {node}",
        )


def check_secret(ask: EnrolAsk, token: TokenFacts | None) -> TokenFacts:
    """Whether the box has that token. Before anything is said of it: a stranger learns nothing."""
    given = digest(ask.tokenKey)
    right = hmac.compare_digest(given, token.digest if token is not None else digest(""))
    if token is None or not right:
        raise Forbidden("the hub knows no such join token", remedy="it may have been withdrawn: ask for a new one")
    _signed(ask, ask.tokenKey, ask.tokenSignature, "join token")
    return token


def check_enrol(ask: EnrolAsk, token: TokenFacts) -> None:
    """Behind :func:`check_secret`: the device's signature, and that the token is for that name and site."""
    _signed(ask, ask.key, ask.signature, "device key")
    if ask.node != token.node:
        raise Forbidden(
            f"the join token is for node {token.node!r}, not for {ask.node[:63]!r}", remedy="each box needs its own"
        )
    if ask.site != token.site:
        raise Forbidden(
            f"the join token is for site {token.site!r}, not for {ask.site[:63]!r}", resource=f"Node/{token.node}"
        )


def enrol(member: Member, token: TokenFacts, key: str, now: float) -> Member:
    """The name's state after a good ask with that token and device key; raises what stands against it.

    The same key with the same token again is the same enrolment: its answer was lost on the way.
    """
    what = f"Node/{token.node}"
    if key in member.barred:
        raise Forbidden("this device key was revoked", resource=what, remedy="make a new key: use an empty directory")
    if token.name in member.used:
        if member.used[token.name] == key == member.key and not member.revoked:
            return member
        raise Forbidden(
            "the join token was used before", resource=what, remedy="a token is good once: ask for a new one"
        )
    if now >= token.expires:
        raise Forbidden("the join token has expired", resource=what, remedy="ask for a new one")
    held = (member.key or member.legacy) and member.key != key
    if (member.revoked or held) and not token.replace:
        why = "is revoked" if member.revoked else "is enrolled already: its name cannot be taken by another box"
        raise Forbidden(why, resource=what, remedy=f"at the hub: edgeward node replace {token.node}")
    taken = _without_holder(member, now)
    return msgspec.structs.replace(
        taken, key=key, revoked=False, legacy=False, used=dict([*member.used.items(), (token.name, key)][-_USED:]),
        barred={k: t for k, t in taken.barred.items() if k != key},
    )  # fmt: skip


def _without_holder(member: Member, now: float) -> Member:
    barred = dict(member.barred)
    if member.key:
        barred[member.key] = int(now)
    elif member.legacy:
        barred["*"] = int(now) - 1  # no key is known: all that was issued until now
    return msgspec.structs.replace(member, key="", barred=barred, issued=0.0, expires=0.0, serial="")


def check_renew(ask: RenewAsk | LeaveAsk, member: Member | None) -> Member:
    """Whether it is that node that asks. What has expired is no matter."""
    what = f"Node/{ask.node[:63]}"
    _signed(ask, ask.key, ask.signature, "device key")
    if member is None:
        raise NotFound("the hub knows no such node", resource=what, remedy="join with a token")
    if member.revoked or ask.key in member.barred:
        raise Forbidden("is revoked", resource=what, remedy="the box needs a new token: edgeward node replace")
    if member.key != ask.key:
        raise Forbidden("this is not its device key", resource=what, remedy="join with a new token")
    return member


def revoke(member: Member, now: float) -> Member:
    """Nobody has the name, and nobody gets it but by a replacement."""
    return msgspec.structs.replace(_without_holder(member, now), revoked=True, legacy=False)


def release(member: Member, now: float) -> Member:
    """The Node was deleted, or left: its name is free, its key is not let in again. A revoked name stays revoked."""
    return msgspec.structs.replace(_without_holder(member, now), legacy=False)


# --- the node's decisions ---------------------------------------------------------------------------------------------


def renew_at(issued: float, expires: float, spread: float) -> float:
    """When to renew: from two thirds of the life on, spread over the twelfth behind it. ``spread``: 0 to 1."""
    return issued + (expires - issued) * (2 / 3 + spread / 12)


Probe = Literal["", "unreachable", "untrusted", "reachable"]


class Standing(msgspec.Struct, frozen=True):
    """How a node stands. ``expires`` 0: credentials of an earlier release that know no end."""

    issued: float
    expires: float
    #: Seconds without the link; 0 with it.
    down_for: float = 0.0
    #: Renewals that failed in a row.
    failed: int = 0
    #: What the last try to reach the hub's port found, and how often in a row.
    probe: Probe = ""
    probes: int = 0
    #: Seconds since the last renewal of this run, by a clock that does not step; below 0: there was none.
    renewed: float = -1.0
    #: Renewals that the hub granted since the link went, and that did not bring it back.
    vain: int = 0


#: Without the link for so long, a node looks whether it is its own credentials or trust that keep it out.
STRANDED, PROBE = 20.0, 30.0
#: The same for one whose credentials have ended by its own clock.
STRANDED_ENDED = 2.0
#: Seconds between two tries to renew.
RETRY_FIRST, RETRY_MOST, RETRY_MOST_DOWN = 5.0, 3600.0, 60.0
#: A wait is cut into pieces: the wall clock may step.
LOOK = 60.0


def next_step(s: Standing, now: float, spread: float) -> tuple[Literal["wait", "probe", "renew"], float]:
    """What to do, after how many seconds; ``spread``: a node's own number from 0 to 1.

    The wall clock alone decides nothing while the link is down: it may say 1970, and the hub may have another CA. Nor
    does a link that is down ask for new credentials at once: when a hub comes back, a thousand nodes have none, and
    all but those that it keeps out are back by themselves.
    """
    if s.down_for <= 0:
        life = s.expires - s.issued if s.expires else DEFAULT_LIFE
        if s.failed:
            return "renew", _backoff(s.failed, min(RETRY_MOST, max(RETRY_FIRST, life / 30)), spread)
        wait = renew_at(s.issued, s.expires, spread) - now if s.expires else 0.0
        if s.renewed >= 0 and s.expires:
            wait = renew_at(0, life, spread) - s.renewed  # however far ahead of the hub's our clock is
        return ("renew", 0.0) if wait <= 0 else ("wait", min(wait, LOOK))
    ended = bool(s.expires) and not s.issued - 86400 <= now < s.expires
    patience = STRANDED_ENDED if ended else STRANDED
    if s.down_for < patience:
        return "wait", patience - s.down_for
    if s.probe == "untrusted" or (s.probe == "reachable" and (ended or s.probes > 1)):
        tries = s.failed + s.vain
        return "renew", _backoff(tries, RETRY_MOST_DOWN, spread) if tries else 0.0
    return "probe", PROBE * (0.5 + spread / 2) if s.probe else 0.0


def _backoff(failed: int, most: float, spread: float) -> float:
    return backoff(failed, RETRY_FIRST, most) * (0.5 + spread / 2)
