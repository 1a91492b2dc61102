"""The hub's side of enrolment: tokens out, identities out, revocations in force.

Asks come in from HTTP (``hub/enrol.py``), decisions come from :mod:`edgeward.nodes.enrol`; this keeps each name's
:class:`Member` in the store, so that all processes of a hub decide on the same. A Member is changed against the
revision it was read at: of two boxes with one token one wins, whichever process they ask; a renewal never undoes a
revocation. What was decided is durable before nats-server hears of it, and a start brings it what it missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from cryptography import x509

from edgeward.core import clock
from edgeward.core.audit import Audit
from edgeward.core.certs import check_certificate, check_csr, pem
from edgeward.core.claims import Claims
from edgeward.core.errors import Conflict, EdgewardError, Forbidden, Invalid, NotFound, Refused
from edgeward.core.identity import HubIdentity
from edgeward.core.nkeys import KeyPair, claims_of
from edgeward.core.nonces import Nonces
from edgeward.core.resource import CLUSTER, Key, Metadata, Resource, check_name
from edgeward.core.store_nats import NatsStore
from edgeward.core.vault import Vault
from edgeward.nodes import enrol as rules
from edgeward.nodes.enrol import EnrolAsk, Grant, LeaveAsk, Member, RenewAsk, Token, TokenFacts
from edgeward.nodes.spec import JoinTokenSpec, NodeSpec

log = logging.getLogger("edgeward.enrol")

#: The facts of the members, by node; and of the nodes that a restore has us revoke (``hub/restore.py``).
MEMBER, REVOKE = "member.", "restore.revoke"
_TRIES = 16
#: Used and expired tokens are kept for so long, to be looked at.
_KEEP_TOKENS = 7 * 86400.0
_TIDY = 600.0

Write = Callable[[Resource | None, Key, int, str], Awaitable[None]]


class _Made(msgspec.Struct, frozen=True):
    """A certificate that was just made."""

    certificate: x509.Certificate
    issued: float
    expires: float
    #: All CAs to trust, PEM.
    ca: str
    #: A digest of what the node is told with it.
    told: str

    def on(self, member: Member) -> Member:
        serial = f"{self.certificate.serial_number:x}"
        return msgspec.structs.replace(
            member, issued=self.issued, expires=self.expires, serial=serial, trusts=self.told
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Enrolment:
    """One hub process's door. Open it with :meth:`open`, keep :meth:`run` running."""

    def __init__(
        self,
        store: NatsStore,
        identity: HubIdentity,
        claims: Claims,
        write: Write,
        audit: Audit,
        vault: Vault,
        *,
        urls: list[str],
        named: list[str] | None = None,
        names: Callable[[], Mapping[str, Sequence[str]]] = dict,
        life: float = rules.DEFAULT_LIFE,
        changed: Callable[[str], Awaitable[None]] | None = None,
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._store, self._identity, self._claims = store, identity, claims
        self._write, self._audit, self._vault = write, audit, vault
        #: ``named``: addresses that the operator gave, which nodes are told at each renewal.
        self._urls, self._named, self._life, self._now = urls, named or [], life, now
        #: Names, by node, that certificates of nodes have besides their own.
        self._names = names
        #: Told of a node that got or lost its identity.
        self._changed = changed
        #: Members as they were unsealed, by revision: every word of a node asks for its own.
        self._opened_at: dict[str, tuple[int, Member]] = {}
        #: Members that nats-server did not take yet.
        self._owed: set[str] = set()
        self._owing = asyncio.Event()
        self.nonces = Nonces(identity.derived("nonces"), rules.NONCE_LIFE)

    # -- members -----------------------------------------------------------------------------------------------------

    def member(self, node: str) -> Member | None:
        revision = self._store.fact_revision(MEMBER + node)
        known = self._opened_at.get(node)
        if known is not None and known[0] == revision:
            return known[1]
        data = self._store.fact(MEMBER + node)
        if data is None:
            return None
        member = self._opened(node, data)
        self._opened_at[node] = (revision, member)
        return member

    def members(self) -> dict[str, Member]:
        found = {name: self.member(name) for name in self._store.facts(MEMBER)}
        return {name: member for name, member in found.items() if member is not None}

    def _opened(self, node: str, data: bytes) -> Member:
        return msgspec.json.decode(self._vault.unseal(data, MEMBER + node), type=Member)

    async def _keep(self, node: str, member: Member, expect: int) -> None:
        sealed = self._vault.seal(msgspec.json.encode(member), MEMBER + node)
        await self._store.set_fact(MEMBER + node, sealed, expect=expect)

    def status(self, node: str) -> dict[str, Any]:
        """What the Node's status says of its identity."""
        member = self.member(node)
        if member is None:
            return {"revoked": False}
        status: dict[str, Any] = {"revoked": member.revoked}
        if member.expires:
            status["credentials"] = {
                "issued": clock.timestamp(member.issued),
                "expires": clock.timestamp(member.expires),
                "publicKey": member.key,
            }
        return status

    def is_revoked(self, node: str) -> bool:
        member = self.member(node)
        return member is not None and member.revoked

    async def _change(self, node: str, change: Callable[[Member | None], Member]) -> Member:
        """Durable when it returns; ``change`` is asked again when somebody else was faster."""
        for _ in range(_TRIES):
            revision = self._store.fact_revision(MEMBER + node)
            old = self.member(node)
            new = self._with_account(node, change(old), old)
            if new == old:
                return new
            try:
                await self._keep(node, new, revision)
            except Conflict:
                continue
            if old is None or new.jwt != old.jwt:
                try:
                    await self._claims.push(new.jwt)
                except EdgewardError:
                    self._owed.add(node)  # what is decided comes into force, if not now
                    self._owing.set()
                    raise
            return new
        raise Conflict("changes too fast", resource=f"Node/{node}", remedy="try again")

    def _with_account(self, node: str, member: Member, old: Member | None) -> Member:
        """Its account JWT, made anew when the barred keys or what we give to nodes are not what it was made of."""
        form = self._identity.account_rules(node)
        if member.jwt and member.rules == form and old is not None and old.barred == member.barred:
            return member
        jwt = self._identity.account_jwt(node, member.seed, member.barred, after=member.jwt)
        return msgspec.structs.replace(member, jwt=jwt, rules=form)

    @staticmethod
    def _new_member() -> Member:
        return Member(KeyPair.create("account").seed)

    # -- life ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Takes over what an earlier release kept in files, and has nats-server know everybody."""
        for node, entry in self._identity.take_files().items():
            if self.member(node) is None:
                kept = Member(entry["seed"], entry["jwt"], barred=dict(entry.get("revocations", {})), legacy=True)
                with contextlib.suppress(Conflict):
                    await self._keep(node, kept, 0)
        self._identity.drop_files()
        for node in msgspec.json.decode(self._store.fact(REVOKE) or b"[]", type=list[str]):
            await self._change(node, lambda m: rules.revoke(m or self._new_member(), self._now()))
            await self._told(node)
        if self._store.fact(REVOKE) not in (None, b"[]"):
            await self._store.set_fact(REVOKE, b"[]")
        for node, member in self.members().items():
            if member.rules != self._identity.account_rules(node):
                await self._change(node, lambda m: m or self._new_member())
            if member.key and self._store.find(Key("Node", CLUSTER, node)) is None:
                await self._release(node)
        news = await self._claims.bring(m.jwt for m in self.members().values())
        if news:
            log.info("nats-server was told of %d nodes", news)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            group.create_task(self._tidy())
            group.create_task(self._pay())

    async def _pay(self) -> None:
        while True:
            await self._owing.wait()
            self._owing.clear()
            for node in tuple(self._owed):
                member = self.member(node)
                try:
                    if member is not None:
                        await self._claims.push(member.jwt)
                    self._owed.discard(node)
                except EdgewardError as e:
                    log.warning("node %s: nats-server did not take its account yet: %s", node, e)
                    self._owing.set()
                    await asyncio.sleep(0.25)  # the back-off between two tries

    async def _watch(self) -> None:
        """A Node that is deleted loses its identity."""
        while True:
            try:
                with self._store.watch() as changes:
                    async for change in changes:
                        if change.key.kind == "Node" and change.resource is None:
                            await self._release(change.key.name)
            except EdgewardError as e:
                log.warning("watch starts anew: %s", e)
                await asyncio.sleep(0.2)  # the back-off between two tries
                for node, member in self.members().items():
                    if member.key and self._store.find(Key("Node", CLUSTER, node)) is None:
                        with contextlib.suppress(EdgewardError):
                            await self._release(node)

    async def _release(self, node: str) -> None:
        if self.member(node) is not None:
            await self._change(node, lambda m: rules.release(m or self._new_member(), self._now()))
            await self._told(node)

    async def _told(self, node: str) -> None:
        if self._changed is not None:
            await self._changed(node)

    async def _tidy(self) -> None:
        while True:
            now = self._now()
            for token in self._store.items("JoinToken"):
                if now > clock.parse_timestamp(token.spec.expires) + _KEEP_TOKENS:
                    with contextlib.suppress(EdgewardError):
                        await self._write(None, token.key, token.revision, "system")
            await asyncio.sleep(_TIDY)  # the period of looking for what is past

    # -- tokens ----------------------------------------------------------------------------------------------------

    async def issue(
        self, node: str, site: str, *, ttl: float = rules.DEFAULT_TTL, replace: bool = False, actor: str
    ) -> tuple[str, str, str]:
        """A token's text (shown once, here), its name and its end."""
        check_name(node, "$.node")
        rules.check_ttl(ttl)
        present = self._store.find(Key("Node", CLUSTER, node))
        site = site or (present.spec.site if present else "")
        check_name(site, "$.site")
        rules.may_issue(self.member(node), node, site, present.spec.site if present else None, replace=replace)
        secret = secrets.token_bytes(32)
        key = KeyPair("user", secret)
        name = f"{node[:50].rstrip('-')}-{clock.new_id(8)}"
        expires = clock.timestamp(self._now() + ttl)
        spec = JoinTokenSpec(node=node, site=site, expires=expires, hash=rules.digest(key.public), replace=replace)
        resource = Resource(kind="JoinToken", metadata=Metadata(name=name), spec=spec)
        await self._write(resource, resource.key, 0, actor)
        pin = bytes.fromhex(self._identity.ca_fingerprint)
        return rules.encode_token(Token(1, name, node, site, self._urls, pin, secret)), name, expires

    def _token(self, name: str) -> TokenFacts | None:
        try:
            check_name(name, "$.token")
        except Invalid:
            return None
        found = self._store.find(Key("JoinToken", CLUSTER, name))
        if found is None:
            return None
        spec: JoinTokenSpec = found.spec
        expires = clock.parse_timestamp(spec.expires)
        return TokenFacts(name, spec.node, spec.site, spec.hash, expires, spec.replace)

    def key_of(self, node: str) -> str:
        """The device key that may speak for the node now; empty: none."""
        member = self.member(node)
        return member.key if member is not None and not member.revoked and member.key not in member.barred else ""

    def use_nonce(self, nonce: str) -> None:
        """Raises ``Refused`` for one that is not fresh, or was used at this hub process."""
        self.nonces.use(nonce, self._now())

    def nonce(self) -> str:
        return self.nonces.make(self._now())

    # -- what boxes ask ------------------------------------------------------------------------------------------------

    async def enrol(self, ask: EnrolAsk, source: str) -> Grant:
        """A new box, or the same box again whose answer was lost."""
        now = self._now()
        self.nonces.check(ask.nonce, now)
        token = rules.check_secret(ask, self._token(ask.token))
        try:
            rules.check_enrol(ask, token)
            self.nonces.use(ask.nonce, now)
            grant, fresh = await self._enrol(ask, token, source, now)
        except EdgewardError as e:
            # a stranger's asks are not kept: they could wash the trail away
            await self._audited("enrol", ask.node, source, f"{e.reason}: {e.message}")
            raise
        if fresh:
            await self._audited("enrol", ask.node, source, "done")
        return grant

    async def _enrol(self, ask: EnrolAsk, token: TokenFacts, source: str, now: float) -> tuple[Grant, bool]:
        made = self._certificate(check_csr(ask.csr, token.node), token.node, now)
        node = Key("Node", CLUSTER, token.node)
        present = self._store.find(node)
        if present is not None and present.spec.site != token.site:
            raise Refused(
                f"it stands in site {present.spec.site!r} now", resource=str(node), remedy="ask for a new token"
            )
        fresh = True

        def change(member: Member | None) -> Member:
            nonlocal fresh
            old = member or self._new_member()
            new = rules.enrol(old, token, ask.key, now)
            fresh = new is not old
            return made.on(new)

        if present is None:
            # before the name is held: a held name without a Node is taken for one whose Node was deleted
            rules.enrol(self.member(token.node) or self._new_member(), token, ask.key, now)
            resource = Resource(kind="Node", metadata=Metadata(name=token.node), spec=NodeSpec(site=token.site))
            with contextlib.suppress(Conflict):
                await self._write(resource, node, 0, f"token:{token.name}")
        member = await self._change(token.node, change)
        if fresh:
            status = {"used": True, "usedAt": clock.timestamp(now), "usedFrom": source, "publicKey": ask.key}
            with contextlib.suppress(NotFound):
                await self._store.put_status(Key("JoinToken", CLUSTER, token.name), status)
        await self._told(token.node)
        return self._grant(member, made, token.node, token.site, now), fresh

    async def renew(self, ask: RenewAsk, source: str) -> Grant:
        """New credentials for the holder of the device key, whatever has expired."""
        now = self._now()
        self.nonces.check(ask.nonce, now)
        member = rules.check_renew(ask, self._adopted(ask))
        self.nonces.use(ask.nonce, now)
        made = self._certificate(check_csr(ask.csr, ask.node), ask.node, now)
        if ask.certificate:
            check_certificate(ask.certificate, ask.node, self._identity.authority.known(), now, expired=True)
        node = self._store.find(Key("Node", CLUSTER, ask.node))
        if node is None:
            raise NotFound("the hub knows no such node", resource=f"Node/{ask.node}", remedy="join with a token")

        def change(member: Member | None) -> Member:
            if member is None or (member.key != ask.key and not member.legacy) or member.revoked:
                raise Forbidden("is revoked", resource=f"Node/{ask.node}")
            return made.on(msgspec.structs.replace(member, key=ask.key, legacy=False))

        member = await self._change(ask.node, change)
        await self._told(ask.node)
        log.info("node %s renewed its credentials from %s", ask.node, source)
        return self._grant(member, made, ask.node, node.spec.site, now)

    def _adopted(self, ask: RenewAsk) -> Member | None:
        """The member; one of an earlier release gets the key that the hub once gave a JWT to."""
        member = self.member(ask.node)
        if member is None or not member.legacy or not ask.jwt:
            return member
        claims = claims_of(ask.jwt)
        ours = claims["iss"] == KeyPair.from_seed(member.seed).public and claims["name"] == ask.node
        return msgspec.structs.replace(member, key=claims["sub"]) if ours else member

    async def leave(self, ask: LeaveAsk, source: str) -> None:
        """The node goes for good: its Node is deleted, its key is not let in again."""
        now = self._now()
        self.nonces.check(ask.nonce, now)
        rules.check_renew(ask, self.member(ask.node))
        self.nonces.use(ask.nonce, now)
        key = Key("Node", CLUSTER, ask.node)
        if self._store.find(key) is not None:
            await self._write(None, key, 0, f"node:{ask.node}")
        await self._release(ask.node)
        await self._audited("leave", ask.node, source, "done")

    def _certificate(self, csr: x509.CertificateSigningRequest, node: str, now: float) -> _Made:
        issued, expires = float(int(now)), float(int(now + self._life))
        names = self._names().get(node, ())
        return _Made(
            self._identity.authority.node(csr, node, expires, names), issued, expires, self._trusted(),
            self._told_now(names),
        )  # fmt: skip

    def _trusted(self) -> str:
        """All CAs to trust. In an order that an activation does not change: it is no news to a node."""
        return "".join(sorted(self._identity.authority.trust().trusted))

    def _grant(self, member: Member, made: _Made, node: str, site: str, now: float) -> Grant:
        jwt = self._identity.user_jwt(node, member.seed, member.key, issued=int(made.issued), expires=int(made.expires))
        return Grant(jwt, pem(made.certificate), made.ca, site, made.issued, made.expires, now, self._named)

    # -- the hub's own CA ------------------------------------------------------------------------------------------

    def _told_now(self, names: Sequence[str]) -> str:
        """A digest of what a renewal tells: the CAs to trust, the hub's addresses where its operator named them, and
        the node's further names."""
        return _digest("\n".join((self._trusted() + "\n".join(sorted(self._named)), *names)))

    def waiting(self) -> list[str]:
        """Nodes that have not heard of the CAs that are to be trusted now, or of the hub's addresses, or whose
        certificate has not the names that it should."""
        now, names = self._told_now(()), self._names()
        told = {n: self._told_now(more) for n, more in names.items()}
        return sorted(n for n, m in self.members().items() if m.key and m.trusts != told.get(n, now))

    def proof(self, request: bytes, grant: bytes) -> bytes:
        """The hub's signature over an answer."""
        return self._identity.authority.sign(rules.answer_proof(request, grant))

    # -- revocation ----------------------------------------------------------------------------------------------------

    async def revoke(self, node: str, actor: str, source: str = "") -> None:
        """Cuts the node off, for good: durable first, then in force."""
        key = Key("Node", CLUSTER, node)
        if self._store.find(key) is None and self.member(node) is None:
            raise NotFound("not found", resource=str(key))
        await self._change(node, lambda m: rules.revoke(m or self._new_member(), self._now()))
        await self._told(node)
        await self._audited("revoke", node, source, "done", actor)

    async def _audited(self, verb: str, node: str, source: str, outcome: str, actor: str = "") -> None:
        key = Key("Node", CLUSTER, node[:63])
        await self._audit.write(verb, key, actor=actor or f"node:{node[:63]}", source=source, outcome=outcome)
