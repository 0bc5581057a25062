"""The books of one engine: who holds what, kept once for all rules.

Follows the events and nothing else, so that what vLLM says (a free count, a reference count) can
be compared with what its own events add up to. ``state.KVState`` shows a pool; this one is made
for speed and for doubt: it counts references and holders apart, and forgets what is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import repeat
from operator import add
from typing import Any

from packaging.version import Version

from vllm_trace.events import (
    AttentionPlanned,
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
    RequestSeen,
    SlotsAllocated,
    SlotsMapped,
    SlotsRefused,
    StepExecuted,
    StepScheduled,
    StepUpdated,
    TableRowChanged,
)
from vllm_trace.invariants.plans import PLANS_KEPT, Plan, Table, WorkerRows
from vllm_trace.invariants.pool import NULL_BLOCK, PoolBooks
from vllm_trace.invariants.registry import Violation
from vllm_trace.invariants.windows import PassedBlocks

WINDOWED = ("SlidingWindowSpec", "SlidingWindowMLASpec", "ChunkedLocalAttentionSpec")
FULL = ("FullAttentionSpec", "MLAAttentionSpec", "UniformTypeKVCacheSpecs")


class Books(PoolBooks):
    """What the events so far add up to.

    While a rule looks at an event, ``number`` is the event's and ``process`` who told it.
    """

    def __init__(self, names: dict[int, str] | None = None, names_kept: int = 1 << 62) -> None:
        self.names = names if names is not None else {}
        self.names_kept = names_kept
        """Names of requests that are over are forgotten but for so many: a long trace has many."""
        self._over: deque[int] = deque()
        self.number = 0
        self.process = 0
        self.workers: set[int] = set()
        """Processes that executed a step of this engine."""
        self.mappers: set[int] = set()
        """Those of them that told tables and slots."""
        self.saw_attention = False
        self.saw_tokens = False
        """A step with tokens was planned: somebody must have executed it."""
        self.config: EngineConfigured | None = None

    # The engine -----------------------------------------------------------------------

    def begin(self, event: EngineConfigured, release: str = "") -> None:
        """Start afresh: a scheduler with a new pool was made."""
        self.config = event
        settings = event.settings
        try:
            self.release = Version(release or str(settings.get("vllm_version", ""))).release
        except ValueError:
            self.release = ()
        self.num_blocks = event.num_blocks
        self.settings: dict[str, Any] = settings
        self.caching = bool(settings.get("enable_prefix_caching", True))
        self.max_model_len = settings.get("max_model_len") or (1 << 62)
        self.num_lookahead = settings.get("num_lookahead_tokens") or 0
        self.speculates = self.num_lookahead > 0
        """Drafts may be rejected: a worker can stand before where the plan was."""
        self.block_sizes = [group.block_size for group in event.groups] or [event.block_size]
        self.hashes_per_block = [
            max(1, size // (event.hash_block_size or size)) for size in self.block_sizes
        ]
        self.windows = [group.sliding_window for group in event.groups]
        self.windowed = [
            index
            for index, group in enumerate(event.groups)
            if group.sliding_window or group.kind in WINDOWED
        ]
        self.unknown_kinds = sorted(
            {g.kind for g in event.groups if g.kind not in FULL and g.kind not in WINDOWED}
        )
        self.num_workers = (settings.get("tensor_parallel_size") or 1) * (
            settings.get("pipeline_parallel_size") or 1
        )
        self.step = 0
        """The last one scheduled."""
        self.scheduling = False
        """The next one is being scheduled now."""
        self.begin_pool()
        self.tables: dict[int, Table] = {}
        self.capacity: dict[int, int] = {}
        """Tokens that a request's tables have room for."""
        self.computed: dict[int, int] = {}
        """Tokens of each unfinished request whose KV was planned so far."""
        self.num_prompt_tokens: dict[int, int] = {}
        self.block_hashes: dict[int, list[int]] = {}
        """A request's own hashes, as far as they are known."""
        self.told: dict[int, int] = {}
        """How many of them came with its arrival and its lookups."""

        self.grown: set[int] = set()
        self.plans: dict[int, Plan] = {}
        self.left: dict[int, list[tuple[int, Table]]] = {}
        """Tables that a request had up to a step that a worker may not have executed yet, oldest first."""
        self._left_in: deque[tuple[int, int]] = deque()
        """(step, request) of each of them."""
        self.executed: dict[int, int] = {}
        """Per process the last step that it executed."""
        self.freed: list[tuple[int, BlocksFreed]] = []
        """``blocks.freed`` that no ``request.freed`` has explained yet."""
        self.passed = PassedBlocks()
        self._order: list[int] = []
        self._ends: list[int] = []
        self._behind = False
        """``computed`` lags behind ``_ends``: the composition of steps has not changed."""
        self.rows: dict[tuple[int, int], WorkerRows] = {}

    @property
    def now(self) -> int:
        """The step that an event without one belongs to."""
        return self.step + 1 if self.scheduling else self.step

    # For messages ---------------------------------------------------------------------

    def name(self, request: int) -> str:
        """The name of a request."""
        return self.names.get(request, f"#{request}")

    def holders(self, block: int) -> list[int]:
        """Requests whose tables have the block."""
        return [r for r, table in self.tables.items() if any(block in row for row in table)]

    def num_blocks_of(self, request: int) -> int:
        """Blocks in the request's tables, null blocks not counted."""
        return sum(1 for row in self.tables.get(request, ()) for block in row if block)

    def violation(
        self,
        message: str,
        *,
        request: int | None = None,
        block: int | None = None,
        number: int | None = None,
        step: int | None = None,
        requests: Iterable[int] = (),
        blocks: Iterable[int] = (),
    ) -> Violation:
        """A violation at this event (or at ``number``); its rule's id and step are put in later."""
        return Violation(
            "",
            self.number if number is None else number,
            message,
            request,
            block,
            step,
            tuple(requests),
            tuple(blocks),
        )

    # Requests -------------------------------------------------------------------------

    def request_arrived(self, event: RequestArrived) -> None:
        request = event.request
        self.names[request] = event.request_id
        self.computed[request] = 0
        self.num_prompt_tokens[request] = event.num_prompt_tokens
        self.block_hashes[request] = list(event.block_hashes)
        self.told[request] = len(event.block_hashes)

    def request_seen(self, event: RequestSeen) -> None:
        self.names[event.request] = event.request_id

    def prefix_looked_up(self, event: PrefixLookedUp) -> None:
        self.scheduling = True
        if event.new_hashes:
            known = self.block_hashes.setdefault(event.request, [])
            first = self.told.get(event.request, 0)
            known[first : first + len(event.new_hashes)] = event.new_hashes
            self.told[event.request] = first + len(event.new_hashes)

    def request_finished(self, event: RequestFinished) -> None:
        self._over.append(event.request)
        if len(self._over) > self.names_kept:
            self.names.pop(self._over.popleft(), None)
        self._drop(event.request)
        for known in (self.computed, self.num_prompt_tokens, self.block_hashes, self.told):
            known.pop(event.request, None)

    def request_preempted(self, event: RequestPreempted) -> None:
        self._drop(event.request)
        self.computed[event.request] = 0

    def request_freed(self, event: RequestFreed) -> None:
        self._drop(event.request)
        self.freed.clear()
        self.last_pool_event = f"request.freed {self.name(event.request)}"

    def _drop(self, request: int) -> None:
        self.catch_up()
        self._order = []  # the next step adds up anew
        self.capacity.pop(request, None)
        table = self.tables.pop(request, None)
        if table is None:
            return
        if min(self.executed.values(), default=0) < self.step:
            self.left.setdefault(request, []).append((self.step, table))
            self._left_in.append((self.step, request))
        for row in table:
            self._let_go_of(row)

    def planned_table(self, plan: Plan, request: int) -> Table | None:
        """The request's table in the life that was planned; it has only grown since."""
        for step, table in self.left.get(request, ()):
            if plan.event.step <= step:
                return table
        return self.tables.get(request)

    def _forget_left(self, oldest: int) -> None:
        """No plan older than that is kept."""
        while self._left_in and self._left_in[0][0] < oldest:
            _, request = self._left_in.popleft()
            tables = self.left[request]
            del tables[0]
            if not tables:
                del self.left[request]

    # Tables ---------------------------------------------------------------------------

    def slots_allocated(self, event: SlotsAllocated) -> None:
        self.scheduling = True
        request = event.request
        self.settle(request)
        table = self.tables.get(request)
        if table is None:
            table = self.tables[request] = [[] for _ in self.block_sizes]
        for group, ids in enumerate(event.hit_blocks):
            passed = self._touched if group in self.windowed else None
            for block in ids:
                # What a window has passed is hit too, and never touched: it is null in the table.
                kept = block if passed is None or block in passed else NULL_BLOCK
                table[group].append(kept)
                if kept:
                    self._hold(kept)
        for group, ids in enumerate(event.blocks):
            if ids:
                table[group].extend(ids)
                self._hold_new(ids)
        if event.num_hit_tokens:
            self.catch_up()
            self._order = []
            self.computed[request] = event.num_hit_tokens
        self._touched.clear()
        room = [len(row) * size for row, size in zip(table, self.block_sizes)]
        self.capacity[request] = room[0] if len(room) == 1 else min(room)
        self.grown.add(request)
        self.last_pool_event = f"slots.allocated {self.name(request)}"

    def slots_refused(self, event: SlotsRefused) -> None:
        self.scheduling = True
        self.settle(event.request)

    def settle(self, caller: int | None = None) -> None:
        """Blocks freed without their request: a sliding window moved on, they are null now."""
        if self.freed:
            if self.windowed:
                self.catch_up()
                for _, event in self.freed:
                    blocks = [block for block in reversed(event.blocks) if block]
                    if blocks:
                        for block in self.passed.take_out(
                            blocks, self._windowed_rows(caller), self._is_passed
                        ):
                            self._let_go(block)
            self.freed.clear()

    def _windowed_rows(self, first: int | None = None) -> list[tuple[int, int, list[int]]]:
        """(request, group, row) of the groups with a window; those of one request first."""
        order = [first, *self.tables] if first in self.tables else [*self.tables]
        return [
            (request, group, self.tables[request][group])
            for request in dict.fromkeys(order)
            for group in self.windowed
        ]

    def _is_passed(self, request: int, group: int, place: int) -> bool:
        seen_from = self.computed.get(request, 0) - (self.windows[group] or 0) + 1
        return (place + 1) * self.block_sizes[group] <= seen_from

    def before_request_freed(self, event: RequestFreed) -> None:
        """What a request with windows gives back says what it had left behind before."""
        if not self.windowed or event.request not in self.tables:
            return
        rows = self._windowed_rows(event.request)
        for (_, freed), group in zip(self.freed[-len(self.block_sizes) :], range(1 << 30)):
            if group in self.windowed:
                row = self.tables[event.request][group]
                given = [block for block in reversed(freed.blocks) if block]
                self.passed.settle_row(event.request, group, row, given, rows)

    # Steps ----------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Bring ``computed`` up to the last step."""
        if self._behind:
            self.computed.update(zip(self._order, self._ends))
            self._behind = False

    def step_scheduled(self, event: StepScheduled) -> None:
        self.settle()
        self.step, self.scheduling = event.step, False
        requests, counts = event.requests or [], event.num_tokens or []
        if requests is not self._order and requests != self._order:
            self.catch_up()
            self._ends = [*map(self.computed.get, requests, repeat(0))]
        self._order = requests
        self._ends = [*map(add, self._ends, counts)]
        self._behind = True
        self.saw_tokens = self.saw_tokens or bool(counts)
        plan = Plan(event, self._ends, self.grown)
        self.grown = set()
        self.speculates = self.speculates or bool(event.num_spec_tokens)
        self.plans[event.step] = plan
        if len(self.plans) > PLANS_KEPT:
            del self.plans[next(iter(self.plans))]
            if self._left_in:
                self._forget_left(next(iter(self.plans)))

    def step_updated(self, event: StepUpdated) -> None:
        plan = self.plans.get(event.step)
        if plan is None or not plan.event.num_spec_tokens or event.num_output_tokens is None:
            return
        # Rejected drafts are computed again: their tokens do not count.
        self.catch_up()
        self._order = []
        for request, made in zip(plan.requests, event.num_output_tokens):
            drafts = plan.event.num_spec_tokens.get(request, 0)
            if drafts and made and request in self.computed:
                self.computed[request] -= max(0, drafts - (made - 1))

    # Workers --------------------------------------------------------------------------

    def rows_of(self, group: int) -> WorkerRows:
        """The rows of the process that told the event."""
        key = (self.process, group)
        found = self.rows.get(key)
        if found is None:
            found = self.rows[key] = WorkerRows()
        return found

    def table_changed(self, event: TableRowChanged) -> None:
        rows = self.rows_of(event.group)
        row = rows.rows.setdefault(event.request, [])
        row[event.first :] = event.blocks
        rows.changed.add(event.request)
        plan = self.plans.get(event.step)
        if plan is not None:
            rows.lives[event.request] = self.planned_table(plan, event.request)

    def slots_mapped(self, event: SlotsMapped) -> None:
        rows = self.rows_of(event.group)
        self.mappers.add(self.process)
        if rows.changed or rows.fresh:
            rows.fresh, rows.changed = rows.changed, set()

    def attention_planned(self, event: AttentionPlanned) -> None:
        self.saw_attention = True

    def step_executed(self, event: StepExecuted) -> None:
        process = self.process
        self.workers.add(process)
        self.executed[process] = event.step
        plan = self.plans.get(event.step)
        if plan is not None and plan.event.finished:
            for (owner, _), rows in self.rows.items():
                if owner == process:
                    for request in plan.event.finished:
                        rows.rows.pop(request, None)
                        rows.lives.pop(request, None)
                        rows.changed.discard(request)


FIRST: dict[type[Event], Any] = {RequestFreed: Books.before_request_freed}
"""What ``books`` does before any rule looks at the event."""

HANDLERS: dict[type[Event], Any] = {
    RequestArrived: Books.request_arrived,
    RequestSeen: Books.request_seen,
    PrefixLookedUp: Books.prefix_looked_up,
    RequestFinished: Books.request_finished,
    RequestPreempted: Books.request_preempted,
    RequestFreed: Books.request_freed,
    BlocksTaken: Books.blocks_taken,
    BlocksTouched: Books.blocks_touched,
    BlocksFreed: Books.blocks_freed,
    BlocksCached: Books.blocks_cached,
    BlockEvicted: Books.block_evicted,
    PrefixCacheReset: Books.prefix_reset,
    SlotsAllocated: Books.slots_allocated,
    SlotsRefused: Books.slots_refused,
    StepScheduled: Books.step_scheduled,
    StepUpdated: Books.step_updated,
    TableRowChanged: Books.table_changed,
    SlotsMapped: Books.slots_mapped,
    AttentionPlanned: Books.attention_planned,
    StepExecuted: Books.step_executed,
}
"""What ``books`` itself does with an event; called like a rule, with (books, event)."""
