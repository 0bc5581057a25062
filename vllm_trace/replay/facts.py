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


class NotRecorded:
    """Stands for a count that a trace does not have, and equals whatever ``mini`` has there."""

    def __eq__(self, other: object) -> bool:
        return True

    def __repr__(self) -> str:
        return "not recorded"


NOT_RECORDED = NotRecorded()


def _given(blocks: list[list[int]]) -> list[list[int]]:
    """``mini`` tells an empty answer without any lists."""
    for ids in blocks:
        if ids:
            return blocks
    return []


FACTS: dict[type[Event], Callable[[Any], Fact]] = {
    BlocksTaken: attrgetter("kind", "blocks"),
    BlockEvicted: attrgetter("kind", "block", "hashes"),
    BlocksTouched: attrgetter("kind", "blocks", "ref_cnts"),
    BlocksCached: attrgetter("kind", "request", "group", "first", "blocks", "hashes"),
    BlocksFreed: attrgetter("kind", "blocks", "ref_cnts"),
    PrefixLookedUp: lambda e: (
        e.kind, e.request, e.num_tokens, e.num_hit_tokens, _given(e.blocks),
    ),
    SlotsAllocated: lambda e: (
        e.kind, e.request, e.num_new_tokens, e.num_hit_tokens, _given(e.blocks),
        e.num_free_blocks,
    ),
    SlotsRefused: lambda e: (
        e.kind, e.request, e.num_new_tokens, e.num_hit_tokens, e.num_free_blocks,
        # 0: vLLM's way of counting was not known to the probe.
        e.num_wanted_blocks or NOT_RECORDED,
    ),
    RequestFreed: attrgetter("kind", "request"),
    RequestPreempted: attrgetter("kind", "request", "num_computed_tokens", "num_free_blocks"),
    PrefixCacheReset: attrgetter("kind", "ok"),
}  # fmt: skip
"""What ``mini`` would tell.

Events that are not here drive the replay, or are no decisions.
"""
