"""MQTT topics and NATS subjects, as nats-server maps them. Pure.

``/`` separates levels and becomes ``.``; a dot inside a level becomes ``//``; an empty level becomes ``/`` (at either
end or between two slashes). ``+`` is ``*`` and ``#`` is ``>``; ``a/#`` also takes ``a`` itself.
"""

from __future__ import annotations

from edgeward.core.errors import Invalid


def is_own(level: str) -> bool:
    """Whether topics with this first level are the system's own: a wildcard does not take them (MQTT 3.1.1, 4.7.2)."""
    return level.startswith(("$", "_INBOX")) or level == "ew"


def check_filter(topic: str, field: str) -> None:
    """Refuses what is no topic filter of MQTT 3.1.1, and topics that are the system's own."""
    if not topic or "\0" in topic or any(c in topic for c in " \t\r\n"):
        raise Invalid(f"{topic[:60]!r} is no topic filter", field=field, remedy="no spaces, not empty")
    levels = topic.split("/")
    for n, level in enumerate(levels):
        if "#" in level and (level != "#" or n != len(levels) - 1):
            raise Invalid(f"{topic[:60]!r}: # stands alone, as the last level", field=field, remedy="e.g. sensors/#")
        if "+" in level and level != "+":
            raise Invalid(f"{topic[:60]!r}: + stands alone in its level", field=field, remedy="e.g. sensors/+/temp")
    if is_own(levels[0]):
        raise Invalid(f"{topic[:60]!r} is the system's own", field=field, remedy="name topics of devices")
    if topic == "#":
        raise Invalid("# would be everything", field=field, remedy="name a first level, e.g. sensors/#")


def check_subject(subject: str, field: str) -> None:
    """Refuses what is no subject filter of NATS, and subjects that are the system's own."""
    words = subject.split(".")
    if not subject or not subject.isprintable() or " " in subject or "" in words:
        raise Invalid(f"{subject[:60]!r} is no subject", field=field, remedy="words with dots between, no spaces")
    for n, word in enumerate(words):
        if (">" in word and (word != ">" or n != len(words) - 1)) or ("*" in word and word != "*"):
            raise Invalid(
                f"{subject[:60]!r}: * is a whole word, > the last one", field=field, remedy="e.g. machines.*.state"
            )
    if words[0] in ("*", ">", "ew") or words[0].startswith(("$", "_")):
        raise Invalid(
            f"{subject[:60]!r} takes what is the system's own", field=field, remedy="name a first word, e.g. machines.>"
        )


def to_subject(topic: str) -> str:
    """The NATS subject of a topic or filter."""
    out: list[str] = []
    levels = topic.split("/")
    for n, level in enumerate(levels):
        if level == "":
            # an empty level is a single slash token
            out.append("/")
        elif level == "+":
            out.append("*")
        elif level == "#" and n == len(levels) - 1:
            out.append(">")
        else:
            out.append(level.replace(".", "//"))
    return ".".join(out)


def to_topic(subject: str) -> str:
    """The MQTT topic of a subject (no wildcards)."""
    return "/".join("" if part == "/" else part.replace("//", ".") for part in subject.split("."))


def filters(topic: str) -> list[str]:
    """The subjects that a topic filter takes."""
    subject = to_subject(topic)
    return [subject, subject[:-2]] if subject.endswith(".>") else [subject]


def covers(pattern: str, topic: str) -> bool:
    """Whether the topic filter takes the topic (no wildcards in it). A wildcard does not take the system's own."""
    levels, wanted = topic.split("/"), pattern.split("/")
    if wanted[0] in ("+", "#") and is_own(levels[0]):
        return False
    for n, want in enumerate(wanted):
        if want == "#" and n == len(wanted) - 1:
            return len(levels) >= n
        if n >= len(levels) or (want != "+" and want != levels[n]):
            return False
    return len(levels) == len(wanted)
