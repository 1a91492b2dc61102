"""What nats-server is told: a spec and the chosen ports in, the text of a configuration file out. No I/O.

Two shapes. The hub's server runs with an operator and JWTs, listens on loopback only, and takes leaf connections
through its WebSocket port, to which the hub process splices what comes for ``wss://host:port/leafnode``. A node's
server has two local accounts, EDGE for everything that lives at the node and SYS, speaks MQTT, keeps its own JetStream
domain and dials the hub as a leaf of EDGE. Which subjects cross the leaf is decided by the hub in the node's JWT
(:func:`edgeward.core.identity.node_permissions`); what is denied here as well is only a second lock.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

MAX_PAYLOAD = 8 << 20
HUB_DOMAIN = "hub"
AGENT_USER = "agent"
SYSTEM_USER = "system"
#: The data plane's: for what triggers keep, and for topics.
PLANE_USER, FUNCTIONS_USER = "plane", "functions"
_LOOPBACK = "127.0.0.1"
#: How long the link may take nothing before the server hangs up: longer than a bad link that is there stands still.
_LINK_WRITE = "2m"


def node_domain(node: str) -> str:
    """The JetStream domain of a node's own server."""
    return f"n-{node}"


def claims_dir(directory: Path) -> Path:
    """Where a hub's server keeps account JWTs, one file ``<account>.jwt`` each."""
    return directory / "claims"


class Spec(Protocol):
    """What a :class:`~edgeward.core.natsserver.NatsServer` runs."""

    @property
    def server_name(self) -> str: ...

    @property
    def ports(self) -> Mapping[str, tuple[str, int]]:
        """Listener to (host, port); port 0 means any free one, the same again after a restart if possible."""
        ...

    def settings(self, directory: Path, ports: Mapping[str, int], secret: str) -> dict[str, Any]:
        """The configuration's top level. ``secret`` is random and stays the same for a directory."""
        ...


@dataclass(frozen=True)
class Cluster:
    """How a hub's server and its peers find and trust one another: mutual TLS by the hub's CA, and a password."""

    listen: tuple[str, int]
    #: ``host:port`` of the peers.
    routes: tuple[str, ...]
    password: str
    #: Certificate and key in one file, and what the peers' ones are checked against.
    cert_file: Path
    ca_file: Path
    name: str = "edgeward"

    def settings(self) -> dict[str, Any]:
        user = "hub"
        host, port = self.listen
        return {
            "name": self.name,
            "host": host,
            "port": port,
            "no_advertise": True,
            "authorization": {"user": user, "password": self.password, "timeout": 5},
            # a peer is near
            "ping_interval": "20s",
            "ping_max": 2,
            "routes": [f"nats-route://{user}:{self.password}@{route}" for route in self.routes],
            "tls": {
                "cert_file": str(self.cert_file),
                "key_file": str(self.cert_file),
                "ca_file": str(self.ca_file),
                "verify": True,
                "timeout": 5,
            },
        }


@dataclass(frozen=True)
class HubSpec:
    """The hub's server. Listeners: ``client``, ``leaf`` (unused, but without it WebSocket leaves are refused),
    ``websocket`` (plain; put TLS before it)."""

    operator_jwt: str
    system_account: str
    #: Account public key to JWT (``HubIdentity.accounts``): those that must be there before anybody can push others.
    accounts: Mapping[str, str]
    server_name: str = "hub"
    client_port: int = 0
    leaf_port: int = 0
    websocket_port: int = 0
    #: ``always``: what is acknowledged survives a power cut. A duration ("1s") is faster and does not.
    sync_interval: str = "always"
    #: Bytes that streams may take on disk; 0 leaves it to the server (three quarters of the free space).
    max_file_store: int = 0
    max_memory_store: int = 256 << 20
    max_payload: int = MAX_PAYLOAD
    #: Seconds between pings; two missed ones end a connection. A node whose beats come is never pinged. Three of these
    #: are more than the longest silence of a node that is there (``nodes/liveness.py``).
    ping_interval: int = 45
    #: Its peers, where the hub is more than one server.
    cluster: Cluster | None = None

    @property
    def ports(self) -> Mapping[str, tuple[str, int]]:
        ports = {
            "client": (_LOOPBACK, self.client_port),
            "leaf": (_LOOPBACK, self.leaf_port),
            "websocket": (_LOOPBACK, self.websocket_port),
        }
        return ports | ({"cluster": self.cluster.listen} if self.cluster else {})

    def settings(self, directory: Path, ports: Mapping[str, int], secret: str) -> dict[str, Any]:
        peers = {"cluster": self.cluster.settings()} if self.cluster else {}
        return {
            **peers,
            **_common(self.server_name, directory, ports["client"], self.max_payload, self.ping_interval),
            "operator": self.operator_jwt,
            "system_account": self.system_account,
            # others are pushed while it runs (core/claims.py) and kept here; the servers of a cluster share them
            "resolver": {"type": "full", "dir": str(claims_dir(directory)), "allow_delete": False, "interval": "2m"},
            "resolver_preload": dict(self.accounts),
            "jetstream": _jetstream(
                directory, HUB_DOMAIN, self.sync_interval, self.max_memory_store, self.max_file_store
            ),
            "leafnodes": {
                "host": _LOOPBACK,
                "port": ports["leaf"],
                # the hub's addresses are loopback ones: a node that learned them would dial itself
                "no_advertise": True,
                # else every node is told every other node's subscriptions
                "isolate_leafnode_interest": True,
                "authorization": {"timeout": 15},
                "write_deadline": _LINK_WRITE,
            },
            "websocket": {
                "host": _LOOPBACK,
                "port": ports["websocket"],
                "no_tls": True,
                "compression": False,
                "handshake_timeout": "15s",
            },
        }


