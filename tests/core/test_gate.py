"""The gate: tokens, request ids, and nothing of the inside."""

from __future__ import annotations

from tests.core.served import CONFIGS, Hub, run

from edgeward.core.gate import _shown


def test_tokens_request_ids_and_nothing_of_the_inside() -> None:
    async def body(hub: Hub) -> None:
        for header in ("", "Bearer", "Bearer bad", "Basic good", "good", "Bearer good bad"):
            answer = await hub.http.get(CONFIGS, headers={"authorization": header})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["remedy"] == "log in"
        for header in ("bearer good", "BEARER   good"):
            assert (await hub.http.get(CONFIGS, headers={"authorization": header})).status_code == 200
        for path, text in (("/healthz", "alive"), ("/readyz", "ready"), ("/metrics", "edgeward_up 1")):
            answer = await hub.http.get(path, headers={"authorization": ""})
            assert (answer.status_code, text in answer.text) == (200, True)
        assert (await hub.http.get("/openapi.json", headers={"authorization": ""})).status_code == 401
        hub.ready = False
        assert (await hub.http.get("/readyz")).status_code == 503

        for given, kept in (("abc-1", True), ("x" * 64, True), ("x" * 65, False), ("", False), ("a\tb", False)):
            answer = await hub.http.get("/healthz", headers={"x-request-id": given})
            assert (answer.headers["x-request-id"] == given) is kept
        status, problem = await hub.ask("GET", "/api/v1/broken", headers={"x-request-id": "find-me"})
        assert (status, "find-me" in problem["remedy"], "s3cret" in str(problem)) == (500, True, False)
        assert (await hub.ask("GET", "/api/v1/version"))[1] == {"version": "1.2.3"}

    run(body)


def test_a_token_in_a_path_is_not_shown() -> None:
    assert _shown("/nodes/n/proxy/80/~" + "aB-_9" * 20 + "/a/~b") == "/nodes/n/proxy/80/~(hidden)/a/~b"
