"""``edgeward gateway explain URL``: what the gateway would do with a request, and why; without doing it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from edgeward.core.errors import Invalid
from edgeward.gateway.cache import choose
from edgeward.gateway.cors import is_preflight
from edgeward.gateway.http1 import Bad, Request, parse_request, write_request
from edgeward.gateway.match import NotAllowed, Table, allowed, clean
from edgeward.gateway.rules import Place, Rule
from edgeward.gateway.shelf import Shelf, key_of

if TYPE_CHECKING:
    from edgeward.gateway.disk import Disk


def request_of(args: dict[str, Any]) -> Request:
    """The request of ``{url, method, headers}``. Raises ``Bad`` or ``Invalid``."""
    url = str(args.get("url", ""))
    if "://" not in url and not url.startswith("/"):
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
    except ValueError:
        raise Invalid(f"{url[:80]!r} is no URL", field="url", remedy="write http://host/path or /path") from None
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = [("host", parts.netloc or str(args.get("host") or "localhost"))]
    for name, value in dict(args.get("headers") or {}).items():
        headers.append((str(name).lower(), str(value)))
    try:
        head = write_request(str(args.get("method") or "GET").upper(), target, headers)
    except UnicodeEncodeError:
        raise Bad(400, "a target with characters that must be encoded") from None
    request = parse_request(head, "https" if parts.scheme == "https" else "http")
    request.path, request.query = clean(request.target)
    return request


def _differs(rule: Rule, request: Request) -> str:
    """Why this rule does not take the request; empty when it does."""
    host, path = rule.host, rule.path
    if host.startswith("*."):
        if not (request.host.endswith(host[1:]) and len(request.host) > len(host[1:])):
            return f"host is not {host}"
    elif host and request.host != host:
        return f"host is not {host}"
    if path.endswith("/"):
        if not request.path.startswith(path):
            return f"path is not below {path}"
    elif request.path != path:
        return f"path is not {path}"
    for name, value in rule.match_headers:
        if request.fields.get(name) != value:
            return f"{name} is not {value}"
    if rule.methods and request.method not in allowed(rule) and not (rule.preflight and is_preflight(request)):
        return f"method is not {', '.join(rule.methods)}"
    return ""


def explain(
    table: Table[Rule], shelf: Shelf, args: dict[str, Any], now: float, unix: float, disk: Disk | None = None
) -> dict[str, Any]:
    """``{request, route, target, endpoints, cache, considered}`` or ``{request, status, why, considered}``."""
    try:
        request = request_of(args)
    except Bad as e:
        return {"status": e.status, "why": f"refused before any route is looked at: {e.why}", "considered": []}
    asked = {"method": request.method, "host": request.host, "path": request.path, "query": request.query}
    considered = []
    for rule in table.rules:
        why = _differs(rule, request)
        considered.append({"route": rule.key, "matches": not why, "why": why})
    try:
        rule = table.find(request)
    except Bad as e:
        doc: dict[str, Any] = {"request": asked, "status": e.status, "why": e.why, "considered": considered}
        if isinstance(e, NotAllowed):
            doc["allow"] = list(e.methods)
        return doc
    config = rule.config
    for entry in considered:
        if entry["matches"] and entry["route"] != rule.key:
            entry["why"] = f"{rule.key} is more exact"
    return {
        "request": asked,
        "route": rule.key,
        "why": f"host {rule.host or 'any'}, path {rule.path}"
        + (f", methods {', '.join(rule.methods)}" if rule.methods else "")
        + (f", {len(rule.match_headers)} header fields" if rule.match_headers else ""),
        "target": config.target,
        "auth": rule.guard.ways if rule.guard is not None else [],
        "endpoints": [
            {"address": str(e), "here": e.here, "circuit": rule.balance.circuits[e].state(now)}
            for e in config.endpoints
        ],
        **_places(rule, now),
        "cache": _cache(rule, shelf, request, unix, disk),
        "considered": considered,
    }


def _places(rule: Rule, now: float) -> dict[str, Any]:
    """In which order the places are asked, and what keeps one from answering; nothing when there is one only."""
    if len(rule.places) == 1:
        return {}
    found = []
    for place in rule.places:
        doc: dict[str, Any] = {"place": place.kind, "target": place.target}
        if place.name:
            doc["name"] = place.name
        if place.kind != "here":
            doc["address"] = ", ".join(map(str, place.balance.endpoints))
        doc["why"] = _why_not(rule, place, now)
        found.append(doc)
    return {"places": found, "asked": next((p["target"] for p in found if not p["why"]), "")}


def _why_not(rule: Rule, place: Place, now: float) -> str:
    """Why the place would not be asked now; empty: it would."""
    if place is rule.home and rule.config.to == "function":
        return "is not on this node" if rule.config.missing else ""
    if not place.balance.endpoints:
        return "has no running endpoint at this site"
    ready = any(c.ready(now) for c in place.balance.circuits.values())
    return "" if ready else "failed again and again; it is left alone for a moment"


def _cache(rule: Rule, shelf: Shelf, request: Request, unix: float, disk: Disk | None) -> dict[str, Any]:
    if rule.cache is None:
        return {"state": "off"}
    stored, others = shelf.peek(key_of(request), request, rule.owner)
    if stored is None and disk is not None and (mark := disk.find(key_of(request), request, rule.owner)) is not None:
        age = int(max(0.0, unix - mark.got))
        return {
            "state": "disk",
            "age": age,
            "bytes": mark.size,
            "message": "it is read, and looked at, when it is asked for",
        }
    choice = choose(request, stored, unix, other_variant=others)
    doc: dict[str, Any] = {"state": choice.way}
    if choice.fwd:
        doc["fwd"] = choice.fwd
    if stored is not None:
        doc |= {
            "status": stored.status,
            "age": int(stored.age(unix)),
            "ttl": int(stored.ttl(unix)),
            "hits": stored.hits,
        }
        doc |= {"bytes": len(stored.body), "staleIfError": int(stored.stale_if_error)}
    return doc


def purge_args(args: dict[str, Any]) -> dict[str, str]:
    """``{url | prefix | tag, host}`` of a purge. Raises ``Invalid``."""
    found = {k: str(args[k]) for k in ("path", "prefix", "tag", "host") if args.get(k)}
    url = str(args.get("url", ""))
    if url:
        try:
            parts = urlsplit(url)
        except ValueError:
            raise Invalid(f"{url[:80]!r} is no URL", field="url", remedy="write http://host/path or /path") from None
        found["path"] = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if parts.netloc:
            found["host"] = parts.netloc
    for name in {"path", "prefix"} & found.keys():
        asked = "prefix" if name == "prefix" else "url"
        if not found[name].startswith("/"):
            raise Invalid("a path begins with a slash", field=asked, remedy=f"write /{found[name][:80]}")
        try:
            found[name] = "".join(clean(found[name]))  # as it is kept
        except Bad as e:
            raise Invalid(f"nothing can be kept there: {e.why}", field=asked, remedy="write e.g. /news/") from None
    if len({"path", "prefix", "tag"} & found.keys()) != 1:
        raise Invalid("what is to be purged?", field="purge", remedy="give one of url, prefix, tag")
    return found
