"""Which engine a segment belongs to: data parallelism has a scheduler, a pool and ``mini`` for each rank."""

from __future__ import annotations

from typing import Any

from vllm_trace.events import EngineStopped
from vllm_trace.replay.base import Replay
from vllm_trace.replay.segments import OF_WORKERS, Segment


class Engines:
    """The replays of all engines of a trace, one at a time for each process that schedules."""

    def __init__(self) -> None:
        self.drivers: dict[int, Replay] = {}
        """By process; a worker's process stands for the engine that it works for."""
        self.begun: list[Replay] = []
        """All that there were, in their order."""
        self._schedulers: set[int] = set()
        self._running: set[int] = set()
        """Processes whose engine has not been shut down."""
        self._doubled: set[int] = set()
        """Those of them in which another engine was made all the same."""

    def __bool__(self) -> bool:
        return bool(self._schedulers)

    @property
    def all(self) -> list[Replay]:
        return [self.drivers[process] for process in self._schedulers]

    def begin(self, process: int, driver: Replay) -> None:
        """An engine was made; an earlier one of the same process is taken to be over."""
        if process in self._running:
            self._doubled.add(process)
        self._running.add(process)
        self._schedulers.add(process)
        self.begun.append(driver)
        self.drivers[process] = driver

    def of(self, segment: Segment) -> Replay | None:
        """The replay that the segment goes to; None before its process has an engine."""
        if type(segment.events[-1]) is EngineStopped:
            self._running.discard(segment.process)
        found = self.drivers.get(segment.process)
        if found is None and type(segment.events[0]) in OF_WORKERS:
            found = self._worked_for(segment.events[0])
            if found is not None and len(self._schedulers) > 1:
                self.drivers[segment.process] = found
        return found

    def _worked_for(self, event: Any) -> Replay | None:
        """The only engine, or the one whose request the worker's event is about."""
        if len(self._schedulers) == 1:
            return self.all[0]
        about = getattr(event, "requests", None) or [getattr(event, "request", None)]
        return next((each for each in self.all if about[0] in each.requests), None)

    def confused(self, segment: Segment) -> list[str]:
        """A difference that may come from two engines of one process, whose events nothing tells apart."""
        if segment.process not in self._doubled:
            return []
        return [
            "a second engine was made in the process while the first had not been shut down: if both"
            " were used, their events cannot be told apart, and the difference may be no more than that"
        ]
