"""The box's side of enrolment: join, renew, come back, leave.

A token or a device key goes in, an identity on the disk comes out (:class:`NodeIdentity`). ``join`` is blocking and can
be killed at any point and run again: the device key is on the disk before it is shown, and the hub takes the same key
with the same token for the same box. :class:`Renewer` lives in the agent; when it acts is decided in ``enrol.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509

from edgeward.core import clock, proc
from edgeward.core.certs import check_certificate, fingerprint, key_pem, make_csr, new_key, pem
from edgeward.core.errors import EdgewardError, Forbidden, Invalid, NotFound, Refused, Unreachable
from edgeward.core.files import read_json, write_json
from edgeward.core.identity import NEW, NodeIdentity
from edgeward.nodes.door import Address, Door, Untrusted, parse_address
from edgeward.nodes.enrol import (
    EnrolAsk,
    Grant,
    LeaveAsk,
    Probe,
    RenewAsk,
    Standing,
    Token,
    next_step,
    transcript,
)

log = logging.getLogger("edgeward.enrol")

T = TypeVar("T")
#: Seconds between two asks of a node that the hub has refused: it may be let in again, but not soon.
_REFUSED = 900.0


def load_ca(path: Path) -> str:
    """A CA file of the operator's. Raises ``Invalid``."""
    try:
        text = path.read_text()
        return "".join(map(pem, x509.load_pem_x509_certificates(text.encode())))
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else "it holds no certificate in PEM form"
        raise Invalid(f"cannot be used: {why}", file=str(path), field="--proxy-ca") from None


def join(
    data: Path,
    token: Token,
    *,
    node: str = "",
    site: str = "",
    hub: str = "",
    proxy: str = "",
    proxy_ca: str = "",
    bind: str = "127.0.0.1",
) -> bool:
    """Makes ``data`` the directory of that node. False when it became that by this token before."""
    node, site = node or token.node, site or token.site
    addresses = [parse_address(u, proxy) for u in ([hub] if hub else token.urls)]
    config = read_json(data / "node.json", {})
    identity = NodeIdentity.open(data / "identity")
    if identity.enrolled and identity.name != node:
        raise Refused(
            f"{data} is node {identity.name!r}'s, not {node!r}'s", remedy="give each node a directory of its own"
        )
    known = identity.enrolled and identity.token == token.name
    if known and hub:  # the hub has moved
        config.pop("hub", None)
    used = addresses[0]
    if not known:
        # another token than last time means a new device key: the old one may be revoked
        fresh = NodeIdentity.open(data / f"identity{NEW}") if identity.enrolled else identity
        fresh.trust(proxy_ca=proxy_ca)
        with _found(addresses, token, proxy_ca) as door:
            _enrol(door, fresh, token, node, site)
            used = door.address
        NodeIdentity.open(data / "identity")  # moves it in
    elif proxy_ca:
        identity.trust(proxy_ca=proxy_ca)
    if not known or "hub" not in config:
        config |= {"node": node, "site": site, "bind": bind, "hub": {"host": used.host, "port": used.port}}
        if proxy:
            config["hub"]["proxy"] = proxy
        write_json(data / "node.json", config)
    return not known


def _found(addresses: list[Address], token: Token, proxy_ca: str) -> Door:
    """A door to the hub that the token pins."""
    first: EdgewardError | None = None
    for address in addresses:
        try:
            with Door(address, proxy_ca=proxy_ca) as stranger:
                said = stranger.trust()
            named = [x509.load_pem_x509_certificate(c.encode()) for c in said.trusted]
            named += [x509.load_pem_x509_certificate(x.old.encode()) for x in said.links]
            pinned = [c for c in named if fingerprint(c) == token.pin]
            door = Door(address, proxy_ca=proxy_ca)
            door.learn(pinned, said)
            return door
        except (EdgewardError, ValueError) as e:
            error = e if isinstance(e, EdgewardError) else Unreachable(f"no Edgeward hub answers at {address.url}")
            first = first or error
    raise first or Invalid("the token names no address of its hub", remedy="write --hub https://host:port")


def _enrol(door: Door, identity: NodeIdentity, token: Token, node: str, site: str) -> None:
    key = new_key()
    ask = EnrolAsk(door.nonce(), token.name, token.key.public, node, site, identity.public_key, make_csr(node, key))
    said = transcript(ask)
    ask.tokenSignature, ask.signature = token.key.sign(said), identity.sign(said)
    identity.remember(token.name)
    _accept(identity, door.ask("enrol", ask), node, key_pem(key))


def _accept(identity: NodeIdentity, grant: Grant | None, node: str, key: bytes) -> bool:
    if grant is None:
        raise Refused("the hub's answer is empty", resource=f"Node/{node}")
    trusted = x509.load_pem_x509_certificates(grant.ca.encode())
    check_certificate(grant.certificate, node, trusted, grant.now)
    urls = [parse_address(u).url for u in grant.urls[:16]]
    return identity.accept(grant.jwt, grant.ca, key_pem=key, certificate=grant.certificate, urls=urls)


def renew(identity: NodeIdentity, node: str, door: Door) -> bool:
    """New credentials by the device key, whatever has expired. True when the CAs to trust are others now."""
    known = identity.trusted()
    if not door.trusted:
        door.trusted = known
    try:
        nonce = door.nonce()
    except Untrusted:
        door.learn(known)  # the hub has another CA: one that ours vouched for, or we do not go on
        nonce = door.nonce()
    key = new_key()
    jwt = "" if identity.certificate else identity.jwt
    ask = RenewAsk(nonce, node, identity.public_key, make_csr(node, key), identity.certificate, jwt)
    ask.signature = identity.sign(transcript(ask))
    return _accept(identity, door.ask("renew", ask), node, key_pem(key))


