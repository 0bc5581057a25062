"""The fold behind ``explain``: one request's events, gathered into the lines of its life.

It keeps what concerns the request, the state of the pool, and the waiting queue; nothing grows
with the trace. Facts of a call come before the call ("inner before outer"), so what belongs to a
step is known when its ``step.scheduled`` comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
)
from vllm_trace.explain import say
from vllm_trace.explain.cache import HashBook
from vllm_trace.explain.queue import Reason, Refusal, is_spent, reason_of, refusal_of
from vllm_trace.explain.words import flat
from vllm_trace.state import KVState
from vllm_trace.trace import Record


@dataclass
class Line:
    """One thing that happened to the request."""

    event: int
    """Number in ``Trace.records``; 0 for what belongs to no event."""
    kind: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Waiting:
    """Steps in a row in which the request waited for the same reason."""

    reason: Reason
    first_event: int
    first_step: int
    last_event: int = 0
    last_step: int = 0
    num_steps: int = 0
    free: list[int] = field(default_factory=list)
    """Lowest and highest number of free blocks."""


@dataclass
class Chunk:
    """Tokens that one step computed before the request decodes."""

    event: int
    step: int
    first: int
    count: int
    blocks: list[list[int]]
    spent: bool
    """The step had no more tokens to give."""


@dataclass
class Decoding:
    """Steps in a row that decoded."""

    event: int
    first_step: int
    last_step: int
    num_tokens: int = 0
    blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """(event, logical position, block ids) of what it got on the way."""


@dataclass
class Loss:
    """What a preemption took."""

    event: int
    num_tokens: int
    step: int = 0


class Life:
    """Tells the life of one request, event by event."""

    def __init__(self, me: int, names: dict[int, str], seen: Any, light: bool) -> None:
        self.me, self.names, self.light = me, names, light
        self.tokens = seen.token_ids
        self.lines: list[Line] = []
        self.state = KVState()
        self.book = HashBook(me, seen.hashes)
        self.arrival: RequestArrived | None = None
        self.status = ""
        """Empty before it arrived, then ``waiting``, ``running``, ``done``."""
        self.table: list[list[int]] = []
        """As it was last, in logical order."""
        self.goal = 0
        """Tokens to compute before the request decodes."""
        self.queue: dict[int, None] = {}
        self.lookup: PrefixLookedUp | None = None
        """The last one of any request."""
        self.lookup_key: Any = None
        self.refusals: list[Refusal] = []
        self.preempted: list[int] = []
        self.freed: list[tuple[int, BlocksFreed]] = []
        self.evicted: set[int] = set()
        self.allocation: tuple[int, SlotsAllocated] | None = None
        self.left: dict[int, int] = {}
        """Blocks it gave back that nobody took yet → event."""
        self.waiting: Waiting | None = None
        self.chunks: list[Chunk] = []
        self.decoding: Decoding | None = None
        self.idle: list[tuple[int, StepScheduled]] = []
        self.loss: Loss | None = None
        self.num_preemptions = 0
        self.last_number = 0

    def take(self, record: Record) -> None:
        """Take in one event of the process that scheduled the request."""
        handler = _HANDLERS.get(type(record.event))
        self.last_number = record.number
        if handler is not None:
            handler(self, record.number, record.event)
        self.state.apply(record.event)

    def done(self) -> list[Line]:
        """All lines in the order of their events."""
        self._flush()
        if self.allocation is not None:  # the trace ends within the schedule
            self._got(*self.allocation)
        if self.status in ("waiting", "running"):
            text = say.still(self.status, self.state.tables.get(self.me) or [])
            self._say(0, "unfinished", text, status=self.status)
        if self.left:
            left = sorted(self.left)
            self._say(0, "never taken", say.never_taken(left), blocks=left)
        return sorted(self.lines, key=lambda line: line.event or 1 << 62)

    def name(self, request: int) -> str:
        return self.names.get(request, f"#{request}")

    def _say(self, event: int, kind: str, text: str, **facts: Any) -> None:
        self.lines.append(Line(event, kind, text, facts))

    def _names(self, requests: Sequence[int]) -> list[str]:
        return [self.name(request) for request in requests]

    # Arrival and the prefix cache -------------------------------------------------------

    def _configured(self, number: int, event: EngineConfigured) -> None:
        self.book.configured(event)
        self.queue.clear()

    def _arrived(self, number: int, event: RequestArrived) -> None:
        self.book.arrived(event, self.tokens)
        if event.request == self.me:
            self.arrival, self.status = event, "waiting"
            self.goal = event.num_prompt_tokens
            ahead = self._names(list(self.queue))
            self._say(number, "arrived", say.arrived(event, ahead), ahead=ahead)
        self.queue[event.request] = None

    def _looked_up(self, number: int, event: PrefixLookedUp) -> None:
        self.lookup = event
        if event.request != self.me:
            return
        self.status = self.status or "waiting"
        self.goal = max(self.goal, event.num_tokens)
        miss = self.book.looked_up(event)
        key = (event.num_tokens, event.num_hit_tokens, miss.cause, miss.lost_event)
        if key == self.lookup_key:
            return  # asked again in every step while it waits
        self.lookup_key = key
        self._end_waiting()
        text = say.looked_up(event, miss, self.name, self.book.config)
        facts = {"num_tokens": event.num_tokens, "num_hit_tokens": event.num_hit_tokens}
        self._say(number, "looked up", text, **facts, blocks=event.blocks, miss=miss.to_dict())

    def _cached(self, number: int, event: BlocksCached) -> None:
        self.book.cached(number, event)

    def _evicted(self, number: int, event: BlockEvicted) -> None:
        self.book.evicted(number, event)
        self.evicted.add(event.block)

    def _reset(self, number: int, event: PrefixCacheReset) -> None:
        if event.ok:
            self.book.reset(number)

    # Blocks -----------------------------------------------------------------------------

    def _refused(self, number: int, event: SlotsRefused) -> None:
        lookup = self.lookup
        known = lookup is not None and lookup.request == event.request
        num_tokens = lookup.num_tokens if lookup is not None and known else 0
        hits = lookup.blocks if lookup is not None and known else []
        self.refusals.append(refusal_of(self.state, number, event, num_tokens, hits))
        self.freed.clear()

    def _allocated(self, number: int, event: SlotsAllocated) -> None:
        self.book.took(event.request)
        self.freed.clear()  # a sliding window moved on
        if event.request == self.me:
            self.allocation = (number, event)
        self._pass_on(number, event.request, flat(event.blocks), flat(event.hit_blocks))
        self.evicted.clear()

    def _pass_on(self, number: int, request: int, new: list[int], hits: list[int]) -> None:
        """Somebody got blocks that the request had given back."""
        taken = [block for block in new if block in self.left]
        found = [block for block in hits if block in self.left]
        for block in (*taken, *found):
            del self.left[block]
        if request == self.me or not (taken or found):
            return
        lost = [block for block in taken if block in self.evicted]
        text = say.passed_on(self.name(request), taken, found, lost)
        facts = {"to": self.name(request), "taken": taken, "hit": found, "evicted": lost}
        self._say(number, "passed on", text, **facts)

    def _freed(self, number: int, event: BlocksFreed) -> None:
        self.freed.append((number, event))

    def _request_freed(self, number: int, event: RequestFreed) -> None:
        if event.request == self.me:
            self.table = self.state.tables.get(self.me) or self.table
        else:
            self.freed.clear()

    def _give_back(self) -> dict[str, Any]:
        """What the ``blocks.freed`` just before said, as facts for a line."""
        table = self.state.tables.get(self.me) or self.table
        given: list[int] = []
        shared: list[int] = []
        event = 0
        for number, freed in self.freed:
            event = event or number
            for block, count in zip(freed.blocks, freed.ref_cnts):
                (shared if count else given).append(block)
        if self.light:
            others = {
                b for r, rows in self.state.tables.items() if r != self.me for b in flat(rows)
            }
            given = [block for block in flat(table)[::-1] if block not in others]
        self.left |= dict.fromkeys((block for block in given if block), event)
        self.freed.clear()
        self.table = []
        facts = {"table": table, "freed": given, "still_held": shared, "freed_event": event}
        return facts | {"holders": self._holders(shared)}

    def _holders(self, blocks: list[int]) -> list[str]:
        """Other requests with one of the blocks in their table."""
        wanted = set(blocks)
        tables = self.state.tables.items() if wanted else ()
        found = [r for r, rows in tables if r != self.me and not wanted.isdisjoint(flat(rows))]
        return self._names(found)

    # Steps ------------------------------------------------------------------------------

    def _scheduled(self, number: int, event: StepScheduled) -> None:
        if self.loss is not None and not self.loss.step:
            self.loss.step = event.step
        counts = dict(zip(event.requests or (), event.num_tokens or ()))
        if self.me in counts:
            self._in_step(number, event, counts[self.me])
        elif self.status == "waiting":
            self._not_in_step(number, event)
        elif self.status == "running":
            self.idle.append((number, event))
        for request in (*event.new, *event.resumed):
            self.queue.pop(request, None)
        self.refusals.clear()
        self.preempted.clear()
        self.allocation = None

    def _not_in_step(self, number: int, event: StepScheduled) -> None:
        own = next((r for r in self.refusals if r.request == self.me), None)
        settings = self.state.config.settings if self.state.config else {}
        preempted = self.preempted or event.preempted
        reason = reason_of(event, own, self.refusals, preempted, settings)
        if self.me in preempted:
            return  # the step that preempted it
        waiting = self.waiting
        free = own.num_free if own else event.num_free_blocks
        at = own.event if own else number
        if waiting is None or waiting.reason != reason:
            self._end_waiting()
            waiting = self.waiting = Waiting(reason, at, event.step, free=[free, free])
        waiting.last_event, waiting.last_step = at, event.step
        waiting.num_steps += 1
        waiting.free = [min(free, waiting.free[0]), max(free, waiting.free[1])]

    def _end_waiting(self) -> None:
        waiting, self.waiting = self.waiting, None
        if waiting is None:
            return
        settings = self.state.config.settings if self.state.config else {}
        text = say.waited(waiting, self.name, settings, self.light)
        self._say(
            waiting.first_event,
            "waited",
            text,
            reason=waiting.reason.kind,
            steps=[waiting.first_step, waiting.last_step],
            num_steps=waiting.num_steps,
            events=[waiting.first_event, waiting.last_event],
            wanted=waiting.reason.wanted,
            free=waiting.free,
        )

    def _in_step(self, number: int, event: StepScheduled, count: int) -> None:
        self._end_waiting()
        self._end_idle()
        admitted = self.status != "running"
        allocation, self.allocation = self.allocation, None
        if admitted:
            self.status, self.lookup_key = "running", None
            self._admitted(number, event, allocation)
        before = self.state.computed.get(self.me, 0)
        got = allocation[1].blocks if allocation and not admitted else []
        settings = self.state.config.settings if self.state.config else {}
        computes = (admitted or count > 1) if self.light else before < self.goal
        if computes:
            spent = is_spent(event, settings)
            self.chunks.append(Chunk(number, event.step, before, count, got, spent))
            if before + count >= self.goal:
                self._end_chunks()
            return
        self._end_chunks()
        if self.decoding is None:
            self.decoding = Decoding(number, event.step, event.step)
        self.decoding.last_step = event.step
        self.decoding.num_tokens += count
        if allocation and flat(got):
            held = self.state.tables.get(self.me) or [[]]
            place = len(held[0]) - len(got[0])
            self.decoding.blocks.append((allocation[0], place, flat(got)))

    def _admitted(self, number: int, event: StepScheduled, allocation: Any) -> None:
        if self.loss is not None:
            hit = allocation[1].num_hit_tokens if allocation else 0
            text = say.resumed(event, self.loss, hit, self.light)
            facts = {"step": event.step, "num_steps": event.step - self.loss.step}
            if not self.light:
                facts |= {"num_lost_tokens": self.loss.num_tokens, "num_hit_tokens": hit}
            self._say(number, "resumed", text, **facts)
        if allocation is not None:
            self._got(*allocation)

    def _got(self, number: int, made: SlotsAllocated) -> None:
        facts = {"blocks": made.blocks, "hit_blocks": made.hit_blocks}
        text = say.got(made)
        self._say(number, "got", text, **facts, num_free=made.num_free_blocks)

    # What ends a run of steps -----------------------------------------------------------

    def _flush(self) -> None:
        self._end_waiting()
        self._end_chunks()
        self._end_idle()
        self._end_decoding()

    def _end_chunks(self) -> None:
        chunks, self.chunks = self.chunks, []
        if not chunks:
            return
        again, self.loss = self.loss is not None, None
        for event, text, shown in say.chunks(chunks, self.goal, again, self.light):
            rows = [[c.step, c.first, c.first + c.count - 1, flat(c.blocks)] for c in shown]
            self._say(event, "computed", text, chunks=rows, again=again)

    def _end_idle(self) -> None:
        idle, self.idle = self.idle, []
        if not idle:
            return
        self._end_chunks()
        self._end_decoding()
        settings = self.state.config.settings if self.state.config else {}
        spent = all(is_spent(step, settings) for _, step in idle)
        first, last = idle[0][1].step, idle[-1][1].step
        text = say.idle(first, last, spent)
        self._say(idle[0][0], "idle", text, steps=[first, last], spent=spent)

    def _end_decoding(self) -> None:
        made, self.decoding = self.decoding, None
        if made is None:
            return
        self._say(
            made.event,
            "decoded",
            say.decoded(made),
            steps=[made.first_step, made.last_step],
            num_tokens=made.num_tokens,
            blocks=[list(block) for block in made.blocks],
        )

    # Preemption and the end -------------------------------------------------------------

    def _preempted(self, number: int, event: RequestPreempted) -> None:
        self.preempted.append(event.request)
        self.queue = {event.request: None} | self.queue
        why = next((r for r in reversed(self.refusals) if r.running), None)
        if event.request == self.me:
            self._flush()
            self.num_preemptions += 1
            facts = self._give_back()
            by = self.name(why.request) if why else None
            text = say.preempted(event, why, by, self.me, facts)
            facts |= {"for": by, "num_lost_tokens": event.num_computed_tokens}
            self._say(number, "preempted", text, **facts, refused_event=why.event if why else 0)
            self.status, self.lookup_key = "waiting", None
            self.loss = Loss(number, event.num_computed_tokens)
        else:
            self.freed.clear()
            if why is not None and why.request == self.me:
                text = say.made_room(why, self.name(event.request), number)
                self._say(why.event, "made room", text, preempted=self.name(event.request))

    def _finished(self, number: int, event: RequestFinished) -> None:
        self.queue.pop(event.request, None)
        if event.request == self.me:
            self._flush()
            facts = self._give_back()
            text = say.finished(event, facts, self.status, self.light)
            tokens = {"num_output_tokens": event.num_output_tokens, "reason": event.reason}
            self._say(number, "finished", text, **tokens, **facts)
            self.status = "done"


_HANDLERS: dict[type, Any] = {
    EngineConfigured: Life._configured,
    RequestArrived: Life._arrived,
    PrefixLookedUp: Life._looked_up,
    BlocksCached: Life._cached,
    BlockEvicted: Life._evicted,
    PrefixCacheReset: Life._reset,
    SlotsRefused: Life._refused,
    SlotsAllocated: Life._allocated,
    BlocksFreed: Life._freed,
    RequestFreed: Life._request_freed,
    StepScheduled: Life._scheduled,
    RequestPreempted: Life._preempted,
    RequestFinished: Life._finished,
}
