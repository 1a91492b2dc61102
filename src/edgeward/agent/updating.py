"""The agent updates itself: fetches the release it is to be, makes it whole beside, and has the launcher start it.

In: the Release that is declared for this node, as its Rollout lets it on; the launcher's state. Out: ``order.json`` for
the launcher and an end of this agent, and the node's report: ``Running`` once the release has proven itself, ``Failed``
when the launcher went back. Nothing is done before all of the new release is on the disk and has looked at this node's
folder. Without a launcher nothing is done, and the report says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeward import __version__
from edgeward.agent.desired import Desired
from edgeward.agent.installing import check, install, this_platform, tidy
from edgeward.agent.launcher import RELEASE, read, write
from edgeward.agent.slots import Order, State, state_of
from edgeward.core.backoff import backoff
from edgeward.core.blobfetch import BlobFetch
from edgeward.core.blobs import hex_of
from edgeward.core.errors import EdgewardError, Invalid, Unreachable
from edgeward.core.quantity import parse_duration
from edgeward.core.resource import Key, Resource
from edgeward.nodes.release_spec import HOME, order_id

log = logging.getLogger("edgeward.agent")

#: Seconds between two looks while a release proves itself, and between two tries to get one, at first and at most.
_LOOK, _BACK_OFF, _LONGEST = 1.0, 2.0, 60.0
#: Seconds until one that does not load is looked at again: what it lacked may be there then.
_BAD = 600.0
Report = Callable[[Key, dict[str, Any] | None], None]


class Updating:
    """``report``: says what this node does with a Release; ``event``: (type, reason, message, namespace, name, kind);
    ``online``: whether the hub answers now; ``end``: ends this agent in good order."""

    def __init__(
        self,
        data: Path,
        desired: Desired,
        blobs: BlobFetch,
        *,
        report: Report,
        event: Callable[..., None],
        online: Callable[[], bool],
        end: Callable[[], None],
    ) -> None:
        self._data, self._releases = data, data / "releases"
        self._desired, self._blobs = desired, blobs
        self._report, self._event, self._online, self._end = report, event, online, end
        #: None: it was started without a launcher.
        self.running = os.environ.pop(RELEASE, None)
        self._wake = asyncio.Event()
        self._said: Key | None = None
        self._tries = 0
        self._failed = self._state().failed

    def poke(self) -> None:
        """What is declared may be new, or the hub may be reached again."""
        self._tries = 0
        self._wake.set()

    def about(self) -> dict[str, Any]:
        """What the Node's status says of it."""
        if self.running is None:
            return {}
        state = self._state()
        failed = {"releaseFailed": state.failedWhy} if state.failed else {}
        return {"release": self.running[:12] or "installed", **failed}

    def _state(self) -> State:
        return state_of(read(self._releases / "state.json"))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            wait = await self._look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    async def _look(self) -> float | None:
        """Seconds until the next look; None: when something is new."""
        declared = self._desired.release()
        key = declared.key if declared is not None else None
        if self._said is not None and self._said != key:
            self._report(self._said, None)
        self._said = key
        if declared is None:
            return None
        wanted = self._desired.governed(declared)
        try:
            return await self._follow(declared, wanted)
        except Unreachable as e:
            self._tell(wanted or declared, "Pending", f"its archive: {e}")
        except Invalid as e:
            self._tell(wanted or declared, "Refused", str(e))
            return _BAD
        except EdgewardError as e:
            self._tell(wanted or declared, "Refused", str(e))
        except OSError as e:
            self._tell(wanted or declared, "Refused", f"cannot be kept: {e.strerror or e}")
        self._tries += 1
        return backoff(self._tries + 1, _BACK_OFF, _LONGEST)

    async def _follow(self, declared: Resource, wanted: Resource | None) -> float | None:
        state = self._state()
        if wanted is None:
            return self._none(declared, state)
        digest = wanted.spec.archives.get(this_platform())
        if digest is None:
            self._tell(wanted, "Refused", f"has no archive for {this_platform()}")
            return None
        hex = hex_of(digest)
        if self.running is None:
            self._tell(wanted, "Refused", "the agent runs without its launcher: edgeward install-service agent")
            return None
        if hex == self.running:
            if state.trying is not None:
                self._tell(wanted, "Updating", "proves itself")
                return _LOOK
            self._tell(wanted, "Running")
            await asyncio.to_thread(tidy, self._releases, {state.current, state.previous})
            return None
        order = order_id(wanted.metadata.uid, hex, wanted.metadata.generation)
        if order in (state.failed, state.failed.partition(".")[0]):
            self._tell(wanted, "Failed", f"went back: {state.failedWhy}")
            if self._failed:
                self._failed = ""
                self._event(
                    "Warning", "ReleaseFailed", f"{wanted.spec.version}: {state.failedWhy}", *_about(wanted)
                )  # fmt: skip
            return None
        if state.obeyed == order:
            order += ".2"  # it had proven itself, and its folder was lost since
        elif state.obeyed == f"{order}.2":
            self._tell(wanted, "Refused", "it was lost from this disk again and again")
            return None
        self._tell(wanted, "Updating", "fetches it")
        await self._have(hex)
        self._switch(wanted, order, hex)
        return None

    def _none(self, declared: Resource, state: State) -> float | None:
        """Its Rollout has not come so far, or took it back and there was no Release before."""
        self._report(declared.key, None)
        digest = declared.spec.archives.get(this_platform(), "")
        if self.running and digest == f"sha256:{self.running}":
            back = state.previous if state.trying is None else state.current
            order = order_id(declared.metadata.uid, f"before {self.running}", declared.metadata.generation)
            if state.obeyed != order:
                self._switch(declared, order, back)
        return None

    async def _have(self, hex: str) -> None:
        """It is whole here, and reads this node's folder."""
        target = self._releases / hex
        if not target.is_dir():
            async with self._blobs.alone(hex):
                file = await self._blobs.get(HOME, hex)
                try:
                    await asyncio.to_thread(install, file, target)
                finally:
                    file.unlink(missing_ok=True)
        await asyncio.to_thread(check, target, self._data)

    def _switch(self, wanted: Resource, id: str, release: str) -> None:
        health = wanted.spec.health
        order = Order(
            id,
            release,
            window=parse_duration(health.window),
            startup=parse_duration(health.startup),
            # a node that was cut off anyway says nothing of the new release by being so
            link=parse_duration(health.link) if self._online() else 0.0,
        )
        write(self._releases / "order.json", asdict(order))
        log.info("ends for release %s", release[:12] or "as it was installed")
        self._event("Normal", "ReleaseStarted", f"tries {wanted.spec.version}", *_about(wanted))
        self._end()

    def _tell(self, release: Resource, phase: str, message: str = "") -> None:
        said: dict[str, Any] = {"phase": phase, "version": __version__}
        said["observedGeneration"] = release.metadata.generation
        if self.running:
            said["release"] = self.running[:12]
        if message:
            said["message"] = message
        self._report(release.key, said)


def _about(release: Resource) -> tuple[str, str, str]:
    return release.metadata.namespace, release.metadata.name, "Release"
