"""The agent's side of Listeners: what is declared for this node becomes what the plane opens and shows.

In come the Listeners, the Secrets and Configs that they name, the node's own certificate and what ACME authorities
gave; out go plain values, with every certificate checked and sealed for its Listener. What is missing or not good goes
out as the reason: the plane keeps what it had. Nothing here waits for anybody.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from edgeward.core.errors import Invalid
from edgeward.core.resource import Resource
from edgeward.gateway.bounds import Bound, why_not
from edgeward.gateway.guests import KEY
from edgeward.gateway.listener_spec import Acme, CaRef, Certificate, ListenerSpec, Tls
from edgeward.gateway.listens import CertConfig, ListenerConfig, TlsConfig, place
from edgeward.gateway.pems import Pair, read_authorities, read_pair

#: (namespace, name) -> (data, revision), or None
Lookup = Callable[[str, str], tuple[dict[str, str], str] | None]
_BEGIN = "-----BEGIN CERTIFICATE-----"


class Seals(Protocol):
    def seal(self, data: bytes, place: str) -> bytes: ...


class Wish(msgspec.Struct, frozen=True):
    """A certificate that an ACME authority is to give. ``ca``: PEM of the directory's own; empty: the system's."""

    hosts: tuple[str, ...]
    directory: str
    contact: tuple[str, ...]
    agreed: bool
    ca: str
    #: The Listener that wants it.
    key: str


class Orders(Protocol):
    """Who gets them (``orders.py``)."""

    def wanted(self, wishes: Sequence[Wish]) -> None: ...
    def found(self, wish: Wish) -> Pair | str:
        """The certificate, or why there is none yet."""
        ...


class Listeners:
    """``own``: the node's certificate with its key (PEM), empty before there is one."""

    def __init__(
        self,
        config: Lookup,
        secret: Lookup,
        vault: Seals,
        *,
        allowed: Sequence[Bound],
        own: Callable[[], str],
        orders: Orders | None = None,
    ) -> None:
        self._config, self._secret, self._vault = config, secret, vault
        self._allowed, self._own, self._orders = allowed, own, orders
        self._sealed: dict[tuple[str, str], str] = {}

    def section(
        self, listeners: Sequence[Resource], guests: tuple[str, int, str] | None = None
    ) -> list[dict[str, Any]]:
        """The same bytes as long as nothing changed. ``guests``: address, port and authorities (PEM) of the door for
        other sites' gateways, which shows the node's own certificate."""
        self._used: set[tuple[str, str]] = set()
        self._wishes: list[Wish] = []
        made = [self._one(r) for r in sorted(listeners, key=lambda r: (r.metadata.namespace, r.metadata.name))]
        if guests is not None:
            own = self._certificate("", KEY, Certificate(platform=True))
            made.append(
                ListenerConfig(KEY, guests[0], guests[1], TlsConfig((own,), guests[2], http2=False), guests=True)
            )
        self._sealed = {k: v for k, v in self._sealed.items() if k in self._used}
        if self._orders is not None:
            self._orders.wanted(self._wishes)
        plain: list[dict[str, Any]] = msgspec.to_builtins(made)
        return plain

    def _one(self, listener: Resource) -> ListenerConfig:
        spec: ListenerSpec = listener.spec
        key = f"{listener.metadata.namespace}/{listener.metadata.name}"
        refused = why_not(spec.address, spec.port, self._allowed)
        tls = None
        if spec.tls is not None:
            try:
                tls = self._tls(listener.metadata.namespace, key, spec.tls)
            except Invalid as e:
                # without the authorities of its clients it must not let anybody in
                refused = refused or str(e)
                tls = TlsConfig()
        return ListenerConfig(key, spec.address, spec.port, tls, spec.redirect, refused)

    def _tls(self, namespace: str, key: str, tls: Tls) -> TlsConfig:
        client_ca = self._authorities(namespace, tls.clientCA) if tls.clientCA is not None else ""
        return TlsConfig(
            tuple(self._certificate(namespace, key, c) for c in tls.certificates),
            client_ca,
            tls.clientCA.optional if tls.clientCA is not None else False,
            tls.minVersion,
            tls.http2,
        )

    def _authorities(self, namespace: str, ref: CaRef) -> str:
        """Raises ``Invalid``."""
        where = f"Config/{ref.config}"
        found = self._config(namespace, ref.config)
        if found is None:
            raise Invalid("is not here yet", resource=where)
        if ref.key not in found[0]:
            raise Invalid(f"has no key {ref.key!r}", resource=where)
        try:
            return read_authorities(found[0][ref.key])
        except Invalid as e:
            raise Invalid(e.message, resource=where, field=f"$.spec.data.{ref.key}") from None

    def _certificate(self, namespace: str, key: str, c: Certificate) -> CertConfig:
        hosts = tuple(c.hosts)
        if c.secret:
            source, found = f"Secret/{c.secret}", self._from_secret(namespace, c.secret)
        elif c.acme is not None:
            source, found = f"acme {hosts[0]}", self._from_acme(namespace, key, hosts, c.acme)
        else:
            source, found = "platform", self._from_platform(hosts)
        if isinstance(found, str):
            return CertConfig(source, hosts, waiting=found)
        missing = found.missing(hosts)
        if missing or not (hosts or found.names):
            what = f"is not for {', '.join(missing)}" if missing else "names no host"
            return CertConfig(source, hosts, waiting=what)
        return CertConfig(
            source, hosts or found.names, found.digest, self._seal(key, found), ends=float(int(found.ends))
        )

    def _seal(self, key: str, pair: Pair) -> str:
        at = (key, pair.digest)
        self._used.add(at)
        if at not in self._sealed:
            sealed = self._vault.seal(pair.pem.encode(), place(key, pair.digest))
            self._sealed[at] = base64.b64encode(sealed).decode()
        return self._sealed[at]

    def _from_secret(self, namespace: str, name: str) -> Pair | str:
        found = self._secret(namespace, name)
        if found is None:
            return "is not here yet"
        missing = [k for k in ("tls.crt", "tls.key") if k not in found[0]]
        if missing:
            return f"has no {' and no '.join(missing)}"
        try:
            return read_pair(found[0]["tls.crt"], found[0]["tls.key"])
        except Invalid as e:
            return e.message

    def _from_platform(self, hosts: Sequence[str]) -> Pair | str:
        text = self._own()
        at = text.find(_BEGIN)
        if at < 0:
            return "waits for the node's certificate: it has none from its hub"
        try:
            pair = read_pair(text[at:], text[:at])
        except Invalid as e:
            return e.message
        missing = pair.missing(hosts)
        return f"waits for the hub to sign for {', '.join(missing)}" if missing else pair

    def _from_acme(self, namespace: str, key: str, hosts: tuple[str, ...], acme: Acme) -> Pair | str:
        if self._orders is None:
            return "this node asks no ACME authority"
        try:
            ca = self._authorities(namespace, acme.ca) if acme.ca is not None else ""
        except Invalid as e:
            return str(e)
        wish = Wish(hosts, acme.directory, tuple(acme.contact), acme.termsAgreed, ca, key)
        self._wishes.append(wish)
        return self._orders.found(wish)
