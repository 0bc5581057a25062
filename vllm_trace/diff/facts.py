"""What two traces are compared by: decisions without their times, cut into the parts of steps.

A trace is read in lanes: what one scheduler decided, and what one worker's kernels received.
Between lanes the order depends on time, within one it does not. A lane falls into parts, each of
which ends with ``step.scheduled`` or ``step.updated`` (in a worker: with a new step), and parts of
the same name are compared.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from vllm_trace.events import (
    AttentionPlanned,
    BackendSelected,
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
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
from vllm_trace.naming import without_random_digits
from vllm_trace.trace import Record, Trace

Ids = tuple[tuple[int, ...], ...]


class Fact(NamedTuple):
    """One event, as it is compared."""

    number: int
    kind: str
    plain: tuple[Any, ...]
    """What must be equal. Requests have the numbers of the first trace."""
    blocks: Ids
    hashes: tuple[int, ...]
    event: Event


class Part(NamedTuple):
    """Facts up to the end of one half of a step; ``key`` orders parts of a lane."""

    key: tuple[int, int]
    records: list[Record]
    facts: list[Fact]


END = 1 << 62
"""Key of what comes after the last whole step."""

Number = Callable[[int], Any]


@dataclass
class Seen:
    """One pass over a trace: its requests, configurations, and who did what."""

    names: dict[int, str] = field(default_factory=dict)
    arrived: list[int] = field(default_factory=list)
    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Tokens of the prompt, and at most to be generated."""
    config: EngineConfigured | None = None
    backends: set[tuple[str, str]] = field(default_factory=set)
    schedulers: list[int] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)
    num_steps: int = 0
    num_token_steps: int = 0
    """Steps whose token ids are recorded."""
    num_tables: int = 0
    num_events: int = 0
    samples: bool = False
    """Some request draws its tokens (temperature above 0)."""


def survey(trace: Trace) -> Seen:
    """Read the trace once."""
    fresh = fresh_reading(trace)
    made = Seen(names=fresh.names)
    for record in fresh.records():
        event: Any = record.event
        kind = type(event)
        made.num_events += 1
        if kind is RequestArrived:
            made.arrived.append(event.request)
            made.shapes[event.request] = (event.num_prompt_tokens, event.max_tokens)
            made.samples = made.samples or bool(event.sampling.get("temperature"))
        elif kind is StepScheduled:
            made.num_steps += 1
            if record.process not in made.schedulers:
                made.schedulers.append(record.process)
        elif kind is StepUpdated:
            made.num_token_steps += event.token_ids is not None
        elif kind is SlotsMapped:
            made.num_tables += 1
            if record.process not in made.workers:
                made.workers.append(record.process)
        elif kind is EngineConfigured:
            made.config = made.config or event
        elif kind is BackendSelected:
            made.backends.add((event.backend, event.impl))
    return made


def fresh_reading(trace: Trace) -> Trace:
    """The same files, with requests numbered from 0 however often they were read before."""
    return Trace(trace.files)


# Requests -------------------------------------------------------------------------------


def match_requests(a: Seen, b: Seen) -> tuple[dict[int, int], str]:
    """Numbers of B → numbers of A, and how they were matched.

    By name; else by name without the random suffix that vLLM adds; else in the order of arrival.
    A name that comes several times is matched in its order.
    """
    ways: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("name", lambda name: name),
        ("name without vLLM's random suffix", without_random_digits),
    )
    for said, key in ways:
        places = _by_key(a, key)
        found: dict[int, int] = {}
        for name, numbers in _by_key(b, key).items():
            found |= dict(zip(numbers, places.get(name, ())))
        if found:
            return found, said
    return dict(zip(b.arrived, a.arrived)), "order of arrival, because no name is in both"


def _by_key(seen: Seen, key: Callable[[str], str]) -> dict[str, list[int]]:
    made: dict[str, list[int]] = {}
    for number in seen.arrived:
        made.setdefault(key(seen.names[number]), []).append(number)
    return made


