"""The recorded calls of the KV-cache manager, in their order, drive ``mini``'s manager.

Most calls of ``allocate_slots`` need no block and leave no event: the trace only counts them. Each
of them is judged all the same. For a request that decodes one token a step, ``mini`` knows up to
how many tokens nothing can happen (``quiet_until``); it is looked at again in the step where that
ends, and then the trace must have an event of it. So a step costs as much as it has events, however
many requests run in it. Everybody else (a prefill, a request that joins or leaves, and all of
them where answers come late, or where a window may move) is followed call by call.
"""

from __future__ import annotations

from typing import Any

from vllm_trace.events import (
    BlocksCached,
    EngineConfigured,
    Event,
    PrefixCacheReset,
    PrefixLookedUp,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsMapped,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
    TableRowChanged,
)
from vllm_trace.mini.request import RequestStatus
from vllm_trace.replay.base import FINISHED_BY_OUTPUT, Replay
from vllm_trace.replay.segments import ENDS, Segment
from vllm_trace.replay.steady import Steady
from vllm_trace.replay.worker import WorkerTables

OF_A_STEP = ("calls without a block", "free blocks")


class ManagerReplay(Replay):
    """Recorded calls drive the manager."""

    def __init__(self, config: EngineConfigured, release: str) -> None:
        super().__init__(config, release)
        self.whole = bool(self.settings.get("full_sequence_must_fit"))
        self.asynchronous = bool(self.settings.get("async_scheduling"))
        self.one_by_one = self.asynchronous or self.manager.has_windows
        """Nobody is steady: a step may be scheduled before the last one is answered, or a window may move."""
        self.kept: list[tuple[int, int | None]] = []
        self.num_kept_done = 0
        """One by one: the silent calls of a schedule in their order, with their tokens; and how many are made."""
        self.worker = WorkerTables(len(config.groups))
        self.hits: dict[int, tuple[Any, int]] = {}
        """What a lookup found, until the request is admitted."""
        self.steps: dict[int, StepScheduled] = {}
        """Scheduled and not answered yet."""
        self.steady = Steady(self.manager)
        self.order: list[int] = []
        self.counts: list[int] = []
        self.others: dict[int, int] = {}
        """Of the last step: its requests and their tokens; the tokens of those that are not steady."""
        self.grown: set[int] = set()
        """Who got blocks in the step that is being scheduled."""
        self.called: set[int] = set()
        """Whose call of that step was replayed."""
        self.filled: int | None = None
        """Whose blocks were just cached: by a call that has an event, or by a silent one?"""
        self.answers: dict[int, tuple[int, int]] = {}
        """Of the step that is being answered: tokens scheduled and sampled by request."""
        self.events: list[Event] = []
        self.process = 0
        self.acts = {
            BlocksCached: self.cached,
            SlotsAllocated: self.allocated,
            SlotsRefused: self.refused,
            PrefixLookedUp: self.looked_up,
            RequestFreed: self.freed,
            RequestArrived: self.arrive,
            RequestFinished: self.finished,
            RequestPreempted: self.preempted,
            PrefixCacheReset: self.reset,
            StepScheduled: self.scheduled,
            StepUpdated: self.updated,
            TableRowChanged: self.row_changed,
            SlotsMapped: self.slots_mapped,
        }

    def begin(self, segment: Segment) -> None:
        self.process, self.events, self.place = segment.process, segment.events, 0
        if self.one_by_one:
            self._look_ahead(0)

    def _upcoming(self, place: int) -> tuple[Any, list[Event]]:
        """The schedule or the answer that the events from ``place`` on belong to, and those before it."""
        events = self.events
        for end in range(place, len(events)):
            if type(events[end]) in ENDS:
                return events[end], events[place:end]
        return None, events[place:]

    def _look_ahead(self, place: int) -> None:
        """One by one: which silent calls stand between the next events, or whose answers they are."""
        end, inner = self._upcoming(place)
        self.kept, self.num_kept_done, self.answers = [], 0, {}
        if type(end) is StepScheduled:
            told = {event.request for event in inner if type(event) is SlotsAllocated}
            counts = dict(zip(end.requests or (), end.num_tokens or ()))
            order = end.kept or [key for key in counts if key not in told]
            self.kept = [(key, counts.get(key)) for key in order]
        elif type(end) is StepUpdated and end.step in self.steps:
            step = self.steps.pop(end.step)
            requests, num_tokens = step.requests or [], step.num_tokens or []
            outputs = end.num_output_tokens or [0] * len(requests)
            self.answers = dict(zip(requests, zip(num_tokens, outputs)))

    # Calls that have an event -----------------------------------------------------------

    def allocated(self, event: SlotsAllocated) -> None:
        key = event.request
        if self.filled is not None:
            self._fill(key)
        if self.kept:
            self._run_kept(event.num_kept)
        member = self.steady.members.get(key)
        if member is not None:
            self.steady.call(member, event.num_new_tokens)
        else:
            self._allocate(event)
        self.grown.add(key)
        self.worker.grow(key, event.blocks)

    def refused(self, event: SlotsRefused) -> None:
        self._fill()
        self._run_kept(event.num_kept)
        member = self.steady.members.get(event.request)
        if member is not None:
            self.steady.call(member, event.num_new_tokens)
        else:
            self._allocate(event)

    def _allocate(self, event: SlotsAllocated | SlotsRefused) -> None:
        key = event.request
        request = self.requests[key]
        if request.status is RequestStatus.RUNNING:
            self._call(key, event.num_new_tokens)
            return
        hits, num_hit = self.hits.pop(key, (None, 0))
        self.require(event, ("hit of the call",), (event.num_hit_tokens,), (num_hit,))
        made = self.manager.allocate_slots(
            request,
            event.num_new_tokens,
            num_hit,
            hits,
            full_sequence_must_fit=self.whole,
            has_scheduled_reqs=True,
        )
        if made is not None:
            self.called.add(key)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = num_hit
            self.worker.admit(key, hits)

    def looked_up(self, event: PrefixLookedUp) -> None:
        self._fill()
        self._run_kept(len(self.kept))
        self.learn_looked_up(event)
        request = self.requests[event.request]
        hits, num_hit, request.shared_prefix_boundary = self.manager.get_computed_blocks(request)
        self.hits[event.request] = (hits, num_hit)

    def freed(self, event: RequestFreed) -> None:
        if self.filled is not None:
            self._fill()
        key = event.request
        self._answer(key)
        self.steady.leave(key)
        self.manager.free(self.requests[key])
        self.worker.forget(key)

    def finished(self, event: RequestFinished) -> None:
        key = event.request
        self.steady.leave(key)
        self.hits.pop(key, None)
        request = self.requests.get(key)
        if request is not None:
            request.num_tokens += self._num_sampled_last(event)
            self.compare_counts(event, request)
        self.forget(key)

    def _num_sampled_last(self, event: RequestFinished) -> int:
        """Of the answer that ended it, which is told only when the whole step is answered."""
        if self.one_by_one or event.reason not in FINISHED_BY_OUTPUT:
            return 0
        end = self._upcoming(self.place)[0]
        step = self.steps.get(end.step) if type(end) is StepUpdated else None
        if step is None or not step.requests or event.request not in step.requests:
            return 0
        place = step.requests.index(event.request)
        return end.num_output_tokens[place] if end.num_output_tokens else 0

    def preempted(self, event: RequestPreempted) -> None:
        request = self.requests[event.request]
        num_free = self.pool.free_block_queue.num_free_blocks
        self.told.append(
            ("request.preempted", event.request, request.num_computed_tokens, num_free)
        )
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        if self.rules.stale_output_waits:
            request.num_stale_output_tokens = request.num_in_flight_tokens
            request.num_output_placeholders = 0
        request.num_preemptions += 1
        self.grown.discard(event.request)

    def reset(self, event: PrefixCacheReset) -> None:
        self.told.append(("prefix.reset", self.manager.reset_prefix_cache()))

    # Calls that have none ---------------------------------------------------------------

    def cached(self, event: BlocksCached) -> None:
        """Within a call whose event comes next, or in one that took no block, or when an output came."""
        self.learn_cached(event)
        if self.one_by_one:
            self._answer(event.request)
            place = next((i for i, (key, _) in enumerate(self.kept) if key == event.request), -1)
            self._run_kept(place + 1)
        elif self.filled != event.request:
            if self.filled is not None:
                self._fill()
            member = self.steady.members.get(event.request)
            if member is None or not self.steady.decode(member):
                self.filled = event.request

    def _fill(self, caller: int | None = None) -> None:
        """Make the silent call that filled a block, unless it is the caller's own, which comes now."""
        key, self.filled = self.filled, None
        if key is None or key == caller:
            return
        member = self.steady.members.get(key)
        end, num_tokens = self._upcoming(self.place)[0], None
        if type(end) is StepScheduled:
            num_tokens = dict(zip(end.requests or (), end.num_tokens or ())).get(key)
        if member is not None and num_tokens is not None:
            self.steady.call(member, num_tokens)
        else:
            self.steady.leave(key)
            self._call(key, num_tokens)

    def _run_kept(self, count: int) -> None:
        """Make the first ``count`` of a schedule's silent calls, as far as they are not made."""
        while self.num_kept_done < min(count, len(self.kept)):
            self.num_kept_done += 1
            self._call(*self.kept[self.num_kept_done - 1])

    def _call(self, key: int, num_tokens: int | None) -> None:
        """``allocate_slots`` for a running request that is not steady."""
        request = self.requests[key]
        if num_tokens is None:
            # Scheduled first and preempted then: the step does not say how much it was to do.
            ahead = request.num_tokens + request.num_output_placeholders
            num_tokens = ahead - request.num_computed_tokens
        if self.manager.allocate_slots(request, num_tokens) is not None:
            self.called.add(key)

    # Steps ------------------------------------------------------------------------------

    def scheduled(self, event: StepScheduled) -> None:
        if self.filled is not None:
            self._fill()
        if self.kept:
            self._run_kept(len(self.kept))
        requests, counts = event.requests or [], event.num_tokens or []
        if self.steps and not self.one_by_one:
            self._overlap()
        if requests is not self.order or counts is not self.counts or self.others:
            self._sort(requests, counts)
        for key, num_tokens in self.others.items():
            if key not in self.called:
                self._call(key, num_tokens)
        for member in self.steady.due():
            self.steady.call(member)
        num_silent = len(event.kept) or len(requests) - len(self.grown)
        recorded = (event.num_kept, event.num_free_blocks)
        made = (num_silent, self.pool.free_block_queue.num_free_blocks)
        self.require(event, OF_A_STEP, recorded, made)
        self.num_silent += num_silent
        self.grown.clear()
        self.called.clear()
        self.steady.next_step()
        if self.others:
            self._advance()
        if requests:
            self.steps[event.step] = event
        self.worker.plan(event)
        if self.one_by_one:
            self._look_ahead(self.place + 1)

    def _overlap(self) -> None:
        """Steps overlap without async scheduling (pipelines)."""
        self.one_by_one = True
        for key in [*self.steady.members]:
            self.steady.leave(key)

    def _sort(self, requests: list[int], counts: list[int]) -> None:
        """Who is steady in this step, and who is not."""
        members = self.steady.members
        others = {key: n for key, n in zip(requests, counts) if key not in members}
        if counts.count(1) - [*others.values()].count(1) != len(requests) - len(others):
            for key, num_tokens in zip(requests, counts):
                if num_tokens != 1:
                    self.steady.leave(key)
            others = {key: n for key, n in zip(requests, counts) if key not in members}
        if len(others) + len(members) > len(requests):
            for key in members.keys() - requests:
                self.steady.leave(key)
        self.order, self.counts, self.others = requests, counts, others

    def _advance(self) -> None:
        """Count what was planned for those who are not steady; who decodes becomes it."""
        for key, num_tokens in [*self.others.items()]:
            request = self.requests[key]
            request.num_computed_tokens += num_tokens
            if not self.one_by_one:
                if num_tokens == 1:
                    self.steady.join(key, request, self.manager.requests[key])
                    del self.others[key]
                continue
            request.num_in_flight_tokens += num_tokens
            ahead = request.num_tokens + request.num_output_placeholders
            if self.asynchronous and request.num_computed_tokens >= ahead:
                request.num_output_placeholders += 1

    def updated(self, event: StepUpdated) -> None:
        if self.filled is not None:
            self._fill()
        if self.one_by_one:
            for key in [*self.answers]:
                self._answer(key)
            self._look_ahead(self.place + 1)
            return
        step = self.steps.pop(event.step, None)
        if step is None:
            return
        self.steady.num_updated += 1
        outputs = event.num_output_tokens or [0] * len(self.order)
        if outputs.count(1) == len(outputs) == len(self.order):
            for key in self.others:
                if key in self.requests:
                    self.requests[key].num_tokens += 1
            return
        for key, sampled in zip(self.order, outputs, strict=True):
            if key in self.others:
                if key in self.requests:
                    self.requests[key].num_tokens += sampled
            elif sampled != 1:
                self.steady.sampled(key, sampled)

    def _answer(self, key: int) -> None:
        """One by one: what ``update_from_output`` does to a request."""
        request = self.requests.get(key)
        scheduled, sampled = self.answers.pop(key, (0, 0))
        if request is None or not scheduled:
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

    # Workers ----------------------------------------------------------------------------

    def row_changed(self, event: TableRowChanged) -> None:
        self.worker.row_changed(self.process, event)

    def slots_mapped(self, event: SlotsMapped) -> None:
        self.worker.compare(self.process, event)
