"""What is said to podman: nothing secret on a command line, nothing that the host cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeward.core.cgroup import Limits
from edgeward.core.errors import Invalid
from edgeward.workloads.engine import Mount, Run
from edgeward.workloads.podman_argv import Facts, environment, loaded, options, run_argv

HOST = Facts(True, True, 2, False, "bridge", {}, ("cpu", "memory", "pids"))
RUN = Run(
    "n", "f00d", "node", "i", Path("/x"), {"A": "1"}, None, ["--rm", "a b"], "", "", [], False, [], Limits()
)  # fmt: skip


def test_what_a_host_needs_said() -> None:
    usual = ["--log-level=error", "--events-backend=none"]
    assert options(HOST) == usual
    assert options(HOST._replace(systemd=False)) == [*usual, "--cgroup-manager=cgroupfs"]
    assert options(HOST._replace(cgroups=12, runc=True)) == [*usual, "--runtime=runc"]
    assert options(HOST._replace(cgroups=12)) == usual, "what is not there cannot be taken"


def test_what_the_app_says_is_behind_the_options() -> None:
    argv, beside, text = run_argv(RUN, HOST)
    assert argv[-4:] == ["--", "f00d", "--rm", "a b"]
    assert (beside, text) == ({}, "A=1\n")
    assert "A=1" not in " ".join(argv)
    assert argv[argv.index("--network") + 1] == "bridge"
    assert "--entrypoint" not in argv
    assert "--memory" not in argv


def test_all_of_it() -> None:
    run = RUN._replace(
        command=["/bin/a", "b c"],
        user="7",
        workdir="/w",
        mounts=[Mount("/h", "/t", True), Mount("v", "/d", False, volume=True)],
        publish=[("127.0.0.1", 20001, 80), ("fd00::1", 20001, 80)],
        limits=Limits(1 << 20, 0.25, 9),
    )
    argv, _, _ = run_argv(run, HOST._replace(rlimits={"nofile": (10, 20)}, oom=-500))
    said = " ".join(argv)
    for words in (
        '--entrypoint ["/bin/a", "b c"]',
        "--user 7 --workdir /w",
        "--mount type=bind,source=/h,target=/t,readonly --mount type=volume,source=v,target=/d ",
        "--publish 127.0.0.1:20001:80 --publish [fd00::1]:20001:80",
        "--memory 1048576 --memory-swap 1048576 --cpus 0.25 --pids-limit 9",
        "--ulimit nofile=10:20 --oom-score-adj 0",
    ):
        assert words in said, words
    host, _, _ = run_argv(run._replace(host_network=True), HOST)
    assert "--network host" in " ".join(host)
    assert "--publish" not in host
    few, _, _ = run_argv(run, HOST._replace(controllers=("pids",)))
    assert "--memory" not in few, "what the host cannot do is left out and found missing when it is read"
    assert "--pids-limit" in few


def test_values_that_a_file_cannot_say() -> None:
    long = "x" * 70_000
    beside, text = environment({"PLAIN": "a b # $x", "KEY": "-----\nabc\n", "LONG": long, "EMPTY": ""})
    assert beside == {"KEY": "-----\nabc\n", "LONG": long}
    assert text == "EMPTY=\nPLAIN=a b # $x\n"
    for name in ("LD_PRELOAD", "PATH", "CONTAINERS_CONF", "HOME", "_CONTAINERS_USERNS_CONFIGURED", "GODEBUG"):
        assert environment({name: "/x"})[0] == {}, "podman itself must not see it"
        with pytest.raises(Invalid, match=f"the variable {name} has several lines"):
            environment({name: "a\nb"})
    with pytest.raises(Invalid, match="holds a zero byte"):
        environment({"A": "\0"})


def test_what_load_says() -> None:
    assert loaded("Loaded image: localhost/a:1\nLoaded image: sha256:00\n") == ["localhost/a:1", "sha256:00"]
    assert loaded("Loaded image(s): a:1,b:2\n") == ["a:1", "b:2"]
    assert loaded("Getting image source signatures\n") == []
