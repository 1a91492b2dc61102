"""nginx's configuration: nothing that a person wrote gets out of its quotes."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from edgeward.gateway import nginx
from edgeward.gateway.balance import Endpoint
from edgeward.gateway.nginx import Where, render, why_not
from edgeward.gateway.rules import CacheConfig, GatewayConfig, Listen, PlaceConfig, RouteConfig, Rule, table

WHERE = Where("/data/nginx", "/data/front.sock", "/data/nginx.sock", "/data/nginx/requests.log", "/dev/shm/x")
HERE = (Endpoint("127.0.0.1", 80),)
LISTEN = (Listen("127.0.0.1", 8080),)
#: One word of nginx's language: quoted, or bare up to what ends it; or a sign.
_WORD = re.compile(r"""\s*(?:("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s;{}"'#][^\s;{}]*)|([;{}])|#[^\n]*)""", re.S)


def directives(text: str) -> set[str]:
    """The first words of all statements, as nginx reads them. Raises ``ValueError`` where it would not."""
    found, at, first, depth, inside = set(), 0, True, 0, []
    while at < len(text.rstrip()):
        match = _WORD.match(text, at)
        if match is None:
            raise ValueError(text[at : at + 80])
        at = match.end()
        word, sign = match.groups()
        if word is not None and first:
            if not inside or inside[-1] != "map":
                found.add(word)
            name, first = word, False
        elif sign == "{":
            inside.append(name)
            depth, first = depth + 1, True
        elif sign:
            if sign == "}":
                inside.pop()
            depth, first = depth - (sign == "}"), True
    if depth:
        raise ValueError("not closed")
    return found


def made(*routes: RouteConfig, node: str = "n1") -> str:
    config = GatewayConfig(node, LISTEN, routes, engine="nginx")
    return render(config, table(config), LISTEN, WHERE)


def rule(**more: Any) -> Rule:
    fields: dict[str, Any] = {"endpoints": HERE, **more}
    return Rule(RouteConfig("default/r", "upstream", "t", **fields), None)


PLAIN = made(
    RouteConfig("default/a", "upstream", "t", host="a.example", path="/a/", endpoints=HERE, send_host="o:81"),
    RouteConfig("default/b", "upstream", "t", host="*.example", path="/b", endpoints=HERE, cache=CacheConfig()),
    RouteConfig("default/c", "service", "t", path="/", endpoints=(*HERE, Endpoint("::1", 80, here=True))),
)


def test_what_it_says() -> None:
    words = directives(PLAIN)
    assert {"server", "location", "upstream", "proxy_pass", "map", "listen"} <= words
    assert "server 127.0.0.1:80 max_fails=5 fail_timeout=5s backup;" in PLAIN, "those of the node come first"
    assert 'proxy_set_header Host "o:81";' in PLAIN and 'location = "/b"' in PLAIN and 'location = "/a"' in PLAIN


NASTY = [
    '"',
    "'",
    ";",
    "{",
    "}",
    "\\",
    "$host",
    "\n",
    " ",
    "#",
    "${x}",
    "\0",
    "é",
    "../",
    "a",
    "/",
    "//",
    "%41",
    "*",
    ".",
]


@pytest.mark.parametrize("seed", range(8))
def test_nothing_gets_out_of_its_quotes(seed: int) -> None:
    rng = random.Random(seed)
    known = directives(PLAIN)
    refused = 0
    for _ in range(150):

        def text(start: str = "") -> str:
            return start + "".join(rng.choice(NASTY) for _ in range(rng.randint(0, 6)))

        nasty = rng.randrange(6)
        fields: dict[str, Any] = {"path": "/", "endpoints": HERE, "key": "default/r", "send_host": "", "host": ""}
        name = ("path", "host", "send_host", "key", "endpoints", "node")[nasty]
        node = "n1"
        if name == "endpoints":
            fields[name] = (Endpoint(text("127.0.0.1"), 80),)
        elif name == "node":
            node = text("n1")
        else:
            fields[name] = text("/" if name == "path" else "")
        try:
            found = made(RouteConfig(to="upstream", target=text(), **fields), node=node)
        except ValueError:
            refused += 1
            continue
        assert directives(found) <= known, (name, fields)
    assert 0 < refused < 150


def test_what_is_left_to_the_plane() -> None:
    assert why_not(rule()) == ""
    for more, word in (
        ({"rate": 1.0}, "rate"), ({"cache": CacheConfig()}, "cache"), ({"methods": ("GET",)}, "methods"),
        ({"headers": (("a", "b"),)}, "headers"), ({"requests": 5}, "limits.requests"), ({"body": 5}, "limits.body"),
        ({"endpoints": ()}, "no endpoint"), ({"endpoints": (Endpoint("a.example", 80),)}, "a name"),
        ({"endpoints": (Endpoint("127.0.0.1", 443, True),)}, "TLS"), ({"send_host": "a b"}, "names"),
        ({"then": (PlaceConfig("cloud", "http://c", HERE[0]),)}, "then"), ({"function": "x"}, "function"),
    ):  # fmt: skip
        assert word in why_not(rule(**more)), more
    assert "function" in why_not(Rule(RouteConfig("a/b", "function", "t", function="a/b"), None))


def test_every_field_of_a_route_is_known_or_the_planes() -> None:
    """A field that is new is the plane's until somebody thought of nginx."""
    assert {"auth", "cors", "static", "compress", "first", "then", "rate", "sticky"}.isdisjoint(nginx._KNOWN)
    assert set(RouteConfig.__struct_fields__) >= nginx._KNOWN
