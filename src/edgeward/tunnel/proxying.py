"""A device's page below a path of the hub: what changes on the way, and what must not get through. Pure.

A page that comes from a device is a stranger's, and it comes from the hub's own address. So it is shown in a browser's
*sandbox*, an origin of its own that nothing else shares (Content-Security-Policy ``sandbox`` without
``allow-same-origin``). The browser never gets a cookie of it: :class:`Jar` keeps them at the hub. What lets a browser
in is a word in the path, good for this one port of this one node and for a while: no other page has it, and no cookie
says who asks. Headers by which a page could touch the rest of the hub's address are dropped. Links that begin with
``/`` are put below the path, in headers, HTML and style sheets; a page's scripts get a small one of ours before them,
that does it for what they ask for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from edgeward.core.errors import Invalid

Headers = list[tuple[bytes, bytes]]

#: RFC 9110, 7.6.1: of one hop, not of the message.
HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade"}
)  # fmt: skip
#: Of a request: what is the hub's, or tells the device more than it need know.
_NOT_THERE = HOP | {
    b"host", b"cookie", b"authorization", b"content-length", b"expect", b"origin", b"referer", b"accept-encoding",
    b"x-request-id", b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip",
}  # fmt: skip
#: Of an answer: what would act on all of the hub's address, or is ours to say.
_NOT_BACK = HOP | {
    b"set-cookie", b"set-cookie2", b"clear-site-data", b"strict-transport-security", b"service-worker-allowed",
    b"alt-svc", b"public-key-pins", b"report-to", b"reporting-endpoints", b"nel", b"expect-ct", b"origin-agent-cluster",
    b"date", b"access-control-allow-origin", b"access-control-allow-credentials", b"access-control-expose-headers",
    b"cross-origin-opener-policy", b"cross-origin-embedder-policy", b"cross-origin-resource-policy", b"referrer-policy",
    b"document-policy", b"permissions-policy", b"x-request-id",
}  # fmt: skip
SANDBOX = b"sandbox allow-forms allow-scripts allow-popups allow-modals allow-downloads allow-pointer-lock"
#: What a page gets whose links are put below the path; larger ones stay as they are.
REWRITE_MOST = 4 * 1024 * 1024
#: Links of one page that are: each grows by the path, and a page may be made of nothing else.
_LINKS_MOST = 20_000


@dataclass(frozen=True, slots=True)
class Where:
    """A port of a node (``host`` empty), or of a machine behind it."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if host else str(self.port)

    @property
    def authority(self) -> str:
        """What a device is called by who asks it."""
        return str(self) if self.host else f"localhost:{self.port}"


_WHERE = re.compile(r"(?:(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9_.-]{1,253}):)?([0-9]{1,5})")


