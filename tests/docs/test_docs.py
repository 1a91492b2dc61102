"""The documents say what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        assert [decode_manifest(m) for m in read_files([folder])]


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
            for name in re.findall(r"\.venv/bin/edgeward ([a-z]+)", text):
                assert name in COMMANDS, f"{page.name}: edgeward {name}"


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "site" / "index.html").exists()
