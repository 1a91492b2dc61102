"""Facts in, verdicts out; whatever is not well comes with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from edgeward.core import diagnose as d
from edgeward.core.diagnose import Check

NOW = 1_795_600_000.0
DISK: dict[str, Any] = {"free": 9 << 30, "total": 50 << 30, "inodes": 10**6, "filesystem": "ext4", "sync": 0.001}
PORT: dict[str, Any] = {"free": True, "ours": False, "privileged": False}
REACH: dict[str, Any] = {"error": "", "trusted": True, "issuer": "", "proxy": ""}
KERNEL: dict[str, Any] = {"cgroups": ["memory", "cpu", "pids"], "why_not": ""}
MACHINE: dict[str, Any] = {"memory": 1 << 30, "files": 65536, "nats": "v2", "nats_error": ""}


def many(found: Check | Iterable[Check] | None) -> list[Check]:
    if found is None:
        return []
    return [found] if isinstance(found, Check) else list(found)


CASES: list[tuple[str, Callable[[], Any], list[str]]] = [
    ("all well", lambda: d.clock(NOW, synchronised=True, hub_offset=0.4), ["ok", "ok"]),
    ("never set", lambda: d.clock(0, synchronised=False, hub_offset=None), ["fail", "warn"]),
    ("never set, though the hub agrees", lambda: d.clock(9, synchronised=None, hub_offset=0), ["fail", "unknown"]),
    ("an hour off", lambda: d.clock(NOW, synchronised=True, hub_offset=-3600), ["fail", "ok"]),
    ("a minute off", lambda: d.clock(NOW, synchronised=True, hub_offset=60), ["warn", "ok"]),
    ("no hub", lambda: d.clock(NOW, synchronised=True, hub_offset=None), ["unknown", "ok"]),
    ("resolves", lambda: d.names("h", ["10.0.0.1"], "", 0.1), ["ok"]),
    ("does not", lambda: d.names("h", None, "Name or service not known", 0.1), ["fail"]),
    ("slowly", lambda: d.names("h", ["10.0.0.1"], "", 5.1), ["warn"]),
    ("the hub", lambda: d.reach("h", 443, **REACH), ["ok"]),
    ("refused", lambda: d.reach("h", 443, **REACH | {"error": "Connection refused"}), ["fail"]),
    ("inspected", lambda: d.reach("h", 443, **REACH | {"trusted": False, "issuer": "Corp"}), ["fail"]),
    ("not joined", lambda: d.reach("h", 443, **REACH | {"trusted": None}), ["warn"]),
    ("no proxy", lambda: d.proxy("", "", joined=True), ["ok"]),
    ("a proxy that is not used", lambda: d.proxy("http://p:1", "", joined=True), ["warn"]),
    ("a proxy before joining", lambda: d.proxy("http://p:1", "", joined=False), ["ok"]),
    ("a proxy that is used", lambda: d.proxy("http://p:1", "http://p:1", joined=True), ["ok"]),
    ("a free port", lambda: d.listener("p", "127.0.0.1", 4, **PORT), ["ok"]),
    ("ours", lambda: d.listener("p", "127.0.0.1", 4, **PORT | {"free": False, "ours": True}), ["ok"]),
    ("taken", lambda: d.listener("p", "127.0.0.1", 4, **PORT | {"free": False}), ["fail"]),
    ("low", lambda: d.listener("p", "127.0.0.1", 4, **PORT | {"free": False, "privileged": True}), ["fail"]),
    ("open to all", lambda: d.listener("p", "0.0.0.0", 4, **PORT), ["ok", "warn"]),  # noqa: S104 - compared, not bound
    ("open to all, v6", lambda: d.listener("p", "::", 4, **PORT), ["ok", "warn"]),
    ("a disk", lambda: d.disk("/d", **DISK), ["ok", "ok"]),
    ("full", lambda: d.disk("/d", **DISK | {"free": 1 << 20}), ["fail", "ok"]),
    ("nearly full", lambda: d.disk("/d", **DISK | {"free": 2 << 30}), ["warn", "ok"]),
    ("no inodes", lambda: d.disk("/d", **DISK | {"inodes": 3}), ["ok", "warn", "ok"]),
    ("in memory", lambda: d.disk("/d", **DISK | {"filesystem": "tmpfs"}), ["ok", "warn", "ok"]),
    ("on the network", lambda: d.disk("/d", **DISK | {"filesystem": "nfs4"}), ["ok", "fail", "ok"]),
    ("slow", lambda: d.disk("/d", **DISK | {"sync": 0.2}), ["ok", "warn"]),
    ("not ours", lambda: d.disk("/d", **DISK | {"sync": None}), ["ok", "fail"]),
    ("a kernel", lambda: d.kernel({"Landlock": True, "TUN": None}, **KERNEL), ["ok", "unknown", "ok"]),
    ("an old kernel", lambda: d.kernel({"Landlock": False, "new": False}, **KERNEL), ["warn", "warn", "ok"]),
    ("no cgroups", lambda: d.kernel({}, cgroups=["cpu"], why_not="needs root"), ["warn"]),
    ("a machine", lambda: d.machine(**MACHINE), ["ok", "ok", "ok"]),
    ("small", lambda: d.machine(**MACHINE | {"memory": 1 << 20, "files": 256}), ["warn", "warn", "ok"]),
    ("asks nothing", lambda: d.machine(**MACHINE | {"memory": None, "files": None}), ["unknown", "ok"]),
    ("no nats", lambda: d.machine(**MACHINE | {"nats_error": "is not installed"}), ["ok", "ok", "fail"]),
    ("a certificate", lambda: d.certificate("c", NOW - 10, NOW + 90, NOW), ["ok"]),
    ("late", lambda: d.certificate("c", NOW - 90, NOW + 10, NOW), ["warn"]),
    ("ours", lambda: d.certificate("c", 0.0, NOW + 90, NOW, NOW - 10), ["ok"]),
    ("ours, late", lambda: d.certificate("c", 0.0, NOW + 10, NOW, NOW - 90), ["warn"]),
    ("over", lambda: d.certificate("c", NOW - 90, NOW - 1, NOW), ["fail"]),
    ("not yet", lambda: d.certificate("c", NOW + 5, NOW + 90, NOW), ["fail"]),
    ("the key is away", lambda: d.recovery_key(False), ["ok"]),
    ("the key is here", lambda: d.recovery_key(True), ["warn"]),
    ("private", lambda: d.private("/d", 0o40700), []),
    ("not private", lambda: d.private("/d", 0o40750), ["fail"]),
]


@pytest.mark.parametrize(("what", "make", "states"), CASES, ids=[c[0] for c in CASES])
def test_verdicts(what: str, make: Callable[[], Any], states: list[str]) -> None:
    found = many(make())
    assert [c.state for c in found] == states
    for check in found:
        assert check.message
        assert bool(check.remedy) == (check.state in ("warn", "fail")) or check.name == "proxy"


def test_a_remedy_names_what_it_is_about() -> None:
    (taken,) = d.listener("p", "127.0.0.1", 8443, **PORT | {"free": False})
    assert "8443" in taken.remedy
    assert "3600 s behind" in d.clock(NOW, synchronised=True, hub_offset=-3600)[0].message
    assert "needs root" in d.kernel({}, cgroups=[], why_not="needs root")[0].message


def test_a_folder_may_be_passed_through_and_not_looked_into() -> None:
    """The process runtime opens it so for apps of other users; `chmod 700` would lock them out."""
    assert d.private("/d", 0o40700) is None
    assert d.private("/d", 0o40701) is None
    for mode in (0o704, 0o702, 0o740, 0o755, 0o710):
        found = d.private("/d", mode)
        assert found is not None and found.state == "fail"
