"""The recorded calls of the KV-cache manager, in their order, drive ``mini``'s manager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vllm_trace.events import (
    BlocksCached,
    EngineConfigured,
    PrefixCacheReset,
    PrefixLookedUp,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.mini.request import RequestStatus
from vllm_trace.replay.base import FINISHED_BY_OUTPUT, Replay
from vllm_trace.replay.facts import fact_of
from vllm_trace.replay.worker import Diverged
from vllm_trace.trace import Record, Trace


class ManagerReplay(Replay):
    """Recorded calls drive the manager."""

    def __init__(self, config: EngineConfigured, trace: Trace) -> None:
        super().__init__(config, trace)
        self.whole = bool(self.settings.get("full_sequence_must_fit"))
        self.asynchronous = bool(self.settings.get("async_scheduling"))
        self.hits: dict[int, tuple[Any, int]] = {}
        self.steps: dict[int, StepScheduled] = {}

    def replay_segment(self, segment: list[Record]) -> None:
        end = segment[-1].event
        kept: _Silent = _Silent([])
        answers: _Silent = _Silent([])
        if type(end) is StepScheduled:
            told = {r.event.request for r in segment if type(r.event) is SlotsAllocated}
            counts = dict(zip(end.requests or (), end.num_tokens or (), strict=True))
            order = end.kept or [request for request in counts if request not in told]
            self.require(segment[-1].number, "calls without a block", end.num_kept, len(order))
            kept = _Silent([(r, partial(self._keep, r, counts.get(r))) for r in order])
        elif type(end) is StepUpdated:
            answers = _Silent(self._answers(end))
        by_output = {
            r.event.request
            for r in segment
            if type(r.event) is RequestFinished and r.event.reason in FINISHED_BY_OUTPUT
        }
        for record in segment:
            event = record.event
            self.learn_hashes(event)
            if type(event) is BlocksCached or (
                type(event) is RequestFreed and event.request in by_output
            ):
                answers.run_through(event.request)
            self._replay_event(record, kept)
        kept.run_rest()
        answers.run_rest()
        self.settle(segment[-1].number)

    def _replay_event(self, record: Record, kept: _Silent) -> None:
        event, number = record.event, record.number
        fact = fact_of(event)
        if fact is not None:
            self.expected.append((number, fact))
        kind = type(event)
        if kind is BlocksCached:
            kept.run_through(event.request)
        elif kind is SlotsAllocated or kind is SlotsRefused:
            kept.run(event.num_kept)
            self._allocate(event, number)
        elif kind is PrefixLookedUp:
            kept.run_rest()
            request = self.requests[event.request]
            hits, num_hit, request.shared_prefix_boundary = self.manager.get_computed_blocks(
                request
            )
            self.hits[event.request] = (hits, num_hit)
            self.settle(number)
        elif kind is RequestFreed:
            self.manager.free(self.requests[event.request])
            self.worker.forget(event.request)
            self.settle(number)
        elif kind is RequestArrived:
            self.arrive(event)
        elif kind is RequestFinished:
            self.requests.pop(event.request, None)
        elif kind is RequestPreempted:
            self._preempt(event, number)
        elif kind is PrefixCacheReset:
            self.told.append(("prefix.reset", self.manager.reset_prefix_cache()))
        elif kind is StepScheduled:
            kept.run_rest()
            self._advance(event, number)

    def _keep(self, key: int, num_tokens: int | None) -> None:
        """A call of ``allocate_slots`` that needed no block and left no event."""
        request = self.requests[key]
        if num_tokens is None:
            # Scheduled first and preempted then: the step does not say how much it was to do.
            ahead = request.num_tokens + request.num_output_placeholders
            num_tokens = ahead - request.num_computed_tokens
        self.manager.allocate_slots(request, num_tokens)

    def _allocate(self, event: Any, number: int) -> None:
        request = self.requests[event.request]
        hits, num_hit = self.hits.pop(event.request, (None, 0))
        admitted = request.status is not RequestStatus.RUNNING
        if admitted and event.num_hit_tokens != num_hit:
            raise Diverged(
                number, ("hit of slots.allocated", event.num_hit_tokens), ("hit", num_hit)
            )
        if admitted:
            self.worker.admit(event.request, hits)
        made = self.manager.allocate_slots(
            request,
            event.num_new_tokens,
            num_hit,
            hits,
            full_sequence_must_fit=admitted and self.whole,
            has_scheduled_reqs=True,
        )
        if made is not None and admitted:
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = num_hit
        self.settle(number)

    def _preempt(self, event: RequestPreempted, number: int) -> None:
        request = self.requests[event.request]
        lost = ("request.preempted", event.request, request.num_computed_tokens)
        self.told.append(lost)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        if self.rules.stale_output_waits:
            request.num_stale_output_tokens = request.num_in_flight_tokens
            request.num_output_placeholders = 0
        request.num_preemptions += 1
        self.settle(number)

    def _advance(self, event: StepScheduled, number: int) -> None:
        self.require(
            number,
            "free blocks",
            event.num_free_blocks,
            self.manager.block_pool.get_num_free_blocks(),
        )
        for key, count in zip(event.requests or (), event.num_tokens or (), strict=True):
            request = self.requests[key]
            request.num_computed_tokens += count
            request.num_in_flight_tokens += count
            ahead = request.num_tokens + request.num_output_placeholders
            if self.asynchronous and request.num_computed_tokens >= ahead:
                request.num_output_placeholders += 1
        self.steps[event.step] = event
        self.worker.plan(event, self.block_size)

    def _answers(self, event: StepUpdated) -> list[tuple[int, Callable[[], object]]]:
        """What ``update_from_output`` does to each request of the step, in order."""
        step = self.steps.pop(event.step, None)
        if step is None:
            return []
        requests, counts = step.requests or [], step.num_tokens or []
        outputs = event.num_output_tokens or [0] * len(requests)
        return [
            (request, partial(self._answer, request, scheduled, sampled))
            for request, scheduled, sampled in zip(requests, counts, outputs, strict=True)
        ]

    def _answer(self, key: int, scheduled: int, sampled: int) -> None:
        request = self.requests.get(key)
        if request is None:
            return
        request.num_in_flight_tokens -= scheduled
        stale = request.num_stale_output_tokens > 0
        if stale:
            request.num_stale_output_tokens -= scheduled
        request.num_tokens += sampled
        if sampled and self.asynchronous and not stale:
            request.num_output_placeholders -= sampled
            if request.status is RequestStatus.RUNNING:
                known = request.num_computed_tokens - (
                    request.num_in_flight_tokens
                    if self.rules.output_caches_processed
                    else request.num_output_placeholders
                )
                self.manager.cache_blocks(request, known)


class _Silent:
    """Actions, one a request, that left no event of their own but whose order is known.

    Each is done when an event comes up that only it, or a later one, can have caused.
    """

    def __init__(self, actions: Sequence[tuple[int, Callable[[], object]]]) -> None:
        self.actions = actions
        self.places = {request: place for place, (request, _) in enumerate(actions)}
        self.done = 0

    def run_through(self, request: int) -> None:
        """Those up to and with this request's, if it has one."""
        self.run(self.places.get(request, -1) + 1)

    def run_rest(self) -> None:
        self.run(len(self.actions))

    def run(self, count: int) -> None:
        """Do the first ``count`` of them."""
        while self.done < min(count, len(self.actions)):
            action = self.actions[self.done][1]
            self.done += 1
            action()
