"""The documents say what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgeward.cli.manifests import packed
from edgeward.core.manifest import decode_manifest, load, read_files
from edgeward.hub.kinds import load as load_kinds

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

load_kinds()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def test_both_readmes_have_the_same_commands() -> None:
    commands = blocks(ROOT / "README.md", "sh")
    assert commands
    assert blocks(ROOT / "README.zh.md", "sh") == commands


def test_every_resource_shown_is_valid() -> None:
    shown = 0
    for page in PAGES:
        for text in blocks(page, "yaml"):
            if "apiVersion" in text:
                for manifest in load(text, str(page)):
                    decode_manifest(manifest)
                    shown += 1
    assert shown >= 5


def test_examples_are_valid() -> None:
    folders = [p for p in (ROOT / "examples").iterdir() if p.is_dir()]
    assert folders
    for folder in folders:
        manifests = read_files([folder])
        for manifest in manifests:
            packed(manifest, pack=False)  # some folders are what a compiler makes
        assert [decode_manifest(m) for m in manifests]


def test_the_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "reference.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_shown_exist() -> None:
    from edgeward.cli.main import COMMANDS

    for page in PAGES:
        for text in blocks(page, "sh"):
            for name in re.findall(r"\.venv/bin/edgeward ([a-z-]+)", text):
                assert name in COMMANDS, f"{page.name}: edgeward {name}"


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "site" / "index.html").exists()


def table(page: str, first: str) -> list[list[str]]:
    """The rows of the table whose head begins with ``first``, without head."""
    lines = (ROOT / page).read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([c.strip() for c in re.split(r"(?<!\\)\|", line.strip().strip("|"))])
    return rows


def test_the_lab_page_gives_the_profiles_as_they_are() -> None:
    from edgeward.lab.links import BUILTIN

    def number(value: float | None) -> str:
        return "no limit" if value is None else f"{value:g}"

    found = {row[0].strip("`"): row[1:] for row in table("docs/lab.md", "link")}
    for name, p in BUILTIN.items():
        stall = f"every {p.stall.every_s:g} s for {p.stall.for_ms:g} ms" if p.stall else "none"
        shown = [number(v) for v in (p.delay_ms, p.jitter_ms, p.up_kbit, p.down_kbit, p.loss)]
        assert found.pop(name) == [*shown, stall]
    assert not found


def test_the_architecture_page_gives_the_messages_of_the_link_as_they_are() -> None:
    import msgspec

    from edgeward.nodes import wire

    asks = {"sync": wire.SyncAsk, "push": wire.PushAsk, "report": wire.ReportAsk, "beat": wire.BeatAsk}
    answers = {"sync": wire.SyncAnswer, "push": wire.PushAnswer, "report": wire.Ok, "beat": wire.BeatAnswer}
    rows = {row[0]: row[2] for row in table("docs/architecture.md", "subject")}
    for verb, ask in asks.items():
        shown = re.findall(r"\{([a-z, ]+)\}", rows[f"`ew.hub.{verb}.<node>`"])
        fields = [", ".join(f.name for f in msgspec.structs.fields(s)) for s in (ask, answers[verb])]
        assert shown == fields, verb


def test_the_decisions_name_every_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[>=;\[ ]", d, maxsplit=1)[0] for d in project["dependencies"]}
    shown = {name for row in table("docs/decisions.md", "dependency") for name in re.split(r", ", row[0])}
    assert shown == wanted


def test_exit_codes_are_those_of_the_errors() -> None:
    from edgeward.core import errors

    codes = {str(e.exit_code) for e in vars(errors).values() if isinstance(e, type) and hasattr(e, "exit_code")}
    assert codes | {"0", "2"} == {row[0] for row in table("docs/operations.md", "exit code")} | ({"2"} & codes)


def test_the_readme_shows_what_the_demo_prints() -> None:
    from edgeward.lab import tally

    printed = {label for label, _ in tally.rows(dict.fromkeys(tally.FIELDS))}
    rows = table("README.md", "what")
    assert len(rows) == len(table("README.zh.md", "内容")) > 5
    for (label, value), (_, chinese) in zip(rows, table("README.zh.md", "内容"), strict=True):
        assert label in printed
        assert value == chinese


def test_both_readmes_link_to_the_same_pages() -> None:
    one, other = (re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text()) for name in ("README.md", "README.zh.md"))
    assert set(one) == set(other)


def test_the_benchmarks_page_shows_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.common import table as rendered

    rows = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    assert all(r.keys() == {"name", "value", "unit", "baseline", "ratio", "bar", "holds", "machine"} for r in rows)
    assert all(r["ratio"] and r["baseline"] for r in rows), "each beside a baseline"
    assert rendered(rows) in (ROOT / "docs" / "benchmarks.md").read_text()
