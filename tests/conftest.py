"""How hypothesis runs here: the same examples every time, and no deadline, so that a slow machine is no failure.

``HYPOTHESIS_PROFILE=explore`` looks further: new examples each time.
"""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

settings.register_profile("edgeward", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "edgeward"))

# Programs that the tests start are ended by signals. Under nohup, or behind an `&` of a shell, some are ignored, and
# what is started inherits that.
for _signal in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_signal) == signal.SIG_IGN:
        signal.signal(_signal, signal.default_int_handler if _signal == signal.SIGINT else signal.SIG_DFL)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What passed only when it was run again is no failure of the run, but nobody shall overlook it."""
    again = terminalreporter.stats.get("rerun", [])
    if not again:
        return
    terminalreporter.section("failed, and run again: mend these", yellow=True)
    for report in again:
        terminalreporter.write_line(f"AGAIN {report.nodeid} ({report.when})", yellow=True)
        terminalreporter.write_line(report.longreprtext)
