"""What a container engine does for us, whichever it is, and what is said to it of one container.

``podman.py`` speaks to podman by its command line (it has no daemon to ask), ``docker.py`` to docker's socket. Images
are named by whoever declares them and used by their ids; containers have names of our own and labels by which ours are
told from others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

from edgeward.core.cgroup import Limits

#: Labels of our containers: which node's they are, and which instance they are.
NODE_LABEL, INSTANCE_LABEL = "edgeward.node", "edgeward.instance"


class Image(NamedTuple):
    """``id``: of what it holds (64 hex digits). ``digests``: those of its manifests, ``sha256:...``, as registries know
    them; none for an image that was built here."""

    id: str
    digests: tuple[str, ...]
    names: tuple[str, ...]


class Mount(NamedTuple):
    """``source``: a path of the node, or the name of a volume that the engine keeps."""

    source: str
    target: str
    read_only: bool
    volume: bool = False


class Run(NamedTuple):
    """One container that is to be. ``command`` None: the image's entrypoint; ``publish``: (address, port of the node,
    port in the container)."""

    name: str
    image: str
    node: str
    instance: str
    folder: Path
    env: dict[str, str]
    command: list[str] | None
    args: list[str]
    user: str
    workdir: str
    mounts: list[Mount]
    host_network: bool
    publish: list[tuple[str, int, int]]
    limits: Limits


class Engine(Protocol):
    name: str
    #: A container's output stays with the engine and has to be followed; else it goes into the pipe by itself.
    keeps_output: bool

    def absent(self) -> str:
        """Why there is no such engine here; "" when there is."""
        ...

    async def image(self, ref: str) -> Image | None:
        """The image that has this name or id here; None when there is none."""
        ...

    async def pull(self, ref: str) -> None:
        """Gets it from its registry. Raises ``EdgewardError`` with the engine's words."""
        ...

    async def load(self, file: Path) -> list[str]:
        """Takes the images of an archive in; their names (or ids, where they have none)."""
        ...

    async def remove_image(self, id: str) -> None:
        """Takes an image away unless a container uses it."""
        ...

    async def run(self, run: Run, out: int) -> None:
        """Makes and starts a container, with its output into the descriptor ``out``. From then on its folder has
        ``pid`` (of its first process, which may have ended meanwhile) and ``cid`` (the engine's own name for it).
        Raises ``EdgewardError`` with the reason; then it does not run."""
        ...

    async def wait(self, name: str) -> int | None:
        """The exit status of a container that ended, 128 and more for a signal; None when nobody knows."""
        ...

    async def remove(self, name: str) -> None:
        """Ends and takes away a container, if there is one."""
        ...

    async def containers(self, node: str) -> dict[str, str]:
        """Names of all containers with this node's label, to the instance that each is."""
        ...

    def exec(
        self,
        name: str,
        argv: list[str],
        *,
        stdin: bool = False,
        tty: bool = False,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[list[str], dict[str, str]]:
        """Command and environment that run ``argv`` in the container and end with its status. ``env``: what it has
        besides, which everybody on the node may see."""
        ...

    def follow(self, name: str, folder: Path, out: int) -> None:
        """Goes on moving an adopted container's output into the pipe ``out``, which it closes at the end."""
        ...

    async def background(self) -> None:
        """Whatever it has to do all the time, until cancelled."""
        ...
