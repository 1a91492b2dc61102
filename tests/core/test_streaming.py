"""Records and lines as they come."""

from __future__ import annotations

import json

from tests.core.served import Hub, events, run


def test_records_are_listed_and_followed_and_lines_stay_lines() -> None:
    async def body(hub: Hub) -> None:
        for n in range(4):
            await hub.records.append("events", {"n": n})
        _, listed = await hub.ask("GET", "/api/v1/events", params={"limit": 2, "since": 1})
        assert [i["n"] for i in listed["items"]] == [2, 3]
        assert (await hub.ask("GET", "/api/v1/journal"))[1] == {"items": []}
        assert (await hub.refused("GET", "/api/v1/events?limit=10001"))[:2] == (422, "?limit")
        assert (await hub.refused("POST", "/api/v1/events", {}))[0] == 404
        async with hub.http.stream("GET", "/api/v1/events", params={"follow": "1", "since": 2}) as answer:
            stream = events(answer)
            got = [await anext(stream) for _ in range(3)]
            await hub.records.append("events", {"n": 4})
            got.append(await anext(stream))
        assert [(seq, data if event or not seq else data["n"]) for event, seq, data in got] == [
            (0, "following"), (3, 2), (4, 3), (5, 4),
        ]  # fmt: skip
        answer = await hub.http.get("/api/v1/lines")
        assert [json.loads(line) for line in answer.text.split("\n")[:-1]] == [
            {"n": n, "text": "a\nb"} for n in range(3)
        ]

    run(body)
