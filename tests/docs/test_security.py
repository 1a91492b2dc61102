"""The page of clauses names tests that exist, and the policy says what a policy must."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| ((?:CR )?\d+\.\d+[^|]*) \|(.*)\|([^|]*)\|$", re.M)


@cache
def named_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, kinds) and n.name.startswith("test"))


def rows() -> list[tuple[str, str]]:
    return [(m[1], m[3].strip()) for m in ROW.finditer((ROOT / "docs" / "security.md").read_text())]


def test_every_test_that_is_named_exists() -> None:
    found = rows()
    assert len(found) > 60
    missing, named = [], set()
    for clause, tests in found:
        if tests.startswith("no test: "):
            assert tests.removeprefix("no test: ") in ("not ours", "not met", "a process of people"), clause
            continue
        names = re.findall(r"`([^`]+)`", tests)
        assert names, f"{clause} names no test and does not say why"
        for name in names:
            file, _, test = name.partition("::")
            named.add(name)
            if not (ROOT / file).is_file() or (test and test not in named_in(file)) or not named_in(file):
                missing.append(f"{clause}: {name}")
    assert not missing
    assert len(named) > 50


def test_each_clause_once() -> None:
    clauses = [c for c, _ in rows()]
    assert len(clauses) == len(set(clauses))


def test_the_policy_says_what_it_must() -> None:
    """ETSI EN 303 645, 5.2-1 and 5.3-13: where to report, when an answer comes, how long there is support."""
    text = (ROOT / "SECURITY.md").read_text()
    for said in ("## Reporting", "private", "working days", "## Supported", "12 months", "edgeward sbom"):
        assert said in text, said