# Facts ----------------------------------------------------------------------------------


def _tuples(tables: Any) -> Ids:
    return tuple(tuple(row) for row in tables)


def is_idle(event: StepScheduled) -> bool:
    """A step of nothing: an engine in a process of its own makes one to tell who finished."""
    return not event.requests and not event.preempted


def _step(event: StepScheduled, number: Number) -> tuple[Any, ...]:
    """``finished`` is left out: whether the next step or an idle one tells it depends on time."""
    return (
        tuple(number(r) for r in event.requests or ()),
        tuple(event.num_tokens or ()),
        tuple(number(r) for r in event.new),
        tuple(number(r) for r in event.resumed),
        tuple(sorted((number(r) for r in event.preempted), key=str)),
        tuple((number(r), count) for r, count in event.num_spec_tokens.items()),
        event.num_running,
        event.num_waiting,
        event.num_free_blocks,
    )


_Parts = tuple[tuple[Any, ...], Ids, tuple[int, ...]]
_MAKE: dict[type, Callable[[Any, Number], _Parts]] = {
    EngineConfigured: lambda e, n: ((), (), ()),
    RequestArrived: lambda e, n: (
        (n(e.request), e.num_prompt_tokens, e.max_tokens, e.priority, e.lora, e.salted),
        (),
        tuple(e.block_hashes),
    ),
    RequestFinished: lambda e, n: (
        (n(e.request), e.reason, e.num_output_tokens, e.num_preemptions), (), ()
    ),
    RequestPreempted: lambda e, n: ((n(e.request), e.num_computed_tokens, e.num_free_blocks), (), ()),
    RequestFreed: lambda e, n: ((n(e.request),), (), ()),
    PrefixLookedUp: lambda e, n: (
        (n(e.request), e.num_tokens, e.num_hit_tokens), _tuples(e.blocks), tuple(e.new_hashes)
    ),
    SlotsAllocated: lambda e, n: (
        (n(e.request), e.num_new_tokens, e.num_hit_tokens, e.num_free_blocks),
        _tuples([*e.blocks, *e.hit_blocks]),
        (),
    ),
    SlotsRefused: lambda e, n: (
        (n(e.request), e.num_new_tokens, e.num_hit_tokens, e.num_free_blocks), (), ()
    ),
    BlocksTaken: lambda e, n: ((), (tuple(e.blocks),), ()),
    BlockEvicted: lambda e, n: ((), ((e.block,),), tuple(e.hashes)),
    BlocksTouched: lambda e, n: (tuple(e.ref_cnts), (tuple(e.blocks),), ()),
    BlocksCached: lambda e, n: (
        (n(e.request), e.group, e.first), (tuple(e.blocks),), tuple(e.hashes)
    ),
    BlocksFreed: lambda e, n: (tuple(e.ref_cnts), (tuple(e.blocks),), ()),
    PrefixCacheReset: lambda e, n: ((e.ok,), (), ()),
    StepScheduled: lambda e, n: (_step(e, n), (), ()),
    StepUpdated: lambda e, n: (
        (
            tuple(e.num_output_tokens or ()),
            None if e.token_ids is None else _tuples(e.token_ids),
        ),
        (),
        (),
    ),
}  # fmt: skip
_WORKER: dict[type, Callable[[Any, Number], _Parts]] = {
    TableRowChanged: lambda e, n: ((e.group, n(e.request), e.first), (tuple(e.blocks),), ()),
    SlotsMapped: lambda e, n: (
        (
            e.group, e.block_size, e.kernel_block_size, tuple(n(r) for r in e.requests),
            tuple(e.query_lens), tuple(e.seq_lens),
            tuple(s % e.kernel_block_size if s >= 0 else -1 for s in e.slots),
        ),
        (tuple(s // e.kernel_block_size for s in e.slots if s >= 0),),
        (),
    ),
    AttentionPlanned: lambda e, n: (
        (e.group, e.kernel, e.variant, tuple(sorted(e.numbers.items()))), (), ()
    ),
}  # fmt: skip

LIGHT = (EngineConfigured, RequestArrived, RequestFinished, RequestPreempted, StepScheduled)
"""What level ``light`` records of a scheduler's decisions."""


@dataclass(frozen=True)
class View:
    """What of an event is compared."""

    light: bool = False
    """At least one of the traces has level ``light``: both are told as it would."""
    hashes: bool = True
    tokens: bool = True
    more_free: int = 0
    """Added to free counts: what the pool of the other side is larger by."""


class _Places:
    """Numbers steps without the idle ones, which depend on time."""

    def __init__(self) -> None:
        self.idle: list[int] = []

    def note(self, event: StepScheduled) -> None:
        if is_idle(event):
            self.idle.append(event.step)

    def is_idle(self, step: int) -> bool:
        at = bisect_left(self.idle, step)
        return at < len(self.idle) and self.idle[at] == step

    def of(self, step: int) -> int:
        return step - bisect_left(self.idle, step)


def parts(trace: Trace, lane: str, process: int, number: Number, view: View) -> Iterator[Part]:
    """The parts of one lane (``scheduler`` or ``worker``), one after the other."""
    if lane == "worker":
        yield from _worker_parts(trace, process, number, view)
        return
    records: list[Record] = []
    facts: list[Fact] = []
    teller = _Light(number) if view.light else None
    places = _Places()
    for record in fresh_reading(trace).records():
        event: Any = record.event
        kind = type(event)
        if record.process != process or kind not in _MAKE:
            continue
        if kind is StepScheduled:
            places.note(event)
        ends = kind is StepScheduled or kind is StepUpdated
        if ends and places.is_idle(event.step):
            continue
        records.append(record)
        told = record
        if view.more_free and hasattr(event, "num_free_blocks"):
            free = event.num_free_blocks + view.more_free
            told = record._replace(event=msgspec.structs.replace(event, num_free_blocks=free))
        fact = teller.fact(told) if teller else _fact(told, _MAKE[kind], number, view)
        if fact is not None:
            facts.append(fact)
        if ends:
            yield Part((places.of(event.step), int(kind is StepUpdated)), records, facts)
            records, facts = [], []
    if records:
        yield Part((END, 0), records, facts)


def _worker_parts(trace: Trace, process: int, number: Number, view: View) -> Iterator[Part]:
    """A part for each step that the worker ran."""
    records: list[Record] = []
    facts: list[Fact] = []
    places = _Places()
    step = 0
    for record in fresh_reading(trace).records():
        event: Any = record.event
        kind = type(event)
        if kind is StepScheduled:
            places.note(event)
        if record.process != process or kind not in _WORKER:
            continue
        if event.step != step:
            if facts:
                yield Part((places.of(step), 0), records, facts)
            records, facts, step = [], [], event.step
        records.append(record)
        facts.append(_fact(record, _WORKER[kind], number, view))
    if facts:
        yield Part((places.of(step), 0), records, facts)


def _fact(
    record: Record, make: Callable[[Any, Number], _Parts], number: Number, view: View
) -> Fact:
    event = record.event
    plain, blocks, hashes = make(event, number)
    if not view.tokens and type(event) is StepUpdated:
        plain = plain[:1]
    return Fact(record.number, event.kind, plain, blocks, hashes if view.hashes else (), event)


class _Light:
    """Tells a trace as level ``light`` would: who ran, when, and how full the pool was."""

    def __init__(self, number: Number) -> None:
        self.number = number

    def fact(self, record: Record) -> Fact | None:
        event: Any = record.event
        kind = type(event)
        if kind not in LIGHT:
            return None
        if kind is StepScheduled:
            plain = _step(event, self.number)
        else:
            plain, _, _ = _MAKE[kind](event, self.number)
        return Fact(record.number, event.kind, plain, (), (), event)