@dataclass(frozen=True)
class NodeSpec:
    """A node's server. Listeners: ``client``, ``mqtt``."""

    node: str
    #: ``wss://host:port`` of the hub; empty: no leaf.
    hub_url: str = ""
    creds_file: Path | None = None
    ca_file: Path | None = None
    #: ``http://[user:password@]host:port`` of an HTTP CONNECT proxy on the way to the hub; empty: none.
    proxy: str = ""
    #: Other addresses of the same hub, tried when that one does not answer.
    more_urls: tuple[str, ...] = ()
    client_port: int = 0
    mqtt_host: str = _LOOPBACK
    mqtt_port: int = 0
    #: MQTT user to password.
    mqtt_users: Mapping[str, str] = field(default_factory=dict)
    #: One of ``mqtt_users``: who a client without a user name is; empty: such a client is refused.
    mqtt_anonymous: str = ""
    #: Password of the data plane's two users; empty: there are none.
    plane_password: str = ""
    #: Subjects whose publishers are refused: a PUBLISH of QoS 1 gets no PUBACK, what wants no answer is dropped.
    closed: tuple[str, ...] = ()
    #: ``1s``: a power cut may cost the last second; ``always`` costs most of the throughput.
    sync_interval: str = "1s"
    max_file_store: int = 4 << 30
    max_memory_store: int = 64 << 20
    max_payload: int = MAX_PAYLOAD
    #: Seconds. A leaf's own pings cross the link whatever else does; the agent's beats find a dead link sooner, and it
    #: has the leaf dialled anew (``nodes/wan.py``).
    ping_interval: int = 240

    @property
    def server_name(self) -> str:
        return node_domain(self.node)

    @property
    def ports(self) -> Mapping[str, tuple[str, int]]:
        return {"client": (_LOOPBACK, self.client_port), "mqtt": (self.mqtt_host, self.mqtt_port)}

    def settings(self, directory: Path, ports: Mapping[str, int], secret: str) -> dict[str, Any]:
        local: list[dict[str, Any]] = [
            {"user": AGENT_USER, "password": secret, "allowed_connection_types": ["STANDARD"]},
            *(
                {
                    "user": user,
                    "password": password,
                    "allowed_connection_types": ["MQTT"],
                    "permissions": _device_permissions(self.node),
                }
                for user, password in sorted(self.mqtt_users.items())
            ),
        ]
        if self.plane_password:
            local += _plane_users(self.node, self.plane_password)
        mqtt: dict[str, Any] = {"host": self.mqtt_host, "port": ports["mqtt"]}
        if self.mqtt_anonymous:
            mqtt["no_auth_user"] = self.mqtt_anonymous
        edge: dict[str, Any] = {"jetstream": "enabled", "users": local}
        if self.closed:
            edge["mappings"] = closed_mappings(self.closed)
        settings = {
            **_common(self.server_name, directory, ports["client"], self.max_payload, self.ping_interval),
            "system_account": "SYS",
            "accounts": {
                "EDGE": edge,
                "SYS": {"users": [{"user": SYSTEM_USER, "password": secret}]},
            },
            "jetstream": _jetstream(
                directory, self.server_name, self.sync_interval, self.max_memory_store, self.max_file_store
            ),
            "mqtt": mqtt,
        }
        if self.hub_url:
            settings["leafnodes"] = {
                "reconnect": f"{self._reconnect_ms()}ms",
                "write_deadline": _LINK_WRITE,
                "remotes": [self._remote()],
            }
        return settings

    def _reconnect_ms(self) -> int:
        # each node has its own period, so that a fleet that lost its hub at one moment does not dial as one for ever
        return 700 + zlib.crc32(self.node.encode()) % 700

    def _remote(self) -> dict[str, Any]:
        remote: dict[str, Any] = {
            "urls": [self.hub_url, *self.more_urls],
            "account": "EDGE",
            # defaults 1 s each; a satellite link with loss needs more
            "dial_timeout": "15s",
            "first_info_timeout": "15s",
            "ignore_discovered_servers": True,
            "deny_imports": ["$MQTT.>"],
            "deny_exports": ["$MQTT.>"],
        }
        if self.creds_file is not None:
            remote["credentials"] = str(self.creds_file)
        if self.ca_file is not None:
            remote["tls"] = {"ca_file": str(self.ca_file), "timeout": 15}
        if self.proxy:
            parts = urlsplit(self.proxy)
            host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
            proxy = {"url": f"http://{host}:{parts.port or 80}", "timeout": "15s"}
            if parts.username:
                proxy |= {"username": unquote(parts.username), "password": unquote(parts.password or "")}
            remote["proxy"] = proxy
        return remote


