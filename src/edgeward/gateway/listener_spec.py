"""Kind Listener: where a node's gateway listens beside its plain port of ``node.json``, and by what certificates. Pure.

A Listener is the hub's to declare, and no site's: the platform's authority signs for the hosts that stand in one, and a
node that was broken into must not have itself certified for others' names. Where it may listen is the word of the
node's owner (``bounds.py``).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from edgeward.core.certs import LOCAL_NAMES, NODE_DOMAIN
from edgeward.core.declared import Declared, Placement
from edgeward.core.errors import Invalid
from edgeward.core.registry import Column, Kind, Ref, kinds
from edgeward.core.resource import NAME_PATTERN, Resource
from edgeward.core.scope import takes
from edgeward.core.spans import is_address

_HOST = re.compile(r"(?=.{1,253}$)(\*\.)?[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_HOSTS_MOST = 32
_NAMES_BYTES = 3000
_OWN = NODE_DOMAIN.removeprefix(".node")


class CaRef(Declared):
    """Certificates of authorities (PEM), public as they are: in a Config of the namespace."""

    config: Annotated[str, Meta(description="A Config of the namespace")]
    key: Annotated[str, Meta(description="Its key with the certificates, PEM", max_length=253)] = "ca.crt"


class Acme(Declared):
    """An authority that speaks ACME (RFC 8555) and asks by HTTP-01 on the hosts' port 80: a plain Listener there, or
    what passes port 80 on to this node's gateway, must answer."""

    directory: Annotated[str, Meta(description="Its directory, an https URL", max_length=512)]
    contact: Annotated[list[str], Meta(description="e.g. mailto:ops@example.org", max_length=8)] = []
    termsAgreed: Annotated[bool, Meta(description="You agree to its terms of service")] = False
    ca: Annotated[
        CaRef | None, Meta(description="Who signed the directory's own certificate; the system's if left out")
    ] = None


class Certificate(Declared):
    """One certificate. Exactly one of secret, platform, acme."""

    hosts: Annotated[
        list[str],
        Meta(
            description="Names, *.NAME or addresses it is for; of a Secret: those in it if empty",
            max_length=_HOSTS_MOST,
        ),
    ] = []
    secret: Annotated[str, Meta(description="A Secret of the namespace with tls.crt (the chain) and tls.key, PEM")] = ""
    platform: Annotated[bool, Meta(description="Signed by the hub for the node's own key, renewed by itself")] = False
    acme: Annotated[Acme | None, Meta(description="From an ACME authority, renewed by itself")] = None


class ClientCA(CaRef):
    """Whose certificates clients show."""

    optional: Annotated[
        bool, Meta(description="Clients without one are let in; Routes with auth.mtls still refuse them")
    ] = False


class Tls(Declared):
    certificates: Annotated[
        list[Certificate],
        Meta(description="The client's SNI chooses; the first without one", min_length=1, max_length=32),
    ]
    clientCA: Annotated[ClientCA | None, Meta(description="Clients show a certificate that one of these signed")] = None
    minVersion: Annotated[Literal["1.2", "1.3"], Meta(description="Of TLS")] = "1.2"
    http2: Annotated[bool, Meta(description="Offer HTTP/2 (by ALPN)")] = True


class ListenerSpec(Declared):
    """A port of the gateway. All Routes of the node answer there; with TLS only for the hosts of its certificates."""

    port: Annotated[int, Meta(description="TCP", ge=1, le=65535)]
    address: Annotated[
        str, Meta(description="An address of the node; others than the loopback's must be allowed in node.json")
    ] = "127.0.0.1"
    tls: Annotated[Tls | None, Meta(description="Left out: plain HTTP")] = None
    redirect: Annotated[
        int, Meta(description="Send everybody to https on this port (308); only without tls. 0: no", ge=0, le=65535)
    ] = 0
    placement: Annotated[Placement, Meta(description="Which nodes have it; empty: all")] = msgspec.field(
        default_factory=Placement
    )


def _check_hosts(hosts: list[str], where: str, *, acme: bool, platform: bool) -> None:
    for n, host in enumerate(hosts):
        at = f"{where}.hosts[{n}]"
        if is_address(host):
            if str(ipaddress.ip_address(host)) != host:
                raise Invalid(
                    f"{host!r} is not in its plain form", field=at, remedy=f"write {ipaddress.ip_address(host)}"
                )
        elif not _HOST.fullmatch(host):
            raise Invalid(
                f"{host[:80]!r} is no host", field=at, remedy="lower case: example.org, *.example.org, 192.0.2.1"
            )
        if f".{host}".endswith(_OWN):
            raise Invalid("is the platform's own", field=at, remedy="the node's certificate has its own name anyway")
        if platform and (host in LOCAL_NAMES or (is_address(host) and ipaddress.ip_address(host).is_loopback)):
            raise Invalid("is the hub's own name as well", field=at, remedy="use another name, or a Secret")
        if acme and host.startswith("*."):
            raise Invalid("HTTP-01 proves no wildcard", field=at, remedy="name the hosts (RFC 8555, section 8.3)")