def parse_where(text: str) -> Where:
    """``80``, ``192.168.1.20:80``, ``[fd00::1]:80``. Raises ``Invalid``."""
    found = _WHERE.fullmatch(text)
    if found is None or not 0 < int(found[2]) < 65536:
        raise Invalid("is no port", field="port", remedy="write 80, 192.168.1.20:80 or [fd00::1]:80")
    return Where((found[1] or "").strip("[]").lower(), int(found[2]))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page lies at the hub. ``prefix``: its path there, without the last slash; ``browsing``: by a ticket."""

    where: Where
    prefix: str
    browsing: bool


# -- there ------------------------------------------------------------------------------------------------------------


def request_head(method: str, target: bytes, headers: Headers, place: Place, cookies: str, *, upgrade: bool) -> bytes:
    """The request's head for the device. ``target``: path and query as the browser wrote them, below the prefix."""
    given = dict(headers)
    named = {t.strip().lower() for t in given.get(b"connection", b"").split(b",")}
    out: Headers = [(b"Host", place.where.authority.encode())]
    out += [(k, v) for k, v in headers if k not in _NOT_THERE and k not in named]
    if (authorization := given.get(b"authorization")) is not None and not authorization.lower().startswith(b"bearer"):
        out.append((b"authorization", authorization))  # a device's own; the hub's are bearers
    if b"origin" in given:
        out.append((b"origin", b"http://" + place.where.authority.encode()))
    if cookies:
        out.append((b"cookie", cookies.encode("latin-1", "replace")))
    out.append((b"accept-encoding", b"gzip" if b"gzip" in given.get(b"accept-encoding", b"") else b"identity"))
    if upgrade:
        out += [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
    else:
        out.append((b"connection", b"close"))
        if b"content-length" in given:
            out.append((b"content-length", given[b"content-length"]))
        elif b"transfer-encoding" in given:
            out.append((b"transfer-encoding", b"chunked"))
    lines = [f"{method} ".encode("latin-1") + (target or b"/") + b" HTTP/1.1"]
    lines += [k + b": " + v for k, v in out]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def preflight(headers: Headers) -> Headers | None:
    """The answer to a browser that asks whether a sandboxed page may ask; None: this is no such question."""
    given = dict(headers)
    method = given.get(b"access-control-request-method")
    if given.get(b"origin") != b"null" or not method:
        return None
    asked = given.get(b"access-control-request-headers", b"")
    more = [(b"access-control-allow-headers", asked)] if asked else []
    return [*_cross_origin(), (b"access-control-allow-methods", method), (b"access-control-max-age", b"600"), *more]


def _cross_origin() -> Headers:
    # a sandboxed page is of the origin "null", to itself as well
    return [
        (b"access-control-allow-origin", b"null"),
        (b"access-control-allow-credentials", b"true"),
        (b"vary", b"origin"),
    ]


# -- back -------------------------------------------------------------------------------------------------------------


def answer_headers(headers: Headers, place: Place) -> Headers:
    """The answer's headers for the browser."""
    named = {t.strip().lower() for k, v in headers if k.lower() == b"connection" for t in v.split(b",")}
    out: Headers = []
    for key, value in headers:
        name = key.lower()
        if name in _NOT_BACK or name in named:
            continue
        if name in (b"location", b"content-location"):
            out.append((name, moved(value.decode("latin-1"), place).encode("latin-1")))
        elif name == b"refresh":
            out.append((name, _refreshed(value.decode("latin-1"), place).encode("latin-1")))
        elif name != b"link":  # preloads of paths that are not there
            out.append((name, value))
    out += [(b"content-security-policy", SANDBOX), (b"referrer-policy", b"no-referrer")]
    out.append((b"cross-origin-resource-policy", b"cross-origin" if place.browsing else b"same-origin"))
    if place.browsing:
        out += [*_cross_origin(), (b"access-control-expose-headers", b"*")]
    return out


def moved(url: str, place: Place) -> str:
    """Where a device sends a browser to, below the path when it is the device itself."""
    if url.startswith("/") and not url.startswith("//"):
        return place.prefix + url
    found = re.fullmatch(r"(?i)(?:http:)?//([^/?#]*)(.*)", url)
    if found is None:
        return url
    own = {place.where.authority, place.where.host, "localhost", "127.0.0.1", "[::1]"} if not place.where.host else {
        place.where.authority
    }  # fmt: skip
    if place.where.port == 80 and place.where.host:
        own.add(place.where.authority.removesuffix(":80"))
    own |= {f"{h}:{place.where.port}" for h in ("localhost", "127.0.0.1", "[::1]")} if not place.where.host else set()
    if found[1].lower() not in own:
        return url
    rest = found[2]
    return place.prefix + (rest if rest.startswith("/") else "/" + rest)


def _refreshed(value: str, place: Place) -> str:
    head, mark, url = re.match(r"(?is)([^;]*)(;\s*url\s*=\s*)?(.*)", value).groups()  # type: ignore[union-attr]
    return f"{head}{mark}{moved(url.strip(chr(34) + chr(39)), place)}" if mark else value


_ATTRIBUTE = re.compile(
    rb"""(?i)(\s(?:src|href|action|formaction|poster|data|background|manifest)\s*=\s*["']?)/(?![/])"""
)
_STYLE = re.compile(rb"""(?i)(url\(\s*["']?|@import\s+["'])/(?!/)""")
_HEAD = re.compile(rb"(?i)<head(?:\s[^>]*)?>|<html(?:\s[^>]*)?>|<!doctype[^>]*>")


def rewrite(body: bytes, content_type: str, place: Place) -> bytes:
    """Links of a page or a style sheet that begin with ``/``, put below the path."""
    below = place.prefix.encode() + b"/"
    body = _STYLE.sub(lambda m: m[1] + below, body, _LINKS_MOST)
    if not content_type.startswith("text/html"):
        return body
    body = _ATTRIBUTE.sub(lambda m: m[1] + below, body, _LINKS_MOST)
    heads = list(_HEAD.finditer(body, 0, 4096))
    if not heads:
        return body  # a piece of a page
    at = next((h for h in heads if h[0][:5].lower() == b"<head"), heads[-1]).end()
    script = b"<script>" + _SCRIPT.replace(b"@PREFIX@", msgspec.json.encode(place.prefix)) + b"</script>"
    return body[:at] + script + body[at:]


def is_rewritten(content_type: str) -> bool:
    return content_type.split(";")[0].strip().lower() in ("text/html", "text/css", "application/xhtml+xml")


#: Before a page's own scripts: what they ask for by ``/path`` is asked for below the path; a sandboxed page has no
#: storage and no cookies, and would end at its first look at them.
_SCRIPT = (
    b"(function(){var P=@PREFIX@,H=location.host,w=window;"
    b"function f(u){if(u==null)return u;var s=String(u),m=/^(https?|wss?):\\/\\/([^\\/?#]*)(.*)$/i.exec(s);"
    b"if(m){if(m[2]!==H||m[3].indexOf(P+'/')===0)return s;"
    b"return (m[1][0].toLowerCase()=='w'?'wss':'https')+'://'+H+P+(m[3][0]=='/'?m[3]:'/'+m[3])}"
    b"return s[0]=='/'&&s[1]!='/'&&s.indexOf(P+'/')!==0?P+s:s}"
    b"function c(n){var C=w[n];if(!C)return;w[n]=new Proxy(C,{construct:function(t,a){a=[].slice.call(a);"
    b"a[0]=n=='WebSocket'?f(a[0]).replace(/^ws:/i,location.protocol=='https:'?'wss:':'ws:'):f(a[0]);"
    b"return Reflect.construct(t,a)}})}"
    b"c('WebSocket');c('EventSource');c('Worker');"
    b"var F=w.fetch;if(F)w.fetch=function(r,o){return F.call(w,typeof r=='string'||r instanceof URL?f(r):r,o)};"
    b"var X=w.XMLHttpRequest&&XMLHttpRequest.prototype,o=X&&X.open;"
    b"if(o)X.open=function(){var a=[].slice.call(arguments);a[1]=f(a[1]);return o.apply(this,a)};"
    b"['pushState','replaceState'].forEach(function(n){var h=history[n];history[n]=function(s,t,u){"
    b"try{return h.call(history,s,t,f(u))}catch(e){}}});"
    b"function S(){var d={};return {getItem:function(k){k=String(k);return k in d?d[k]:null},"
    b"setItem:function(k,v){d[String(k)]=String(v)},removeItem:function(k){delete d[k]},clear:function(){d={}},"
    b"key:function(i){return Object.keys(d)[i]||null},get length(){return Object.keys(d).length}}}"
    b"['localStorage','sessionStorage'].forEach(function(n){try{w[n].length}catch(e){"
    b"Object.defineProperty(w,n,{value:S(),configurable:true})}});"
    b"try{document.cookie}catch(e){var k={};Object.defineProperty(document,'cookie',{configurable:true,"
    b"get:function(){return Object.keys(k).map(function(n){return n+'='+k[n]}).join('; ')},"
    b"set:function(v){var p=String(v).split(';')[0],i=p.indexOf('=');"
    b"if(i>0)k[p.slice(0,i).trim()]=p.slice(i+1).trim()}})}"
    b"})();"
)


class Jar:
    """The cookies that a device gave to one person; only the hub has them. Bounded; Domain and Secure mean nothing."""

    MOST, LONGEST = 50, 4096

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], str] = {}

    def take(self, lines: Iterable[bytes]) -> None:
        """``Set-Cookie`` headers of an answer (RFC 6265, 5.2)."""
        for line in lines:
            first, *attributes = line.decode("latin-1").split(";")
            name, equals, value = first.partition("=")
            name, value = name.strip(), value.strip()
            if not equals or not name or len(line) > self.LONGEST or re.search(r"[\x00-\x1f\x7f]", first):
                continue
            path, gone = "/", False
            for attribute in attributes:
                key, _, said = attribute.partition("=")
                key, said = key.strip().lower(), said.strip()
                if key == "path" and said.startswith("/"):
                    path = said
                elif key == "max-age":
                    gone = said.startswith("-") or said == "0"
                elif key == "expires":
                    gone = gone or "1970" in said or "01-Jan-70" in said  # how everybody deletes one
            self._kept.pop((name, path), None)
            if not gone:
                self._kept[(name, path)] = value
                if len(self._kept) > self.MOST:
                    del self._kept[next(iter(self._kept))]

    def header(self, path: str) -> str:
        """``Cookie`` for a request of ``path``; empty: none."""
        fit = [(len(p), n, v) for (n, p), v in self._kept.items() if _below(path, p)]
        return "; ".join(f"{n}={v}" for _, n, v in sorted(fit, key=lambda one: -one[0]))


def _below(path: str, cookie: str) -> bool:
    return path == cookie or (path.startswith(cookie) and (cookie.endswith("/") or path[len(cookie)] == "/"))
