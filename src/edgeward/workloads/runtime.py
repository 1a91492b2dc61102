"""The face that every runtime shows to ``edge.py``, whatever runs an App's instances.

A runtime is an extension (``runtime/process``, ``runtime/container``), chosen by what the App's spec has
(:func:`~edgeward.workloads.spec.runtime_of`) and made with the node's :class:`~edgeward.workloads.ground.Ground`.
``waits_for`` says what must come to the node first, ``start`` starts an instance, ``stop`` ends it, ``find`` finds one
again whose start was cut off and ``resume`` takes it over, ``clean`` leaves nothing of it behind but its log, ``tidy``
takes away what nothing needs. An instance is a process of the node that can be waited for, whatever stands around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

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

    async def start(self, row: InstanceRow, snapshot: Snapshot, extra: Mapping[str, str]) -> Started:
        """Raises ``EdgewardError`` with the reason when it cannot be started; then nothing of it runs."""
        ...

    async def stop(self, row: InstanceRow, spec: AppSpec) -> bool: ...
    def find(self, row: InstanceRow) -> proc.ProcId | None: ...
    def resume(self, row: InstanceRow, spec: AppSpec, process: proc.ProcId) -> None: ...
    async def exit_code(self, row: InstanceRow, spec: AppSpec) -> int | None: ...
    def check(
        self, row: InstanceRow, snapshot: Snapshot, extra: Mapping[str, str]
    ) -> tuple[list[str], dict[str, str], dict[str, Any]]: ...
    def pids(self, process: proc.ProcId) -> list[int]:
        """All living processes of the instance that ``process`` leads."""
        ...

    async def clean(self, row: InstanceRow) -> None: ...
    def forget(self, namespace: str, name: str) -> None:
        """The app is gone from this node."""
        ...

    def hurry(self) -> None:
        """The link is up again: what is waited for may come now."""
        ...

    async def run(self, kept: Kept) -> None:
        """Until cancelled: what it does besides, and takes away what nothing needs."""
        ...
