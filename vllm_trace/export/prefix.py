"""Why a prefix was not hit, for every lookup of a trace in one reading.

``explain`` follows the hashes of one request through a trace that it has read before. Here nothing
is known beforehand, so the history of all hashes is kept: of those in the cache, which are no more
than the pool has blocks, and of the last ``REMEMBERED`` that were lost.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    EngineConfigured,
    PrefixLookedUp,
    RequestArrived,
)
from vllm_trace.explain.cache import Miss, first_miss

REMEMBERED = 200_000
"""Lost hashes that are still understood."""

Lost = list[Any]
"""[cause, request that took the block or -1]: what the hashes lost in one call have in common."""


NEVER: Lost = ["none shared", -1]
"""Of a hash that was never there."""


class Lookup:
    """One ``get_computed_blocks`` of a request."""

    __slots__ = ("event", "miss")

    def __init__(self, event: PrefixLookedUp) -> None:
        self.event = event
        self.miss: Miss | None = None
        """Known once it is judged."""


class PrefixHistory:
    """Which hashes one engine has, had and lost. A key is a hash, with its KV-cache group above it.

    A lookup is judged when something changes in the cache, and not at all when ``allocate_slots``
    refused its request: a waiting request looks up again in each step.

    Leaves out: whether the same tokens lie there under another salt or LoRA, which takes token ids.
    """

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self.remembered = remembered
        self.config: EngineConfigured | None = None
        self.seen: dict[int, Lost | None] = {}
        """Key → None while a block has it, or how it was lost. The oldest lost ones are forgotten."""
        self.num_lost = 0
        self.copies: dict[int, int] = {}
        """Key → blocks that have it beside the first."""
        self.of_block: dict[int, int | tuple[int, ...]] = {}
        """Block → its key, or its keys."""
        self.hashes: dict[int, list[int]] = {}
        """Of each unfinished request, in order."""
        self._asked: Lookup | None = None
        """Not judged yet."""
        self._story: Lost = ["evicted", -1]
        self._evicting = False
        self._forgot = False

    def configured(self, event: EngineConfigured) -> None:
        """A new pool: nothing is cached."""
        self.judge()
        self.config = event
        self._empty()
        self.seen.clear()
        self.num_lost = 0
        self._forgot = False

    def arrived(self, event: RequestArrived) -> None:
        self.hashes[event.request] = list(event.block_hashes)

    def finished(self, request: int) -> None:
        self.hashes.pop(request, None)

    def blocks_cached(self, event: BlocksCached) -> None:
        """Blocks got a hash."""
        if self._asked is not None:
            self.judge()
        above = event.group << 64
        seen, of_block = self.seen, self.of_block
        for block, key in zip(event.blocks, event.hashes):
            key |= above
            if block in of_block:
                known = of_block[block]
                keys = known if isinstance(known, tuple) else (known,)
                if key in keys:
                    continue
                of_block[block] = (*keys, key)
            else:
                of_block[block] = key
            story = seen.get(key, NEVER)
            if story is None:
                self.copies[key] = self.copies.get(key, 0) + 1
            else:
                self.num_lost -= story is not NEVER
                seen[key] = None

    def block_evicted(self, event: BlockEvicted) -> None:
        """A block lost its hashes; who takes it is known at the next ``took``."""
        if self._asked is not None:
            self.judge()
        self._evicting = True
        self._lose(event.block, self._story)

    def _lose(self, block: int, story: Lost) -> None:
        known, copies = self.of_block.pop(block, None), self.copies
        if known is None:
            return
        for key in known if isinstance(known, tuple) else (known,):
            if copies and key in copies:
                self._lose_copy(key, copies[key])
            else:
                self.seen[key] = story
                self.num_lost += 1
        if self.num_lost > self.remembered:
            self._forget()

    def _lose_copy(self, key: int, left: int) -> None:
        if left > 1:
            self.copies[key] = left - 1
        else:
            del self.copies[key]

    def _forget(self) -> None:
        """Some of those seen first, when too many are lost: a good part of them at a time.

        The first key of a dict is not cheap to find again and again.
        """
        if self.num_lost > self.remembered:
            gone = (key for key, story in self.seen.items() if story is not None)
            for key in [*islice(gone, self.num_lost - self.remembered * 3 // 4)]:
                del self.seen[key]
                self.num_lost -= 1
            self._forgot = True

    def took(self, request: int) -> None:
        """``allocate_slots`` gave: what was evicted since the last one was evicted for it."""
        if self._asked is not None:
            self.judge()
        if self._evicting:
            self._story[1] = request
            self._story = ["evicted", -1]
            self._evicting = False

    def reset(self) -> None:
        """``reset_prefix_cache``: everything was forgotten."""
        self.judge()
        story: Lost = ["reset", -1]
        for known in self.of_block.values():
            for key in known if isinstance(known, tuple) else (known,):
                self.seen[key] = story
        self.num_lost = len(self.seen)
        self._empty()
        self._forget()

    def _empty(self) -> None:
        self.copies.clear()
        self.of_block.clear()

    def refused(self, request: int) -> None:
        """``allocate_slots`` gave nothing: what was looked up for it leads to nothing."""
        if self._asked is not None and self._asked.event.request == request:
            self._asked = None

    def looked_up(self, event: PrefixLookedUp) -> Lookup:
        """Take in a lookup; its ``miss`` is there when it leads to an allocation."""
        self.judge()
        if event.new_hashes:
            self.hashes.setdefault(event.request, []).extend(event.new_hashes)
        self._asked = Lookup(event)
        return self._asked

    def judge(self) -> None:
        """Find the cause of the last lookup; ``cause`` is a key of ``explain.cache.CAUSES``."""
        asked, self._asked = self._asked, None
        if asked is None:
            return
        if self.config is None:
            asked.miss = Miss("unknown", 0, 0)
            return
        miss = asked.miss = first_miss(asked.event, self.config)
        if not miss.cause:
            self._examine(miss, self.hashes.get(asked.event.request, []), self.config)

    def _examine(self, miss: Miss, hashes: list[int], config: EngineConfigured) -> None:
        """Look for the missing block in every group."""
        unit, hash_size = config.block_size, config.hash_block_size
        there, missing = 0, []
        for group, size in enumerate([g.block_size for g in config.groups] or [unit]):
            wanted = []
            for end in range(miss.index * unit + size, (miss.index + 1) * unit + 1, size):
                place = end // hash_size - 1
                if not 0 <= place < len(hashes):
                    miss.cause = "unknown"
                    return
                wanted.append(hashes[place] | group << 64)
            absent = [key for key in wanted if self.seen.get(key, NEVER) is not None]
            missing += absent[:1]
            there += not absent
        if not missing:
            miss.cause = "unread"
            return
        known = self.seen.get(missing[0])
        if known is None:
            miss.cause = "unknown" if self._forgot else "none shared"
        else:
            miss.cause, miss.taker = known
        miss.group = missing[0] >> 64
        if there:
            miss.cause = "group"
