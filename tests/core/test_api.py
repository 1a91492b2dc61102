"""The API as a whole: what it serves is what it says."""

from __future__ import annotations

from tests.core.served import Hub, run


def test_the_api_serves_what_its_document_says() -> None:
    async def body(hub: Hub) -> None:
        _, doc = await hub.ask("GET", "/openapi.json")
        for path, item in doc["paths"].items():
            real = path.replace("{namespace}", "default").replace("{name}", "x")
            for method in {"get", "post", "put", "patch", "delete"} & set(item):
                answer = await hub.http.request(method, real, content=b"")
                assert answer.status_code in (200, 404, 422), (method, path, answer.text)
                assert answer.status_code != 404 or answer.json()["resource"].endswith("/x"), (method, path)

    run(body)
