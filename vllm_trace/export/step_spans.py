"""The trace of one engine step: schedule, execute (forward, attention, sample), postprocess."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.export import attributes as a
from vllm_trace.export.span import INTERNAL, Ids, Link, Resource, Span, hashed

Emit = Callable[[Span], None]

SPANS_PER_STEP = 1 << 12
"""Room for span ids in one step; workers and groups are fewer."""


class Step:
    """What is known of a step so far."""

    __slots__ = (
        "chunks", "decode_tokens", "link", "links", "number", "parts", "prefill_tokens", "scheduled",
        "updated",
    )  # fmt: skip

    def __init__(self, number: int, link: Link) -> None:
        self.number = number
        self.link = link
        """To its root."""
        self.scheduled: StepScheduled | None = None
        self.updated: StepUpdated | None = None
        self.chunks: list[Any] = []
        """Prefill chunks whose results are not in."""
        self.links: list[Link] = []
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.parts: list[tuple[Any, Any]] = []
        """(process, event) of workers."""


class StepIds:
    """Trace and span ids of an engine's steps; the same in every export."""

    def __init__(self, *identity: Any) -> None:
        made = hashed(*identity, "steps", size=24)
        self.high = made[:8]
        self.low = Ids(int.from_bytes(made[8:16], "big"))
        self.spans = Ids(int.from_bytes(made[16:], "big"))

    def link(self, step: int) -> Link:
        """To the root of a step."""
        return Link(self.high + self.low.at(step), self.spans.at(step * SPANS_PER_STEP))


SCHEDULE, POSTPROCESS = 1, 2
"""Places of the scheduler's own spans; those of workers follow."""


class _Tree:
    """The workers' spans of one step."""

    def __init__(self, step: Step, ids: StepIds, emit: Emit) -> None:
        self.trace_id, self.root_id = step.link.trace_id, step.link.span_id
        self.first = step.number * SPANS_PER_STEP
        self.ids, self.emit = ids, emit
        self.place = POSTPROCESS
        self.begin, self.end = 0, 0

    def add(
        self,
        name: str,
        start: int,
        dur_ns: int,
        resource: Resource,
        attributes: dict[str, Any],
        parent: bytes = b"",
    ) -> bytes:
        self.place += 1
        span_id = self.ids.spans.at(self.first + self.place)
        end = start + dur_ns
        if not self.begin or start < self.begin:
            self.begin = start
        if end > self.end:
            self.end = end
        self.emit(
            Span(
                self.trace_id, span_id, parent or self.root_id, name, start, end, resource,
                attributes,
            )
        )  # fmt: skip
        return span_id


NO_FACTS: dict[str, Any] = {}


def emit_step(step: Step, ids: StepIds, engine: Any) -> None:
    """Emit all spans of a step, the root last. What is missing of it makes the root incomplete."""
    plan, done, offset, resource = step.scheduled, step.updated, engine.offset, engine.resource
    trace_id, root_id, emit = step.link.trace_id, step.link.span_id, engine.emit
    first = step.number * SPANS_PER_STEP
    facts: dict[str, Any] = {a.STEP: step.number}
    begin = end = 0
    if plan is not None:
        begin = plan.started_ns + offset
        end = begin + plan.dur_ns
        span_id = ids.spans.at(first + SCHEDULE)
        emit(Span(trace_id, span_id, root_id, "schedule", begin, end, resource, NO_FACTS))
        facts = _plan_facts(step, plan)
    if step.parts:
        tree = _Tree(step, ids, emit)
        _emit_workers(step, tree, engine)
        if tree.end:
            begin = min(begin, tree.begin) if begin else tree.begin
            end = max(end, tree.end)
    if done is not None:
        start = done.started_ns + offset
        last = start + done.dur_ns
        begin, end = begin or start, max(end, last)
        span_id = ids.spans.at(first + POSTPROCESS)
        emit(Span(trace_id, span_id, root_id, "postprocess", start, last, resource, NO_FACTS))
        if done.num_output_tokens is not None:
            facts[a.NUM_OUTPUT] = sum(done.num_output_tokens)
    if plan is None or done is None:
        facts[a.INCOMPLETE] = True
    if end:
        emit(
            Span(
                trace_id, root_id, b"", "engine_step", begin, end, resource, facts, INTERNAL, (),
                step.links,
            )
        )  # fmt: skip


