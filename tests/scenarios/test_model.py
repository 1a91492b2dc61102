"""The example with a model, as it stands, but for where its wheel comes from."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.functions.making import wheel_of_installed
from tests.scenarios.conftest import ROOT


def _post(url: str, path: str, text: str) -> tuple[int, Any]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", path, text.encode())
        got = connection.getresponse()
        return got.status, json.load(got)


def test_a_model_in_a_wheel_answers_at_the_edge(systems: Callable[..., Any], tmp_path: Path) -> None:
    example = tmp_path / "04-model"
    shutil.copytree(ROOT / "examples" / "04-model", example)
    file = example / "function.yaml"
    lock = wheel_of_installed(tmp_path / "wheels", "budoux").split()
    text = file.read_text()
    locked = re.search(r"budoux==(\S+)", text)
    assert locked is not None and lock[0] == locked[0], "the development lock and the example name one version"
    file.write_text(re.sub(r"--hash=sha256:\w+", lock[1], text))
    (tmp_path / "a" / "hub").mkdir(parents=True)
    packages = {"packages": {"findLinks": str(tmp_path / "wheels")}}
    (tmp_path / "a" / "hub" / "hub.json").write_text(json.dumps(packages))
    up = systems("a", "up", "--port", "0")
    up.run("apply", "-f", str(example), "--wait")
    said = json.loads(up.run("invoke", "phrases", "-d", "今日は天気です。"))
    assert said == {"language": "ja", "phrases": ["今日は", "天気です。"]}
    url = up.wait("the gateway's address", lambda: up.context["nodes"][0].get("gateway_url"))
    want = (200, {"language": "zh-hans", "phrases": ["今天", "是", "晴天。"]})
    up.wait("the route", lambda: _post(url, "/phrases", "今日は")[0] == 200)
    assert _post(url, "/phrases?language=zh-hans", "今天是晴天。") == want
    assert _post(url, "/phrases?language=xx", "x")[0] == 422
