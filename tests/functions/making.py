"""Small wheels, made by hand, and the lock files that name them."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from importlib import metadata
from pathlib import Path


def wheel(
    folder: Path, name: str, files: dict[str, str | bytes], *, version: str = "1.0", tag: str = "py3-none-any"
) -> str:
    """Writes a wheel of these files; its line of a lock file."""
    info = f"{name}-{version}.dist-info"
    inside: dict[str, bytes] = {k: v.encode() if isinstance(v, str) else v for k, v in files.items()}
    inside[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    inside[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode()
    record = []
    for path, data in inside.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(data)}\n")
    inside[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for path, data in inside.items():
            archive.writestr(zipfile.ZipInfo(path), data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-{version}-{tag}.whl").write_bytes(made.getvalue())
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(made.getvalue()).hexdigest()}\n"


def wheel_of_installed(folder: Path, name: str) -> str:
    """A wheel of a package as it is installed here: the real one takes a network. Its line of a lock file."""
    there = metadata.distribution(name)
    files: dict[str, str | bytes] = {}
    for path in there.files or []:
        text = path.as_posix()
        if ".dist-info/" not in text and not text.startswith("..") and not text.endswith(".pyc"):
            files[text] = path.read_binary()
    return wheel(folder, name, files, version=there.version)
