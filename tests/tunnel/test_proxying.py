"""What a device's page may do behind the hub's address, and how its links find back."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.core.errors import EdgewardError, Invalid, Unauthorized
from edgeward.tunnel import proxying
from edgeward.tunnel.proxy import TICKET, Tickets, _Answer
from edgeward.tunnel.proxying import Headers, Jar, Place, Where, parse_where

PLC = Place(Where("10.0.0.5", 80), "/nodes/n/proxy/10.0.0.5:80/~t", True)
OWN = Place(Where("", 8080), "/nodes/n/proxy/8080", False)


def asked(headers: Headers, place: Place = PLC, **more: bool) -> str:
    return proxying.request_head("GET", b"/x?y", headers, place, "a=1", upgrade=more.get("upgrade", False)).decode()


def test_a_device_learns_nothing_of_the_hub_and_its_caller() -> None:
    head = asked(
        [
            (b"host", b"hub:8443"),
            (b"authorization", b"Bearer ew_secret"),
            (b"cookie", b"console=1"),
            (b"connection", b"x-hop"),
            (b"x-hop", b"1"),
            (b"referer", b"https://hub/nodes/n/proxy/80/~ticket/"),
            (b"origin", b"null"),
            (b"accept", b"*/*"),
            (b"x-forwarded-for", b"192.0.2.1"),
            (b"proxy-authorization", b"x"),
        ]
    )
    assert head.startswith("GET /x?y HTTP/1.1\r\nHost: 10.0.0.5:80\r\n")
    for secret in ("ew_secret", "console", "x-hop", "ticket", "192.0.2.1", "hub", "proxy-auth"):
        assert secret not in head
    assert "origin: http://10.0.0.5:80\r\n" in head
    assert "cookie: a=1\r\n" in head
    assert "connection: close\r\n" in head


def test_a_device_s_own_login_gets_through() -> None:
    assert "authorization: Basic eDp5\r\n" in asked([(b"authorization", b"Basic eDp5")])
    assert "bearer" not in asked([(b"authorization", b"bearer x")]).lower()


def test_a_websocket_s_head_keeps_what_it_needs() -> None:
    head = asked([(b"upgrade", b"websocket"), (b"connection", b"Upgrade"), (b"sec-websocket-key", b"k")], upgrade=True)
    assert "upgrade: websocket" in head
    assert "sec-websocket-key: k" in head
    assert "close" not in head


def test_an_answer_cannot_touch_the_rest_of_the_hub_s_address() -> None:
    evil: Headers = [
        (b"Set-Cookie", b"session=fixed; Path=/"),
        (b"Clear-Site-Data", b'"*"'),
        (b"Strict-Transport-Security", b"max-age=1"),
        (b"Service-Worker-Allowed", b"/"),
        (b"Access-Control-Allow-Origin", b"*"),
        (b"Alt-Svc", b"h3"),
        (b"Report-To", b"x"),
        (b"Content-Security-Policy", b"default-src 'self'"),
        (b"Content-Type", b"text/html"),
        (b"Connection", b"x-hop"),
        (b"X-Hop", b"1"),
        (b"Cross-Origin-Opener-Policy", b"same-origin"),
        (b"Link", b"</a>; rel=preload"),
    ]
    for place in (PLC, OWN):
        out = proxying.answer_headers(evil, place)
        names = [k for k, _ in out]
        assert not {
            b"set-cookie",
            b"clear-site-data",
            b"strict-transport-security",
            b"service-worker-allowed",
            b"alt-svc",
            b"report-to",
            b"x-hop",
            b"cross-origin-opener-policy",
            b"link",
        } & set(names)
        policies = [v for k, v in out if k == b"content-security-policy"]
        assert policies == [b"default-src 'self'", proxying.SANDBOX]
        assert b"allow-same-origin" not in policies[1]
        assert b"top-navigation" not in policies[1]
        assert dict(out)[b"referrer-policy"] == b"no-referrer"
        assert (b"access-control-allow-origin", b"*") not in out
    assert (b"access-control-allow-origin", b"null") in proxying.answer_headers([], PLC)
    assert b"access-control-allow-origin" not in dict(proxying.answer_headers([], OWN))


def test_only_a_sandboxed_page_s_question_is_answered_for_the_device() -> None:
    ask: Headers = [
        (b"origin", b"null"),
        (b"access-control-request-method", b"PUT"),
        (b"access-control-request-headers", b"x"),
    ]
    said = dict(proxying.preflight(ask) or [])
    assert (said[b"access-control-allow-methods"], said[b"access-control-allow-headers"]) == (b"PUT", b"x")
    assert (
        proxying.preflight([(b"origin", b"https://evil.example"), (b"access-control-request-method", b"PUT")]) is None
    )
    assert proxying.preflight([(b"origin", b"null")]) is None


@pytest.mark.parametrize(
    ("place", "url", "found"),
    [
        (PLC, "/login", PLC.prefix + "/login"),
        (PLC, "login?x", "login?x"),
        (PLC, "http://10.0.0.5/a?b#c", PLC.prefix + "/a?b#c"),
        (PLC, "http://10.0.0.5:80", PLC.prefix + "/"),
        (PLC, "//10.0.0.5:80/a", PLC.prefix + "/a"),
        (PLC, "http://10.0.0.6/a", "http://10.0.0.6/a"),
        (PLC, "http://10.0.0.5:81/a", "http://10.0.0.5:81/a"),
        (PLC, "https://10.0.0.5/a", "https://10.0.0.5/a"),
        (PLC, "//evil.example/a", "//evil.example/a"),
        (OWN, "http://localhost:8080/a", OWN.prefix + "/a"),
        (OWN, "http://127.0.0.1:8080/a", OWN.prefix + "/a"),
        (OWN, "http://localhost:9/a", "http://localhost:9/a"),
    ],
)
def test_a_redirect_to_the_device_stays_below_its_path(place: Place, url: str, found: str) -> None:
    assert proxying.moved(url, place) == found


def test_links_of_a_page_and_of_a_style_sheet_are_put_below_the_path() -> None:
    page = b"""<!DOCTYPE html><html><HEAD lang=x><link href="/a.css"><script src=/s.js></script></head>
