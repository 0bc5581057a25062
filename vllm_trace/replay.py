"""Replays a trace's inputs through ``mini`` and compares every decision with the recorded one.

Two replays of the same trace:

*manager*  the recorded calls of the KV-cache manager, in their order, drive ``mini``'s manager:
           every hit, table, block id, eviction, reference count and free count is compared, and
           the tables and slots that the workers' kernels received.
*engine*   only arrivals, aborts and token outcomes drive ``mini``'s own scheduler, which has to
           come to the same steps, preemptions and blocks by itself.

Facts of a call stand before the call in a trace ("inner before outer"), and the calls of one step
before ``step.scheduled`` or ``step.updated``. So a trace falls into segments, each of which ends
with one of those two, and a segment is replayed as a whole: ``mini`` tells what it does in the
same words, and both lists must be equal.

A replay that could not consume every event is not a pass, and says what it did not judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm_trace.divergence import Divergence, describe
from vllm_trace.errors import TraceError
from vllm_trace.events import (
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
from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, KVCacheManager, SlidingWindowSpec
from vllm_trace.mini.request import Request, RequestStatus
from vllm_trace.mini.rules import rules_for
from vllm_trace.mini.scheduler import Scheduler, SchedulerConfig
from vllm_trace.trace import Record, Trace

Fact = tuple[Any, ...]
"""An event in ``mini``'s words: ``(kind, *fields)``."""

MODES = ("manager", "engine")

FINISHED_BY_OUTPUT = ("stop", "length", "repetition")
"""Reasons that ``update_from_output`` finds; all others come from outside the step."""


@dataclass
class Replayed:
    """What one replay found."""

    mode: str
    num_events: int = 0
    num_consumed: int = 0
    num_compared: int = 0
    """Facts that stood on both sides and were equal."""
    divergence: Divergence | None = None
    not_judged: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        complete = self.num_consumed == self.num_events and self.num_events > 0
        return self.divergence is None and complete and not self.not_judged

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "passed": self.passed,
            "events": self.num_events,
            "consumed": self.num_consumed,
            "compared": self.num_compared,
            "not_judged": self.not_judged,
            "divergence": self.divergence.to_dict() if self.divergence else None,
        }


class Diverged(Exception):
    """Both sides differ: at which event, what was recorded, what ``mini`` did."""

    def __init__(self, number: int, recorded: Fact | None, mini: Fact | None) -> None:
        super().__init__(number)
        self.number, self.recorded, self.mini = number, recorded, mini


def replay(trace: Trace, mode: str) -> Replayed:
    """Replay a trace in one mode.

    Raises: ``TraceError`` when the trace has no engine in it.
    """
    result = Replayed(mode)
    if trace.level == "light":
        result.not_judged.append(
            "level light: blocks and lookups were not recorded, so nothing can be compared"
        )
    driver: _Replay | None = None
    segment: list[Record] = []
    for record in trace.records():
        result.num_events += 1
        event = record.event
        if type(event) is EngineConfigured:
            if result.not_judged:
                continue
            result.not_judged += _unfollowed(event, trace)
            if not result.not_judged:
                driver = _DRIVERS[mode](event, trace)
                segment = []
                result.num_consumed += 1
            continue
        if type(event) is BackendSelected:
            # Chosen before there is an engine; kept for people, not compared.
            result.num_consumed += 1
            continue
        if driver is None or result.not_judged or result.divergence:
            continue
        if type(event) not in _DECISIONS:
            _run(driver, [record], result, trace)
            continue
        segment.append(record)
        if type(event) is StepScheduled or type(event) is StepUpdated:
            _run(driver, segment, result, trace)
            segment = []
    if driver is None and not result.not_judged:
        raise TraceError(
            "this trace has no engine in it", hint="Was the process of the scheduler traced?"
        )
    if driver is not None and segment and result.divergence is None:
        _run(driver, segment, result, trace)
    result.not_judged += trace.problems
    return result


def _run(driver: _Replay, segment: list[Record], result: Replayed, trace: Trace) -> None:
    try:
        driver.take(segment)
    except Diverged as difference:
        result.divergence = describe(difference, driver.manager, driver.history, trace)
    except Exception as error:
        # mini asserts on what cannot be: a block freed twice, a hash that nobody has.
        last = segment[-1].number
        difference = Diverged(last, None, ("mini.refused", f"{type(error).__name__}: {error}"))
        result.divergence = describe(difference, driver.manager, driver.history, trace)
    else:
        result.num_consumed += len(segment)
    result.num_compared = driver.num_compared


