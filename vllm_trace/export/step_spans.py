"""The trace of one engine step: schedule, execute (forward, attention, sample), postprocess."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import Any

import msgspec

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
from vllm_trace.export.span import GOLDEN, U64, Emit, Form, Ids, Link, Resource, hashed, id_of

SPANS_PER_STEP = 1 << 12
"""Room for span ids in one step; workers and groups are fewer."""


MAX_LINKS = 1024
"""Links that are remembered."""

_STRIDE = SPANS_PER_STEP * GOLDEN & U64


class StepIds:
    """Trace and span ids of an engine's steps; the same in every export."""

    def __init__(self, *identity: Any) -> None:
        made = hashed(*identity, "steps", size=24)
        self._high, self._low = made[:8], int.from_bytes(made[8:16], "big")
        self._spans = int.from_bytes(made[16:], "big")
        self._links: dict[int, Link] = {}
        """Of the last steps: several requests point to one."""

    def trace_id(self, step: int) -> bytes:
        return self._high + id_of(self._low + step * GOLDEN)

    def first(self, step: int) -> int:
        """The number of the root's id; those of its children follow, as in ``Ids``."""
        return self._spans + step * _STRIDE & U64

    def link(self, step: int) -> Link:
        """To the root of a step."""
        found = self._links.get(step)
        if found is None:
            if len(self._links) >= MAX_LINKS:
                self._links.clear()
            found = self._links[step] = Link(self.trace_id(step), id_of(self.first(step)))
        return found


class Step(msgspec.Struct):
    """What is known of a step so far."""

    number: int
    scheduled: StepScheduled | None = None
    updated: StepUpdated | None = None
    chunks: Sequence[Any] = ()
    """Prefill chunks whose results are not in."""
    links: Sequence[Link] = ()
    prefill_tokens: int = 0
    decode_tokens: int = 0
    parts: dict[Any, list[Any]] | None = None
    """Process → what it told as a worker."""


def emit_step(step: Step, trace_id: bytes, engine: Any) -> None:
    """Emit all spans of a step, the root last. What is missing of it makes the root incomplete."""
    plan, done, offset, resource = step.scheduled, step.updated, engine.offset, engine.resource
    emit, first = engine.emit, engine.step_ids.first(step.number)
    root_id = id_of(first)
    begins, ends = [], []
    # The scheduler's own spans have the first two ids.
    if plan is not None:
        start = plan.started_ns + offset
        end = start + plan.dur_ns
        begins.append(start)
        ends.append(end)
        emit(resource, STEP_SCHEDULE, trace_id, id_of(first + GOLDEN), root_id, start, end)
    if step.parts is not None:
        tree = _Tree(trace_id, root_id, first + 2 * GOLDEN, emit, begins, ends)
        _emit_workers(step.parts, tree, engine)
    if done is not None:
        start = done.started_ns + offset
        end = start + done.dur_ns
        begins.append(start)
        ends.append(end)
        emit(resource, POSTPROCESS, trace_id, id_of(first + 2 * GOLDEN), root_id, start, end)
    if begins:
        emit(
            resource, ENGINE_STEP, trace_id, root_id, b"", min(begins), max(ends),
            _values_of(step), (), step.links,
        )  # fmt: skip


def _values_of(step: Step) -> tuple[Any, ...]:
    """Of the root."""
    plan, done = step.scheduled, step.updated
    output = None
    if done is not None and done.num_output_tokens is not None:
        output = sum(done.num_output_tokens)
    incomplete = True if plan is None or done is None else None
    if plan is None:
        return step.number, None, (None, None, None, None, output), None, (None, None, incomplete)
    queues = len(plan.requests or ()), plan.num_running, plan.num_waiting
    facts = (*queues, step.decode_tokens, output)
    values = step.number, plan.num_free_blocks, facts, step.prefill_tokens
    if plan.new or plan.resumed or plan.preempted or incomplete:
        joined = len(plan.new) + len(plan.resumed)
        return *values, (joined or None, len(plan.preempted) or None, incomplete)
    return values


class _Tree:
    """The workers' spans of one step."""

    __slots__ = ("begins", "emit", "ends", "next_id", "root_id", "trace_id")

    def __init__(
        self, trace_id: bytes, root_id: bytes, last: int, emit: Emit, begins: Any, ends: Any
    ) -> None:
        self.trace_id, self.root_id, self.next_id = trace_id, root_id, Ids(last).next
        self.emit, self.begins, self.ends = emit, begins, ends

    def add(
        self,
        resource: Resource,
        form: Form,
        start: int,
        dur_ns: int,
        values: tuple[Any, ...] = (),
        parent: bytes = b"",
    ) -> bytes:
        """Emit a child. Returns its id."""
        span_id, end = self.next_id(), start + dur_ns
        self.begins.append(start)
        self.ends.append(end)
        self.emit(
            resource, form, self.trace_id, span_id, parent or self.root_id, start, end, values
        )
        return span_id


def _emit_workers(parts: dict[Any, list[Any]], tree: _Tree, engine: Any) -> None:
    for process in sorted(parts, key=_key_of) if len(parts) > 1 else parts:
        _emit_worker(parts[process], process, process.offset_for(engine), tree, engine)


def _key_of(process: Any) -> Any:
    return process.key


def _emit_worker(told: list[Any], process: Any, offset: int, tree: _Tree, engine: Any) -> None:
    """``execute`` of a worker with what is in it, and ``sample``."""
    resource = process.resource
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
        execute = tree.add(resource, EXECUTE, start, ran.dur_ns, values)
        if ran.forward_ns:
            start, dur = ran.forward_ns + offset, ran.forward_dur_ns
            forward = tree.add(resource, FORWARD, start, dur, (), execute)
            within = (forward, start, dur)
            _emit_attention(tree, process, offset, engine, within, plans, called)
    for one in sampled:
        tree.add(resource, SAMPLE, one.started_ns + offset, one.dur_ns, (one.rank,))


def _emit_attention(
    tree: _Tree,
    process: Any,
    offset: int,
    engine: Any,
    within: tuple[bytes, int, int],
    plans: dict[int, AttentionPlanned],
    called: list[AttentionCalled],
) -> None:
    """One span for each KV-cache group and implementation; a group without calls has no time.

    ``within``: id, start and duration of the forward.
    """
    resource = process.resource
    forward, forward_start, forward_dur = within
    timed: set[int] = set()
    for event in called:
        for group, places in engine.layers.of(event.layers):
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
            tree.add(resource, ATTENTION, start, dur, (choice, sum(durs)), forward)
    for group, plan in plans.items():
        if group not in timed:
            untimed = group, plan.kernel, plan.variant, None, None, None, None
            tree.add(resource, ATTENTION, forward_start, forward_dur, (untimed,), forward)
