"""A lock file names packages by hash and says nothing else; wheels are held against it and against the node."""

from __future__ import annotations

import pytest

from edgeward.core.blobs import Target
from edgeward.core.errors import Invalid
from edgeward.functions.wheels import MAX_LOCK, lacking, parse_lock, platforms, tags_of, wanted, where

H = "a" * 64
TARGET = Target("3.11", platforms("x86_64", 28), {"python_version": "3.11", "sys_platform": "linux"})


def test_what_pip_compile_writes_is_read() -> None:
    text = (
        "# made by a tool\n"
        f"Tiny_Greet==1.0 \\\n    --hash=sha256:{H} \\\n    --hash=sha256:{'b' * 64}\n    # via -r in.txt\n"
        f"other[extra]==2.0rc1 ; sys_platform == 'win32' --hash=sha256:{H}\n"
    )
    pins = parse_lock(text)
    assert [(p.name, p.version, len(p.hashes)) for p in pins] == [("tiny-greet", "1.0", 2), ("other", "2.0rc1", 1)]
    assert [p.name for p in wanted(pins, TARGET.environment)] == ["tiny-greet"]
    assert pins[0].line() == f"tiny-greet==1.0 --hash=sha256:{H} --hash=sha256:{'b' * 64}"


@pytest.mark.parametrize(
    "line",
    [
        f"--index-url=https://elsewhere.example\na==1 --hash=sha256:{H}",
        f"-r other.txt\na==1 --hash=sha256:{H}",
        f"-e .\na==1 --hash=sha256:{H}",
        f"a @ file:///etc/passwd --hash=sha256:{H}",
        f"./a.whl --hash=sha256:{H}",
        f"a>=1 --hash=sha256:{H}",
        f"a==1 --hash=sha256:{H} --global-option=x",
        f"a==1 --find-links=/tmp --hash=sha256:{H}",
        "a==1",
        "a==1 --hash=md5:0",
        f"a==1 --hash=sha256:{H}\nA==1 --hash=sha256:{H}",
        f"a==1 --hash=sha256:{H}\na==2 ; python_version > '3' --hash=sha256:{H}",
        "",
        "# nothing",
        "x" * (MAX_LOCK + 1),
    ],
)
def test_nothing_else_is_taken(line: str) -> None:
    with pytest.raises(Invalid):
        parse_lock(line)


def test_a_marker_that_is_none_is_refused_with_its_package() -> None:
    with pytest.raises(Invalid, match="marker of a "):
        wanted(parse_lock(f"a==1 ; nonsense --hash=sha256:{H}"), TARGET.environment)
    with pytest.raises(Invalid, match="marker of a "):
        wanted(parse_lock(f"a==1 ; {'(' * 490} --hash=sha256:{H}"), TARGET.environment)


def test_wheels_must_be_all_and_fit() -> None:
    pins, tags, place = parse_lock(f"a==1 --hash=sha256:{H}\nb==2 --hash=sha256:{H}"), tags_of(TARGET), where(TARGET)
    fits = ["a-1-py3-none-any.whl", "b-2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"]
    assert lacking(pins, fits, tags, place) == ""
    assert lacking(pins, fits[:1], tags, place) == "b 2 has no wheel in the bundle"
    for other in ("cp311-cp311-manylinux_2_17_aarch64", "cp312-cp312-manylinux_2_17_x86_64", "cp311-cp311-win_amd64",
                  "cp311-cp311-manylinux_2_34_x86_64"):  # fmt: skip
        why = lacking(pins, [fits[0], f"b-2-{other}.whl"], tags, place)
        assert why.startswith("b 2 has no wheel for Python 3.11 on manylinux_2_28_x86_64"), other
    assert lacking(pins, [fits[0], "b-2-cp38-abi3-manylinux_2_12_x86_64.whl"], tags, place) == ""
    with pytest.raises(Invalid, match="no wheel"):
        lacking(pins, ["a-1.tar.gz"], tags, place)
