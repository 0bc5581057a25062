"""The trace of one request: what it waited for, got, computed and gave back.

A ``Life`` gathers a request's spans as the engine's fold (``engine_spans``) tells it what happened.
Each span is emitted when it is finished, children first, the root last.
"""

from __future__ import annotations

from typing import Any

from vllm_trace.events import (
    PrefixLookedUp,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.explain.cache import Miss
from vllm_trace.export import attributes as a
from vllm_trace.export.request_facts import arrival_facts
from vllm_trace.export.span import (
    INTERNAL,
    SERVER,
    Ids,
    Link,
    Span,
    SpanEvent,
    Traceparent,
    hashed,
    read_traceparent,
)
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

    ``engine`` gives what all requests of it share: ``emit``, ``offset``, ``resource``, ``log``.
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
        made = hashed(*engine.identity, number, self.name, size=24)
        self.trace_id = self.remote.trace_id if self.remote else made[:16]
        self.ids = Ids(int.from_bytes(made[16:], "big"))
        self.root_id = self.ids.at(0)
        self.sampled = engine.sampler(self.trace_id, self.remote)
        engine.num_unsampled += not self.sampled
        # Where it stands.
        self.waiting = True
        self.queued_since = at_ns
        self.resumed = False
        self.computed = 0
        self.goal = arrival.num_prompt_tokens if arrival is not None else 0
        """Tokens to compute before it decodes."""
        self.parent = self.root_id
        """Of the spans of calls in the current step."""
        self.parent_step = -1
        self.lookup: tuple[PrefixLookedUp, Miss] | None = None
        self.num_lookups = 0
        self.refused: list[SpanEvent] = []
        self.num_refused = 0
        self.ended: RequestFinished | None = None
        # The decode that is going on.
        self.decode_id = b""
        self.open = -1
        """Place in the log where its current range began; -1 when it is in no range."""
        self.ranges: list[tuple[int, int]] = []
        self.decode_ns = 0
        self.exceptions: dict[int, int] = {}
        """Place in the log → tokens, where it was not one."""
        self.refused_running: list[SpanEvent] = []
        self.root_events: list[SpanEvent] = []
        self.num_new_blocks = 0
        # In all.
        self.num_output = 0
        self.num_hit: int | None = None
        self.num_chunks = self.num_steps = self.num_preemptions = self.num_refusals = 0
        self.queued_ns = 0
        self.first_token_ns = 0
        self.last_chunk_ns = 0
        self.token_ids: list[int] = []

    # Spans ----------------------------------------------------------------------------

    def add(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: dict[str, Any],
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
                Span(
                    self.trace_id, span_id, parent or self.root_id, name, start_ns + offset,
                    end_ns + offset, engine.resource, attributes, INTERNAL, events, links, "", False,
                    dropped,
                )
            )  # fmt: skip
        return span_id

    def link(self) -> Link:
        return Link(self.trace_id, self.root_id)

    def event(self, name: str, at_ns: int, attributes: dict[str, Any]) -> SpanEvent:
        return SpanEvent(at_ns + self.engine.offset, name, attributes)

    # Waiting --------------------------------------------------------------------------

    def refuse(self, event: SlotsRefused, step: int, at_ns: int) -> None:
        """``allocate_slots`` said no."""
        facts = {a.STEP: step, a.FREE_AFTER: event.num_free_blocks, a.NUM_HIT: event.num_hit_tokens}
        made = self.event("refused", at_ns, facts)
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
        self._end_wait(at_ns, {})

    def _end_wait(self, at_ns: int, facts: dict[str, Any]) -> None:
        self.waiting = False
        if self.arrival is None and not self.resumed:
            return
        if self.num_refused:
            facts[a.NUM_REFUSALS] = self.num_refused
        if self.resumed:
            facts[a.RESUMED] = True
        self.add(
            "queued", self.queued_since, at_ns, facts, events=self.refused,
            dropped=self.num_refused - len(self.refused),
        )  # fmt: skip
        self.queued_ns += max(0, at_ns - self.queued_since)
        self.refused, self.num_refused = [], 0

    # Computing the prompt -------------------------------------------------------------

    def schedule(self, plan: StepScheduled, place: int, count: int, link: Link) -> Chunk:
        """A step gives it ``count`` tokens of the prompt."""
        facts = {
            a.STEP: plan.step,
            a.NUM_TOKENS: count,
            a.NUM_COMPUTED: self.computed,
            a.NUM_RUNNING: plan.num_running,
            a.NUM_WAITING: plan.num_waiting,
        }
        if plan.resumed and self.number in plan.resumed:
            facts[a.RESUMED] = True
        end = plan.started_ns + plan.dur_ns
        self.parent = self.add("schedule", plan.started_ns, end, facts, links=(link,))
        self.parent_step = plan.step
        self.num_chunks += 1
        self.num_steps += 1
        chunk = Chunk(self, place, plan.step, self.computed, count, end)
        self.computed += count
        return chunk

    def end_chunk(self, chunk: Chunk, end_ns: int, output: int | None, **more: Any) -> None:
        """The results of a chunk are in."""
        facts = {a.STEP: chunk.step, a.NUM_TOKENS: chunk.count, a.NUM_COMPUTED: chunk.before} | more
        if output is not None:
            facts[a.NUM_OUTPUT] = output
            self.num_output += output
            if output and not self.first_token_ns:
                self.first_token_ns = end_ns
        link = self.engine.step_ids.link(chunk.step)
        self.add("prefill", chunk.started_ns, end_ns, facts, links=(link,))
        self.last_chunk_ns = end_ns

    # Calls of the KV-cache manager ----------------------------------------------------

    def call_parent(self, step: int) -> bytes:
        """The span that stands for what the current step does for this request."""
        if self.parent_step == step:
            return self.parent
        return self.decode_id or self.root_id

    def look_up(self, step: int, at_ns: int) -> None:
        """What the prefix cache had when it was admitted."""
        assert self.lookup is not None
        (event, miss), self.lookup = self.lookup, None
        config = self.engine.history.config
        facts: dict[str, Any] = {
            a.MATCHED: event.num_hit_tokens,
            a.REASON: miss.cause,
            a.NUM_LOOKUPS: self.num_lookups,
        }
        if config is not None:
            unit = config.block_size
            caching = config.settings.get("enable_prefix_caching", True)
            facts[a.EXPECTED] = (event.num_tokens - 1) // unit * unit if caching else 0
        if miss.index >= 0:
            facts[a.MISSING_BLOCK] = miss.index
        if miss.taker >= 0:
            facts[a.EVICTED_BY] = self.engine.name_of(miss.taker)
        self.num_lookups = 0
        self.add("prefix_lookup", at_ns, at_ns, facts, self.call_parent(step))

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
        facts: dict[str, Any] = {
            a.NUM_NEW_BLOCKS: len(new),
            a.NEW_BLOCKS: tuple(new[:MAX_IDS] if len(new) > MAX_IDS else new),
            a.FREE_AFTER: event.num_free_blocks,
        }
        if before is not None:
            facts[a.FREE_BEFORE] = before
        if evicted:
            facts[a.NUM_EVICTED] = evicted
        if event.num_hit_tokens:
            facts[a.NUM_HIT] = event.num_hit_tokens
            hits = [block for row in event.hit_blocks for block in row if block != NULL_BLOCK]
            facts[a.HIT_BLOCKS] = tuple(hits[:MAX_IDS])
        if self.decode_id:
            self.num_new_blocks += len(new)
        self.add("allocate", at_ns, at_ns, facts, self.call_parent(step))

    def free(self, told: tuple[list[int], int, Any, Any], step: int, at_ns: int) -> None:
        """Its blocks went back. ``told``: they, how many others hold, free blocks before and after."""
        blocks, held, before, after = told
        facts: dict[str, Any] = {
            a.NUM_FREED: len(blocks),
            a.FREED_BLOCKS: tuple(blocks[:MAX_IDS]),
            a.NUM_SHARED: held,
        }
        if before is not None and after is not None:
            facts[a.FREE_BEFORE], facts[a.FREE_AFTER] = before, after
        self.add("free", at_ns, at_ns, facts)

    def preempt(self, told: tuple[RequestPreempted, str], step: int, at_ns: int) -> None:
        """It waits again, from now on. ``told``: the event, and for whom it gave way."""
        event, cause = told
        facts: dict[str, Any] = {
            a.NUM_COMPUTED: event.num_computed_tokens,
            a.FREE_AFTER: event.num_free_blocks,
        }
        if step:
            facts[a.STEP] = step
        if cause:
            facts[a.CAUSED_BY] = cause
        self.num_preemptions += 1
        # Refused in this very call, and itself the one to give way.
        self.root_events += self.refused_running + self.refused
        self.refused, self.refused_running, self.num_refused = [], [], 0
        self.add("preempt", at_ns, at_ns, facts)
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

    def end_decode(self, end_ns: int = 0, **more: Any) -> None:
        """Emit the decode that was going on; ``end_ns`` where its last step was cut short."""
        if not self.decode_id:
            return
        log = self.engine.log
        self.leave_range(log.end)
        events: list[SpanEvent] = []
        tokens: int | None = 0
        latest = end_ns or self.engine.last_ns
        for begin, end in self.ranges:
            part, count = self._events_of(begin, end, latest)
            events += part
            tokens = None if tokens is None or count is None else tokens + count
        if tokens is not None and self.engine.full:
            more[a.NUM_OUTPUT] = tokens
            self.num_output += tokens
        links: tuple[Link, ...] = ()
        offset = self.engine.offset
        end = self.decode_ns
        if events:
            first, last = events[0].attributes[a.STEP], events[-1].attributes[a.STEP]
            more |= {a.NUM_STEPS: len(events), a.FIRST_STEP: first, a.LAST_STEP: last}
            step_ids = self.engine.step_ids
            links = (step_ids.link(first),)
            if last != first:
                links += (step_ids.link(last),)
            end = max(end, events[-1].at_ns - offset)
        end = end_ns or end
        self.num_steps += len(events)
        if self.num_new_blocks:
            more[a.NUM_NEW_BLOCKS] = self.num_new_blocks
        if self.refused_running:
            within = [event for event in self.refused_running if event.at_ns <= end + offset]
            self.refused_running = self.refused_running[len(within) :]
            events = sorted([*events, *within], key=lambda event: event.at_ns)
        self.add(
            "decode", self.decode_ns, end, more, span_id=self.decode_id,
            events=events, links=links,
        )  # fmt: skip
        self.decode_id, self.ranges, self.exceptions = b"", [], {}

    def _events_of(self, begin: int, end: int, latest: int) -> tuple[list[SpanEvent], int | None]:
        """Events of a range and the tokens they brought; the shared ones where each got one.

        A step whose results are not in brought none, as far as this request is concerned.
        """
        engine = self.engine
        events = engine.log.slice(begin, end)
        for place in engine.in_flight.values():
            if begin <= place < end:
                self.exceptions.setdefault(place, 0)
                facts = events[place - begin].attributes
                events[place - begin] = SpanEvent(latest + engine.offset, "step", facts)
        if not engine.full:
            return events, None
        tokens = len(events)
        for place, count in self.exceptions.items():
            if begin <= place < end:
                shared = events[place - begin]
                facts = shared.attributes | {a.NUM_OUTPUT: count}
                events[place - begin] = SpanEvent(shared.at_ns, shared.name, facts)
                tokens += count - 1
        return events, tokens

    def add_decode_step(self, started: int, updated: StepUpdated, count: int | None) -> None:
        """With ``--detail``: a span for one step of the decode."""
        facts: dict[str, Any] = {a.STEP: updated.step}
        if count is not None:
            facts[a.NUM_OUTPUT] = count
        link = self.engine.step_ids.link(updated.step)
        end = updated.started_ns
        if self.ended is not None:
            end = min(end, self.ended.at_ns)
        self.add("decode_step", started, end, facts, parent=self.decode_id, links=(link,))

    # The root -------------------------------------------------------------------------

    def finish(self, last_ns: int = 0) -> None:
        """Emit what is open and the root. ``last_ns``: the trace ended here, and not the request."""
        end = self.ended.at_ns if self.ended is not None else max(last_ns, self.started_ns)
        more: dict[str, Any] = {} if self.ended is not None else {a.INCOMPLETE: True}
        if self.waiting:
            self._end_wait(end, dict(more))
        self.end_decode(end, **more)
        end = max(end, self.latest_ns)
        start = self._root_start()
        events = self.root_events + self.refused_running
        if self.first_token_ns:
            at = min(self.first_token_ns, end)
            more[a.TTFT_NS] = at - start
            events.append(self.event("first_token", at, {}))
        reason = self.ended.reason if self.ended is not None else ""
        if reason == "abort":
            events.append(self.event("abort", end, {}))
        if self.ended is None:
            events.append(self.event("trace_ended", end, {}))
        if self.arrival is None:
            more[a.INCOMPLETE] = True
        if not self.sampled:
            return
        offset = self.engine.offset
        self.engine.emit(
            Span(
                self.trace_id, self.root_id, self.remote.span_id if self.remote else b"",
                "llm_request", start + offset, end + offset, self.engine.resource,
                self._root_facts(more, reason), kind=SERVER,
                events=sorted(events, key=lambda event: event.at_ns),
                error=f"the request ended with {reason!r}" if reason in FAILED else "",
                remote_parent=self.remote is not None,
            )
        )  # fmt: skip

    def _root_start(self) -> int:
        """When the front end took it, as far as the clocks of both agree."""
        if self.arrival is None:
            return self.started_ns
        taken = int(self.arrival.arrival_unix * 1e9) - self.engine.offset
        plausible = 0 <= self.started_ns - taken <= FRONT_END_S * 10**9
        return taken if plausible else self.started_ns

    def _root_facts(self, more: dict[str, Any], reason: str) -> dict[str, Any]:
        chat = self.name.startswith("chatcmpl-")
        facts: dict[str, Any] = {
            a.OPERATION: "chat" if chat else "text_completion",
            a.PROVIDER: "vllm",
            a.REQUEST_ID: self.name or f"#{self.number}",
            a.REQUEST_NUMBER: self.number,
        }
        config = self.engine.history.config
        if config is not None and config.settings.get("model"):
            facts[a.REQUEST_MODEL] = facts[a.RESPONSE_MODEL] = str(config.settings["model"])
        if self.arrival is not None:
            facts |= arrival_facts(self.arrival, bool(self.remote))
        if reason:
            facts[a.FINISH_REASONS] = (reason,)
        if reason in FAILED:
            facts[a.ERROR_TYPE] = reason
        if self.num_hit is not None:
            facts[a.CACHE_READ] = self.num_hit
        output = self.ended.num_output_tokens if self.ended is not None else self.num_output
        if self.ended is not None or self.engine.full:
            facts[a.OUTPUT_TOKENS] = output
        preemptions = self.num_preemptions
        if self.ended is not None:
            preemptions = self.ended.num_preemptions
        facts |= {
            a.NUM_PREEMPTIONS: preemptions,
            a.NUM_CHUNKS: self.num_chunks,
            a.NUM_STEPS: self.num_steps,
            a.QUEUED_NS: self.queued_ns,
        }
        if self.engine.full:
            facts[a.NUM_REFUSALS] = self.num_refusals
        if self.engine.tokens and self.arrival is not None and self.arrival.token_ids is not None:
            facts[a.PROMPT_TOKEN_IDS] = tuple(self.arrival.token_ids)
            facts[a.OUTPUT_TOKEN_IDS] = tuple(self.token_ids)
        return facts | more
