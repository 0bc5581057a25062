"""The trace of one engine step: schedule, execute (forward, attention, sample), postprocess."""

from __future__ import annotations

from operator import add
from typing import Any

from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.export.forms import (
    ATTENTION,
    ENGINE_STEP,
    EXECUTE,
    FORWARD,
    POSTPROCESS,
    SAMPLE,
    STEP_SCHEDULE,
)
from vllm_trace.export.span import GOLDEN, Emit, Form, Ids, Link, Resource, hashed, id_of

SPANS_PER_STEP = 1 << 12
"""Room for span ids in one step; workers and groups are fewer."""


class StepIds:
    """Trace and span ids of an engine's steps; the same in every export."""

    def __init__(self, *identity: Any) -> None:
        made = hashed(*identity, "steps", size=24)
        self._high, self._low = made[:8], int.from_bytes(made[8:16], "big")
        self._spans = int.from_bytes(made[16:], "big")

    def link(self, step: int) -> Link:
        """To the root of a step."""
        return Link(self._high + id_of(self._low + step * GOLDEN), id_of(self.first(step)))

    def first(self, step: int) -> int:
        """The number of the root's id; those of its children follow, as in ``Ids``."""
        return self._spans + step * (SPANS_PER_STEP * GOLDEN)


class Step:
    """What is known of a step so far, and the tree that its spans become."""

    __slots__ = (
        "begin", "chunks", "decode_tokens", "end", "link", "links", "next_id", "number", "parts",
        "prefill_tokens", "scheduled", "updated",
    )  # fmt: skip

    def __init__(self, number: int, ids: StepIds) -> None:
        self.number = number
        self.link = ids.link(number)
        """To its root."""
        self.next_id = Ids(ids.first(number)).next
        self.scheduled: StepScheduled | None = None
        self.updated: StepUpdated | None = None
        self.chunks: list[Any] = []
        """Prefill chunks whose results are not in."""
        self.links: list[Link] = []
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.parts: dict[Any, list[Any]] = {}
        """Process → what it told as a worker."""
        self.begin = self.end = 0
        """Of its spans; 0 while there is none."""

    def add(
        self,
        emit: Emit,
        resource: Resource,
        form: Form,
        start: int,
        dur_ns: int,
        values: tuple[Any, ...] = (),
        parent: bytes = b"",
        span_id: bytes = b"",
    ) -> bytes:
        """Emit a child. Returns its id."""
        span_id = span_id or self.next_id()
        end = start + dur_ns
        if start < self.begin or not self.begin:
            self.begin = start
        if end > self.end:
            self.end = end
        link = self.link
        emit(resource, form, link.trace_id, span_id, parent or link.span_id, start, end, values)
        return span_id


def emit_step(step: Step, engine: Any) -> None:
    """Emit all spans of a step, the root last. What is missing of it makes the root incomplete."""
    plan, done, offset, resource = step.scheduled, step.updated, engine.offset, engine.resource
    emit = engine.emit
    # The scheduler's own spans have the first two ids.
    schedule_id, postprocess_id = step.next_id(), step.next_id()
    if plan is not None:
        start = plan.started_ns + offset
        step.add(emit, resource, STEP_SCHEDULE, start, plan.dur_ns, span_id=schedule_id)
    parts = step.parts
    for process in sorted(parts, key=_key_of) if len(parts) > 1 else parts:
        _emit_worker(parts[process], process, step, engine)
    if done is not None:
        start = done.started_ns + offset
        step.add(emit, resource, POSTPROCESS, start, done.dur_ns, span_id=postprocess_id)
    if step.end:
        trace_id, root_id = step.link.trace_id, step.link.span_id
        values, links = _values_of(step), step.links
        emit(
            resource, ENGINE_STEP, trace_id, root_id, b"", step.begin, step.end, values, (), links
        )  # fmt: skip


def _key_of(process: Any) -> Any:
    return process.key


def _values_of(step: Step) -> tuple[Any, ...]:
    """Of the root."""
    plan, done = step.scheduled, step.updated
    output = None
    if done is not None and done.num_output_tokens is not None:
        output = sum(done.num_output_tokens)
    incomplete = True if plan is None or done is None else None
    if plan is None:
        return step.number, (None, output), (None,) * 3, None, None, (None, None, incomplete)
    queues = len(plan.requests or ()), plan.num_running, plan.num_waiting
    tokens = step.decode_tokens, output
    values = step.number, tokens, queues, plan.num_free_blocks, step.prefill_tokens
    if plan.new or plan.resumed or plan.preempted or incomplete:
        joined = len(plan.new) + len(plan.resumed)
        return *values, (joined or None, len(plan.preempted) or None, incomplete)
    return values


def _emit_worker(told: list[Any], process: Any, step: Step, engine: Any) -> None:
    """``execute`` of a worker with what is in it, and ``sample``."""
    offset, resource, emit = process.offset_for(engine), process.resource, engine.emit
    executed: list[StepExecuted] = []
    sampled: list[StepSampled] = []
    called: list[AttentionCalled] = []
    plans: dict[int, AttentionPlanned] = {}
    for event in told:
        kind = type(event)
        if kind is AttentionPlanned:
            plans[event.group] = event
        elif kind is AttentionCalled:
            called.append(event)
        elif kind is StepExecuted:
            executed.append(event)
        else:
            sampled.append(event)
    for ran in executed:
        values = ((ran.rank, ran.num_tokens, ran.num_tokens_padded, ran.mode),)
        start = ran.started_ns + offset
        execute = step.add(emit, resource, EXECUTE, start, ran.dur_ns, values)
        if ran.forward_ns:
            start, dur = ran.forward_ns + offset, ran.forward_dur_ns
            forward = step.add(emit, resource, FORWARD, start, dur, (), execute)
            _emit_attention(step, process, engine, forward, start, dur, plans, called)
    for one in sampled:
        step.add(emit, resource, SAMPLE, one.started_ns + offset, one.dur_ns, (one.rank,))


def _emit_attention(
    step: Step,
    process: Any,
    engine: Any,
    forward: bytes,
    forward_start: int,
    forward_dur: int,
    plans: dict[int, AttentionPlanned],
    called: list[AttentionCalled],
) -> None:
    """One span for each KV-cache group and implementation; a group without calls has no time."""
    offset, resource, emit = process.offset_for(engine), process.resource, engine.emit
    timed: set[int] = set()
    for event in called:
        for group, places in engine.groups_of(event.layers):
            timed.add(group)
            starts, durs = event.started_ns, event.dur_ns
            if len(places) < len(event.layers):
                starts, durs = [starts[i] for i in places], [durs[i] for i in places]
            plan = plans.get(group)
            kernel, variant = (plan.kernel, plan.variant) if plan is not None else (None, None)
            backend = process.backends.get(event.layers[places[0]]) or None
            choice = group, kernel, variant, event.kernel or None, len(places), event.clock, backend
            start, dur = forward_start, forward_dur
            if event.clock == "host":
                # Times of a stream are not the host's: that span is the forward it belongs to.
                start = min(starts) + offset
                dur = max(map(add, starts, durs)) + offset - start
            step.add(emit, resource, ATTENTION, start, dur, (choice, sum(durs)), forward)
    for group, plan in plans.items():
        if group not in timed:
            choice = group, plan.kernel, plan.variant, None, None, None, None
            step.add(emit, resource, ATTENTION, forward_start, forward_dur, (choice,), forward)
