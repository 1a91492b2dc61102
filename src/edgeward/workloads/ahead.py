"""What a Rollout will bring to this node's Apps: what those versions need is got before, and none of them is started.

Asked with each look at an App, as all is that is wanted of it. A runtime fetches beside what runs; when the run comes
to this node the version has its image already, also at a site whose link is cut by then. What was given up is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgeward.core.errors import EdgewardError
from edgeward.core.resource import Key, Resource
from edgeward.workloads.live import AppKey
from edgeward.workloads.runtime import Runtime
from edgeward.workloads.spec import runtime_of
from edgeward.workloads.wish import Source, digest, snapshot

Coming = Callable[[], Mapping[AppKey, Resource]]


class Ahead:
    """``coming``: the Apps that are declared for this node and do not run here yet; ``changed``: called when
    :attr:`fetched` did."""

    def __init__(
        self, source: Source, runtimes: Mapping[str, Runtime], coming: Coming, changed: Callable[[], None]
    ) -> None:
        self._source, self._runtimes, self._coming, self._changed = source, runtimes, coming, changed
        #: Of each such App that needs something: whether it is all here.
        self.fetched: dict[Key, bool] = {}

    def begin(self) -> None:
        """What was fetched by an agent before this one is needed still."""
        for key in self._coming():
            self.look(key)

    def look(self, key: AppKey) -> None:
        app = self._coming().get(key)
        name = runtime_of(app.spec) if app is not None else ""
        here: bool | None = None
        for other, runtime in self._runtimes.items():
            if app is None or other != name:
                runtime.drop(*key)
        if app is not None:
            try:
                here = self._runtimes[name].ahead(*key, digest(snapshot(app, self._source)), app.spec)
            except EdgewardError:  # a Config that it names is not here: then it has another name in the end
                self._runtimes[name].drop(*key)
                here = False
        where = Key("App", *key)
        before = self.fetched.pop(where, None)
        if here is not None:
            self.fetched[where] = here
        if here != before:
            self._changed()


__all__ = ["Ahead", "Coming"]
