"""One engine's events, folded into the spans of its requests and of its steps.

Facts of a call come before the call ("inner before outer") and have no time: they wait in
``pending`` for the next event that has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
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
from vllm_trace.export.decodes import MAX_STEPS, Decodes
from vllm_trace.export.layers import LayerGroups
from vllm_trace.export.open_steps import LAG, OpenSteps
from vllm_trace.export.prefix import PrefixHistory
from vllm_trace.export.request_spans import Life
from vllm_trace.export.span import Emit, Resource, Traceparent
from vllm_trace.export.step_spans import Step, StepIds, emit_step
from vllm_trace.state import NULL_BLOCK, computes_prompt

NAMES_KEPT = 4096
"""Names of finished requests that can still be somebody's taker."""

Sampler = Callable[[bytes, "Traceparent | None"], bool]
"""Whether the trace of this id, a child of that remote span, is exported."""


class Engine:
    """The fold of one process that schedules."""

    def __init__(
        self,
        identity: tuple[Any, ...],
        resource: Resource,
        offset: int,
        light: bool,
        emit: Emit,
        sampler: Sampler,
        *,
        host: str = "",
        detail: bool = False,
        tokens: bool = False,
        max_steps: int = MAX_STEPS,
        lag: int = LAG,
    ) -> None:
        self.host = host
        self.identity = "\0".join(map(str, identity))
        self.resource = resource
        self.offset = offset
        self.light, self.full = light, not light
        self.emit = emit
        self.sampler = sampler
        self.detail, self.tokens = detail, tokens
        self.names: dict[int, str] = {}
        self.lives: dict[int, Life] = {}
        self.history = PrefixHistory()
        self.step_ids = StepIds(*identity)
        self.steps = OpenSteps(lag, self._emit_step)
        self.decodes = Decodes(max_steps, offset)
        self.layers = LayerGroups()
        self.num_requests = self.num_unsampled = 0
        self.last_ns = 0
        self._pending: list[tuple[Any, ...]] = []
        self._freed: list[BlocksFreed] = []
        self._evicted = 0
        self._free: int | None = None
        """Free blocks when the last call had returned."""
        self._refused: int = -1
        self._ending: list[Life] = []

    # Names ----------------------------------------------------------------------------

    def name_of(self, request: int) -> str:
        return self.names.get(request, f"#{request}")

    def _life(self, request: int, at_ns: int) -> Life:
        life = self.lives.get(request)
        if life is None:
            # It arrived before the trace began.
            life = self.lives[request] = Life(self, request, None, at_ns)
            life.waiting = False
            self.num_requests += 1
        return life

    def sees(self, request_id: str) -> bool:
        """Whether a request of that name is here: a worker that knows it is one of this engine's."""
        return any(life.name == request_id for life in self.lives.values())

    # Untimed events -------------------------------------------------------------------

    def configured(self, event: EngineConfigured) -> None:
        """A new engine in this process."""
        for life in [*self.lives.values()]:
            self._finish(life, self.last_ns)
        self.history.configured(event)
        self.layers.configured(event)
        self._free = event.num_blocks - 1
        self.last_ns = max(self.last_ns, event.at_ns)

    def arrived(self, event: RequestArrived) -> None:
        self.last_ns = event.at_ns
        self.names[event.request] = event.request_id
        if len(self.names) > NAMES_KEPT + len(self.lives):
            oldest = next(iter(self.names))
            if oldest not in self.lives:
                del self.names[oldest]
        self.lives[event.request] = Life(self, event.request, event, event.at_ns)
        self.num_requests += 1
        self.history.arrived(event)

    def looked_up(self, event: PrefixLookedUp) -> None:
        lookup = self.history.looked_up(event)
        life = self.lives.get(event.request)
        if life is not None:
            life.lookup = lookup
            life.num_lookups += 1
            life.goal = event.num_tokens

    def evicted(self, event: BlockEvicted) -> None:
        self._evicted += 1
        self.history.block_evicted(event)

    def cached(self, event: BlocksCached) -> None:
        self.history.blocks_cached(event)

    def reset(self, event: PrefixCacheReset) -> None:
        if event.ok:
            self.history.reset()

    def freed_blocks(self, event: BlocksFreed) -> None:
        self._freed.append(event)

    def allocated(self, event: SlotsAllocated) -> None:
        request = event.request
        if self._freed:
            self._freed.clear()
        life = self.lives.get(request)
        if self._evicted or life is None or life.lookup is not None:
            self.history.took(request)
        if life is not None and event.num_hit_tokens:
            life.computed = event.num_hit_tokens
        self._pending.append((Life.allocate, request, (event, self._free, self._evicted)))
        self._evicted = 0
        self._free = event.num_free_blocks

    def refused(self, event: SlotsRefused) -> None:
        self._refused = event.request
        self.history.refused(event.request)
        self._pending.append((Life.refuse, event.request, event))
        self._free = event.num_free_blocks

    def freed(self, event: RequestFreed) -> None:
        blocks, held = [], 0
        for part in self._freed:
            for block, count in zip(part.blocks, part.ref_cnts):
                if block != NULL_BLOCK:
                    blocks.append(block)
                    held += count > 0
        self._freed.clear()
        before = self._free
        if before is not None:
            self._free = before + len(blocks) - held
        self._pending.append((Life.free, event.request, (blocks, held, before, self._free)))

    def preempted(self, event: RequestPreempted) -> None:
        self._free = event.num_free_blocks
        life = self._life(event.request, self.last_ns)
        life.end_decode()
        self.decodes.leave(event.request)
        life.computed, life.waiting, life.resumed = 0, True, True
        life.goal = max(life.goal, event.num_computed_tokens)
        life.queued_since = self.last_ns
        cause = self.name_of(self._refused) if self._refused >= 0 else ""
        self._pending.append((Life.preempt, event.request, (event, cause)))

    # Steps ----------------------------------------------------------------------------

    def worked(self, process: Any, event: Any) -> None:
        """A worker's fact about a step."""
        self.steps.worked(process, event)

    def scheduled(self, event: StepScheduled) -> None:
        at = event.started_ns
        self.last_ns = at + event.dur_ns
        if self._ending:
            self._finish_ending()
        step = self.steps.at(event.step)
        step.scheduled = event
        decodes = self.decodes
        if (event.requests, event.num_tokens) == decodes.batch_of:
            decodes.note(event.step, self.last_ns)
            step.decode_tokens = decodes.num_tokens
        else:
            self._compose(step, event)
        if self._pending:
            self._settle(at, self.last_ns, event.step)
        self._refused = -1
        self._free = event.num_free_blocks
        if decodes.begun and decodes.log.end - decodes.begun[0][0] >= decodes.max_steps:
            decodes.split(event, self.lives)

    def _compose(self, step: Step, event: StepScheduled) -> None:
        """A step unlike the one before: look at each request that did not decode in that."""
        batch, chunks = self.decodes.batch, []
        requests, counts = event.requests or (), event.num_tokens or ()
        num_staying = len(requests)
        joining: list[Life] = []
        for place, request in enumerate(requests):
            if request in batch:
                continue
            num_staying -= 1
            life = self._life(request, event.started_ns)
            if life.waiting:
                life.admit(event.started_ns)
            before = life.computed if self.full and life.goal else None
            if not life.decode_id and computes_prompt(
                event, request, counts[place], before, life.goal
            ):
                step.prefill_tokens += counts[place]
                chunks.append(life.schedule(event, place, counts[place]))
            else:
                joining.append(life)
        step.chunks = chunks
        step.decode_tokens = sum(counts) - step.prefill_tokens
        self.decodes.compose(event, self.last_ns, joining, num_staying, step.decode_tokens)
        concerned = [*event.new, *event.resumed, *event.preempted]
        if concerned:
            lives = [self.lives[request] for request in concerned if request in self.lives]
            step.links = [life.link() for life in lives if life.sampled]

    # What waited for a time -----------------------------------------------------------

    def _settle(self, at: int, end: int, step: int = 0) -> None:
        """The pending facts happened in a call from ``at`` to ``end``, in this order."""
        pending, self._pending = self._pending, []
        lives = self.lives
        for what, request, facts in pending:
            life = lives.get(request)
            if life is not None:
                what(life, facts, step, at if at < end else end)
            at += 2

    # Results --------------------------------------------------------------------------

    def updated(self, event: StepUpdated) -> None:
        end = self.last_ns = event.started_ns + event.dur_ns
        step = self.steps.done(event)
        counts = event.num_output_tokens
        place = self.decodes.updated(event.step, event.started_ns, counts is not None)
        if step.scheduled is not None:
            if place is not None and counts is not None and counts.count(1) != len(counts):
                self._note_exceptions(step, place, counts)
            for life in self._ending:
                if place is not None and self._gone_before(life, event.started_ns):
                    life.exceptions[place] = 0
            if step.chunks:
                self._end_chunks(step, counts, event)
            if self.detail and place is not None:
                self._add_decode_steps(step, event, counts)
            if self.tokens and event.token_ids is not None:
                self._note_tokens(step, event.token_ids)
        if self._pending:
            self._settle(event.started_ns, end, event.step)
        if self._ending:
            self._finish_ending()
        if len(self.steps.open) >= self.steps.look_at:
            self.steps.look()

    def _gone_before(self, life: Life, results_ns: int) -> bool:
        """Whether it was aborted while the step ran: vLLM throws its results away."""
        return life.ended is not None and life.ended.at_ns < results_ns

    def _note_exceptions(self, step: Step, place: int, counts: list[int]) -> None:
        """Whoever did not get one token in this step of the log."""
        chunks = {chunk.place for chunk in step.chunks}
        for at, request in enumerate(step.scheduled.requests or ()):  # type: ignore[union-attr]
            if at < len(counts) and counts[at] != 1 and at not in chunks:
                life = self.lives.get(request)
                if life is not None:
                    life.exceptions[place] = counts[at]

    def _end_chunks(self, step: Step, counts: Any, event: StepUpdated) -> None:
        for chunk in step.chunks:
            life: Life = chunk.life
            if self.lives.get(life.number) is not life:
                continue
            output = (
                counts[chunk.place] if counts is not None and chunk.place < len(counts) else None
            )
            end = event.started_ns
            if self._gone_before(life, end):
                end, output = life.ended.at_ns, None if output is None else 0  # type: ignore[union-attr]
            life.end_chunk(chunk, end, output)
        step.chunks = ()

    def _add_decode_steps(self, step: Step, event: StepUpdated, counts: Any) -> None:
        started = step.scheduled.started_ns  # type: ignore[union-attr]
        for at, request in enumerate(step.scheduled.requests or ()):  # type: ignore[union-attr]
            life = self.lives.get(request)
            if life is not None and life.decode_id:
                count = counts[at] if counts is not None and at < len(counts) else None
                count = 0 if count and self._gone_before(life, event.started_ns) else count
                life.add_decode_step(started, event, count)

    def _note_tokens(self, step: Step, token_ids: list[list[int]]) -> None:
        for request, ids in zip(step.scheduled.requests or (), token_ids):  # type: ignore[union-attr]
            life = self.lives.get(request)
            if life is not None:
                life.token_ids += ids

    def _emit_step(self, step: Step) -> None:
        self.decodes.in_flight.pop(step.number, None)
        trace_id = self.step_ids.trace_id(step.number)
        if self.sampler(trace_id, None):
            emit_step(step, trace_id, self)

    # Ends -----------------------------------------------------------------------------

    def finished(self, event: RequestFinished) -> None:
        self.last_ns = event.at_ns
        life = self._life(event.request, event.at_ns)
        life.ended = event
        if self._pending:
            self._settle(event.at_ns, event.at_ns)
        self.history.finished(event.request)
        self._ending.append(life)

    def _finish_ending(self) -> None:
        ending, self._ending = self._ending, []
        for life in ending:
            self._finish(life, 0)

    def _finish(self, life: Life, last_ns: int) -> None:
        self.decodes.leave(life.number)
        life.finish(last_ns)
        if self.lives.get(life.number) is life:
            del self.lives[life.number]

    def settle_steps(self) -> None:
        """Nothing more is coming for now: steps whose results are in need not wait."""
        self.steps.settle()

    def end(self) -> None:
        """The trace is over: what is open ends here and says so."""
        if self._pending:
            self._settle(self.last_ns, self.last_ns)
        self._finish_ending()
        for step in self.steps.cut_short():
            for chunk in step.chunks:
                known = self.lives.get(chunk.life.number)
                if known is not None and known is chunk.life:
                    known.end_chunk(chunk, self.last_ns, None, True)
            step.chunks = ()
        for life in [*self.lives.values()]:
            self._finish(life, self.last_ns)
        self.steps.end()
