"""One small document from another server over HTTPS: bounded in bytes and time, no redirects.

A URL goes in, bytes come out, or ``OSError`` and ``ValueError``. It blocks: call it in a thread.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

#: Bytes of a document, and seconds to wait for it.
MOST, WAIT = 256 * 1024, 10.0


def safe(url: str) -> bool:
    """Whether nobody on the way can read or change what is fetched there: TLS, or this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and host in ("127.0.0.1", "localhost", "::1"))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def fetch(url: str, form: bytes | None, ca_file: str = "", ca_pem: str = "") -> bytes:
    """The document, over TLS (or from this machine). With ``form`` it is posted, and a refusal in JSON is an answer."""
    if not safe(url):
        raise ValueError("it is no https address")
    tls = ssl.create_default_context(cafile=ca_file or None, cadata=ca_pem or None)
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=tls), _NoRedirect)
    headers = {"Accept": "application/json", "User-Agent": "edgeward"}
    asked = urllib.request.Request(url, data=form, headers=headers)  # noqa: S310 - the scheme was looked at
    try:
        with opener.open(asked, timeout=WAIT) as answer:
            data: bytes = answer.read(MOST + 1)
    except urllib.error.HTTPError as e:
        data = e.read(MOST + 1)
        if form is None or not data.strip().startswith(b"{"):
            raise OSError(f"HTTP status {e.code}") from None
    if len(data) > MOST:
        raise ValueError("its answer is too large")
    return data
