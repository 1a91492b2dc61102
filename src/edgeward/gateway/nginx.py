"""The configuration of nginx: the gateway's rules in, text out. Pure.

nginx stands before the plane. What is plain it proxies by itself: a request that can be read in one way only, for a
Route that goes to addresses and asks for nothing that nginx does not do as the plane does. All else goes to the plane
by a unix socket, as if nginx were not there: odd requests, functions, auth, rates, fallbacks, WebSockets, large bodies.
So does what nginx could not get answered, with a word on whether the target may have seen it: retries and refusals are
the plane's in any case. The cache is the plane's, too; nginx keeps what the plane gives it as a hit, for a second.

Nothing that a person wrote stands here unquoted, and what cannot be quoted is left to the plane. The engine
(``engine.py``) tests, applies and verifies the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from edgeward.core.spans import is_address
from edgeward.gateway.http1 import CLAIMS, FALLBACK, FRONT_CLIENT, FRONT_HOST, FRONT_SCHEME, FRONT_TRIED, PLACE, REFUSED
from edgeward.gateway.match import Table
from edgeward.gateway.rules import GatewayConfig, Listen, RouteConfig, Rule

#: In progress at once: each has two connections. A Route that allows less is the plane's.
REQUESTS = 1024
#: Bytes of a body up to which nginx keeps it, to be able to give it to the plane when the target fails.
BODY = 99_999
#: Seconds that nginx keeps a hit of the plane's cache; its Age has whole seconds.
KEPT = 1

#: A path as :func:`edgeward.gateway.match.clean` leaves it, and without escapes.
_PATH = (
    r"/(?:(?!\.{1,2}(?:[;/?]|$))[A-Za-z0-9_~!$&'()*+,=:@;.-]+(?:/|(?=\?|$)))*"
    r"(?:\?[\x21\x24-\x5b\x5d-\x7b\x7d\x7e]*)?$"
)
#: Method, Connection, fields that make a request the plane's, length, host twice, target. The bar between them is in
#: none of them, a query's is the plane's: a field with bars could otherwise pass for all that follows it.
_PLAIN = (
    r"^(?:(?:GET|HEAD|OPTIONS)\|(?i:close|keep-alive)?\|\||"
    r"(?:POST|PUT|PATCH|DELETE)\|(?i:close|keep-alive)?\|\|(?:[0-9]{1,5})?)\|"
    r"([a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?)\|(?i:\1)(?::[0-9]{1,5})?\|" + _PATH
)
_PLAIN_KEY = (
    "$request_method|$http_connection|$http_upgrade$http_expect$http_transfer_encoding$http_via"
    "$http_edgeward_fallback|$http_content_length|$host|$http_host|$request_uri"
)
#: What a cache has to look at: such requests are the plane's, on Routes that have a cache.
_FANCY_KEY = (
    "$http_range$http_if_none_match$http_if_modified_since$http_if_match$http_if_unmodified_since$http_if_range"
    "$http_cache_control$http_pragma$http_authorization"
)
#: What a Connection field may name, as ``http1.py`` has it.
_OPTIONS = r"^[ ,]*(?:(?:close|keep-alive|upgrade|te|trailer|http2-settings|proxy-connection)(?: *,[ ,]*| *$))*$"
_NAMED = '{"title":"Bad Request","status":400,"detail":"Connection names what is not of the connection"}'
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
_ROUTE = re.compile(r"[a-z0-9-]+/[a-z0-9.-]+")
_AUTHORITY = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_LOCATION = re.compile(r"/[A-Za-z0-9_~!$&'()*+,=:@;./-]*")
_FILE = re.compile(r"/[A-Za-z0-9_./ @+,=:-]*")
#: Fields of a Route that nginx serves as the plane does, or that say nothing of how.
_KNOWN = frozenset(
    {"host", "path", "methods", "headers", "endpoints", "send_host", "connect", "answer", "idle", "attempts", "budget",
     "failures", "pause", "body", "requests", "burst", "lacking"}
)  # fmt: skip
#: Where ACME authorities look (RFC 8555, section 8.3): the plane knows what they shall find.
_PROOFS = "/.well-known/acme-challenge/"
#: A label that no host of a Route begins with: a name below a wildcard, and nothing else.
_ANY = "0-edgeward-0"


class Where(NamedTuple):
    """Files of the engine. ``front``: the plane's socket; ``own``: nginx's, for the engine's questions."""

    folder: str
    front: str
    own: str
    log: str
    #: Where answers are kept for a second; best in memory.
    kept: str
    workers: int = 1
    user: str = ""


