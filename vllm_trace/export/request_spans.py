"""The trace of one request: what it waited for, got, computed and gave back.

A ``Life`` gathers a request's spans as the engine's fold (``engine_spans``) tells it what happened.
Each span is emitted when it is finished, children first, the root last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_trace.events import (
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.explain.cache import Miss
from vllm_trace.export.forms import (
    ABORT,
    ALLOCATE,
    DECODE,
    DECODE_STEP,
    FIRST_TOKEN,
    FREE,
    LLM_REQUEST,
    PREEMPT,
    PREFILL,
    PREFIX_LOOKUP,
    QUEUED,
    REFUSED,
    SCHEDULE,
    TRACE_ENDED,
)
from vllm_trace.export.prefix import Lookup
from vllm_trace.export.request_facts import arrival_facts, sampling_facts
from vllm_trace.export.span import (
    Form,
    Ids,
    Link,
    SpanEvent,
    Traceparent,
    hashed,
    read_traceparent,
)
from vllm_trace.export.step_log import LogEvents, Piece
from vllm_trace.state import NULL_BLOCK

MAX_IDS = 128
"""Block ids in an attribute; their number stands beside them."""

MAX_REFUSALS = 128
"""Events ``refused`` of one wait; all of them are counted."""

FRONT_END_S = 600
"""A front end that took a request longer before the scheduler than this has another clock."""

FAILED = ("abort", "error")
"""vLLM's reasons that make the status ERROR."""


class Chunk:
    """Prompt tokens that one step computes."""

    __slots__ = ("before", "count", "life", "place", "started_ns", "step")

    def __init__(
        self, life: Life, place: int, step: int, before: int, count: int, started: int
    ) -> None:
        self.life, self.place, self.step = life, place, step
        self.before, self.count, self.started_ns = before, count, started