<a HREF='/b'>x</a><a href="//cdn/c">y</a><a href="d">z</a>
<form action = "/f"><div style="background:url(/g.png)"></div>"""
    out = proxying.rewrite(page, "text/html", PLC)
    p = PLC.prefix.encode()
    for link in (b'href="%b/a.css"', b"src=%b/s.js", b"HREF='%b/b'", b'action = "%b/f"', b"url(%b/g.png)"):
        assert link % p in out
    assert b'href="//cdn/c"' in out and b'href="d"' in out
    assert out.index(b"<script>(function") < out.index(b"<link")
    assert proxying.rewrite(b"<p src='/x'>piece</p>", "text/html", PLC) == b"<p src='%b/x'>piece</p>" % p
    assert proxying.rewrite(
        b"@import '/x'; a{b:url( '/y')}", "text/css", PLC
    ) == b"@import '%b/x'; a{b:url( '%b/y')}" % (p, p)


@given(st.binary(max_size=300))
def test_whatever_a_page_is_it_is_rewritten_without_a_failure(page: bytes) -> None:
    proxying.rewrite(b"<html>" + page, "text/html", PLC)


@pytest.mark.parametrize("piece", [b"<a ", b" src=", b" src  ", b"<", b"url( ", b"@import  ", b" href='/"])
def test_a_page_made_to_take_long_does_not(piece: bytes) -> None:
    """It would not end within the test's time if the work grew with the square of the size."""
    page = b"<html>" + piece * (proxying.REWRITE_MOST // len(piece))
    assert len(page) <= len(proxying.rewrite(page, "text/html", PLC)) < 2 * proxying.REWRITE_MOST


def test_an_answer_in_chunks_of_one_byte_is_held_as_one() -> None:
    answer = _Answer()
    answer.feed(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    assert (answer.headed, answer.status, [k.lower() for k, _ in answer.headers]) == (True, 200, [b"transfer-encoding"])
    for _ in range(100):
        answer.feed(b"1\r\nx\r\n" * 1000)
    answer.feed(b"0\r\n\r\n")
    assert answer.whole
    assert answer.taken() == b"x" * 100_000
    assert answer.taken() == b""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_a_page_s_scripts_ask_below_the_path_and_have_a_storage() -> None:
    script = proxying._SCRIPT.replace(b"@PREFIX@", json.dumps(PLC.prefix).encode()).decode()
    world = """
const asked=[];const vm=require('vm');
const w={location:{host:'hub:8443',protocol:'https:'},URL,Proxy,Reflect,Object,String,
 fetch:function(u){asked.push(u)},WebSocket:function(u){asked.push(u)},history:{pushState(a,b,u){asked.push(u)},replaceState(){}}};
w.XMLHttpRequest=function(){};w.XMLHttpRequest.prototype.open=function(m,u){asked.push(u)};
w.window=w;w.document={get cookie(){throw new Error('sandboxed')}};
Object.defineProperty(w,'localStorage',{configurable:true,get(){throw new Error('sandboxed')}});
vm.runInNewContext(SCRIPT+`
fetch('/a');fetch('b');fetch('https://hub:8443/c');fetch('https://elsewhere/d');fetch('@P@/e');
new WebSocket('ws://'+location.host+'/ws');new WebSocket('/ws2');
new XMLHttpRequest().open('GET','/x');history.pushState(1,2,'/h');
localStorage.setItem('k',1);document.cookie='c=1; path=/';
fetch(localStorage.getItem('k')+document.cookie);`,w);
console.log(JSON.stringify(asked));
""".replace("SCRIPT", json.dumps(script)).replace("@P@", PLC.prefix)
    done = subprocess.run(["node", "-e", world], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    p = PLC.prefix
    assert json.loads(done.stdout) == [
        p + "/a",
        "b",
        f"https://hub:8443{p}/c",
        "https://elsewhere/d",
        p + "/e",
        f"wss://hub:8443{p}/ws",
        p + "/ws2",
        p + "/x",
        p + "/h",
        "1c=1",
    ]


def test_cookies_of_a_device_are_kept_by_path_and_bounded() -> None:
    jar = Jar()
    jar.take([b"a=1; Path=/; HttpOnly", b"b=2; Path=/deep", b"bad", b"=x", b"c=\r\n3"])
    assert jar.header("/") == "a=1"
    assert jar.header("/deep/er") == "b=2; a=1"
    assert jar.header("/deeper") == "a=1"
    jar.take([b"a=; Max-Age=0", b"b=; Path=/deep; Expires=Thu, 01 Jan 1970 00:00:00 GMT"])
    assert jar.header("/deep") == ""
    jar.take([b"n%d=%d" % (n, n) for n in range(200)])
    assert jar.header("/").count("=") == Jar.MOST


def test_a_ticket_is_for_one_port_of_one_node_and_for_a_while() -> None:
    now = 1000.0
    tickets = Tickets(bytes(32), lambda: now)
    ticket, ends = tickets.make("ew_operator_secret", "n", Where("", 80))
    assert ends == 1000.0 + TICKET
    assert tickets.open(ticket, "n", Where("", 80)) == "ew_operator_secret"
    assert b"ew_operator_secret" not in base64.urlsafe_b64decode(ticket + "==")
    for node, where in (("m", Where("", 80)), ("n", Where("", 81)), ("n", Where("h", 80))):
        with pytest.raises(Unauthorized):
            tickets.open(ticket, node, where)
    other = ticket[:30] + ("A" if ticket[30] != "A" else "B") + ticket[31:]
    for wrong in (other, "", "x" * 100, "~" * 100, ticket + "\u00e9"):
        with pytest.raises(Unauthorized):
            tickets.open(wrong, "n", Where("", 80))
    with pytest.raises(Unauthorized):
        Tickets(bytes(31) + b"1", lambda: now).open(ticket, "n", Where("", 80))
    now = ends
    with pytest.raises(Unauthorized, match="ended"):
        tickets.open(ticket, "n", Where("", 80))


def test_a_port_is_written_so_and_no_other_way() -> None:
    assert parse_where("80") == Where("", 80)
    assert parse_where("PLC.local:502") == Where("plc.local", 502)
    assert str(parse_where("[fd00::1]:80")) == "[fd00::1]:80"
    for wrong in ("", "0", "65536", "a", "a:b", "a/b:80", "a@b:80", "80:", ":80", "[x]:80", "1:2:80"):
        with pytest.raises(Invalid):
            parse_where(wrong)


@given(st.text(max_size=60))
def test_a_stranger_s_port_is_one_or_refused(text: str) -> None:
    try:
        assert parse_where(text).port
    except EdgewardError:
        pass
