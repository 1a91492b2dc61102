"""RFC 9111 as decisions: what is kept, how old it is, when it may be given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.gateway import cache
from edgeward.gateway.cache import Stored
from edgeward.gateway.http1 import Request, Response, parse_request, parse_response
from edgeward.gateway.shelf import VARIANTS, Shelf, hit_head, key_of

NOW = 1_800_000_000.0


def request(*lines: str, method: str = "GET", path: str = "/a") -> Request:
    r = parse_request("\r\n".join([f"{method} {path} HTTP/1.1", "Host: h", *lines, "", ""]).encode())
    r.path, r.query = path, ""
    return r


def response(*lines: str, status: int = 200) -> Response:
    return parse_response("\r\n".join([f"HTTP/1.1 {status} X", *lines, "", ""]).encode(), "GET")


def kept(*lines: str, at: float = NOW, ask: Request | None = None, body: bytes = b"body", **more: float) -> Stored:
    r = response(*lines)
    return cache.store(ask or request(), r, r.headers, body, at, at, **more)


def date(at: float) -> str:
    return f"Date: {cache.http_date(at)}"


@pytest.mark.parametrize(
    ("lines", "ask", "status", "why"),
    [
        (["Cache-Control: max-age=60"], [], 200, ""),
        (["ETag: x"], [], 200, ""),
        ([], [], 200, "neither"),
        (["Cache-Control: no-store, max-age=60"], [], 200, "no-store"),
        (["Cache-Control: private, max-age=60"], [], 200, "private"),
        (['Cache-Control: private="x", max-age=60'], [], 200, "private"),
        (["Cache-Control: max-age=60"], ["Cache-Control: no-store"], 200, "no-store"),
        (["Cache-Control: max-age=60"], ["Authorization: Basic x"], 200, "authorised"),
        (["Cache-Control: public, max-age=60"], ["Authorization: Basic x"], 200, ""),
        (["Cache-Control: s-maxage=60"], ["Authorization: Basic x"], 200, ""),
        (["Cache-Control: must-revalidate, max-age=60"], ["Authorization: Basic x"], 200, ""),
        (["Cache-Control: max-age=60", "Vary: *"], [], 200, "Vary"),
        (["Cache-Control: max-age=60", "Vary: Accept, X-Forwarded-For"], [], 200, "varies"),
        (["Cache-Control: max-age=60", "Set-Cookie: a=b"], [], 200, "cookie"),
        (["Cache-Control: max-age=60"], [], 206, "part"),
        (["Cache-Control: max-age=60"], [], 404, ""),
        (["Cache-Control: max-age=60"], [], 500, ""),
        (["ETag: x"], [], 500, "explicit"),
        (["Cache-Control: max-age=0"], [], 200, "neither"),
        (["Cache-Control: no-cache", "ETag: x"], [], 200, ""),
    ],
)
def test_what_is_kept(lines: list[str], ask: list[str], status: int, why: str) -> None:
    said = cache.why_not_stored(request(*ask), response(*lines, status=status))
    assert why in said
    assert bool(why) == bool(said)
    assert cache.why_not_stored(request(method="HEAD"), response(*lines)) != ""
    assert cache.why_not_stored(request("Content-Length: 3", method="GET"), response(*lines)) != ""


@pytest.mark.parametrize(
    ("lines", "fresh"),
    [
        (["Cache-Control: max-age=60"], 60),
        (["Cache-Control: max-age=60, s-maxage=10"], 10),
        (["Cache-Control: max-age=60", f"Expires: {cache.http_date(NOW + 999)}"], 60),
        ([date(NOW), f"Expires: {cache.http_date(NOW + 30)}"], 30),
        ([date(NOW), f"Expires: {cache.http_date(NOW - 30)}"], 0),
        ([date(NOW), "Expires: 0"], 0),
        ([date(NOW), f"Last-Modified: {cache.http_date(NOW - 1000)}"], 100),
        ([date(NOW), f"Last-Modified: {cache.http_date(NOW - 10**9)}"], 86400),
        (["Cache-Control: max-age=60, max-age=5"], 60),
        (["Cache-Control: max-age=x"], 0),
        (["Cache-Control: max-age=-1"], 0),
        (["Cache-Control: max-age=" + "9" * 30], 0),
        (["Cache-Control: max-age=9999999999"], 2**31),
        (['Cache-Control: max-age="60"'], 60),
        (["Cache-Control: MAX-AGE=60"], 60),
        (["Cache-Control: ,, foo=\"a,max-age=1\",max-age=7"], 7),
        (["Cache-Control: no-cache, max-age=60"], 0),
        (["Cache-Control: s-maxage=0, max-age=60"], 0),
    ],
)  # fmt: skip
def test_how_long_it_is_fresh(lines: list[str], fresh: int) -> None:
    assert kept(*lines).fresh_for == fresh


def test_how_old_it_is() -> None:
    r = response(date(NOW - 100), "Cache-Control: max-age=1000")
    assert cache.initial_age(r.fields, NOW, NOW) == 100
    r = response(date(NOW + 100), "Age: 7")
    assert cache.initial_age(r.fields, NOW - 3, NOW) == 10  # told, and the time of the way
    r = response(date(NOW - 100), "Age: 7")
    assert cache.initial_age(r.fields, NOW - 3, NOW) == 100
    for odd in ("Age: x", "Age: -5", "Age: 1.5", "Age: " + "9" * 40):
        assert cache.initial_age(response(date(NOW), odd).fields, NOW, NOW) == 0
    stored = kept(date(NOW), "Age: 20", "Cache-Control: max-age=60")
    assert (stored.age(NOW + 30), stored.ttl(NOW + 30)) == (50, 10)
    assert stored.age(NOW - 1000) == 20  # a clock that was set back makes nothing younger


def way(stored: Stored | None, after: float, *lines: str, method: str = "GET", **more: bool) -> str:
    choice = cache.choose(request(*lines, method=method), stored, NOW + after, **more)
    return f"{choice.way} {choice.fwd}".strip()


def test_what_is_done() -> None:
    s = kept(date(NOW), "Cache-Control: max-age=60", "ETag: x")
    assert way(None, 0) == "miss uri-miss"
    assert way(None, 0, other_variant=True) == "miss vary-miss"
    assert way(s, 59) == "hit"
    assert way(s, 60) == "validate stale"
    assert way(s, 0, method="POST") == "bypass method"
    assert way(s, 0, method="HEAD") == "hit"
    assert way(s, 0, "Content-Length: 1") == "bypass bypass"
    assert way(s, 0, "Cache-Control: no-cache") == "validate request"
    assert way(s, 0, "Pragma: no-cache") == "validate request"
    assert way(s, 0, "Pragma: no-cache", "Cache-Control: x") == "hit"
    assert way(s, 0, "Cache-Control: no-store") == "bypass request"
    assert way(s, 30, "Cache-Control: max-age=20") == "validate request"
    assert way(s, 30, "Cache-Control: max-age=40") == "hit"
    assert way(s, 30, "Cache-Control: min-fresh=40") == "validate stale"
    assert way(s, 30, "Cache-Control: min-fresh=20") == "hit"
    assert way(s, 90, "Cache-Control: max-stale=20") == "validate stale"
    assert way(s, 90, "Cache-Control: max-stale=40") == "stale"
    assert way(s, 9000, "Cache-Control: max-stale") == "stale"
    assert way(s, 60, "Cache-Control: only-if-cached") == "refuse"
    assert way(None, 0, "Cache-Control: only-if-cached") == "refuse"
    assert way(s, 0, "Cache-Control: only-if-cached") == "hit"
    assert way(s, 0, "Authorization: Basic x") == "bypass request"
    assert way(kept("Cache-Control: public, max-age=60"), 0, "Authorization: Basic x") == "hit"
    strict = kept("Cache-Control: max-age=60, must-revalidate")
    assert way(strict, 90, "Cache-Control: max-stale=40") == "validate stale"


def test_stale_while_revalidate_and_if_error() -> None:
    s = kept("Cache-Control: max-age=60, stale-while-revalidate=30, stale-if-error=100")
    assert [way(s, t) for t in (59, 60, 89, 90)] == ["hit", "renew stale", "renew stale", "validate stale"]
    assert [cache.serve_on_error(s, request(), NOW + t) for t in (60, 159, 160)] == [True, True, False]
    none = kept("Cache-Control: max-age=60")
    assert way(none, 60) == "validate stale"
    assert not cache.serve_on_error(none, request(), NOW + 60)
    assert cache.serve_on_error(none, request("Cache-Control: stale-if-error=10"), NOW + 69)
    # the route's own word, where the answer says nothing; never against must-revalidate
    mine = kept("Cache-Control: max-age=60", if_error=50, while_revalidate=20)
    assert way(mine, 79) == "renew stale"
    assert cache.serve_on_error(mine, request(), NOW + 109)
    for word in ("must-revalidate", "proxy-revalidate", "s-maxage=60", "no-cache"):
        never = kept(f"Cache-Control: max-age=60, {word}", if_error=50, while_revalidate=20)
        assert way(never, 79) == "validate stale"
        assert not cache.serve_on_error(never, request("Cache-Control: stale-if-error=1000"), NOW + 61)


def test_validated_by_a_304() -> None:
    old = kept(date(NOW), "Cache-Control: max-age=60", 'ETag: "1"', "X: old", "Content-Type: text/plain")
    assert old.validators == [("if-none-match", '"1"')]
    lines = [date(NOW + 100), "Cache-Control: max-age=30", 'ETag: "1"', "X: new", "Content-Type: evil"]
    r = response(*lines, "Content-Length: 9", status=304)
    new = cache.refreshed(old, r, r.headers, NOW + 100, NOW + 100)
    assert (new.body, new.status, new.fresh_for, new.age(NOW + 110)) == (b"body", 200, 30, 10)
    assert new.fields["x"] == "new"
    assert dict(new.headers)["content-type"] == "text/plain"
    assert [v for n, v in new.headers if n == "date"] == [cache.http_date(NOW + 100)]


def test_what_the_client_has_already() -> None:
    s = kept('ETag: W/"1"', f"Last-Modified: {cache.http_date(NOW - 50)}")
    assert cache.not_modified(request('If-None-Match: "0", "1"'), s)
    assert cache.not_modified(request("If-None-Match: *"), s)
    assert not cache.not_modified(request('If-None-Match: "2"', f"If-Modified-Since: {cache.http_date(NOW)}"), s)
    assert cache.not_modified(request(f"If-Modified-Since: {cache.http_date(NOW - 50)}"), s)
    assert not cache.not_modified(request(f"If-Modified-Since: {cache.http_date(NOW - 51)}"), s)
    assert not cache.not_modified(request("If-Modified-Since: yesterday"), s)
    assert not cache.not_modified(request(), s)


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-3", (0, 4)), ("bytes=2-", (2, 10)), ("bytes=-3", (7, 10)), ("bytes=-99", (0, 10)),
        ("bytes=5-99", (5, 10)),
        ("bytes=10-", "unsatisfiable"), ("bytes=-0", "unsatisfiable"), ("bytes=3-1", None), ("bytes=0-1,3-4", None),
        ("bytes=-", None), ("items=0-1", None), ("bytes=a-b", None), ("bytes=0-" + "9" * 30, None),
    ],
)  # fmt: skip
def test_parts(asked: str, part: object) -> None:
    s = kept('ETag: "1"', body=b"0123456789")
    assert cache.part_of(request(f"Range: {asked}"), s) == part
    assert cache.part_of(request(f"Range: {asked}", 'If-Range: "1"'), s) == part
    assert cache.part_of(request(f"Range: {asked}", 'If-Range: "2"'), s) is None
    assert cache.part_of(request(f"Range: {asked}", 'If-Range: W/"1"'), s) is None


def put(shelf: Shelf, path: str, *lines: str, ask: tuple[str, ...] = (), size: int = 10, owner: str = "o") -> None:
    r = request(*ask, path=path)
    stored = kept("Cache-Control: max-age=60", *lines, ask=r, body=b"x" * size)
    stored.owner = owner
    shelf.put(key_of(r), stored)


def got(shelf: Shelf, path: str, *lines: str, owner: str = "o") -> tuple[bool, bool]:
    r = request(*lines, path=path)
    stored, others = shelf.find(key_of(r), r, owner)
    return stored is not None, others


def test_variants() -> None:
    shelf = Shelf(10**6)
    put(shelf, "/a", "Vary: Accept, Accept-Language", ask=("Accept: x, y", "Accept-Language: de"))
    assert got(shelf, "/a", "accept-language: de", "accept: x,y") == (True, False)
    assert got(shelf, "/a", "Accept: x") == (False, True)
    assert got(shelf, "/b") == (False, False)
    # two fields that mean one value together are one variant; another route's answers are none of ours
    assert got(shelf, "/a", "Accept: x, y", "Accept-Language: de", owner="other") == (False, False)
    for owner in ("one", "two"):
        put(shelf, "/o", owner=owner)
    assert got(shelf, "/o", owner="one") == got(shelf, "/o", owner="two") == (True, False)
    for n in range(VARIANTS * 3):
        put(shelf, "/v", "Vary: X", ask=(f"X: {n}",))
    assert got(shelf, "/v", f"X: {VARIANTS * 3 - 1}") == (True, False)
    assert got(shelf, "/v", "X: 0") == (False, True)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3000), st.booleans()), max_size=60))
def test_the_memory_is_bounded(steps: list[tuple[int, int, bool]]) -> None:
    shelf = Shelf(10_000)
    for n, size, drop in steps:
        if drop:
            shelf.purge(prefix=f"/{n}")
        else:
            put(shelf, f"/{n}", size=size)
        assert 0 <= shelf.used <= 10_000
    assert shelf.used == sum(s.size for v in shelf._items.values() for s in v)


def test_the_least_recently_used_goes_first() -> None:
    shelf = Shelf(10_000)
    for n in range(4):
        put(shelf, f"/{n}", size=1000)
    assert got(shelf, "/0") == (True, False)
    for n in range(4, 7):
        put(shelf, f"/{n}", size=1000)
    assert got(shelf, "/0") == (True, False)
    assert got(shelf, "/1") == (False, False)
    put(shelf, "/big", size=5000)
    assert got(shelf, "/big") == (False, False)


def test_purges() -> None:
    shelf = Shelf(10**6)
    for path, tags in (("/a", "x y"), ("/a/b", "y"), ("/c", "z")):
        put(shelf, path, f"Cache-Tag: {tags}")
    assert shelf.purge(tag="y") == 2
    assert shelf.purge(path="/c", host="other") == 0
    assert shelf.purge(path="/c", host="H") == 1
    assert (len(shelf), shelf.used) == (0, 0)
    for path in ("/a", "/a/b", "/c"):
        put(shelf, path)
    assert shelf.purge(prefix="/a") == 2
    assert len(shelf) == 1


def test_the_head_of_a_hit() -> None:
    s = kept(
        date(NOW - 5), "Cache-Control: max-age=60", "Age: 1", "Content-Length: 4", "Cache-Status: other; hit", "X: 1"
    )
    head = hit_head(s, NOW + 1)
    assert head.count(b"age: ") == 1
    assert b"\r\nage: 6\r\n" in head
    assert b"\r\ncache-status: edgeward; hit; ttl=54\r\n" in head
    assert b"\r\ncontent-length: 4\r\n" in head
    assert head.endswith(b"\r\n\r\n")
    assert hit_head(s, NOW + 1.5) is head
    assert b"age: 7\r\n" in hit_head(s, NOW + 2)


@given(st.text(max_size=60))
def test_no_directive_breaks_it(text: str) -> None:
    found = cache.directives(text)
    for name in found:
        seconds = cache.seconds(found, name)
        assert seconds is None or 0 <= seconds <= 2**31
