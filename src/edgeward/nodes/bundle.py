"""One file for a box without internet: its token, the way to its hub, and the wheels to install from.

A tar archive. ``join.json`` is what :func:`read` gives back; ``install.sh`` makes a virtual environment out of
``wheels/`` and joins. Reading takes what it knows out of the archive into memory, bounded, and writes nothing to the
disk, so no name in an archive can lead anywhere. Who holds the file can join as that box: it is for its owner only.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Annotated

import msgspec
from msgspec import Meta

from edgeward.core.errors import Invalid
from edgeward.core.files import replacing
from edgeward.nodes.enrol import MAX_TOKEN, decode_token

MAX_MEMBERS = 1000
MAX_WHEELS = 2 << 30
_MAX_CONFIG = 256 * 1024
_CONFIG, _SCRIPT, _WHEELS = "join.json", "install.sh", "wheels/"

INSTALL = """\
#!/bin/sh
# Installs Edgeward from the wheels beside this file, without a network, and joins the hub: sh install.sh DIR
# What follows DIR goes to `edgeward join`: with --enrol-only it ends when the box has joined, and runs no agent.
set -eu
dir=${1:?usage: sh install.sh DIR [OPTION...]}
shift
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$python is not Python 3.11 or newer; name one that is: PYTHON=... sh install.sh $dir" >&2
    exit 1
fi
(umask 077 && mkdir -p "$dir")
"$python" -m venv "$dir/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$dir/venv/bin/python" -m pip install --quiet --no-index --find-links "$here/wheels" edgeward
exec "$dir/venv/bin/edgeward" join --bundle "$here/join.json" --data "$dir" "$@"
"""


class Bundle(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """``join.json``: the options of ``join``."""

    token: Annotated[str, Meta(max_length=MAX_TOKEN)]
    node: str = ""
    site: str = ""
    hub: Annotated[str, Meta(max_length=1024)] = ""
    proxy: Annotated[str, Meta(max_length=1024)] = ""
    proxyCa: Annotated[str, Meta(max_length=65536)] = ""
    bind: Annotated[str, Meta(max_length=64)] = "127.0.0.1"


def write(path: Path, bundle: Bundle, wheels: Iterable[Path] = ()) -> int:
    """Makes the archive (0600); how many wheels are in it."""
    wheels = sorted(wheels)
    size = sum(w.stat().st_size for w in wheels)
    if len(wheels) > MAX_MEMBERS - 2 or size > MAX_WHEELS:
        raise Invalid(f"{len(wheels)} wheels of {size} bytes", file=str(path), remedy=f"at most {MAX_WHEELS} bytes")
    with replacing(path) as out:
        _pack(out, bundle, wheels)
    return len(wheels)


def _pack(out: IO[bytes], bundle: Bundle, wheels: list[Path]) -> None:
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data, mode in (
            (_CONFIG, msgspec.json.encode(bundle), 0o600),
            (_SCRIPT, INSTALL.encode(), 0o700),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
        for wheel in wheels:
            info = tarfile.TarInfo(_WHEELS + wheel.name)
            info.size, info.mode = wheel.stat().st_size, 0o644
            with wheel.open("rb") as content:
                tar.addfile(info, content)


def read(path: Path) -> Bundle:
    """What ``join`` is to do: of an archive, or of the ``join.json`` taken out of one. Raises ``Invalid``."""
    try:
        with path.open("rb") as file:
            start = file.read(1)
            file.seek(0)
            data = file.read(_MAX_CONFIG + 1) if start == b"{" else _member(file)
        if len(data) > _MAX_CONFIG:
            raise Invalid("its join.json is too large", file=str(path))
        bundle = msgspec.json.decode(data, type=Bundle)
    except (tarfile.TarError, EOFError, msgspec.DecodeError) as e:
        raise Invalid(f"is no bundle: {e}", file=str(path), remedy="make it by: token create --bundle FILE") from None
    except OSError as e:
        raise Invalid(f"cannot be read: {e.strerror or e}", file=str(path)) from None
    decode_token(bundle.token)
    return bundle


def _member(file: io.BufferedReader) -> bytes:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for count, info in enumerate(tar):
            if count >= MAX_MEMBERS:
                break
            if info.name == _CONFIG and info.isfile():
                if info.size > _MAX_CONFIG:
                    raise tarfile.TarError("join.json is too large")
                found = tar.extractfile(info)
                if found is not None:
                    return found.read(_MAX_CONFIG + 1)
    raise tarfile.TarError("there is no join.json in it")
