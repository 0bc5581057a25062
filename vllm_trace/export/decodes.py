"""Decodes that are going on, and the log of the steps that they share.

A step in which the same requests decode as in the one before costs no look at any of them: its
event goes into the log, of which each request's decode is a range.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from vllm_trace.events import StepScheduled
from vllm_trace.export.forms import STEP
from vllm_trace.export.request_spans import Life
from vllm_trace.export.span import SpanEvent
from vllm_trace.export.step_log import StepLog

MAX_STEPS = 1024
"""A decode span ends after so many steps and another begins: no span grows with the output."""


class Decodes:
    """Of one engine."""

    def __init__(self, max_steps: int, offset: int) -> None:
        self.max_steps, self.offset = max_steps, offset
        self.log = StepLog()
        self.batch: dict[int, Life] = {}
        """Requests that decode in the steps that are going on."""
        self.num_tokens = 0
        """That one of these steps computes for them."""
        self.in_flight: dict[int, int] = {}
        """Step without results → its place in the log."""
        self.batch_of: tuple[Any, Any] | None = None
        """The composition that ``batch`` is of, when all of it decodes: a step of the same one is but noted."""
        self.begun: deque[tuple[int, int, bytes]] = deque()
        """(place in the log, request, id) in the order in which they began; some have ended."""

    def compose(
        self, event: StepScheduled, at_ns: int, joining: list[Life], num_staying: int, tokens: int
    ) -> None:
        """A step of others: ``num_staying`` of the batch, those who join it, and who computes its prompt.

        ``tokens``: of all but the prompts.
        """
        batch, end = self.batch, self.log.end
        if len(batch) > num_staying:
            for request in batch.keys() - (event.requests or ()):
                batch.pop(request).leave_range(end)
        for life in joining:
            if not life.decode_id:
                self._begin(life, event, end)
            life.open = end
            batch[life.number] = life
        if batch:
            self.note(event.step, at_ns)
        whole = len(batch) == len(event.requests or ()) > 0
        self.batch_of = (event.requests, event.num_tokens) if whole else None
        self.num_tokens = tokens

    def note(self, step: int, at_ns: int) -> None:
        """Put a step into the log."""
        made = SpanEvent(STEP, at_ns + self.offset, (step,))
        self.in_flight[step] = self.log.append(made)

    def leave(self, request: int) -> None:
        """It is not in the next step, which is looked at anew."""
        self.batch.pop(request, None)
        self.batch_of = None

    def _begin(self, life: Life, event: StepScheduled, place: int) -> None:
        life.begin_decode(event)
        self.begun.append((place, life.number, life.decode_id))

    def split(self, event: StepScheduled, lives: Mapping[int, Life]) -> None:
        """Decodes that are long enough end before this step, the last of the log, and begin anew with it."""
        log, begun = self.log, self.begun
        end = log.end - 1 if event.step in self.in_flight else log.end
        while begun:
            began, number, decode_id = begun[0]
            life = lives.get(number)
            if life is not None and life.decode_id == decode_id:
                if end - began < self.max_steps - 1:
                    break
                begun.popleft()
                going_on = life.open >= 0 and number in self.batch
                life.leave_range(end)
                life.end_decode()
                self._begin(life, event, end)
                if going_on:
                    life.open = end
            else:
                begun.popleft()
        log.forget(begun[0][0] if begun else end)

    def updated(self, step: int, at_ns: int, one_each: bool) -> int | None:
        """Results of a step are in. Returns its place in the log, if it has one."""
        place = self.in_flight.pop(step, None)
        if place is not None and place >= self.log.begin:
            logged = self.log.at(place)
            logged.at_ns, logged.wire = at_ns + self.offset, None
            if one_each:
                logged.values = (step, 1)
        return place