class Life:
    """One request that is not finished.

    ``engine`` gives what all requests of it share: ``emit``, ``offset``, ``resource``, ``decodes``.
    """

    def __init__(
        self, engine: Any, number: int, arrival: RequestArrived | None, at_ns: int
    ) -> None:
        self.engine = engine
        self.number = number
        self.arrival = arrival
        self.name = arrival.request_id if arrival is not None else engine.names.get(number, "")
        self.started_ns = self.latest_ns = at_ns
        self.remote: Traceparent | None = None
        if arrival is not None and arrival.traceparent:
            self.remote = read_traceparent(arrival.traceparent)
        made = hashed(engine.identity, number, self.name, size=24)
        self.trace_id = self.remote.trace_id if self.remote else made[:16]
        self.ids = Ids(int.from_bytes(made[16:], "big"))
        self.root_id = self.ids.at(0)
        self.sampled = engine.sampler(self.trace_id, self.remote)
        engine.num_unsampled += not self.sampled
        self.queued_since = at_ns
        self.goal = arrival.num_prompt_tokens if arrival is not None else 0
        """Tokens to compute before it decodes."""
        self.parent = self.root_id
        """Of the spans of calls in the current step."""
        self.refused: list[SpanEvent] = []
        self.ranges: list[tuple[int, int]] = []
        self.exceptions: dict[int, int] = {}
        """Place in the log → tokens, where it was not one."""
        self.refused_running: list[SpanEvent] = []
        self.root_events: list[SpanEvent] = []
        self.token_ids: list[int] = []

    # Where it stands.
    waiting = True
    resumed = False
    computed = 0
    parent_step = -1
    lookup: Lookup | None = None
    num_lookups = 0
    num_refused = 0
    ended: RequestFinished | None = None
    # The decode that is going on.
    decode_id = b""
    open = -1
    """Place in the log where its current range began; -1 when it is in no range."""
    decode_ns = 0
    num_new_blocks = 0
    # In all.
    num_output = 0
    num_hit: int | None = None
    num_chunks = 0
    num_steps = 0
    num_preemptions = 0
    num_refusals = 0
    queued_ns = 0
    first_token_ns = 0
    last_chunk_ns = 0

    # Spans ----------------------------------------------------------------------------

    def add(
        self,
        form: Form,
        start_ns: int,
        end_ns: int,
        values: tuple[Any, ...],
        parent: bytes = b"",
        span_id: bytes = b"",
        events: Any = (),
        links: Any = (),
        dropped: int = 0,
    ) -> bytes:
        """Emit a child. Returns its id."""
        span_id = span_id or self.ids.next()
        # A trace can say anything of its times; a span does not leave its parent.
        if start_ns < self.started_ns:
            start_ns = self.started_ns
        if end_ns < start_ns:
            end_ns = start_ns
        if end_ns > self.latest_ns:
            self.latest_ns = end_ns
        if self.sampled:
            engine = self.engine
            offset = engine.offset
            engine.emit(
                engine.resource, form, self.trace_id, span_id, parent or self.root_id,
                start_ns + offset, end_ns + offset, values, events, links, "", False, dropped,
            )  # fmt: skip
        return span_id

    def link(self) -> Link:
        return Link(self.trace_id, self.root_id)

    def event(self, form: Form, at_ns: int, values: tuple[Any, ...] = ()) -> SpanEvent:
        return SpanEvent(form, at_ns + self.engine.offset, values)

    # Waiting --------------------------------------------------------------------------

    def refuse(self, event: SlotsRefused, step: int, at_ns: int) -> None:
        """``allocate_slots`` said no."""
        values = (step, event.num_free_blocks, event.num_hit_tokens)
        made = self.event(REFUSED, at_ns, values)
        self.num_refusals += 1
        if not self.waiting:
            if len(self.refused_running) < MAX_REFUSALS:
                self.refused_running.append(made)
            return
        self.num_refused += 1
        if len(self.refused) < MAX_REFUSALS:
            self.refused.append(made)

    def admit(self, at_ns: int) -> None:
        """It waits no longer."""
        self._end_wait(at_ns)

    def _end_wait(self, at_ns: int, incomplete: bool | None = None) -> None:
        self.waiting = False
        if self.arrival is None and not self.resumed:
            return
        values = (self.num_refused or None, self.resumed or None, incomplete)
        self.add(
            QUEUED, self.queued_since, at_ns, values, events=self.refused,
            dropped=self.num_refused - len(self.refused),
        )  # fmt: skip
        self.queued_ns += max(0, at_ns - self.queued_since)
        self.refused, self.num_refused = [], 0

    # Computing the prompt -------------------------------------------------------------

    def schedule(self, plan: StepScheduled, place: int, count: int) -> Chunk:
        """A step gives it ``count`` tokens of the prompt."""
        resumed = self.number in plan.resumed or None
        queues = (plan.num_running, plan.num_waiting, resumed)
        values = (plan.step, count, self.computed, queues)
        end = plan.started_ns + plan.dur_ns
        link = self.engine.step_ids.link(plan.step)
        self.parent = self.add(SCHEDULE, plan.started_ns, end, values, links=(link,))
        self.parent_step = plan.step
        self.num_chunks += 1
        self.num_steps += 1
        chunk = Chunk(self, place, plan.step, self.computed, count, end)
        self.computed += count
        return chunk

    def end_chunk(
        self, chunk: Chunk, end_ns: int, output: int | None, incomplete: bool | None = None
    ) -> None:
        """The results of a chunk are in."""
        values = (chunk.step, chunk.count, chunk.before, output, incomplete)
        if output is not None:
            self.num_output += output
            if output and not self.first_token_ns:
                self.first_token_ns = end_ns
        link = self.engine.step_ids.link(chunk.step)
        self.add(PREFILL, chunk.started_ns, end_ns, values, links=(link,))
        self.last_chunk_ns = end_ns

    # Calls of the KV-cache manager ----------------------------------------------------

    def look_up(self, step: int, at_ns: int) -> None:
        """What the prefix cache had when it was admitted."""
        assert self.lookup is not None
        event, miss, self.lookup = self.lookup.event, self.lookup.miss, None
        if miss is None:  # its call was refused, and another succeeded without a lookup
            miss = Miss("unknown", 0, 0)
        config, expected = self.engine.history.config, None
        if config is not None:
            unit = config.block_size
            caching = config.settings.get("enable_prefix_caching", True)
            expected = (event.num_tokens - 1) // unit * unit if caching else 0
        values = (
            event.num_hit_tokens,
            expected,
            (miss.cause, self.num_lookups),
            miss.index if miss.index >= 0 else None,
            self.engine.name_of(miss.taker) if miss.taker >= 0 else None,
        )
        self.num_lookups = 0
        parent = self.parent if self.parent_step == step else self.decode_id
        self.add(PREFIX_LOOKUP, at_ns, at_ns, values, parent)

    def allocate(self, told: tuple[SlotsAllocated, int | None, int], step: int, at_ns: int) -> None:
        """It got blocks. ``told``: the event, free blocks before it, blocks evicted for it."""
        event, before, evicted = told
        if self.lookup is not None:
            if self.num_hit is None:
                self.num_hit = event.num_hit_tokens
            self.look_up(step, at_ns)
            at_ns += 1
        blocks = event.blocks
        new = blocks[0] if len(blocks) == 1 else [b for row in blocks for b in row]
        ids = tuple(new if len(new) <= MAX_IDS else new[:MAX_IDS])
        values: tuple[Any, ...] = (len(new), ids, event.num_free_blocks, before)
        if evicted or event.num_hit_tokens:
            values += (evicted or None, *self._hits(event))
        if self.decode_id:
            self.num_new_blocks += len(new)
        parent = self.parent if self.parent_step == step else self.decode_id
        self.add(ALLOCATE, at_ns, at_ns, values, parent)

    @staticmethod
    def _hits(event: SlotsAllocated) -> tuple[int, tuple[int, ...]] | tuple[()]:
        if not event.num_hit_tokens:
            return ()
        hits = [block for row in event.hit_blocks for block in row if block != NULL_BLOCK]
        return event.num_hit_tokens, tuple(hits[:MAX_IDS])

    def free(self, told: tuple[list[int], int, Any, Any], step: int, at_ns: int) -> None:
        """Its blocks went back. ``told``: they, how many others hold, free blocks before and after."""
        blocks, held, before, after = told
        if before is None or after is None:
            before = after = None
        self.add(FREE, at_ns, at_ns, (len(blocks), tuple(blocks[:MAX_IDS]), held, before, after))

    def preempt(self, told: tuple[RequestPreempted, str], step: int, at_ns: int) -> None:
        """It waits again, from now on. ``told``: the event, and for whom it gave way."""
        event, cause = told
        values = (step or None, event.num_computed_tokens, event.num_free_blocks, cause or None)
        self.num_preemptions += 1
        # Refused in this very call, and itself the one to give way.
        self.root_events += self.refused_running + self.refused
        self.refused, self.refused_running, self.num_refused = [], [], 0
        self.add(PREEMPT, at_ns, at_ns, values)
        self.queued_since = at_ns

    # Decoding -------------------------------------------------------------------------

    def begin_decode(self, plan: StepScheduled) -> None:
        """From this step on it generates."""
        self.decode_id = self.ids.next()
        self.decode_ns = plan.started_ns
        self.num_new_blocks = 0
        if not self.first_token_ns and self.last_chunk_ns and self.engine.light:
            self.first_token_ns = self.last_chunk_ns

    def leave_range(self, end: int) -> None:
        """It is not in the steps of the log from ``end`` on."""
        if self.open >= 0:
            if end > self.open:
                self.ranges.append((self.open, end))
            self.open = -1

    def end_decode(self, end_ns: int = 0, incomplete: bool | None = None) -> None:
        """Emit the decode that was going on; ``end_ns`` where its last step was cut short."""
        if not self.decode_id:
            return
        engine = self.engine
        log = engine.decodes.log
        self.leave_range(log.end)
        pieces: list[Piece] = []
        tokens = 0
        latest = end_ns or engine.last_ns
        for begin, last in self.ranges:
            tokens += self._add_pieces(pieces, begin, last, latest)
        events: Sequence[SpanEvent] = LogEvents(log, pieces)
        if engine.full:
            self.num_output += tokens
        links: tuple[Link, ...] = ()
        end, count = self.decode_ns, len(events)
        first_step = last_step = None
        if count:
            first_step, last_step = events[0].values[0], events[-1].values[0]
            links = (engine.step_ids.link(first_step),)
            if last_step != first_step:
                links += (engine.step_ids.link(last_step),)
            end = max(end, events[-1].at_ns - engine.offset)
        end = end_ns or end
        self.num_steps += count
        values = (
            tokens if engine.full else None, count or None, first_step, last_step,
            self.num_new_blocks or None, incomplete,
        )  # fmt: skip
        if self.refused_running:
            events = self._with_refusals(events, end + engine.offset)
        self.add(
            DECODE, self.decode_ns, end, values, span_id=self.decode_id,
            events=events, links=links,
        )  # fmt: skip
        self.decode_id, self.ranges, self.exceptions = b"", [], {}

    def _with_refusals(self, events: Sequence[SpanEvent], until: int) -> list[SpanEvent]:
        """The refusals of a decode among its steps, in the order of time; later ones still wait."""
        within = [event for event in self.refused_running if event.at_ns <= until]
        self.refused_running = self.refused_running[len(within) :]
        return sorted([*events, *within], key=lambda event: event.at_ns)

    def _add_pieces(self, pieces: list[Piece], begin: int, end: int, latest: int) -> int:
        """Add a range of the log as it is, and events of its own where it did not get one token.

        A step whose results are not in brought none, as far as this request is concerned. Returns
        the tokens that the range brought.
        """
        engine, decodes = self.engine, self.engine.decodes
        log = decodes.log
        own: dict[int, SpanEvent] = {}
        tokens, later = end - begin, False
        for place in decodes.in_flight.values():
            if begin <= place < end:
                self.exceptions.setdefault(place, 0)
                shared = log.at(place)
                own[place] = SpanEvent(shared.form, latest + engine.offset, shared.values)
            elif place < begin:
                later = True
        if engine.full:
            for place, count in self.exceptions.items():
                if begin <= place < end:
                    shared = own.get(place) or log.at(place)
                    values = (shared.values[0], count)
                    own[place] = SpanEvent(shared.form, shared.at_ns, values)
                    tokens += count - 1
        if later:  # a step before this range still changes: the log cannot be taken as it is
            for place in range(begin, end):
                own.setdefault(place, log.at(place))
        for place in sorted(own):
            if begin < place:
                pieces.append((begin, place))
            pieces.append(own[place])
            begin = place + 1
        if begin < end:
            pieces.append((begin, end))
        return tokens

    def add_decode_step(self, started: int, updated: StepUpdated, count: int | None) -> None:
        """With ``--detail``: a span for one step of the decode."""
        link = self.engine.step_ids.link(updated.step)
        end = updated.started_ns
        if self.ended is not None:
            end = min(end, self.ended.at_ns)
        values = (updated.step, count)
        self.add(DECODE_STEP, started, end, values, parent=self.decode_id, links=(link,))

    # The root -------------------------------------------------------------------------

    def finish(self, last_ns: int = 0) -> None:
        """Emit what is open and the root. ``last_ns``: the trace ended here, and not the request."""
        ended = self.ended
        end = ended.at_ns if ended is not None else max(last_ns, self.started_ns)
        incomplete = None if ended is not None else True
        if self.waiting:
            self._end_wait(end, incomplete)
        self.end_decode(end, incomplete)
        if not self.sampled:
            return
        end = max(end, self.latest_ns)
        start, first_token = self._root_start(), None
        events = self.root_events + self.refused_running
        if self.first_token_ns:
            at = min(self.first_token_ns, end)
            first_token = at - start
            events.append(self.event(FIRST_TOKEN, at))
        reason = ended.reason if ended is not None else ""
        if reason == "abort":
            events.append(self.event(ABORT, end))
        if ended is None:
            events.append(self.event(TRACE_ENDED, end))
        if self.arrival is None:
            incomplete = True
        if len(events) > 1:
            events.sort(key=lambda event: event.at_ns)
        engine = self.engine
        offset = engine.offset
        engine.emit(
            engine.resource, LLM_REQUEST, self.trace_id, self.root_id,
            self.remote.span_id if self.remote else b"", start + offset, end + offset,
            self._root_values(reason, first_token, incomplete), events, (),
            f"the request ended with {reason!r}" if reason in FAILED else "",
            self.remote is not None,
        )  # fmt: skip

    def _root_start(self) -> int:
        """When the front end took it, as far as the clocks of both agree."""
        if self.arrival is None:
            return self.started_ns
        taken = int(self.arrival.arrival_unix * 1e9) - self.engine.offset
        plausible = 0 <= self.started_ns - taken <= FRONT_END_S * 10**9
        return taken if plausible else self.started_ns

    def _root_values(
        self, reason: str, first_token: int | None, incomplete: bool | None
    ) -> tuple[Any, ...]:
        engine, arrival, ended = self.engine, self.arrival, self.ended
        config = engine.history.config
        model = str(config.settings.get("model") or "") if config is not None else ""
        chat = self.name.startswith("chatcmpl-")
        finish = ((reason,) if reason else None, reason if reason in FAILED else None)
        output, preemptions = self.num_output, self.num_preemptions
        if ended is not None:
            output, preemptions = ended.num_output_tokens, ended.num_preemptions
        prompt_ids = output_ids = None
        if engine.tokens and arrival is not None and arrival.token_ids is not None:
            prompt_ids, output_ids = tuple(arrival.token_ids), tuple(self.token_ids)
        return (
            ("chat" if chat else "text_completion", "vllm", model or None, model or None),
            self.name or f"#{self.number}",
            self.number,
            arrival.num_prompt_tokens if arrival is not None else None,
            sampling_facts(arrival),
            (*arrival_facts(arrival, bool(self.remote)), *finish),
            self.num_hit,
            output if ended is not None or engine.full else None,
            (preemptions, self.num_chunks, self.num_refusals if engine.full else None),
            self.num_steps,
            self.queued_ns,
            first_token,
            incomplete,
            prompt_ids,
            output_ids,
        )
