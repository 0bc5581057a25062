"""What the KV cache looks like after each event: tables, owners, reference counts, hashes.

A fold over a trace: ``apply`` one event after the other. Readers (summary, the pool map,
``explain``, invariants) ask it instead of each keeping books of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    EngineConfigured,
    Event,
    PrefixCacheReset,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    StepScheduled,
)

NULL_BLOCK = 0


@dataclass
class KVState:
    """The pool and the block tables of one engine.

    ``tables[request][group]`` is the list of block ids in logical order.
    """

    config: EngineConfigured | None = None
    tables: dict[int, list[list[int]]] = field(default_factory=dict)
    ref_cnts: dict[int, int] = field(default_factory=dict)
    """Blocks with a count above zero."""
    hashes: dict[int, list[int]] = field(default_factory=dict)
    """Hashes under which a block can be hit."""
    computed: dict[int, int] = field(default_factory=dict)
    """Tokens of each unfinished request whose KV was planned so far."""
    num_prompt_tokens: dict[int, int] = field(default_factory=dict)
    num_free_blocks: int | None = None
    _released: list[int] = field(default_factory=list)

    @property
    def num_groups(self) -> int:
        return max(1, len(self.config.groups)) if self.config else 1

    def apply(self, event: Event) -> None:
        """Take in one event."""
        handler = _HANDLERS.get(type(event))
        if handler is not None:
            handler(self, event)

    def _engine_configured(self, event: EngineConfigured) -> None:
        fresh = KVState(config=event)
        fresh.num_free_blocks = event.num_blocks - 1
        self.__dict__.update(fresh.__dict__)

    def _request_arrived(self, event: RequestArrived) -> None:
        self.computed[event.request] = 0
        self.num_prompt_tokens[event.request] = event.num_prompt_tokens

    def _request_finished(self, event: RequestFinished) -> None:
        self.computed.pop(event.request, None)
        self.num_prompt_tokens.pop(event.request, None)
        self.tables.pop(event.request, None)

    def _request_preempted(self, event: RequestPreempted) -> None:
        self.computed[event.request] = 0
        self.tables.pop(event.request, None)
        self.num_free_blocks = event.num_free_blocks

    def _request_freed(self, event: RequestFreed) -> None:
        self.tables.pop(event.request, None)
        self._released.clear()

    def _slots_allocated(self, event: SlotsAllocated) -> None:
        table = self.tables.setdefault(event.request, [[] for _ in range(self.num_groups)])
        self._null_released(event.request)
        for group, ids in enumerate(event.hit_blocks):
            table[group].extend(ids)
        for group, ids in enumerate(event.blocks):
            table[group].extend(ids)
        if event.num_hit_tokens:
            self.computed[event.request] = event.num_hit_tokens
        self.num_free_blocks = event.num_free_blocks

    def _null_released(self, request: int) -> None:
        """A sliding window moved on: what it released is the null block in the table now."""
        if self._released:
            gone = set(self._released)
            for row in self.tables.get(request, ()):
                row[:] = [NULL_BLOCK if block in gone else block for block in row]
            self._released.clear()

    def _blocks_taken(self, event: BlocksTaken) -> None:
        for block in event.blocks:
            self.ref_cnts[block] = self.ref_cnts.get(block, 0) + 1

    def _blocks_touched(self, event: BlocksTouched) -> None:
        for block, count in zip(event.blocks, event.ref_cnts, strict=True):
            self.ref_cnts[block] = count

    def _blocks_freed(self, event: BlocksFreed) -> None:
        for block, count in zip(event.blocks, event.ref_cnts, strict=True):
            if count > 0:
                self.ref_cnts[block] = count
            else:
                self.ref_cnts.pop(block, None)
        self._released.extend(event.blocks)

    def _blocks_cached(self, event: BlocksCached) -> None:
        for block, block_hash in zip(event.blocks, event.hashes, strict=True):
            self.hashes.setdefault(block, []).append(block_hash)

    def _block_evicted(self, event: BlockEvicted) -> None:
        self.hashes.pop(event.block, None)

    def _prefix_reset(self, event: PrefixCacheReset) -> None:
        if event.ok:
            self.hashes.clear()

    def _step_scheduled(self, event: StepScheduled) -> None:
        for request, count in zip(event.requests or (), event.num_tokens or (), strict=True):
            self.computed[request] = self.computed.get(request, 0) + count
        self.num_free_blocks = event.num_free_blocks


def computes_prompt(
    step: StepScheduled, request: int, count: int, before: int | None, num_prompt_tokens: int
) -> bool:
    """Whether the ``count`` tokens of a request in a step are of its prompt, and no decode.

    ``before``: its tokens computed until then; None where hits are not recorded (level light). A
    chunk of a single token, other than the first, is taken for a decode then.
    """
    if before is not None:
        return before < num_prompt_tokens
    more = count - step.num_spec_tokens.get(request, 0)
    return more > 1 or request in step.new or request in step.resumed


_HANDLERS: dict[type[Event], Callable[..., None]] = {
    EngineConfigured: KVState._engine_configured,
    RequestArrived: KVState._request_arrived,
    RequestFinished: KVState._request_finished,
    RequestPreempted: KVState._request_preempted,
    RequestFreed: KVState._request_freed,
    SlotsAllocated: KVState._slots_allocated,
    BlocksTaken: KVState._blocks_taken,
    BlocksTouched: KVState._blocks_touched,
    BlocksFreed: KVState._blocks_freed,
    BlocksCached: KVState._blocks_cached,
    BlockEvicted: KVState._block_evicted,
    PrefixCacheReset: KVState._prefix_reset,
    StepScheduled: KVState._step_scheduled,
}
