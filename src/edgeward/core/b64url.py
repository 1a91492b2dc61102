"""base64url without padding (RFC 4648, section 5; RFC 7515, appendix C): how bytes stand in tokens and keys. Pure."""

from __future__ import annotations

import base64
import binascii


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def unb64(text: str) -> bytes:
    """Raises ``ValueError``."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", True)
    except binascii.Error as e:
        raise ValueError(str(e)) from None
