"""Runs a node's agent of whichever release, and goes back to the one before when a new one does not prove itself.

``python -m edgeward.agent.launcher --data DIR``. What runs is decided in ``slots.py``; here are the files, the child
and the clock. An agent that wants another release to run has made it whole in ``DIR/releases/<digest>``, writes
``order.json`` there and ends. The launcher writes ``state.json`` before each step, so a power cut at any moment leaves
the old release or the new one, each whole. It uses the standard library alone: it must not break with what it runs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgeward.agent.slots import Order, State, ended, give_up, judge, next_start, order_of, plain, proven, state_of
from edgeward.agent.slots import stopped as stopped_by_hand

#: Tells the agent that it has a launcher, and which release it is.
RELEASE = "EDGEWARD_RELEASE"
#: Seconds between two looks at one that is tried, between an end and the next start, for an agent to end, for the
#: agent of a launcher that was killed to end.
_LOOK, _PAUSE, _END, _LEFT = 0.25, 1.0, 25.0, 40.0


def read(path: Path) -> Any:
    """The JSON value in it; None where there is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def write(path: Path, doc: Any) -> None:
    """Replaces it so that after a power cut it is the old or the new one."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w") as out:
        json.dump(doc, out, indent=2, sort_keys=True)
        out.flush()
        os.fsync(out.fileno())
    scratch.replace(path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def say(text: str) -> None:
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "logger": "edgeward.launcher", "message": text}
    print(json.dumps(line), file=sys.stderr, flush=True)


class Launcher:
    """One node's launcher; :meth:`run` until SIGTERM or SIGINT. ``supervised``: who started it starts it again, and is
    to see when a release that is not on trial ends."""

    def __init__(self, data: Path, supervised: bool = False) -> None:
        self._supervised = supervised
        self.data, self.releases = data, data / "releases"
        self._state_file, self._order_file = self.releases / "state.json", self.releases / "order.json"
        #: A plain word: what waits by locks must not be woken from a signal's handler.
        self._stop = False
        self._child: subprocess.Popen[bytes] | None = None
        #: How the last one ended.
        self._status = 1
        self.state: State = state_of(read(self._state_file))

    def stop(self, *_: Any) -> None:
        self._stop = True
        if self._child is not None:
            self._child.terminate()
            signal.alarm(int(_END))

    def kill(self, *_: Any) -> None:
        if self._child is not None:
            self._child.kill()

    def _save(self, state: State) -> None:
        """On a full disk the step is not taken: what ran before is started again."""
        if state == self.state:
            return
        try:
            write(self._state_file, plain(state))
        except OSError as e:
            say(f"the launcher's state cannot be written: {e.strerror or e}")
            if state.trying is not None:
                state = give_up(state, f"the launcher's state cannot be written: {e.strerror or e}")
        self.state = state

    def python(self, release: str) -> str:
        return str(self.releases / release / "bin" / "python") if release else sys.executable

    def whole(self, release: str) -> bool:
        """A release's folder gets its name when all of it is on the disk."""
        return not release or os.access(self.python(release), os.X_OK)

    def run(self) -> int:
        self._wait_for_left()
        first = True
        while not self._stop:
            if not first and not (self.data / "identity" / "node.creds").exists():
                return 0  # it left its fleet
            first = False
            state, _ = next_start(self.state, order_of(read(self._order_file)), self.whole)
            self._save(state)
            state = self.state
            release = state.trying.release if state.trying is not None else state.current
            self._start(release)
            self._watch()
            order = order_of(read(self._order_file))
            if not self._stop and (order is None or order.id == self.state.obeyed):
                if self._supervised and state.trying is None:
                    return self._status
                time.sleep(_PAUSE)  # the pace of starting
        return 0

    def _start(self, release: str) -> None:
        env = {**os.environ, RELEASE: release}
        if release:  # nothing of the Python that the launcher runs in
            for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
                env.pop(name, None)
        argv = [self.python(release), "-m", "edgeward.agent", "--data", str(self.data), "--die-with-parent"]
        say(f"starts {release[:12] or 'the installed release'}" + (", on trial" if self.state.trying else ""))
        try:
            self._child = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL)
        except OSError as e:
            self._child = None
            self._save(ended(self.state, f"it cannot be started: {e.strerror or e}"))
            return
        if self._stop:  # it was said while the child was being made
            self.stop()

    def _watch(self) -> None:
        """Until the child has ended."""
        child, order = self._child, self.state.trying
        if child is None:
            return
        if order is not None and not self._try(child, order):
            self._end(child)
        child.wait()
        self._child, code = None, child.returncode
        self._status = code if code >= 0 else 128 - code
        if self.state.trying is None:
            return
        how = f"it ended with status {code}" if code >= 0 else f"it was ended by signal {-code}"
        self._save(stopped_by_hand(self.state) if self._stop else ended(self.state, how))

    def _try(self, child: subprocess.Popen[bytes], order: Order) -> bool:
        """Until it has proven itself, has failed (False), or has ended."""
        began, ready_since, linked = time.monotonic(), None, False
        while child.poll() is None and not self._stop:
            run = read(self.data / "run.json")
            mine = run if isinstance(run, dict) and run.get("pid") == child.pid else {}
            now = time.monotonic()
            ready_since = (ready_since or now) if mine.get("ready") else None
            linked = linked or bool(mine.get("online"))
            ready = None if ready_since is None else now - ready_since
            verdict, why = judge(order, now - began, ready, linked)
            if verdict == "proven":
                say(f"{order.release[:12] or 'the installed release'} has proven itself")
                self._save(proven(self.state))
                return True
            if verdict == "failed":
                say(f"{order.release[:12] or 'the installed release'}: {why}")
                self._save(give_up(self.state, why))
                return False
            time.sleep(_LOOK)
        return True

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        child.terminate()
        try:
            child.wait(_END)
        except subprocess.TimeoutExpired:
            say("the agent does not end, and is killed")
            child.kill()

    def _wait_for_left(self) -> None:
        """The agent of a launcher that was killed ends by itself; two at once must not be."""
        run = read(self.data / "run.json")
        pid = run.get("pid") if isinstance(run, dict) else None
        until = time.monotonic() + _LEFT
        while isinstance(pid, int) and self._is_agent(pid) and time.monotonic() < until and not self._stop:
            time.sleep(_LOOK)

    def _is_agent(self, pid: int) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return b"edgeward.agent" in words and os.fsencode(str(self.data)) in words


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgeward.agent.launcher", description="Runs one node's agent.")
    parser.add_argument("--data", type=Path, required=True, help="the node's directory")
    parser.add_argument("--supervised", action="store_true", help="end with an agent that ends and is not on trial")
    args = parser.parse_args()
    data = args.data.absolute()
    fd = os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"another launcher runs in {data}")
        return 1
    launcher = Launcher(data, args.supervised)
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, launcher.stop)
    signal.signal(signal.SIGALRM, launcher.kill)
    return launcher.run()


if __name__ == "__main__":
    raise SystemExit(main())
