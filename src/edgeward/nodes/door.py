"""A box's way to its hub's door: HTTPS with the hub's own CA, through proxies if need be, and the hub's signed answers.

Blocking; an agent runs it in a thread. In go addresses and what is trusted; out come answers whose signature by the
hub's CA holds, or an error. TLS alone is not believed: a proxy may look into it, with a CA that the operator named, so
every answer is signed by the hub for the very request it answers. Rules are in :mod:`edgeward.nodes.enrol`.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import msgspec
from cryptography import x509

from edgeward.core.certs import Trust, follow, pem, verify
from edgeward.core.errors import Invalid, Refused, Unreachable, from_problem
from edgeward.nodes.enrol import Answer, Grant, answer_proof

TIMEOUT = 20.0
_MOST = 1 << 20
#: OpenSSL's flag to leave the times of certificates alone.
_NO_CHECK_TIME = 0x200000


class Address(msgspec.Struct, frozen=True):
    """Where the hub is, and the CONNECT proxy before it (``http://[user:password@]host:port``, or empty)."""

    host: str
    port: int
    proxy: str = ""

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}"


def parse_address(url: str, proxy: str = "") -> Address:
    parts = _split(url if "://" in url else f"https://{url}", "hub")
    if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/"):
        raise Invalid(f"{url[:200]!r} is no address of a hub", remedy="write https://host:port")
    if proxy:
        via = _split(proxy, "proxy")
        if via.scheme != "http" or not via.hostname or via.path not in ("", "/"):
            raise Invalid(
                "that is no address of a proxy", field="--proxy", remedy="write http://[user:password@]host:port"
            )
    return Address(parts.hostname, parts.port or 443, proxy)


def _split(url: str, what: str) -> Any:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as e:
        raise Invalid(f"that is no address of a {what}: {e}") from None
    return parts


class Door:
    """One connection to a hub. ``trusted``: the hub's CAs; without them only :meth:`trust` may be called."""

    def __init__(
        self,
        address: Address,
        trusted: Sequence[x509.Certificate] = (),
        proxy_ca: str = "",
        *,
        timeout: float = TIMEOUT,
    ) -> None:
        self.address = address
        self.trusted = list(trusted)
        self._proxy_ca = proxy_ca
        self._timeout = timeout
        self._connection: http.client.HTTPSConnection | None = None

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # -- the wire ------------------------------------------------------------------------------------------------

    def context(self) -> ssl.SSLContext:
        """TLS that trusts the hub's CAs, and the proxy's."""
        # not create_default_context: it reads all of the system's CAs, which have no say here (60 ms)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not self.trusted:
            # only to fetch CAs, which are then held against the token's pin or against those that we know
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context
        context.load_verify_locations(cadata="".join(map(pem, self.trusted)) + self._proxy_ca)
        if time.time() < min(c.not_valid_before_utc.timestamp() for c in self.trusted):
            # this box's clock is wrong: it must get in to hear the time, and these CAs are ours at any time
            context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
        return context

    def _open(self) -> http.client.HTTPSConnection:
        a, context = self.address, self.context()
        if not a.proxy:
            return http.client.HTTPSConnection(a.host, a.port, timeout=self._timeout, context=context)
        via = urlsplit(a.proxy)
        connection = http.client.HTTPSConnection(
            via.hostname or "", via.port or 80, timeout=self._timeout, context=context
        )
        headers = {}
        if via.username:
            login = f"{unquote(via.username)}:{unquote(via.password or '')}"
            headers["Proxy-Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        connection.set_tunnel(a.host, a.port, headers)
        return connection

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "edgeward-node"}
        try:
            if self._connection is None:
                self._connection = self._open()
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
            data = response.read(_MOST + 1)
        except (OSError, http.client.HTTPException) as e:
            self.close()
            if isinstance(e, ssl.SSLCertVerificationError):
                raise Untrusted(self.address, e.verify_message) from None
            raise Unreachable(f"the hub at {self.address.url} cannot be reached: {_reason(e, self.address)}") from None
        if len(data) > _MOST:
            self.close()
            raise Refused(f"{self.address.url} sends too much", remedy="is it a hub?")
        if response.status >= 400:
            doc: Any = {}
            with contextlib.suppress(ValueError):
                doc = json.loads(data)
            error = from_problem(doc if isinstance(doc, dict) else {}, response.status)
            if not doc:
                error.remedy = f"does an Edgeward hub answer at {self.address.url}?"
            raise error
        return data

    def _decoded(self, data: bytes, form: Any) -> Any:
        try:
            return msgspec.json.decode(data, type=form)
        except (msgspec.DecodeError, ValueError):
            raise Unreachable(f"what answers at {self.address.url} is no Edgeward hub") from None

    # -- what it is for ----------------------------------------------------------------------------------------------

    def trust(self) -> Trust:
        """What the hub says of its CAs. Not believed by itself."""
        found: Trust = self._decoded(self._call("GET", "/api/v1/ca"), Trust)
        return found

    def learn(self, known: Sequence[x509.Certificate], said: Trust | None = None) -> None:
        """Trusts from now on those of the hub's CAs that ``known`` ones vouch for. Raises ``Refused``.

        ``said``: what the hub told already.
        """
        if said is None:
            with Door(self.address, proxy_ca=self._proxy_ca, timeout=self._timeout) as stranger:
                said = stranger.trust()
        self.close()
        self.trusted = follow(known, said)

    def nonce(self) -> str:
        return str(self._decoded(self._call("GET", "/api/v1/nonce"), dict[str, str]).get("nonce", ""))

    def ask(self, what: Literal["enrol", "renew", "leave"], ask: msgspec.Struct) -> Grant | None:
        """The hub's answer, its signature checked."""
        body = msgspec.json.encode(ask)
        answer: Answer = self._decoded(self._call("POST", f"/api/v1/{what}", body), Answer)
        proof = answer_proof(body, answer.grant)
        if not any(verify(ca, proof, answer.signature) for ca in self.trusted):
            raise Refused(
                f"the answer of {self.address.url} is not signed by the hub",
                remedy="something in between answers in its place",
            )
        grant: Grant | None = self._decoded(answer.grant, Grant | None)
        return grant

    def probe(self) -> Literal["unreachable", "untrusted", "reachable"]:
        """Whether the hub's port answers, and with a certificate that we trust."""
        try:
            connection = self._open()
            try:
                connection.connect()
            finally:
                connection.close()
        except ssl.SSLCertVerificationError:
            return "untrusted"
        except (OSError, http.client.HTTPException):
            return "unreachable"
        return "reachable"


class Untrusted(Unreachable):
    """The hub's certificate was not made by a CA that we trust."""

    def __init__(self, address: Address, why: str) -> None:
        super().__init__(
            f"the hub at {address.url} cannot be reached: its certificate is not trusted: {why}",
            remedy="behind a proxy that looks into TLS give its CA: --proxy-ca FILE",
        )


def _reason(e: Exception, address: Address) -> str:
    if isinstance(e, TimeoutError):
        return "no answer in time"
    if isinstance(e, socket.gaierror):
        return f"its name is not known: {e.strerror}"
    if isinstance(e, OSError) and address.proxy and str(e).startswith("Tunnel connection failed"):
        return f"the proxy refused: {e}"
    if isinstance(e, http.client.RemoteDisconnected | ConnectionResetError):
        return "it closed the connection"
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    return str(e) or type(e).__name__
