"""The face that every runtime shows to ``edge.py``, whatever runs an App's instances.

A runtime is an extension (``runtime/process``, ``runtime/container``), chosen by what the App's spec has
(:func:`~edgeward.workloads.spec.runtime_of`) and made with the node's :class:`~edgeward.workloads.ground.Ground`.
``waits_for`` says what must come to the node first, ``start`` starts an instance, ``stop`` ends it, ``find`` finds one
again whose start was cut off and ``resume`` takes it over, ``clean`` leaves nothing of it behind but its log, ``run``
takes away what nothing needs. An instance is a process of the node that can be waited for, whatever stands around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import msgspec

from edgeward.core import proc
from edgeward.workloads.spec import AppSpec
from edgeward.workloads.state import InstanceRow, Snapshot


class Started(msgspec.Struct):
    process: proc.ProcId
    enforced: list[str]
    not_enforced: list[dict[str, str]]
    #: What it was made of, where that is a thing with a name of its own: the digest of its image.
    image: str = ""


class Inside(NamedTuple):
    """A program, its environment and folder, and the ``user``, ``group`` and ``extra_groups`` to run it as."""

    argv: list[str]
    env: dict[str, str]
    folder: Path
    user: dict[str, Any]
    #: ``argv`` only asks an engine for the program, which runs elsewhere and is known by its marks.
    apart: bool = False
    #: Puts what was started below the instance's limits. Raises ``OSError``.
    enter: Callable[[proc.ProcId], None] | None = None
    #: The instance itself, for what must not outlive it.
    instance: proc.ProcId | None = None


class Kept(Protocol):
    """What the node still needs, asked whenever something is to be taken away."""

    def instances(self) -> set[str]:
        """Ids of all instances that there are."""
        ...

    def versions(self) -> set[tuple[str, str, str]]:
        """(namespace, name, digest) of all versions that are kept, those on trial among them."""
        ...


class Runtime(Protocol):
    def waits_for(self, namespace: str, name: str, version: str, spec: AppSpec) -> str:
        """What an instance of this version cannot be started without and is being fetched, in words; "" when all is
        here. ``poke`` of the ground is called when the answer changes."""
        ...

    def ahead(self, namespace: str, name: str, version: str, spec: AppSpec) -> bool | None:
        """What a version that may come needs is got beside what runs; whether it is here, None where it needs nothing.
        ``poke`` of the ground is called when the answer changes."""
        ...

    def drop(self, namespace: str, name: str) -> None:
        """Nothing that :meth:`ahead` was asked for is to come any more."""
        ...

    async def start(self, row: InstanceRow, snapshot: Snapshot, extra: Mapping[str, str]) -> Started:
        """Raises ``EdgewardError`` with the reason when it cannot be started; then nothing of it runs."""
        ...

    async def stop(self, row: InstanceRow, spec: AppSpec) -> bool: ...
    def find(self, row: InstanceRow) -> proc.ProcId | None: ...
    def resume(self, row: InstanceRow, spec: AppSpec, process: proc.ProcId) -> None: ...
    async def exit_code(self, row: InstanceRow, spec: AppSpec) -> int | None: ...
    def environment(self, row: InstanceRow, snapshot: Snapshot, extra: Mapping[str, str]) -> dict[str, str]:
        """The words that ``${NAME}`` is replaced from."""
        ...

    def inside(
        self,
        row: InstanceRow,
        snapshot: Snapshot,
        extra: Mapping[str, str],
        argv: Sequence[str],
        *,
        stdin: bool = False,
        tty: bool = False,
        marks: Mapping[str, str] = MappingProxyType({}),
    ) -> Inside:
        """What to run for ``argv`` to run as the instance does: an exec check's command, or somebody's who looks, with
        their ``stdin`` and on their terminal (``tty``), with the variables ``marks``, by which all of it is found."""
        ...

    def pids(self, process: proc.ProcId) -> list[int]:
        """All living processes of the instance that ``process`` leads."""
        ...

    async def clean(self, row: InstanceRow) -> None: ...
    def forget(self, namespace: str, name: str) -> None:
        """The app is gone from this node."""
        ...

    def about(self) -> dict[str, Any]:
        """What the node says of itself on its account."""
        ...

    def hurry(self) -> None:
        """The link is up again: what is waited for may come now."""
        ...

    async def run(self, kept: Kept) -> None:
        """Until cancelled: what it does besides, and takes away what nothing needs."""
        ...
