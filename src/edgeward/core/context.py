"""The id of the request or job that is being worked on; log lines and audit records carry it."""

from __future__ import annotations

import contextvars

correlation: contextvars.ContextVar[str] = contextvars.ContextVar("correlation", default="")