def why_not(rule: Rule) -> str:
    """Why nginx leaves a rule's requests to the plane; empty: it serves them by itself."""
    config = rule.config
    if config.to not in ("upstream", "service"):
        return f"a {config.to} answers" if config.to == "function" else "files answer"
    if asked := _beyond(config):
        return f"it has {asked}"
    if config.body <= BODY:
        return "it has limits.body"
    if config.requests < REQUESTS:
        return "it has limits.requests"
    if config.methods or config.headers:
        return "it has methods or headers"
    if not config.endpoints:
        return "it has no endpoint"
    for e in config.endpoints:
        if e.tls:
            return "its target speaks TLS"
        if not is_address(e.host):
            return "its target is a name"
    if not _ROUTE.fullmatch(config.key) or (config.send_host and not _AUTHORITY.fullmatch(config.send_host)):
        return "it has names that nginx would not take"
    return ""


def keeps(rule: Rule) -> bool:
    """Whether nginx keeps hits of the plane's cache for a moment; not where each request has to be looked at."""
    config = rule.config
    return config.cache is not None and not _beyond(config, "cache") and bool(_ROUTE.fullmatch(config.key))


def _beyond(config: RouteConfig, *more: str) -> str:
    """What a Route asks for beyond what nginx knows, also what is not thought of here; empty: nothing."""
    asked = (f for f in msgspec.structs.fields(config) if f.name not in _KNOWN and f.name not in more)
    for f in asked:
        if f.default is not msgspec.NODEFAULT and getattr(config, f.name) != f.default:
            return f.name
    return ""