def _unfollowed(event: EngineConfigured, trace: Trace) -> list[str]:
    """What this engine has that ``mini`` does not follow."""
    said = []
    for group in event.groups:
        if group.kind not in ("FullAttentionSpec", "SlidingWindowSpec"):
            said.append(f"KV group of kind {group.kind}: mini does not follow it")
    if len({group.block_size for group in event.groups}) > 1:
        said.append("KV groups of different block sizes: mini does not follow them")
    if event.settings.get("num_lookahead_tokens"):
        said.append("speculative decoding: mini does not follow it")
    version = str(trace.header.get("vllm", ""))
    try:
        rules_for(version)
    except ValueError as error:
        said.append(str(error))
    return said


# What mini says and what the trace says, in the same words -------------------------------


def fact_of(event: Event) -> Fact | None:
    """A recorded event as ``mini`` would tell it; None for those that drive the replay."""
    make = _FACTS.get(type(event))
    return make(event) if make is not None else None


_FACTS: dict[type, Any] = {
    BlocksTaken: lambda e: ("blocks.taken", e.blocks),
    BlockEvicted: lambda e: ("block.evicted", e.block, e.hashes),
    BlocksTouched: lambda e: ("blocks.touched", e.blocks, e.ref_cnts),
    BlocksCached: lambda e: ("blocks.cached", e.request, e.group, e.blocks, e.hashes),
    BlocksFreed: lambda e: ("blocks.freed", e.blocks, e.ref_cnts),
    PrefixLookedUp: lambda e: (
        "prefix.looked_up", e.request, e.num_tokens, e.num_hit_tokens, _filled(e.blocks),
    ),
    SlotsAllocated: lambda e: (
        "slots.allocated", e.request, e.num_new_tokens, e.num_hit_tokens, _filled(e.blocks),
        e.num_free_blocks,
    ),
    SlotsRefused: lambda e: ("slots.refused", e.request, e.num_new_tokens, e.num_free_blocks),
    RequestFreed: lambda e: ("request.freed", e.request),
    RequestPreempted: lambda e: ("request.preempted", e.request, e.num_computed_tokens),
    PrefixCacheReset: lambda e: ("prefix.reset", e.ok),
}  # fmt: skip

_DECISIONS = frozenset(_FACTS) | {RequestArrived, RequestFinished, StepScheduled, StepUpdated}


def _filled(blocks: list[list[int]]) -> list[list[int]]:
    """An empty answer has one form: no lists at all."""
    return blocks if any(blocks) else []