def _check_certificate(c: Certificate, where: str) -> None:
    given = [n for n in ("secret", "platform", "acme") if getattr(c, n)]
    if len(given) != 1:
        what = f"more than one source: {', '.join(given)}" if given else "no source"
        raise Invalid(what, field=where, remedy="give exactly one of secret, platform: true, acme")
    if c.secret and not re.fullmatch(NAME_PATTERN, c.secret):
        raise Invalid(f"{c.secret[:63]!r} is no name", field=f"{where}.secret")
    if not c.hosts and not c.secret:
        raise Invalid("for which hosts?", field=f"{where}.hosts", remedy="name them: [shop.example.org]")
    _check_hosts(c.hosts, where, acme=c.acme is not None, platform=c.platform)
    if c.acme is not None:
        url = urlsplit(c.acme.directory)
        if url.scheme != "https" or not url.hostname or not c.acme.directory.isascii() or url.username is not None:
            raise Invalid("is no https URL", field=f"{where}.acme.directory", remedy="write https://host/directory")
        for n, contact in enumerate(c.acme.contact):
            if not re.fullmatch(r"mailto:[!-~]{3,254}", contact):
                raise Invalid(
                    f"{contact[:80]!r} is no contact",
                    field=f"{where}.acme.contact[{n}]",
                    remedy="write mailto:NAME@HOST",
                )


def _check(r: Resource) -> None:
    spec: ListenerSpec = r.spec
    if not is_address(spec.address):
        raise Invalid(
            f"{spec.address[:80]!r} is no address", field="$.spec.address", remedy="write e.g. 192.0.2.10 or ::1"
        )
    if spec.tls is None:
        return
    if spec.redirect:
        raise Invalid("with tls there is nothing to redirect to", field="$.spec.redirect", remedy="remove it")
    seen: dict[str, str] = {}
    for n, c in enumerate(spec.tls.certificates):
        where = f"$.spec.tls.certificates[{n}]"
        _check_certificate(c, where)
        for host in c.hosts:
            if host in seen:
                raise Invalid(f"{host!r} stands in {seen[host]} already", field=f"{where}.hosts", remedy="remove one")
            seen[host] = where


def _refs(r: Resource) -> list[Ref]:
    spec: ListenerSpec = r.spec
    ns = r.metadata.namespace
    refs = [Ref("Site", "_", spec.placement.site, "$.spec.placement.site")] if spec.placement.site else []
    if spec.tls is None:
        return refs
    if spec.tls.clientCA is not None:
        refs.append(Ref("Config", ns, spec.tls.clientCA.config, "$.spec.tls.clientCA.config"))
    for n, c in enumerate(spec.tls.certificates):
        where = f"$.spec.tls.certificates[{n}]"
        if c.secret:
            refs.append(Ref("Secret", ns, c.secret, f"{where}.secret"))
        if c.acme is not None and c.acme.ca is not None:
            refs.append(Ref("Config", ns, c.acme.ca.config, f"{where}.acme.ca.config"))
    return refs


def platform_hosts(r: Resource) -> list[str]:
    """The names that the hub shall put into the certificates of the Listener's nodes."""
    tls = r.spec.tls
    return [h for c in tls.certificates if c.platform for h in c.hosts] if tls is not None else []


def names_by_node(
    listeners: Iterable[Resource], nodes: Sequence[Resource], taken: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """The names that each node's certificate gets. ``taken``: the hub's own, which no node may pass for."""
    found: dict[str, set[str]] = {}
    for listener in listeners:
        hosts = [h for h in platform_hosts(listener) if not _matches(h, taken)]
        if hosts and not listener.metadata.deletionTimestamp:
            for node in nodes:
                if takes(listener, node):
                    found.setdefault(node.metadata.name, set()).update(hosts)
    return {n: tuple(_fitting(sorted(hosts))) for n, hosts in found.items()}


def _matches(host: str, taken: Collection[str]) -> bool:
    return host in taken or (host.startswith("*.") and any(t.partition(".")[2] == host[2:] for t in taken))


def _fitting(hosts: Iterable[str]) -> Iterable[str]:
    """As many as a certificate that travels in 8 kB can have."""
    left = _NAMES_BYTES
    for host in hosts:
        left -= len(host) + 4
        if left < 0:
            return
        yield host


def _tls(d: dict[str, Any]) -> str:
    tls = d["spec"].get("tls")
    if tls is None:
        return f"to :{d['spec']['redirect']}" if d["spec"].get("redirect") else "no"
    return ", ".join(h for c in tls["certificates"] for h in c.get("hosts", [c.get("secret", "")]))


kinds.add(
    Kind(
        "Listener",
        "listeners",
        ListenerSpec,
        reported=True,
        doc="A port at which nodes' gateways listen, plain or with TLS.",
        scope="placed",
        at_hub_only=True,
        level=2,
        check=_check,
        refs=_refs,
        columns=(
            Column("ADDRESS", lambda d: f"{d['spec'].get('address', '127.0.0.1')}:{d['spec']['port']}"),
            Column("TLS", _tls),
            Column("PHASE", lambda d: d.get("status", {}).get("phase", "Pending")),
            Column("MESSAGE", lambda d: d.get("status", {}).get("message", ""), wide=True),
        ),
        example=(
            "apiVersion: edgeward/v1\nkind: Listener\nmetadata: {name: shop}\n"
            "spec:\n  port: 8443\n  tls:\n    certificates:\n    - {hosts: [shop.example.org], platform: true}\n"
        ),
    )
)
