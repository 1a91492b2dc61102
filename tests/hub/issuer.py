"""An OpenID Connect issuer on loopback: discovery, keys, device flow; real keys, real tokens."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

Doc = dict[str, Any]


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _int(n: int, size: int | None = None) -> str:
    return b64(n.to_bytes(size or (n.bit_length() + 7) // 8, "big"))


class Key:
    """A signing key of the issuer, RSA or EC."""

    def __init__(self, kid: str, kind: str = "RS256", bits: int = 2048) -> None:
        self.kid, self.alg = kid, kind
        self.rsa = rsa.generate_private_key(65537, bits) if kind == "RS256" else None
        self.ec = ec.generate_private_key(ec.SECP256R1()) if kind == "ES256" else None

    @property
    def jwk(self) -> Doc:
        if self.rsa is not None:
            n = self.rsa.public_key().public_numbers()
            return {"kty": "RSA", "kid": self.kid, "use": "sig", "n": _int(n.n), "e": _int(n.e)}
        assert self.ec is not None
        p = self.ec.public_key().public_numbers()
        return {"kty": "EC", "kid": self.kid, "crv": "P-256", "x": _int(p.x, 32), "y": _int(p.y, 32)}

    def sign(self, claims: Doc, **header: Any) -> str:
        head = b64(json.dumps({"alg": self.alg, "kid": self.kid, **header}).encode())
        signed = f"{head}.{b64(json.dumps(claims).encode())}".encode()
        if self.rsa is not None:
            mark = self.rsa.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        else:
            assert self.ec is not None
            r, s = decode_dss_signature(self.ec.sign(signed, ec.ECDSA(hashes.SHA256())))
            mark = r.to_bytes(32, "big") + s.to_bytes(32, "big")
        return f"{signed.decode()}.{b64(mark)}"


class Issuer:
    def __init__(self, url: str) -> None:
        self.url = url
        self.keys = [Key("one")]
        self.person: Doc = {"sub": "u-1", "email": "eve@example.org", "groups": ["dev"]}
        #: What the token endpoint answers before it gives the token.
        self.answers: list[str] = ["authorization_pending"]
        self.asked: list[str] = []

    def claims(self, **more: Any) -> Doc:
        now = int(time.time())
        return {
            "iss": self.url,
            "aud": "edgeward",
            "iat": now,
            "exp": now + 300,
            "jti": os.urandom(8).hex(),
            **self.person,
            **more,
        }

    def answer(self, path: str, form: dict[str, str]) -> tuple[int, Doc]:
        self.asked.append(path)
        if path == "/.well-known/openid-configuration":
            ends = {"device_authorization_endpoint": "device", "token_endpoint": "token", "jwks_uri": "keys"}
            return 200, {"issuer": self.url, **{k: f"{self.url}/{v}" for k, v in ends.items()}}
        if path == "/keys":
            return 200, {"keys": [k.jwk for k in self.keys]}
        if path == "/device" and form.get("client_id") == "edgeward":
            return 200, {"device_code": "dc", "user_code": "WXYZ", "verification_uri": f"{self.url}/activate",
                         "interval": 0, "expires_in": 60}  # fmt: skip
        if path == "/token" and form.get("device_code") == "dc":
            if self.answers:
                return 400, {"error": self.answers.pop(0)}
            return 200, {"id_token": self.keys[-1].sign(self.claims()), "access_token": "x"}
        return 404, {"error": "no"}


@contextmanager
def issuer() -> Iterator[Issuer]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            form = {k: v[0] for k, v in parse_qs(self.rfile.read(length).decode()).items()}
            status, doc = made.answer(self.path, form)
            body = json.dumps(doc).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _do

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Issuer(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
