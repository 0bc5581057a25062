"""The recorded side of a divergence: what its events add up to, in ``mini``'s terms."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from vllm_trace.divergence import PoolState
from vllm_trace.events import (
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    EngineConfigured,
    Event,
    PrefixLookedUp,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.mini.rules import Rules
from vllm_trace.state import NULL_BLOCK, KVState


@dataclass
class Known:
    """One request as far as the trace tells."""

    arrival: RequestArrived
    hashes: list[int] = field(default_factory=list)
    num_hashes_told: int = 0
    """By arrival and lookups."""
    num_output_tokens: int = 0
    preempted: bool = False


class Recorded:
    """Pool, tables and requests of one engine, added up event by event."""

    def __init__(self, rules: Rules) -> None:
        self.unhashed_first = rules.unhashed_blocks_first
        self.kv = KVState()
        self.queue: OrderedDict[int, None] = OrderedDict()
        """Free blocks, the next to be handed out first."""
        self.requests: dict[int, Known] = {}
        self.group_of: dict[int, int] = {}
        """The group under which a block was cached."""
        self.running: list[int] = []
        """In the order of the last step."""
        self._steps: dict[int, list[int]] = {}

    def take(self, event: Event) -> None:
        """Take in one event."""
        kind = type(event)
        if kind in _TAKES:
            _TAKES[kind](self, event)
        self.kv.apply(event)

    def _configured(self, event: EngineConfigured) -> None:
        self.queue = OrderedDict.fromkeys(range(1, event.num_blocks))
        self.requests.clear()

    def _taken(self, event: BlocksTaken) -> None:
        for block in event.blocks:
            self.queue.pop(block, None)

    def _touched(self, event: BlocksTouched) -> None:
        for block, count in zip(event.blocks, event.ref_cnts):
            if count == 1:
                self.queue.pop(block, None)

    def _freed(self, event: BlocksFreed) -> None:
        freed = [b for b, n in zip(event.blocks, event.ref_cnts) if not n and b != NULL_BLOCK]
        self.queue.update(dict.fromkeys(freed))
        if self.unhashed_first:
            for block in reversed([block for block in freed if block not in self.kv.hashes]):
                self.queue.move_to_end(block, last=False)

    def _arrived(self, event: RequestArrived) -> None:
        hashes = [*event.block_hashes]
        self.requests[event.request] = Known(event, hashes, len(hashes))

    def _looked_up(self, event: PrefixLookedUp) -> None:
        known = self.requests.get(event.request)
        if known is not None:
            self._learn(known, known.num_hashes_told, event.new_hashes)
            known.num_hashes_told += len(event.new_hashes)

    def _cached(self, event: BlocksCached) -> None:
        self.group_of.update(dict.fromkeys(event.blocks, event.group))
        if event.request in self.requests:
            self._learn(self.requests[event.request], event.first, event.hashes)

    @staticmethod
    def _learn(known: Known, first: int, hashes: list[int]) -> None:
        known.hashes += hashes[max(0, len(known.hashes) - first) :]

    def _preempted(self, event: RequestPreempted) -> None:
        if event.request in self.requests:
            self.requests[event.request].preempted = True

    def _finished(self, event: RequestFinished) -> None:
        self.requests.pop(event.request, None)

    def _scheduled(self, event: StepScheduled) -> None:
        self.running = [*(event.requests or ())]
        self._steps[event.step] = self.running
        for request in self.running:
            if request in self.requests:
                self.requests[request].preempted = False

    def _updated(self, event: StepUpdated) -> None:
        requests = self._steps.pop(event.step, [])
        for request, count in zip(requests, event.num_output_tokens or ()):
            if request in self.requests:
                self.requests[request].num_output_tokens += count

    def state_by(self, name: Any) -> PoolState:
        """The pool, with requests by their names."""
        tables = {name(request): rows for request, rows in self.kv.tables.items()}
        return PoolState([*self.queue], tables, dict(self.kv.ref_cnts))


_TAKES: dict[type[Event], Any] = {
    EngineConfigured: Recorded._configured,
    BlocksTaken: Recorded._taken,
    BlocksTouched: Recorded._touched,
    BlocksFreed: Recorded._freed,
    RequestArrived: Recorded._arrived,
    PrefixLookedUp: Recorded._looked_up,
    BlocksCached: Recorded._cached,
    RequestPreempted: Recorded._preempted,
    RequestFinished: Recorded._finished,
    StepScheduled: Recorded._scheduled,
    StepUpdated: Recorded._updated,
}
