"""Small wheels, made by hand, and the lock files that name them."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
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