def quoted(text: str, shape: re.Pattern[str]) -> str:
    """As one word of the configuration. Raises ``ValueError`` for what is not of the shape."""
    if not shape.fullmatch(text):
        raise ValueError(f"{text[:80]!r} does not belong into nginx's configuration")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def render(config: GatewayConfig, table: Table[Rule], listens: Iterable[Listen], where: Where) -> str:
    """The whole file, but for its digest."""
    own = {rule.key: n for n, rule in enumerate(table.rules) if not why_not(rule)}
    kept = {rule.key: n for n, rule in enumerate(table.rules) if keeps(rule)}
    lines = [*_global(where), "http {", *_http(config, where)]
    for rule in table.rules:
        if rule.key in own:
            lines += _upstream(rule, own[rule.key])
        elif rule.key in kept:
            lines.append(_log_format(kept[rule.key], rule.key, "", "hit"))
    hosts = sorted({r.host for r in table.rules if r.host and not r.host.startswith("[")})
    ports = [_listen(listen) for listen in listens]
    for host in ("", *hosts):
        lines += _server(config, table, host, ports, own, kept, where)
    lines += [
        "  server {",
        f"    listen {_unix(where.own)};",
        "    access_log off;",
        "    location = /digest { return 200 @DIGEST@; }",
        "    location / { return 404; }",
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _global(where: Where) -> Iterator[str]:
    yield "# Made by edgeward of its Routes; changes are lost."
    yield "daemon off;"
    if where.user:
        yield f"user {where.user};"
    yield f"worker_processes {where.workers};"
    yield "worker_rlimit_nofile 16384;"
    yield f"pid {quoted(where.folder + '/nginx.pid', _FILE)};"
    yield "error_log stderr crit;"
    yield "pcre_jit on;"
    yield f"events {{ worker_connections {4 * REQUESTS}; }}"


def _http(config: GatewayConfig, where: Where) -> Iterator[str]:
    yield "  access_log off;"
    for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        yield f"  {what}_temp_path {quoted(f'{where.folder}/{what}', _FILE)};"
    yield f"  proxy_cache_path {quoted(where.kept, _FILE)} keys_zone=kept:4m max_size=64m inactive=10s"
    yield "    use_temp_path=off;"
    yield "  server_tokens off; keepalive_timeout 75s; keepalive_requests 1000000; client_header_timeout 15s;"
    yield "  client_body_timeout 20s; send_timeout 60s; reset_timedout_connection on; large_client_header_buffers 4 8k;"
    yield "  client_max_body_size 0; client_body_buffer_size 128k; proxy_max_temp_file_size 0;"
    yield "  server_names_hash_bucket_size 512; variables_hash_max_size 2048; map_hash_bucket_size 256;"
    yield "  proxy_headers_hash_max_size 2048;"
    yield "  proxy_headers_hash_bucket_size 256; ignore_invalid_headers on; underscores_in_headers off;"
    yield "  proxy_http_version 1.1; proxy_next_upstream off; proxy_buffering off; absolute_redirect off;"
    yield "  proxy_pass_header Server; proxy_pass_header Date;"
    yield "  default_type application/problem+json;"
    yield f'  map "{_PLAIN_KEY}" $ew_odd {{ default 1; "~{_PLAIN}" ""; }}'
    yield f'  map "{_FANCY_KEY}" $ew_fancy {{ default 1; "" ""; }}'
    yield f'  map $http_connection $ew_named {{ default 1; "" ""; "~*{_OPTIONS}" ""; }}'
    yield '  map $request_method $ew_unkept { default 1; GET ""; }'
    yield '  map $http_upgrade $ew_connection { default upgrade; "" ""; }'
    yield "  map $upstream_cache_status $ew_hit { default 0; HIT 1; }"
    yield '  map $http_host $ew_host { default $http_host; "" $host; }'
    yield f"  upstream plane {{ server {_unix(where.front)}; keepalive 64; keepalive_requests 1000000; }}"


def _unix(path: str) -> str:
    return '"unix:' + quoted(path, _FILE)[1:]


def _upstream(rule: Rule, n: int) -> Iterator[str]:
    config = rule.config
    here = any(e.here for e in config.endpoints)
    servers = []
    for e in config.endpoints:
        address = f"[{e.host}]:{e.port}" if ":" in e.host else f"{e.host}:{e.port}"
        backup = " backup" if here and not e.here else ""
        limits = f"max_fails={config.failures} fail_timeout={max(1, round(config.pause))}s"
        servers.append(f"server {address} {limits}{backup};")
    yield f"  upstream t{n} {{ {' '.join(servers)} keepalive 64; keepalive_requests 1000000; }}"
    yield _log_format(n, rule.key, "$upstream_addr", "")


def _log_format(n: int, route: str, target: str, cache: str) -> str:
    fields = (
        '"time":"$time_iso8601","client":"$remote_addr","method":"$request_method","host":"$http_host",'
        '"path":"$request_uri","status":$status,"bytes":$body_bytes_sent,"seconds":$request_time,'
        f'"route":{quoted(route, _ROUTE)},"target":"{target}","cache":"{cache}"'
    )
    return f"  log_format r{n} escape=json '{{{fields}}}';"


def _listen(listen: Listen) -> str:
    host = f"[{listen.host}]" if ":" in listen.host else listen.host
    if not is_address(listen.host):
        raise ValueError(f"{listen.host[:80]!r} is no address to listen on")
    return f"{host}:{listen.port}"


def _ms(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def decided(table: Table[Rule], host: str, path: str) -> Rule | None:
    """The rule of every request for ``host`` at ``path``; None when it depends on more, or there is none."""
    name = host.replace("*", _ANY, 1) if host.startswith("*") else host
    rule = next(iter(table.ordered(name, path)), None)
    return None if rule is None or rule.methods or rule.match_headers else rule


def _server(
    config: GatewayConfig, table: Table[Rule], host: str, ports: list[str], own: dict[str, int], kept: dict[str, int],
    where: Where,
) -> Iterator[str]:  # fmt: skip
    yield "  server {"
    for port in ports:
        yield f"    listen {port};" if host else f"    listen {port} default_server backlog=1024;"
    yield f"    server_name {quoted(host, _NAME) if host else '_'};"
    yield f"    if ($ew_named) {{ return 400 '{_NAMED}'; }}"
    yield "    if ($ew_odd) { return 418; }"
    yield "    error_page 418 = @plane;"
    yield "    error_page 502 = @failed;"
    yield "    error_page 504 = @silent;"
    yield "    location @plane {"
    yield from _to_plane("")
    yield "    }"
    for name, status in (("failed", 502), ("silent", 504)):
        yield f"    location @{name} {{"
        yield from _to_plane(f"{status} $upstream_connect_time")
        yield "    }"
    paths = {r.path for r in table.rules if "%" not in r.path} | {_PROOFS}
    # nginx would lead from /a to /a/ by itself
    paths |= {p[:-1] for p in paths if len(p) > 1 and p.endswith("/")} | {"/"}
    for path in sorted(paths):
        rule = None if path.startswith(_PROOFS) else decided(table, host, path)
        sign = "" if path.endswith("/") else "= "
        yield f"    location {sign}{quoted(path, _LOCATION)} {{"
        if rule is not None and rule.key in own:
            yield from _natively(config, rule, own[rule.key], where)
        elif rule is not None and rule.key in kept:
            yield from _kept(kept[rule.key], where)
        else:
            yield from _to_plane("")
        yield "    }"
    yield "  }"


def _to_plane(tried: str) -> Iterator[str]:
    yield "      access_log off; proxy_request_buffering off;"
    yield "      proxy_connect_timeout 10s; proxy_send_timeout 3600s; proxy_read_timeout 3600s;"
    yield "      proxy_ignore_headers X-Accel-Redirect X-Accel-Expires X-Accel-Limit-Rate X-Accel-Charset;"
    yield from _front(tried)
    yield "      proxy_pass http://plane;"


def _front(tried: str) -> Iterator[str]:
    for name, value in (
        ("Host", "$ew_host"), ("Connection", "$ew_connection"), ("Upgrade", "$http_upgrade"), ("TE", ""),
        (FRONT_CLIENT, "$remote_addr"), (FRONT_SCHEME, "$scheme"), (FRONT_HOST, "$host"), (FRONT_TRIED, tried),
    ):  # fmt: skip
        yield f'      proxy_set_header {name} "{value}";'


def _natively(config: GatewayConfig, rule: Rule, n: int, where: Where) -> Iterator[str]:
    """The plane's own words for ``serving.forwarded``."""
    made = rule.config
    yield f"      proxy_connect_timeout {_ms(made.connect)}; proxy_send_timeout {_ms(made.idle)};"
    # nginx knows one time for both: what is declared for the head may come late, a stream is not cut early
    yield f"      proxy_read_timeout {_ms(max(made.answer, made.idle))};"
    yield "      proxy_ignore_headers X-Accel-Redirect X-Accel-Expires X-Accel-Limit-Rate X-Accel-Buffering"
    yield "        X-Accel-Charset;"
    host = quoted(made.send_host, _AUTHORITY) if made.send_host else '"$http_host"'
    yield f"      proxy_set_header Host {host};"
    yield '      proxy_set_header Connection "";'
    said = {
        "X-Forwarded-For": "$remote_addr", "X-Forwarded-Host": "$http_host", "X-Forwarded-Proto": "$scheme",
        "Via": f"1.1 {_node(config.node)}.edgeward",
    }  # fmt: skip
    for name, value in said.items():
        yield f'      proxy_set_header {name} "{value}";'
    gone = sorted(CLAIMS | {FALLBACK, REFUSED, PLACE, FRONT_CLIENT, FRONT_SCHEME, FRONT_HOST, FRONT_TRIED})
    gone += ["te", "trailer", "keep-alive", "proxy-connection", "proxy-authorization", "http2-settings"]
    gone += ["x-edgeward-identity", "x-edgeward-auth", "x-edgeward-scope"]
    for name in gone:
        if name not in map(str.lower, said):
            yield f'      proxy_set_header {name} "";'
    yield f"      access_log {quoted(where.log, _FILE)} r{n} buffer=64k flush=1s;"
    yield f"      proxy_pass http://t{n};"


def _kept(n: int, where: Where) -> Iterator[str]:
    """What the plane answers from its cache is kept for a second; everything else goes through."""
    yield "      if ($ew_fancy) { return 418; }"
    yield "      if ($ew_unkept) { return 418; }"
    yield f"      access_log {quoted(where.log, _FILE)} r{n} buffer=64k flush=1s if=$ew_hit;"
    yield "      open_file_cache max=4096 inactive=10s;"  # of kept answers; nginx knows when one was replaced
    yield '      proxy_buffering on; proxy_cache kept; proxy_cache_key "$http_host|$request_uri"; proxy_cache_lock off;'
    yield "      proxy_ignore_headers Cache-Control Expires Set-Cookie Vary X-Accel-Redirect X-Accel-Limit-Rate"
    yield "        X-Accel-Charset;"
    yield "      proxy_read_timeout 3600s;"
    yield from _front("")
    yield "      proxy_pass http://plane;"


def _node(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9.-]+", name):
        raise ValueError(f"{name[:80]!r} is no name of a node")
    return name