class _Replay:
    """What both modes share: ``mini``, what it told, and the comparison."""

    def __init__(self, config: EngineConfigured, trace: Trace) -> None:
        settings = config.settings
        self.settings = settings
        self.block_size = config.block_size
        self.told: list[Fact] = []
        self.expected: list[tuple[int, Fact]] = []
        self.num_compared = 0
        self.requests: dict[int, Request] = {}
        self.num_hashes_told: dict[int, int] = {}
        """By arrivals and lookups; ``blocks.cached`` may have told some of them before."""
        self.history: list[Record] = []
        """The last segments, for the story of a divergence."""
        self.rules = rules_for(str(trace.header["vllm"]))
        self.manager = KVCacheManager(
            config.num_blocks,
            [
                SlidingWindowSpec(group.block_size, group.sliding_window)
                if group.kind == "SlidingWindowSpec"
                else FullAttentionSpec(group.block_size)
                for group in config.groups
            ],
            settings["max_model_len"],
            enable_caching=settings["enable_prefix_caching"],
            max_in_flight_tokens=settings.get("max_in_flight_tokens"),
            retention_interval=settings.get("retention_interval"),
            rules=self.rules,
            tell=self.hear,
        )
        self.manager.watermark_blocks = settings.get("watermark_blocks", 0)
        self.blocks = self.manager.block_pool.blocks
        self.worker = _WorkerTables(len(config.groups))

    def hear(self, kind: str, *fields: Any) -> None:
        """``mini``'s callback; drops what the trace does not have and adds what it has more."""
        if kind == "slots.allocated":
            request, num_new, num_hit, new, free = fields
            new = [list(ids) for ids in new]
            if num_hit or any(new):
                self.told.append((kind, request, num_new, num_hit, _filled(new), free))
                self.worker.grow(request, new)
        elif kind == "blocks.cached":
            request, group, _, ids, hashes = fields
            pairs = [(i, h) for i, h in zip(ids, hashes, strict=True) if h is not None]
            if pairs:
                self.told.append(
                    (kind, request, group, [p[0] for p in pairs], [p[1] for p in pairs])
                )
        elif kind == "blocks.touched":
            counts = [self.blocks[block].ref_cnt for block in fields[0]]
            self.told.append((kind, list(fields[0]), counts))
        elif kind == "block.evicted":
            self.told.append((kind, fields[0], [fields[1]]))
        elif kind == "prefix.looked_up":
            request, num_tokens, num_hit, ids = fields
            self.told.append((kind, request, num_tokens, num_hit, _filled([list(i) for i in ids])))
        elif kind == "slots.refused" or kind not in ("step.scheduled", "request.finished"):
            self.told.append((kind, *fields))

    def settle(self, number: int) -> None:
        """Both sides have said all of a call: they must be equal."""
        told, expected = self.told, self.expected
        for (at, recorded), mini in zip(expected, told, strict=False):
            if recorded != mini:
                raise Diverged(at, recorded, mini)
        if len(expected) > len(told):
            raise Diverged(*expected[len(told)], None)
        if len(told) > len(expected):
            raise Diverged(number, None, told[len(expected)])
        self.num_compared += len(told)
        told.clear()
        expected.clear()

    def require(self, number: int, name: str, recorded: Any, mini: Any) -> None:
        """A value of a step that both sides must agree on."""
        if recorded != mini:
            raise Diverged(number, (name, recorded), (name, mini))
        self.num_compared += 1

    def arrive(self, event: RequestArrived) -> Request:
        request = Request(
            event.request,
            num_prompt_tokens=event.num_prompt_tokens,
            max_tokens=event.max_tokens,
            block_hashes=event.block_hashes,
            arrival_time=event.arrival_unix,
            priority=event.priority,
        )
        self.requests[event.request] = request
        self.num_hashes_told[event.request] = len(event.block_hashes)
        return request

    def learn_hashes(self, event: Event) -> None:
        """Hashes of generated blocks come from the trace: it has no token ids to make them of."""
        if type(event) is PrefixLookedUp:
            first, hashes = self.num_hashes_told.get(event.request, 0), event.new_hashes
            self.num_hashes_told[event.request] = first + len(hashes)
        elif type(event) is BlocksCached:
            first, hashes = event.first, event.hashes
        else:
            return
        if hashes and event.request in self.requests:
            known = self.requests[event.request].block_hashes
            known += hashes[max(0, len(known) - first) :]

    def take(self, segment: list[Record]) -> None:
        """Replay one segment, or an event that decides nothing. Raises: ``Diverged``."""
        self.history = [*self.history[-40:], *segment]
        if type(segment[0].event) in _DECISIONS:
            self.replay_segment(segment)
        else:
            self.observe(segment[0])

    def replay_segment(self, segment: list[Record]) -> None:
        raise NotImplementedError

    def observe(self, record: Record) -> None:
        """An event that is no decision of the scheduler: workers' tables and slots are compared."""
        self.worker.observe(record)


class _ManagerReplay(_Replay):
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


