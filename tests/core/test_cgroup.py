"""Limits that the kernel really holds, where this host lets us make groups; else the reason why not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeward.core import cgroup, proc
from edgeward.core.cgroup import Limits

NODE = f"test-{os.getpid()}"
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def instance() -> Iterator[str]:
    yield "i1"
    cgroup.remove(NODE, "i1")
    for root in set(cgroup.host().roots.values()):
        if (root / NODE).is_dir():
            (root / NODE).rmdir()


def groups() -> list[Path]:
    return [p for p in cgroup._dirs(NODE, "i1") if p.is_dir()]


def need(*controllers: str) -> None:
    missing = [c for c in controllers if c not in cgroup.available()]
    if missing:
        pytest.skip(f"{', '.join(missing)}: {cgroup.host().why or 'not there'}")


def test_everything_asked_for_is_enforced_or_refused_with_a_reason(instance: str) -> None:
    limits = Limits(memory=64 << 20, cpu=0.5, pids=50)
    verdict = cgroup.prepare(NODE, instance, limits)
    assert sorted([*verdict.enforced, *verdict.refused]) == ["cpu", "memory", "pids"]
    assert all(verdict.refused.values())
    assert set(verdict.enforced) <= set(cgroup.available())
    assert cgroup.prepare(NODE, instance, limits) == verdict, "again the same"
    assert cgroup.prepare(NODE, instance, Limits()) == ([], {})


def test_no_limits_no_groups(instance: str) -> None:
    cgroup.prepare(NODE, instance, Limits())
    assert groups() == []
    cgroup.enter(NODE, instance, os.getpid())
    cgroup.remove(NODE, instance)


def test_what_the_kernel_does_not_take_is_refused(instance: str) -> None:
    need("pids")
    verdict = cgroup.prepare(NODE, instance, Limits(pids=-5))
    assert verdict.enforced == []
    assert verdict.refused["pids"]


def test_a_removed_group_is_gone_and_a_busy_one_stays(instance: str) -> None:
    need("pids")
    cgroup.prepare(NODE, instance, Limits(pids=50))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as held:
        cgroup.enter(NODE, instance, held.pid)
        cgroup.remove(NODE, instance)
        assert groups()
        assert str(held.pid) in (groups()[0] / "cgroup.procs").read_text().split()
        held.communicate()
    cgroup.remove(NODE, instance)
    assert groups() == []


async def _limited(instance: str, limits: Limits, code: str) -> tuple[int, str]:
    """Runs Python ``code`` below ``limits``: its status, and what it said."""
    verdict = cgroup.prepare(NODE, instance, limits)
    assert not verdict.refused
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"import sys; sys.stdin.readline()\n{code}",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    me = proc.identify(process.pid)
    assert me is not None
    cgroup.enter(NODE, instance, process.pid)
    out, _ = await process.communicate(b"go\n")
    return process.returncode or 0, out.decode()


def test_memory_above_the_limit_ends_the_process(instance: str) -> None:
    need("memory")
    code = "d = bytearray(%d)\nfor n in range(0, len(d), 4096): d[n] = 1\nprint('lived')"
    assert asyncio.run(_limited(instance, Limits(memory=64 << 20), code % (16 << 20))) == (0, "lived\n")
    assert asyncio.run(_limited(instance, Limits(memory=64 << 20), code % (256 << 20))) == (-9, "")


def test_so_many_processes_and_no_more(instance: str) -> None:
    need("pids")
    code = (
        "import os, signal\nn = 0\n"
        "try:\n"
        "  for _ in range(50):\n"
        "    if os.fork() == 0: signal.pause()\n"
        "    n += 1\n"
        "except OSError: pass\n"
        "print(n)\nsys.stdout.flush()\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.killpg(0, signal.SIGTERM)"
    )
    code = "import os; os.setsid()\n" + code
    assert asyncio.run(_limited(instance, Limits(pids=5), code)) == (0, "4\n")


def test_a_group_that_somebody_else_made_is_not_ours() -> None:
    """Root's `edgeward` group is there after root ran an agent; that says nothing of what another user may do."""
    if os.geteuid() != 0:
        pytest.skip("needs root: to be another user than the group's owner")
    script = (
        "import os, sys, pathlib; from edgeward.core import cgroup; os.setegid(65534); os.seteuid(65534);"
        "cgroup._ROOT = pathlib.Path(sys.argv[1]); print(cgroup.available(), cgroup.host().why)"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for controller in ("memory", "cpu", "pids"):
            (root / controller / "edgeward").mkdir(parents=True)
        done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
        assert done.stdout.strip() == "[] cannot make a cgroup: Permission denied (needs root)", done.stderr


_DIVIDE = """
import json, os, sys
from pathlib import Path
from edgeward.core import cgroup
cgroup._ROOT, cgroup._own_path = Path(sys.argv[1]), lambda _: "/" + sys.argv[2]
group = Path(sys.argv[1], sys.argv[2])
(group / "cgroup.procs").write_text(str(os.getpid()))
found = cgroup._probe_own()
held = {p.parent.name: p.read_text().split() for p in group.rglob("cgroup.procs")}
cgroup.host = lambda: found
limit = group / "instance-i1" / "pids.max"
verdict, seen = None, []
look = lambda: seen.append(limit.read_text().strip() if limit.exists() else "")
if found.roots:
    verdict = cgroup.prepare("n", "i1", cgroup.Limits(memory=64 << 20, cpu=0.5, pids=9))
    look()
cgroup.release()
(group / "cgroup.procs").write_text(str(os.getpid()))  # as systemd does with the next agent
if found.roots:
    look()
    cgroup._probe_own()
    look()
    cgroup.release()
assert cgroup.leftovers("n", "i") == (["i1"] if found.roots else [])
cgroup.remove("n", "i1")
print(json.dumps([os.getpid(), found.own, sorted(found.roots), found.why, held, verdict, seen]))
"""


def test_a_units_own_group_is_divided_and_can_be_entered_again() -> None:
    """With a real group of v2 in the place of systemd's; without controllers (a hybrid host) all but the limits."""
    tree = next((p for p in (cgroup._ROOT, cgroup._ROOT / "unified") if (p / "cgroup.controllers").exists()), None)
    name = f"edgeward-test-{os.getpid()}"
    try:
        if tree is None:
            raise FileNotFoundError(2, "no cgroup v2 here")
        (tree / name).mkdir()
    except OSError as e:
        pytest.skip(f"no group of one's own: {e.strerror}")
    try:
        with contextlib.suppress(OSError):
            (tree / "cgroup.subtree_control").write_text("+memory +cpu +pids")
        done = subprocess.run([sys.executable, "-c", _DIVIDE, str(tree), name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        pid, own, roots, why, held, verdict, seen = json.loads(done.stdout)
        assert own
        assert held["agent"] == [str(pid)] and held[name] == []
        if roots:
            assert roots == ["cpu", "memory", "pids"]
            assert verdict == [["memory", "cpu", "pids"], {}]
            assert seen == ["9", "", "9"]
        else:
            assert why == "the service was given no cgroup controllers"
    finally:
        for group in (tree / name / "agent", tree / name):
            if group.is_dir():
                group.rmdir()
