"""The built wheel, installed by pip into an environment of its own, runs a system."""

from __future__ import annotations

import json
import os
import signal
import site
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_installs_and_runs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "v", with_pip=True)
    python = tmp_path / "v" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, capture_output=True, timeout=240)
    # the dependencies are those of this environment, which came from the lock file
    (target,) = (tmp_path / "v" / "lib").glob("python*/site-packages")
    (target / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "EDGEWARD_CONTEXT")}
    edgeward = tmp_path / "v" / "bin" / "edgeward"
    where = subprocess.run(
        [python, "-c", "import edgeward; print(edgeward.__file__)"],
        env=env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert str(target) in where.stdout
    assert (target / "edgeward" / "examples" / "01-hello-edge" / "app.yaml").exists()
    data = tmp_path / "d"
    up = subprocess.Popen([edgeward, "up", "--data", data], env=env, cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 180
        while not (data / "context.json").exists():
            assert up.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        got = subprocess.run(
            [edgeward, "get", "node", "plant-1", "-o", "json", "--context", data / "context.json"],
            env=env, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert json.loads(got.stdout)["spec"]["site"] == "plant", got.stderr
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(120)
