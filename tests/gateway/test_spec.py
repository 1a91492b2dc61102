from __future__ import annotations

from typing import Any

import pytest

from edgeward.core.errors import EdgewardError
from edgeward.core.resource import decode
from edgeward.gateway import spec as spec_module


def route(**spec: Any) -> Any:
    spec.setdefault("to", {"upstream": "http://127.0.0.1:18080"})
    return decode({"apiVersion": "edgeward/v1", "kind": "Route", "metadata": {"name": "r"}, "spec": spec})


def test_the_documents_of_the_issue() -> None:
    assert route(path="/hello", to={"function": "hello"}).spec.to.function == "hello"
    news = route(path="/news/", to={"upstream": "http://127.0.0.1:18080"}, cache={})
    assert news.spec.cache == spec_module.Cache()
    assert spec_module.origin_of("https://example.org/") == ("https", "example.org", 443)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"to": {}}, "$.spec.to"),
        ({"to": {"service": "a", "function": "b"}}, "$.spec.to"),
        ({"to": {"static": "/var/www"}}, "static"),
        ({"to": {"upstream": "ftp://x"}}, "$.spec.to.upstream"),
        ({"to": {"upstream": "http://x/path"}}, "$.spec.to.upstream"),
        ({"to": {"upstream": "http://u:p@x"}}, "$.spec.to.upstream"),
        ({"to": {"upstream": "http://x:99999"}}, "$.spec.to.upstream"),
        ({"to": {"function": "a@"}}, "$.spec.to.function"),
        ({"path": "hello"}, "$.spec.path"),
        ({"path": "/a/../b"}, "$.spec.path"),
        ({"path": "/%61"}, "$.spec.path"),
        ({"path": "/a?b"}, "$.spec.path"),
        ({"host": "Example.org"}, "$.spec.host"),
        ({"host": "a:80"}, "$.spec.host"),
        ({"host": "*"}, "$.spec.host"),
        ({"methods": ["TRACE"]}, "methods"),
        ({"methods": ["GET", "GET"]}, "$.spec.methods"),
        ({"headers": {"Connection": "x"}}, "$.spec.headers.Connection"),
        ({"headers": {"X-Forwarded-For": "x"}}, "$.spec.headers.X-Forwarded-For"),
        ({"timeouts": {"answer": "0s"}}, "$.spec.timeouts.answer"),
        ({"retries": {"attempts": 9}}, "attempts"),
        ({"cache": {"object": "1Gi"}}, "$.spec.cache.object"),
        ({"sticky": {"header": "X-User"}}, "$.spec.sticky"),
        ({"to": {"function": "f"}, "sticky": {}}, "$.spec.sticky"),
        ({"to": {"function": "f"}, "sticky": {"header": "a", "cookie": "b"}}, "$.spec.sticky"),
        ({"to": {"function": "f"}, "sticky": {"cookie": "a b"}}, "$.spec.sticky.cookie"),
        ({"cors": {}}, "origins"),
        ({"cors": {"origins": ["example.org"]}}, "$.spec.cors.origins[0]"),
        ({"cors": {"origins": ["https://a/"]}}, "$.spec.cors.origins[0]"),
        ({"cors": {"origins": ["*"], "credentials": True}}, "$.spec.cors.credentials"),
        ({"cors": {"origins": ["*"], "headers": ["a b"]}}, "$.spec.cors.headers[0]"),
        ({"auth": {}}, "auth"),
        ({"rateLimit": {}}, "rateLimit"),
        ({"limits": {"rate": {"requests": 0}}}, "requests"),
        ({"limits": {"rate": {"requests": 1, "per": "0s"}}}, "$.spec.limits.rate.per"),
        ({"prefer": "site"}, "prefer"),
        ({"prefer": "cloud"}, "$.spec.cloud"),
        ({"to": {"static": {"config": "c"}}, "fallback": ["nearest"]}, "$.spec.fallback"),
        ({"fallback": ["cloud"]}, "$.spec.cloud"),
        ({"fallback": ["site"]}, "fallback"),
        ({"fallback": ["nearest", "nearest"]}, "$.spec.fallback"),
        ({"fallback": ["nearest"], "cloud": "https://h"}, "$.spec.cloud"),
        ({"fallback": ["cloud"], "cloud": "https://h/path"}, "$.spec.cloud"),
        ({"prefer": "cloud", "fallback": ["cloud"], "cloud": "https://h"}, "$.spec.fallback"),
    ],
)
def test_refused_where_it_is_declared(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(EdgewardError) as e:
        route(**spec)
    assert field in f"{e.value.field} {e.value}"