def closed_mappings(subjects: Collection[str]) -> dict[str, Any]:
    """An account's ``mappings`` by which nothing that is published on these subjects arrives anywhere.

    A destination of weight 0 that is the source is none at all (without it nats-server fills up with the source), and
    a publish to nowhere gets no acknowledgement of JetStream's: after 5 s the broker closes the connection. There is no
    such destination for a source with ``*``: what nats-server takes there ends in a subject, and is acknowledged.
    """
    if any("*" in subject for subject in subjects):
        raise ValueError("a subject with * cannot be closed")
    return {subject: [{"destination": subject, "weight": 0}] for subject in sorted(subjects)}


def _device_permissions(node: str) -> dict[str, Any]:
    # An MQTT topic is a subject: without this a device could speak as the agent (`ew/hub/beat/<node>`), and across the
    # leaf as the node; and one that subscribes to `#` would read the answers the agent gets.
    denied = ["ew.>", "_INBOX.>", f"_INBOX_{node}.>", "$JS.>", "$SYS.>", "$KV.>", "$O.>"]
    return {"publish": {"deny": denied}, "subscribe": {"deny": denied}}


def _plane_users(node: str, password: str) -> list[dict[str, Any]]:
    """The data plane's: one for the functions' streams and consumers and nothing else, one that is as a device is."""
    streams = ("FN_bus", "FN_dead")
    publish = [
        f"$JS.API.STREAM.{verb}.{s}" for verb in ("CREATE", "UPDATE", "INFO", "DELETE", "PURGE") for s in streams
    ]
    publish += ["$JS.API.STREAM.MSG.DELETE.FN_dead", "$JS.API.DIRECT.GET.FN_dead", "$JS.API.DIRECT.GET.FN_dead.>"]
    publish += ["$JS.API.INFO", "$JS.API.STREAM.INFO.$MQTT_msgs", "$MQTT.msgs.>", "ew.fn.dead.>"]
    for stream in ("FN_bus", "$MQTT_msgs"):
        publish += [f"$JS.ACK.{stream}.>", f"$JS.ACK.*.*.{stream}.>", f"$JS.API.CONSUMER.*.{stream}"]
        publish += [f"$JS.API.CONSUMER.{verb}.{stream}.>" for verb in ("*", "DURABLE.CREATE", "MSG.NEXT")]
    devices = _device_permissions(node)
    denied = {side: {"deny": [*rule["deny"], "$MQTT.>"]} for side, rule in devices.items()}
    return [
        {
            "user": PLANE_USER,
            "password": password,
            "allowed_connection_types": ["STANDARD"],
            "permissions": {
                "publish": {"allow": publish},
                "subscribe": {"allow": ["ew.local.plane.>", "ew.local.*"]},
            },
        },
        {
            "user": FUNCTIONS_USER,
            "password": password,
            "allowed_connection_types": ["STANDARD", "MQTT"],
            "permissions": denied,
        },
    ]


def _common(name: str, directory: Path, port: int, max_payload: int, ping_interval: int) -> dict[str, Any]:
    return {
        "server_name": name,
        "host": _LOOPBACK,
        "port": port,
        "logfile": str(directory / "nats.log"),
        "logfile_size_limit": 8 << 20,
        "logfile_max_num": 3,
        "max_payload": max_payload,
        "max_pending": 64 << 20,
        "ping_interval": f"{ping_interval}s",
        "ping_max": 2,
        "write_deadline": "15s",
    }


def _jetstream(directory: Path, domain: str, sync: str, memory: int, disk: int) -> dict[str, Any]:
    value: dict[str, Any] = {
        "store_dir": str(directory / "jetstream"),
        "domain": domain,
        "sync_interval": sync,
        "max_memory_store": memory,
    }
    if disk:
        value["max_file_store"] = disk
    return value


_ESCAPE = re.compile(r"\\(?:u00([0-9a-f]{2})|(.))")


def _text(value: Any) -> str:
    """JSON with NATS's escapes for control characters: it knows ``\\x1f``, not ``\\u001f``, ``\\b`` and ``\\f``."""

    def one(match: re.Match[str]) -> str:
        return "\\x" + match[1] if match[1] else {"b": "\\x08", "f": "\\x0c"}.get(match[2], match[0])

    return _ESCAPE.sub(one, json.dumps(value, indent=2, ensure_ascii=False))


def render(spec: Spec, directory: Path, ports: Mapping[str, int], secret: str) -> str:
    """The file's text. Values are JSON, which NATS's language takes too, so nothing can break out of its quotes."""
    lines = ["# Written by Edgeward at each start; changes made here are lost."]
    for key, value in spec.settings(directory, ports, secret).items():
        lines.append(f"{key}: {_text(value)}")
    return "\n".join(lines) + "\n"