def leave(identity: NodeIdentity, node: str, door: Door) -> None:
    """Tells the hub that this box is no node of it any more."""
    door.trusted = door.trusted or identity.trusted()
    try:
        nonce = door.nonce()
    except Untrusted:
        door.learn(identity.trusted())
        nonce = door.nonce()
    ask = LeaveAsk(nonce, node, identity.public_key)
    ask.signature = identity.sign(transcript(ask))
    door.ask("leave", ask)


def doors_of(identity: NodeIdentity, hub: Mapping[str, Any]) -> list[Door]:
    """The ways to the hub: the one that ``node.json`` names, then those that the hub itself named."""
    way = str(hub.get("proxy", ""))
    addresses = [Address(str(hub["host"]), int(hub["port"]), way), *(parse_address(u, way) for u in identity.urls)]
    proxy_ca = identity.proxy_ca_file.read_text() if identity.proxy_ca_file.exists() else ""
    return [Door(a, identity.trusted(), proxy_ca) for a in dict.fromkeys(addresses)]


def at_first(doors: Sequence[Door], ask: Callable[[Door], T]) -> T:
    """What the first door that can be reached gives."""
    for n, door in enumerate(doors):
        try:
            with door:
                return ask(door)
        except Unreachable:
            if n == len(doors) - 1:
                raise
    raise Invalid("no address of the hub is known")


def leave_fleet(data: Path, *, force: bool = False) -> tuple[str, EdgewardError | None]:
    """Tells the hub, ends the agent, forgets the identity. Gives the node's name, and (``force``) why the hub was not
    told."""
    identity = NodeIdentity.open(data / "identity")
    config = read_json(data / "node.json", {})
    if not identity.enrolled or "hub" not in config:
        raise Refused("is no node of a fleet", resource=str(data))
    node, error = str(config["node"]), None
    try:
        at_first(doors_of(identity, config["hub"]), lambda door: leave(identity, node, door))
    except EdgewardError as e:
        if not force:
            e.remedy = f"{e.remedy + '; ' if e.remedy else ''}to leave without telling it: --force"
            raise
        error = e
    run = read_json(data / "run.json", {})
    if run.get("pid") and run.get("start"):
        agent = proc.ProcId(int(run["pid"]), run["start"])
        if proc.alive(agent):
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent.pid, signal.SIGTERM)
    identity.forget()
    del config["hub"]
    write_json(data / "node.json", config)
    return node, error


class Renewer:
    """Keeps a node's identity good: :meth:`run` until cancelled.

    ``renewed(changed)`` is told of each renewal, and whether other CAs are trusted or other addresses known now.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        node: str,
        doors: Callable[[], list[Door]],
        renewed: Callable[[bool], Awaitable[None]],
        refused: Callable[[EdgewardError], None],
    ) -> None:
        self._identity, self._node, self._doors = identity, node, doors
        self._renewed, self._refused = renewed, refused
        self._spread = random.random()  # noqa: S311 - spreads the nodes, no secret
        self._down_since: float | None = clock.monotonic()
        self._failed = 0
        self._probe: Probe = ""
        self._probes = 0
        self._renewed_at: float | None = None
        self._vain = 0
        self._wake = asyncio.Event()
        self._now = False

    def flipped(self, online: bool) -> None:
        """The link came or went."""
        self._down_since = None if online else clock.monotonic()
        self._failed, self._probe, self._probes, self._vain = 0, "", 0, 0
        self._wake.set()

    def hurry(self) -> None:
        """Renew now: the hub asked for it."""
        self._now = True
        self._wake.set()

    def standing(self) -> Standing:
        issued, expires = self._identity.lease
        down = 0.0 if self._down_since is None else max(0.001, clock.monotonic() - self._down_since)
        renewed = -1.0 if self._renewed_at is None else clock.boottime() - self._renewed_at
        return Standing(issued, expires, down, self._failed, self._probe, self._probes, renewed, self._vain)

    async def run(self) -> None:
        while True:
            act, wait = next_step(self.standing(), clock.now(), self._spread)
            if self._now:
                self._now, act, wait = False, "renew", 0.0
            if wait > 0:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._wake.wait()
                    continue  # something changed: think again
            if act == "probe":
                await self._look()
            elif act == "renew":
                await self._renew()

    async def _look(self) -> None:
        def look() -> Probe:
            found = [door.probe() for door in self._doors()]
            return next((f for f in found if f != "unreachable"), "unreachable")

        found = await asyncio.to_thread(look)
        self._probes = self._probes + 1 if found == self._probe else 1
        self._probe = found

    async def _renew(self) -> None:
        def ask() -> bool:
            return at_first(self._doors(), lambda door: renew(self._identity, self._node, door))

        try:
            changed = await asyncio.to_thread(ask)
        except (Forbidden, NotFound) as e:
            self._refused(e)
            await asyncio.sleep(_REFUSED * (0.5 + self._spread / 2))  # its own pace: nothing wakes it
        except EdgewardError as e:
            self._failed += 1
            self._probe, self._probes = "", 0
            log.info("credentials not renewed: %s", e)
        else:
            self._failed, self._probe, self._probes = 0, "", 0
            self._renewed_at = clock.boottime()
            self._vain += self._down_since is not None
            log.info("credentials renewed")
            await self._renewed(changed)