def _plan_facts(step: Step, plan: StepScheduled) -> dict[str, Any]:
    facts: dict[str, Any] = {
        a.STEP: step.number,
        a.NUM_REQUESTS: len(plan.requests or ()),
        a.NUM_RUNNING: plan.num_running,
        a.NUM_WAITING: plan.num_waiting,
        a.NUM_FREE: plan.num_free_blocks,
        a.PREFILL_TOKENS: step.prefill_tokens,
        a.DECODE_TOKENS: step.decode_tokens,
    }
    if plan.new or plan.resumed:
        facts[a.NUM_NEW] = len(plan.new) + len(plan.resumed)
    if plan.preempted:
        facts[a.NUM_PREEMPTED] = len(plan.preempted)
    return facts


def _emit_workers(step: Step, tree: _Tree, engine: Any) -> None:
    """``execute`` of each worker with what is in it, and ``sample``."""
    by_process: dict[tuple[Any, ...], tuple[Any, dict[type, list[Any]]]] = {}
    for process, event in step.parts:
        _, found = by_process.setdefault(process.key, (process, {}))
        found.setdefault(type(event), []).append(event)
    for key in sorted(by_process):
        process, found = by_process[key]
        offset = process.offset_for(engine)
        for ran in found.get(StepExecuted, ()):
            facts = {
                a.RANK: ran.rank,
                a.NUM_TOKENS: ran.num_tokens,
                a.NUM_PADDED: ran.num_tokens_padded,
                a.MODE: ran.mode,
            }
            start = ran.started_ns + offset
            execute = tree.add("execute", start, ran.dur_ns, process.resource, facts)
            if ran.forward_ns:
                start, dur = ran.forward_ns + offset, ran.forward_dur_ns
                forward = tree.add("forward", start, dur, process.resource, {}, execute)
                _emit_attention(tree, process, engine, forward, ran, found)
        for one in found.get(StepSampled, ()):
            facts = {a.RANK: one.rank}
            tree.add("sample", one.started_ns + offset, one.dur_ns, process.resource, facts)


def _emit_attention(
    tree: _Tree,
    process: Any,
    engine: Any,
    parent: bytes,
    ran: StepExecuted,
    found: dict[type, list[Any]],
) -> None:
    """One span for each KV-cache group and implementation; a group without calls has no time."""
    plans = {plan.group: plan for plan in found.get(AttentionPlanned, ())}
    offset = process.offset_for(engine)
    forward = (ran.forward_ns, ran.forward_ns + ran.forward_dur_ns)
    timed: set[int] = set()
    for called in found.get(AttentionCalled, ()):
        groups: dict[int, list[int]] = {}
        for place, layer in enumerate(called.layers):
            groups.setdefault(engine.group_of(layer), []).append(place)
        for group, places in groups.items():
            timed.add(group)
            begin = min(called.started_ns[place] for place in places)
            end = max(called.started_ns[place] + called.dur_ns[place] for place in places)
            facts = _attention_facts(group, plans.get(group), called.kernel)
            facts[a.NUM_CALLS] = len(places)
            facts[a.CALLS_NS] = sum(called.dur_ns[place] for place in places)
            facts[a.CLOCK] = called.clock
            backend = process.backends.get(called.layers[places[0]])
            if backend:
                facts[a.BACKEND] = backend
            if called.clock != "host":
                # Times of a stream are not the host's: the span is the forward it belongs to.
                begin, end = forward
            tree.add("attention", begin + offset, end - begin, process.resource, facts, parent)
    for group, plan in plans.items():
        if group not in timed:
            facts = _attention_facts(group, plan, "")
            begin, end = forward
            tree.add("attention", begin + offset, end - begin, process.resource, facts, parent)


def _attention_facts(group: int, plan: AttentionPlanned | None, impl: str) -> dict[str, Any]:
    facts: dict[str, Any] = {a.GROUP: group}
    if plan is not None:
        facts[a.KERNEL], facts[a.VARIANT] = plan.kernel, plan.variant
    if impl:
        facts[a.IMPL] = impl
    return facts