class _EngineReplay(_Replay):
    """Arrivals, aborts and outcomes drive ``mini``'s scheduler."""

    def __init__(self, config: EngineConfigured, trace: Trace) -> None:
        super().__init__(config, trace)
        settings = self.settings
        self.scheduler = Scheduler(
            self.manager,
            SchedulerConfig(
                max_num_batched_tokens=settings["max_num_scheduled_tokens"],
                max_num_seqs=settings["max_num_seqs"],
                policy=settings["policy"],
                enable_chunked_prefill=settings["enable_chunked_prefill"],
                long_prefill_token_threshold=settings["long_prefill_token_threshold"],
                scheduler_reserve_full_isl=settings["full_sequence_must_fit"],
                async_scheduling=settings["async_scheduling"],
            ),
            tell=self.hear,
        )
        self.outputs: dict[int, Any] = {}
        self.steps: dict[int, StepScheduled] = {}

    def replay_segment(self, segment: list[Record]) -> None:
        stops: dict[int, str] = {}
        for record in segment:
            event, number = record.event, record.number
            fact = fact_of(event)
            if fact is not None:
                self.expected.append((number, fact))
            self.learn_hashes(event)
            kind = type(event)
            if kind is RequestArrived:
                self.scheduler.add_request(self.arrive(event))
            elif kind is RequestFinished and event.reason in FINISHED_BY_OUTPUT:
                stops[event.request] = event.reason
            elif kind is RequestFinished:
                self.scheduler.finish_requests([event.request], event.reason)
                self.worker.forget(event.request)
                self.settle(number)
            elif kind is PrefixCacheReset:
                self.told.append(("prefix.reset", self.manager.reset_prefix_cache()))
            elif kind is StepScheduled:
                self._schedule(event, number)
            elif kind is StepUpdated:
                self._update(event, number, stops)

    def _schedule(self, event: StepScheduled, number: int) -> None:
        output = self.scheduler.schedule()
        self.settle(number)
        scheduler, mine = self.scheduler, output.num_scheduled_tokens
        self.require(number, "scheduled requests", event.requests, list(mine))
        self.require(number, "scheduled tokens", event.num_tokens, list(mine.values()))
        self.require(number, "new requests", event.new, output.scheduled_new_reqs)
        self.require(number, "resumed requests", event.resumed, output.scheduled_resumed_reqs)
        preempted = sorted(output.preempted_req_ids)
        self.require(number, "preempted requests", event.preempted, preempted)
        self.require(number, "running", event.num_running, len(scheduler.running))
        self.require(number, "waiting", event.num_waiting, len(scheduler.waiting))
        free = self.manager.block_pool.get_num_free_blocks()
        self.require(number, "free blocks", event.num_free_blocks, free)
        self.outputs[event.step] = output
        self.steps[event.step] = event

    def _update(self, event: StepUpdated, number: int, stops: dict[int, str]) -> None:
        output, step = self.outputs.pop(event.step, None), self.steps.pop(event.step, None)
        if output is None or step is None:
            return
        counts = event.num_output_tokens or ()
        sampled = {r: n for r, n in zip(step.requests or (), counts, strict=True) if n}
        finished = self.scheduler.update_from_output(output, sampled, stops)
        self.settle(number)
        # Without token ids mini cannot tell a stop at the last token from reaching the limit.
        self.require(number, "finished requests", list(stops), list(finished))
        for request in finished:
            self.requests.pop(request, None)

    def observe(self, record: Record) -> None:
        """Workers are judged once, by the manager's replay."""


_DRIVERS: dict[str, type[_Replay]] = {"manager": _ManagerReplay, "engine": _EngineReplay}


class _WorkerTables:
    """The tables that workers must hold, and the comparison with those that kernels received."""

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.tables: dict[int, list[list[int]]] = {}
        self.rows: dict[tuple[int, int, int], list[int]] = {}
        self.planned: dict[int, dict[int, list[list[int]]]] = {}
        self.block_size = 0

    def admit(self, request: int, hits: Any) -> None:
        ids = [[block.block_id for block in group] for group in hits or ()]
        self.tables[request] = ids or [[] for _ in range(self.num_groups)]

    def grow(self, request: int, new: list[list[int]]) -> None:
        table = self.tables.setdefault(request, [[] for _ in range(self.num_groups)])
        for row, ids in zip(table, new, strict=False):
            row.extend(ids)

    def forget(self, request: int) -> None:
        self.tables.pop(request, None)

    def plan(self, event: StepScheduled, block_size: int) -> None:
        """Remember which tables this step was planned with: it may run when others are there."""
        self.block_size = block_size
        tables = self.tables
        self.planned[event.step] = {r: tables[r] for r in event.requests or () if r in tables}
        for old in [step for step in self.planned if step < event.step - 8]:
            del self.planned[old]

    def observe(self, record: Record) -> None:
        event = record.event
        if type(event) is TableRowChanged:
            row = self.rows.setdefault((record.process, event.group, event.request), [])
            row[event.first :] = event.blocks
        elif type(event) is SlotsMapped:
            self._compare(record, event)

    def _compare(self, record: Record, event: SlotsMapped) -> None:
        planned = self.planned.get(event.step)
        if planned is None:
            return
        size, ratio = event.block_size, event.block_size // event.kernel_block_size
        cursor = 0
        for request, query, length in zip(
            event.requests, event.query_lens, event.seq_lens, strict=True
        ):
            slots = event.slots[cursor : cursor + query]
            cursor += query
            if request not in planned:
                continue
            mine = planned[request][event.group]
            row = self.rows.get((record.process, event.group, request), [])
            theirs = [block // ratio for block in row[::ratio]] if ratio > 1 else row
            used = -(-length // size)
            if theirs[:used] != mine[:used]:
                raise Diverged(
                    record.number,
                    ("worker's table", request, theirs[:used]),
                    ("table", request, mine[:used]),
                )
            expected = [
                mine[position // size] * size + position % size
                for position in range(length - query, length)
            ]
            if slots != expected:
                raise Diverged(
                    record.number, ("slots", request, slots), ("slots", request, expected)
                )
