"""Paths in their one spelling, and which rule is the more exact."""

from __future__ import annotations

import pytest

from edgeward.gateway.http1 import Bad, parse_request
from edgeward.gateway.match import NotAllowed, Table, clean
from edgeward.gateway.rules import RouteConfig, Rule


@pytest.mark.parametrize(
    ("target", "path"),
    [("/", "/"), ("/a/b", "/a/b"), ("/a/", "/a/"), ("/%61dmin", "/admin"), ("/%7Eme", "/~me"), ("/a%20b", "/a%20b"),
     ("/a%c3%a9", "/a%C3%A9"), ("/a;b=1", "/a;b=1"), ("/...", "/..."), ("/.well-known/x", "/.well-known/x"),
      ("/a..b", "/a..b")],
)  # fmt: skip
def test_one_spelling(target: str, path: str) -> None:
    assert clean(target) == (path, "")
    assert clean(f"{target}?q=%2F..//") == (path, "?q=%2F..//")


@pytest.mark.parametrize(
    "target",
    ["/../x", "/a/../b", "/a/..", "/./a", "/a/.", "/%2e%2e/x", "/a/%2E/b", "/a/.%2e/b", "/..;/x", "/a/..;p=1/b",
     "//a", "/a//b",
     "/a%2fb", "/a%2Fb", "/a%5cb", "/a\\b", "/a%00", "/a%0d%0aX:1", "/a%7f", "/a%", "/a%zz", "/a%252e", "/a%25",
      "/a#b", '/a"b', "/a<b",
     "/a?x#y", "/a|b"],
)  # fmt: skip
def test_two_meanings(target: str) -> None:
    with pytest.raises(Bad):
        clean(target)


def rule(name: str, path: str = "/", host: str = "", methods: tuple[str, ...] = (), **headers: str) -> Rule:
    return Rule(RouteConfig(name, "upstream", "t", host, path, methods, tuple(sorted(headers.items()))), None)


def find(table: Table[Rule], target: str, *lines: str, host: str = "h", method: str = "GET") -> str:
    r = parse_request("\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode())
    r.path, r.query = clean(r.target)
    return table.find(r).key


def test_the_more_exact_rule_answers() -> None:
    table = Table(
        [rule("all"), rule("a", "/a"), rule("below-a", "/a/"), rule("below-ab", "/a/b/"), rule("get-a", "/a", "",
         ("GET",)),
         rule("canary", "/a", "", (), x="1"), rule("org", "/", "example.org"), rule("any-org", "/", "*.example.org"),
         rule("deep-org", "/", "*.b.example.org"), rule("org-a", "/a", "example.org")]
    )  # fmt: skip
    assert find(table, "/") == "all"
    assert find(table, "/b") == "all"
    assert find(table, "/a") == "get-a"
    assert find(table, "/a", method="HEAD") == "get-a"
    assert find(table, "/a", method="POST") == "a"
    assert find(table, "/a", "X: 1", method="POST") == "canary"
    assert find(table, "/a/") == "below-a"
    assert find(table, "/a/b") == "below-a"
    assert find(table, "/a/b/c/d") == "below-ab"
    assert find(table, "/a", host="EXAMPLE.org:80") == "org-a"
    assert find(table, "/x", host="example.org") == "org"
    assert find(table, "/x", host="w.example.org") == "any-org"
    assert find(table, "/x", host="w.b.example.org") == "deep-org"
    assert find(table, "/x", host="notexample.org") == "all"


def test_no_rule() -> None:
    table = Table([rule("get", "/a", "", ("GET",)), rule("put", "/a", "", ("PUT",)), rule("x", "/b", "", (), x="1")])
    with pytest.raises(NotAllowed) as e:
        find(table, "/a", method="DELETE")
    assert e.value.methods == ["GET", "HEAD", "PUT"]
    for path in ("/", "/b", "/a/", "/A"):
        with pytest.raises(Bad) as bad:
            find(table, path)
        assert bad.value.status == 404


def test_a_rule_behind_its_double_is_told() -> None:
    table = Table([rule("b/x", "/a"), rule("a/x", "/a"), rule("c/x", "/a", "", ("GET",))])
    assert table.shadowed() == {"b/x": "a/x"}
    assert find(table, "/a", method="POST") == "a/x"
