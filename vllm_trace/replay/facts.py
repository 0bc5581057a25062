"""Recorded events in ``mini``'s words, so that both sides can be compared as they are."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
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


FACTS: dict[type[Event], Callable[[Any], Fact]] = {
    BlocksTaken: attrgetter("kind", "blocks"),
    BlockEvicted: attrgetter("kind", "block", "hashes"),
    BlocksTouched: attrgetter("kind", "blocks", "ref_cnts"),
    BlocksCached: attrgetter("kind", "request", "group", "blocks", "hashes"),
    BlocksFreed: attrgetter("kind", "blocks", "ref_cnts"),
    PrefixLookedUp: lambda e: (
        e.kind, e.request, e.num_tokens, e.num_hit_tokens, e.blocks if any(e.blocks) else [],
    ),
    SlotsAllocated: lambda e: (
        e.kind, e.request, e.num_new_tokens, e.num_hit_tokens, e.blocks if any(e.blocks) else [],
        e.num_free_blocks,
    ),
    SlotsRefused: attrgetter("kind", "request", "num_new_tokens", "num_free_blocks"),
    RequestFreed: attrgetter("kind", "request"),
    RequestPreempted: attrgetter("kind", "request", "num_computed_tokens"),
    PrefixCacheReset: attrgetter("kind", "ok"),
}  # fmt: skip
"""What ``mini`` would tell, where an empty answer has no lists at all.

Events that are not here drive the replay, or are no decisions.
"""
