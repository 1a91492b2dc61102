"""What would drive a terminal is shown."""

from __future__ import annotations

import pytest

from edgeward.cli.main import say
from edgeward.cli.plain import plain


def test_control_characters_are_shown_and_lines_and_tabs_stay() -> None:
    assert plain("a b\tc\nd") == "a b\tc\nd"
    assert plain("\x1b]0;mine\x07\x9b31m\r") == "\\x1b]0;mine\\x07\\x9b31m\\r"


def test_an_error_is_told_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    say("error: \x1b[2J gone")
    assert capsys.readouterr().err == "error: \\x1b[2J gone\n"
