"""A small ACME authority (RFC 8555) that takes nothing on trust: signatures, nonces, URLs, proofs and requests are
checked as the RFC says, and the proof is fetched by HTTP from where the host is. What a real one does on top (policies,
several validators) it does not. ``pebble``, where it is installed, is the other one that the client is tested with."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import secrets
import ssl
import threading
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from tests.gateway.papers import Authority

from edgeward.core.certs import pem
from edgeward.gateway.pems import names_of

ERROR = "urn:ietf:params:acme:error:"


class Bad(Exception):
    def __init__(self, kind: str, detail: str, status: int = 400, **headers: str) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.status, self.headers = kind, detail, status, headers


def unb64(text: str) -> bytes:
    if "=" in text:
        raise Bad("malformed", "padding")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def thumbprint(jwk: dict[str, str]) -> str:
    text = json.dumps({k: jwk[k] for k in ("crv", "kty", "x", "y")}, separators=(",", ":"))
    digest = hashes.Hash(hashes.SHA256())
    digest.update(text.encode())
    return b64(digest.finalize())


class AcmeAuthority:
    """``http_port``: where the hosts' port 80 is. Set ``stale`` to refuse so many nonces, ``limited`` to refuse orders
    with that Retry-After, ``wrong`` to certify another name, ``days`` for the life of certificates (from ``begin``)."""

    def __init__(self, folder: Path, http_port: int) -> None:
        self.http_port = http_port
        self.signer, self.own = Authority("acme intermediate"), Authority("acme server")
        self.nonces: set[str] = set()
        self.accounts: dict[str, dict[str, Any]] = {}
        self.orders: dict[str, dict[str, Any]] = {}
        self.authorizations: dict[str, dict[str, Any]] = {}
        self.certificates: dict[str, str] = {}
        self.stale = 0
        self.limited = ""
        self.wrong = False
        self.begin: Any = None
        self.end: Any = None
        self.asked: list[str] = []
        self.lock = threading.Lock()
        chain, key = self.own.issue("127.0.0.1")
        (folder / "acme.pem").write_text(key + chain)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "acme.pem")
        authority = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                authority.serve(self, b"")

            def do_GET(self) -> None:
                authority.serve(self, b"")

            def do_POST(self) -> None:
                authority.serve(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.base = f"https://127.0.0.1:{self.server.server_address[1]}"
        self.directory = f"{self.base}/dir"
        self.ca = self.own.pem
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    def serve(self, h: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        with self.lock:
            self.asked.append(h.path)
            try:
                status, headers, doc = self.answer(h, body)
            except Bad as e:
                status, headers = e.status, {"Content-Type": "application/problem+json", **e.headers}
                doc = {"type": ERROR + e.kind, "detail": e.detail}
            except (KeyError, ValueError, TypeError) as e:
                status, headers, doc = 400, {}, {"type": ERROR + "malformed", "detail": repr(e)}
            data = doc.encode() if isinstance(doc, str) else json.dumps(doc).encode() if doc is not None else b""
            nonce = secrets.token_urlsafe(16)
            self.nonces.add(nonce)
        h.send_response(status)
        for name, value in {**headers, "Replay-Nonce": nonce, "Content-Length": str(len(data))}.items():
            h.send_header(name, value)
        h.end_headers()
        if h.command != "HEAD":
            h.wfile.write(data)

    def answer(self, h: http.server.BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], Any]:
        path = h.path
        if path == "/dir" and h.command == "GET":
            names = {"newNonce": "nonce", "newAccount": "account", "newOrder": "order", "revokeCert": "revoke"}
            return 200, {}, {k: f"{self.base}/{v}" for k, v in names.items()} | {"meta": {"termsOfService": "x"}}
        if path == "/nonce" and h.command == "HEAD":
            return 200, {"Cache-Control": "no-store"}, None
        if h.command != "POST":
            raise Bad("malformed", "only POST is served here", 405)
        if h.headers["Content-Type"] != "application/jose+json":
            raise Bad("malformed", "Content-Type", 415)
        account, payload = self.verified(body, f"{self.base}{path}", new=path == "/account")
        kind, _, name = path[1:].partition("/")
        if kind == "account":
            return self.new_account(account, cast(dict[str, Any], payload))
        if kind == "order" and not name:
            return self.new_order(account, cast(dict[str, Any], payload))
        found = {"order": self.orders, "authz": self.authorizations, "challenge": self.authorizations,
                 "finalize": self.orders, "cert": self.certificates}[kind][name]  # fmt: skip
        if isinstance(found, dict) and found["account"] != account["kid"]:
            raise Bad("unauthorized", "another account's", 403)
        if kind in ("challenge", "finalize"):
            if payload is None:
                raise Bad("malformed", "a payload is wanted")
            return (
                self.begin_proof(found) if kind == "challenge" else self.finalize(found, cast(dict[str, Any], payload))
            )
        if payload is not None:
            raise Bad("malformed", "POST-as-GET has no payload")
        if kind == "cert":
            return 200, {"Content-Type": "application/pem-certificate-chain"}, found
        if kind == "authz" and found["state"] == "asked":
            self.validate(found, account)
        return 200, {"Retry-After": "1"}, self.shown(found)

    # -- JWS -----------------------------------------------------------------------------------------------------------

    def verified(self, body: bytes, url: str, *, new: bool) -> tuple[dict[str, Any], Any]:
        doc = json.loads(body)
        if set(doc) != {"protected", "payload", "signature"}:
            raise Bad("malformed", "not a flattened JWS")
        head = json.loads(unb64(doc["protected"]))
        if set(head) != {"alg", "nonce", "url", "jwk" if new else "kid"} or head["alg"] != "ES256":
            raise Bad("malformed", f"header {sorted(head)}")
        if self.stale:
            self.stale -= 1
            raise Bad("badNonce", "not this time")
        if head["nonce"] not in self.nonces:
            raise Bad("badNonce", "not ours, or used")
        self.nonces.discard(head["nonce"])
        if head["url"] != url:
            raise Bad("unauthorized", "another URL", 401)
        jwk = head["jwk"] if new else self.accounts[head["kid"]]["jwk"]
        if set(jwk) != {"kty", "crv", "x", "y"} or (jwk["kty"], jwk["crv"]) != ("EC", "P-256"):
            raise Bad("badPublicKey", "the key")
        numbers = ec.EllipticCurvePublicNumbers(
            int.from_bytes(unb64(jwk["x"]), "big"), int.from_bytes(unb64(jwk["y"]), "big"), ec.SECP256R1()
        )
        mark = unb64(doc["signature"])
        if len(mark) != 64:
            raise Bad("malformed", "the signature's form")
        pair = encode_dss_signature(int.from_bytes(mark[:32], "big"), int.from_bytes(mark[32:], "big"))
        said = f"{doc['protected']}.{doc['payload']}".encode()
        numbers.public_key().verify(pair, said, ec.ECDSA(hashes.SHA256()))
        payload = json.loads(unb64(doc["payload"])) if doc["payload"] else None
        if new:
            kid = f"{self.base}/account/{thumbprint(jwk)}"
            return self.accounts.get(kid) or {"kid": kid, "jwk": jwk}, payload
        return self.accounts[head["kid"]], payload

    # -- what there is -----------------------------------------------------------------------------------------------

    def new_account(self, account: dict[str, Any], payload: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        known = account["kid"] in self.accounts
        if not known and not payload.get("termsOfServiceAgreed"):
            raise Bad("userActionRequired", "agree to the terms of service", 403)
        self.accounts[account["kid"]] = account | {"contact": payload.get("contact", [])}
        return 200 if known else 201, {"Location": account["kid"]}, {"status": "valid"}

    def new_order(self, account: dict[str, Any], payload: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if self.limited:
            raise Bad("rateLimited", "too many orders", 429, **{"Retry-After": self.limited})
        name = secrets.token_hex(8)
        order = {"account": account["kid"], "state": "pending", "identifiers": payload["identifiers"], "name": name}
        order["authorizations"] = []
        for identifier in payload["identifiers"]:
            one = secrets.token_hex(8)
            self.authorizations[one] = {
                "account": account["kid"], "state": "pending", "identifier": identifier, "name": one, "error": None,
                "token": secrets.token_urlsafe(32),
            }  # fmt: skip
            order["authorizations"].append(one)
        self.orders[name] = order
        return 201, {"Location": f"{self.base}/order/{name}"}, self.shown(order)

    def shown(self, what: dict[str, Any]) -> dict[str, Any]:
        state = "pending" if what["state"] == "asked" else what["state"]
        if "token" in what:
            challenge = {"type": "http-01", "url": f"{self.base}/challenge/{what['name']}", "token": what["token"],
                         "status": state} | ({"error": what["error"]} if what["error"] else {})  # fmt: skip
            others = [{"type": t, "url": "x", "token": what["token"]} for t in ("dns-01", "tls-alpn-01")]
            return {"status": state, "identifier": what["identifier"], "challenges": [*others, challenge]}
        states = [self.authorizations[n]["state"] for n in what["authorizations"]]
        if state == "pending" and all(s == "valid" for s in states):
            what["state"] = state = "ready"
        if state == "pending" and "invalid" in states:
            what["state"] = state = "invalid"
        doc = {
            "status": state, "identifiers": what["identifiers"], "finalize": f"{self.base}/finalize/{what['name']}",
            "authorizations": [f"{self.base}/authz/{n}" for n in what["authorizations"]],
        }  # fmt: skip
        if state == "processing":
            what["state"] = "valid"  # with the next look
        if state == "valid":
            doc["certificate"] = f"{self.base}/cert/{what['name']}"
        return doc

    def begin_proof(self, authorization: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if authorization["state"] == "pending":
            authorization["state"] = "asked"
        return 200, {}, self.shown(authorization)["challenges"][-1]

    def validate(self, authorization: dict[str, Any], account: dict[str, Any]) -> None:
        """RFC 8555, section 8.3."""
        host, token = authorization["identifier"]["value"], authorization["token"]
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=30)
        try:
            connection.request("GET", f"/.well-known/acme-challenge/{token}", headers={"Host": host})
            got = connection.getresponse()
            body = got.read(1000).rstrip()
            if got.status == 200 and body == f"{token}.{thumbprint(account['jwk'])}".encode():
                authorization["state"] = "valid"
                return
            why = f"status {got.status}, {body[:40]!r}"
        except OSError as e:
            why = str(e)
        finally:
            connection.close()
        authorization["state"] = "invalid"
        authorization["error"] = {"type": ERROR + "unauthorized", "detail": f"{host} said {why}"}

    def finalize(self, order: dict[str, Any], payload: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if self.shown(order)["status"] != "ready":
            raise Bad("orderNotReady", order["state"], 403)
        csr = x509.load_der_x509_csr(unb64(payload["csr"]))
        wanted = {i["value"] for i in order["identifiers"]}
        if not csr.is_signature_valid or set(names_of(cast(x509.Certificate, csr))) != wanted or len(csr.subject) > 1:
            raise Bad("badCSR", "not for the order's names")
        x962, form = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        point = csr.public_key().public_bytes(x962, form)
        if any(unb64(a["jwk"]["x"]) == point[1:33] for a in self.accounts.values()):
            raise Bad("badPublicKey", "the account's own key")
        times = {k: v for k, v in (("begin", self.begin), ("end", self.end)) if v is not None}
        names = ("other.example.org",) if self.wrong else tuple(sorted(wanted))
        self.certificates[order["name"]] = pem(self.signer.certify(csr.public_key(), *names, **times)) + self.signer.pem
        order["state"] = "processing"
        return 200, {}, self.shown(order)
