"""``spec.container`` of an App: a program in an image, what it may say and what is refused. Pure.

The program's own words (``command``, ``args``, ``env``) mean what they mean in ``process``; the rest says which image,
what of the node it sees, and which port inside answers which of the App's ``ports``. How images come to the node is in
``images.py``, how containers run in ``container.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Annotated, Literal

from msgspec import Meta

from edgeward.core.blobs import DIGEST
from edgeward.core.declared import Declared
from edgeward.core.errors import Invalid

#: ``[HOST[:PORT]/]PATH[:TAG][@sha256:DIGEST]``, as registries know images (the distribution project's grammar).
_IMAGE = re.compile(
    r"(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?/)?"
    r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?")
_NAME = r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$(?!\n)"
#: What separates the parts of a mount on an engine's command line, or cannot be in a path at all.
_APART = re.compile(r"[,:\x00-\x1f\x7f]")
#: Of a container these are the engine's to mount.
_OWN = ("/", "/proc", "/sys", "/dev")


class Volume(Declared):
    """A folder that outlives the container: a named one that the node keeps, or one of the node itself."""

    path: Annotated[str, Meta(description="Where it is in the container; absolute", min_length=1, max_length=512)]
    name: Annotated[
        str, Meta(description="A volume of the namespace on this node, made when it is missing and never taken away")
    ] = ""
    hostPath: Annotated[str, Meta(description="A file or folder of the node, which must be there")] = ""
    readOnly: Annotated[bool, Meta(description="The container cannot write to it")] = False


class Container(Declared):
    """The container runtime: a program in an image, run by podman or docker."""

    image: Annotated[
        str,
        Meta(
            description="Name with a tag or (better) a digest: registry/path:tag@sha256:...; may be left out beside "
            "archive",
            max_length=512,
        ),
    ] = ""
    archive: Annotated[
        str,
        Meta(
            description="An image archive (of podman save or docker save) that the hub holds as a blob: sha256:...; "
            "`edgeward apply` takes a file's path and uploads it; no registry is asked"
        ),
    ] = ""
    pull: Annotated[
        Literal["missing", "always", "never"],
        Meta(description="When a registry is asked: if the node lacks the image, for each new version, or never"),
    ] = "missing"
    command: Annotated[list[str], Meta(description="Instead of the image's entrypoint; ${NAME} is replaced")] = []
    args: Annotated[list[str], Meta(description="Instead of the image's arguments; ${NAME} is replaced")] = []
    env: Annotated[dict[str, str], Meta(description="Environment; ${NAME} is replaced")] = {}
    user: Annotated[str, Meta(description="User (or user:group) in the container; else the image's")] = ""
    workingDir: Annotated[str, Meta(description="Working folder in the container; else the image's")] = ""
    filesAt: Annotated[
        str, Meta(description="Folder in the container below which each of the App's files is mounted, read-only")
    ] = "/"
    volumes: Annotated[list[Volume], Meta(description="Folders that outlive the container", max_length=64)] = []
    network: Annotated[
        Literal["bridge", "host"],
        Meta(description="bridge: its own, and the App's ports lead into it; host: the node's"),
    ] = "bridge"
    ports: Annotated[
        dict[str, Annotated[int, Meta(ge=1, le=65535)]],
        Meta(
            description="For a port of the App (by its name): which port in the container it leads to; others lead to "
            "the same number (bridge only)"
        ),
    ] = {}


def image_problem(image: str) -> str:
    """Why this names no image; "" when it does."""
    if re.fullmatch(DIGEST, image) or _IMAGE.fullmatch(image):
        return ""
    return f"{image[:80]!r} is no image"


def _path(path: str, field: str, *, own: bool) -> None:
    parts = PurePosixPath(path)
    if not parts.is_absolute() or ".." in parts.parts or _APART.search(path):
        raise Invalid(
            f"{path[:80]!r} is no absolute path", field=field, remedy="begin it with /, without '..', ',' and ':'"
        )
    if not own and str(parts) in _OWN:
        raise Invalid(f"{path!r} is the container's own", field=field, remedy="name a folder below it")


def check_container(spec: Container, ports: Collection[str]) -> None:
    """Raises ``Invalid`` for what no engine could run. ``ports``: names of the App's ports."""
    at = "$.spec.container"
    if not spec.image and not spec.archive:
        raise Invalid("no image is given", field=f"{at}.image", remedy="e.g. image: registry.example.org/web:1.2")
    if spec.image and (why := image_problem(spec.image)):
        raise Invalid(why, field=f"{at}.image", remedy="write registry/path:tag or registry/path@sha256:...")
    if spec.archive and not re.fullmatch(DIGEST, spec.archive):
        raise Invalid(
            f"{spec.archive[:80]!r} is no digest",
            field=f"{at}.archive",
            remedy="write sha256: and 64 of the digits 0-9 and a-f, or let `edgeward apply` upload a file",
        )
    if spec.archive and spec.pull == "always":
        raise Invalid("an archive is not pulled", field=f"{at}.pull", remedy="leave out pull or archive")
    if spec.user and not _USER.fullmatch(spec.user):
        raise Invalid(f"{spec.user[:60]!r} is no user", field=f"{at}.user", remedy="a name or number, or user:group")
    if spec.workingDir:
        _path(spec.workingDir, f"{at}.workingDir", own=True)
    _path(spec.filesAt, f"{at}.filesAt", own=True)
    for n, volume in enumerate(spec.volumes):
        field = f"{at}.volumes[{n}]"
        if bool(volume.name) == bool(volume.hostPath):
            raise Invalid("give a name or a hostPath", field=field, remedy="exactly one of the two")
        if volume.name and not re.fullmatch(_NAME, volume.name):
            raise Invalid(
                f"{volume.name[:60]!r} is no volume's name", field=f"{field}.name", remedy="a-z, 0-9 and - between"
            )
        if volume.hostPath:
            _path(volume.hostPath, f"{field}.hostPath", own=True)
        _path(volume.path, f"{field}.path", own=False)
        if [v.path for v in spec.volumes[:n] if PurePosixPath(v.path) == PurePosixPath(volume.path)]:
            raise Invalid(f"{volume.path!r} is given twice", field=f"{field}.path", remedy="keep one")
    for name in spec.ports:
        if spec.network == "host":
            raise Invalid(
                "on the node's network the program listens on the App's ports themselves",
                field=f"{at}.ports",
                remedy="leave ports out, and tell it by env",
            )
        if name not in ports:
            raise Invalid(
                f"there is no port {name!r}", field=f"{at}.ports", remedy=f"ports: {', '.join(ports) or 'none'}"
            )
