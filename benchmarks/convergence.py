"""Edits at hub and site in random interleavings with cuts, lost answers, restarts and clock steps: do both agree?

The measure is the property test of ``tests/nodes/test_convergence.py``, drawn anew: a real hub, a real replica file,
and after each interleaving both must hold what the declared rule says. The baseline is what a plain synced store does,
"the later write by the clock wins", on as many interleavings of the same kind against the same model.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import PYTHON, Row, row

ROOT = Path(__file__).parents[1]
_STEPS = (-400 * 86400.0, -3600.0, 3600.0, 400 * 86400.0)
_MADE = re.compile(r"during generate phase.*?(\d+) passing(?: examples)?, \d+ failing", re.S)


def _converged(count: int, seed: int) -> int:
    """How many of ``count`` new interleavings converged; those after the first that did not are not played."""
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder:
        env = {**os.environ, "EDGEWARD_INTERLEAVINGS": str(count), "HYPOTHESIS_PROFILE": "explore"}
        argv = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/t"]
        argv += ["--hypothesis-show-statistics", f"--hypothesis-seed={seed}", "tests/nodes/test_convergence.py"]
        done = subprocess.run(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, timeout=900)
    found = _MADE.search(done.stdout)
    if found is None or done.returncode not in (0, 1):
        raise RuntimeError(f"the test did not run:\n{done.stdout[-2000:]}")
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
    return int(found[1]) if done.returncode == 0 else min(int(found[1]), count - 1)


def _script(rng: random.Random) -> list[tuple[Any, ...]]:
    def act() -> tuple[Any, ...]:
        kind = rng.choice(("edit", "edit", "way", "clock", "clock"))
        if kind == "edit":
            return rng.choice(("hub", "site")), rng.choice((None, 0, 1, 2, 3, 4))
        if kind == "clock":
            return rng.choice(("hub clock", "site clock")), rng.choice(_STEPS)
        return (rng.choice(("heal", "push", "push lost", "sync", "restart")),)

    return [act() for _ in range(rng.randrange(15))]


def by_the_clock(rule: str, script: list[tuple[Any, ...]]) -> bool:
    """Whether "the later write wins" ends with what the rule declares."""
    from tests.nodes.test_convergence import Model

    model, now = Model(rule), 1e9
    clocks = {"hub": 0.0, "site": 0.0}
    held: dict[str, tuple[float, Any]] = {"hub": (0.0, None), "site": (0.0, None)}

    def take(to: str, of: str) -> None:
        if held[of][0] > held[to][0]:
            held[to] = held[of]

    for act, *more in [*script, ("heal",)]:
        now += 1.0
        if act in clocks:
            if more[0] is None and (model.hub if act == "hub" else model.site) is None:
                continue
            at = now + clocks[act]
            held[act] = (at, more[0])
            (model.at_hub if act == "hub" else model.at_site)(more[0], at)
        elif act.endswith("clock"):
            clocks[act.split()[0]] += more[0]
        if act in ("heal", "push", "push lost"):
            take("hub", "site")
            model.push()
            if act != "push lost" and model.local:
                model.answered()
        if act in ("heal", "sync"):
            take("site", "hub")
            model.synced()
    return held["hub"][1] == held["site"][1] == model.hub


def convergence() -> list[Row]:
    count = int(os.environ.get("EDGEWARD_INTERLEAVINGS", "1000"))
    seed = random.SystemRandom().randrange(10**9)
    print(f"convergence: --hypothesis-seed={seed}", file=sys.stderr, flush=True)
    rng = random.Random(3)
    naive = sum(by_the_clock(rng.choice(("cloud", "edge", "newest")), _script(rng)) for _ in range(count))
    name = f"two-sided edits with cuts, restarts and clock steps, random interleavings that converge, of {count}"
    base = (f"the later write by the clock wins, of {count}", float(naive))
    return [row(name, _converged(count, seed), "converge", count, less=False, base=base)]
