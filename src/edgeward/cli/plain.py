"""Text from elsewhere, made fit for a terminal: what would drive it is shown, not obeyed.

A function's error, a node's message, a header: whoever wrote them may not be whoever reads them.
"""

from __future__ import annotations


def plain(text: str) -> str:
    """The text with control characters as ``\\x1b``; lines and tabs stay."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
