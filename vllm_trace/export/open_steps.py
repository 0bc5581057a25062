"""Steps that are not emitted yet: what the scheduler and the workers have told of each.

The files of an engine and of its workers are not read at the same instant, so a step whose results
are in waits for a few later ones before its spans are made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_trace.events import StepUpdated
from vllm_trace.export.step_spans import Step

LAG = 4
"""Steps whose results are in wait for so many later ones: a worker's facts may come after."""

AT_ONCE = 16
"""Steps that are emitted one after the other: looking after each step what can go costs more."""

MAX_OPEN = 256
"""Steps without results that are waited for."""


class OpenSteps:
    """They leave through ``emit``, the one that was heard of first before the others."""

    def __init__(self, lag: int, emit: Callable[[Step], None]) -> None:
        self.lag = lag
        self.late = 0
        """Facts of workers that came when their step had been emitted."""
        self._emit = emit
        self.open: dict[int, Step] = {}
        self._last_done = self._last_emitted = 0
        self.look_at = lag + AT_ONCE
        """Open steps at which it is looked what can go."""

    def at(self, number: int) -> Step:
        found = self.open.get(number)
        if found is None:
            found = self.open[number] = Step(number)
        return found

    def worked(self, process: Any, event: Any) -> None:
        """A worker's fact about a step."""
        if event.step <= self._last_emitted and event.step not in self.open:
            self.late += 1
            return
        step = self.at(event.step)
        if step.parts is None:
            step.parts = {}
        told = step.parts.get(process)
        if told is None:
            told = step.parts[process] = []
        told.append(event)

    def done(self, event: StepUpdated) -> Step:
        """The results of a step are in."""
        number = event.step
        if number > self._last_done:
            self._last_done = number
        step = self.open.get(number) or self.at(number)
        step.updated = event
        return step

    def look(self) -> None:
        """Emit those that have waited long enough."""
        while self.open:
            oldest = next(iter(self.open.values()))
            ready = oldest.updated is not None and self._last_done - oldest.number >= self.lag
            if not ready and len(self.open) <= MAX_OPEN:
                break
            self._leave(oldest)
        self.look_at = max(self.lag, len(self.open)) + AT_ONCE

    def _leave(self, step: Step) -> None:
        del self.open[step.number]
        self._last_emitted = max(self._last_emitted, step.number)
        self._emit(step)

    def settle(self) -> None:
        """Nothing more is coming for now: steps whose results are in need not wait."""
        for step in [step for step in self.open.values() if step.updated is not None]:
            self._leave(step)

    def cut_short(self) -> list[Step]:
        """Those that are open when the trace ends."""
        return [*self.open.values()]

    def end(self) -> None:
        """The trace is over."""
        for step in [*self.open.values()]:
            self._leave(step)
