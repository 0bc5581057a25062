"""Recorded events in ``mini``'s words, so that both sides can be compared as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    Event,
    PrefixCacheReset,
    PrefixLookedUp,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
)

Fact = tuple[Any, ...]
"""An event in ``mini``'s words: ``(kind, *fields)``."""


def filled(blocks: list[list[int]]) -> list[list[int]]:
    """An empty answer has one form: no lists at all."""
    return blocks if any(blocks) else []


FACTS: dict[type[Event], Callable[[Any], Fact]] = {
    BlocksTaken: lambda e: ("blocks.taken", e.blocks),
    BlockEvicted: lambda e: ("block.evicted", e.block, e.hashes),
    BlocksTouched: lambda e: ("blocks.touched", e.blocks, e.ref_cnts),
    BlocksCached: lambda e: ("blocks.cached", e.request, e.group, e.blocks, e.hashes),
    BlocksFreed: lambda e: ("blocks.freed", e.blocks, e.ref_cnts),
    PrefixLookedUp: lambda e: (
        "prefix.looked_up", e.request, e.num_tokens, e.num_hit_tokens, filled(e.blocks),
    ),
    SlotsAllocated: lambda e: (
        "slots.allocated", e.request, e.num_new_tokens, e.num_hit_tokens, filled(e.blocks),
        e.num_free_blocks,
    ),
    SlotsRefused: lambda e: ("slots.refused", e.request, e.num_new_tokens, e.num_free_blocks),
    RequestFreed: lambda e: ("request.freed", e.request),
    RequestPreempted: lambda e: ("request.preempted", e.request, e.num_computed_tokens),
    PrefixCacheReset: lambda e: ("prefix.reset", e.ok),
}  # fmt: skip
"""What ``mini`` would tell; events that are not here drive the replay, or are no decisions."""
