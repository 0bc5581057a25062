"""Rules of the prefix cache: what may be hit, how hashes link, who is evicted."""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain, islice
from typing import Any

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    KVEventsTaken,
    PrefixCacheReset,
    PrefixLookedUp,
    SlotsAllocated,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.invariants.books import Books
from vllm_trace.invariants.registry import Violation, invariant
from vllm_trace.invariants.words import listed, many


@invariant(
    "hit-cached",
    "A prefix is hit only in blocks that have a hash: cached, and not evicted since.",
    needs=("full", "caching"),
    releases=">=0.11",
    doc="Also: a block that is handed out anew has lost the hash of what it held.",
    mutation="the prefix map still finds a block that was evicted",
    built_in=True,
)
class HitCached:
    def before_prefix_looked_up(self, books: Books, event: PrefixLookedUp) -> Violation | None:
        if not event.num_hit_tokens:
            return None
        hashes = books.hashes
        for row in event.blocks:
            for place, block in enumerate(row):
                if block and block not in hashes:
                    return self._unhashed(books, event.request, place, block)
        return None

    def _unhashed(self, books: Books, request: int, place: int, block: int) -> Violation:
        number, _ = books.evicted_at.get(block, (0, ()))
        why = f"was evicted at event {number}" if number else "never got a hash"
        return books.violation(
            f"{books.name(request)} hits block {block} at position {place} of its table, which {why}",
            request=request,
            block=block,
        )

    def blocks_taken(self, books: Books, event: BlocksTaken) -> Violation | None:
        blocks = event.blocks
        if len(blocks) == 1 and blocks[0] not in books.hashes:
            return None
        if books.hashes.keys().isdisjoint(blocks):
            return None
        block = next(b for b in event.blocks if b in books.hashes)
        return books.violation(
            f"block {block} is handed out anew and can still be hit under its old hash", block=block
        )


@invariant(
    "hash-chain",
    "Hashes link: a cached block has its request's own hash of that place, and so has a hit.",
    needs=("full", "caching", "known-groups"),
    releases=">=0.11,<0.34",
    doc="Position i of a table is cached under the request's i-th hash, and a hit is a beginning"
    " of the request's own hashes, shorter than the request.",
    mutation="the prefix map gives a block of another prefix",
    built_in=True,
)
class HashChain:
    def __init__(self) -> None:
        self.waiting: list[tuple[int, BlocksCached]] = []
        """Cached within ``allocate_slots``, whose result tells the table they are in."""

    def before_prefix_looked_up(self, books: Books, event: PrefixLookedUp) -> Violation | None:
        known = books.block_hashes.get(event.request, [])
        first = books.told.get(event.request, 0)
        for place, (told, learned) in enumerate(zip(event.new_hashes, known[first:]), first):
            if told != learned:
                return books.violation(
                    f"{books.name(event.request)}'s hash {place} is {told:016x}, and a block was "
                    f"cached for it under {learned:016x}",
                    request=event.request,
                )
        if event.num_hit_tokens:
            return self._hit(books, event, [*known[:first], *event.new_hashes] or known)
        return None

    def _hit(self, books: Books, event: PrefixLookedUp, known: list[int]) -> Violation | None:
        who = books.name(event.request)
        if event.num_hit_tokens >= event.num_tokens:
            return books.violation(
                f"{who} hits {event.num_hit_tokens} tokens of {event.num_tokens}: nothing is left "
                "to compute its next token from",
                request=event.request,
            )
        for group, row in enumerate(event.blocks):
            per_block, size = books.hashes_per_block[group], books.block_sizes[group]
            if len(row) * size < event.num_hit_tokens:
                return books.violation(
                    f"{who} hits {event.num_hit_tokens} tokens in {many(len(row), 'block')} of {size}",
                    request=event.request,
                )
            for place, block in enumerate(row):
                index = (place + 1) * per_block - 1
                cached = books.hashes.get(block) if block else None
                if cached and index < len(known) and known[index] not in cached:
                    return books.violation(
                        f"{who} hits block {block} at position {place}, which is cached as "
                        f"{cached[0]:016x}; its own hash there is {known[index]:016x}",
                        request=event.request,
                        block=block,
                    )
        return None

    def blocks_cached(self, books: Books, event: BlocksCached) -> Violation | None:
        table = books.tables.get(event.request)
        if table and len(table[event.group]) >= event.first + len(event.blocks):
            found = self._place(books, books.number, event)
            if found is not None or event.blocks[-1] in table[event.group]:
                return found
        self.waiting.append((books.number, event))
        return None

    def slots_allocated(self, books: Books, event: SlotsAllocated) -> Violation | None:
        return self._settle(books) if self.waiting else None

    def step_scheduled(self, books: Books, event: StepScheduled) -> Violation | None:
        return self._settle(books) if self.waiting else None

    def _settle(self, books: Books) -> Violation | None:
        waiting, self.waiting = self.waiting, []
        for number, event in waiting:
            found = self._place(books, number, event, late=True)
            if found is not None:
                return found
        return None

    def _place(
        self, books: Books, number: int, event: BlocksCached, late: bool = False
    ) -> Violation | None:
        table = books.tables.get(event.request)
        known = books.block_hashes.get(event.request)
        if table is None or known is None:
            return None
        row, place = table[event.group], event.first
        per_block = books.hashes_per_block[event.group]
        for block, block_hash in zip(event.blocks, event.hashes, strict=True):
            try:
                place = row.index(block, place)
            except ValueError:
                if not late:
                    return None
                return books.violation(
                    f"block {block} is cached for {books.name(event.request)}, whose table does not "
                    f"have it from position {place} on",
                    request=event.request,
                    block=block,
                    number=number,
                )
            index = (place + 1) * per_block - 1
            if index < len(known):
                if known[index] != block_hash:
                    return books.violation(
                        f"block {block} at position {place} of {books.name(event.request)} is cached "
                        f"as {block_hash:016x}; the request's hash there is {known[index]:016x}",
                        request=event.request,
                        block=block,
                        number=number,
                    )
            elif index == len(known):
                known.append(block_hash)
            place += 1
        return None


@invariant(
    "evict-head",
    "Blocks are handed out, and so evicted, from the head of the free queue.",
    needs=("full",),
    releases=">=0.11,!=0.23,<0.34",
    doc="The queue is rebuilt from what was freed. Since 0.24 freed blocks without a hash go to its"
    " front, in the order given; before, all went to its end (0.23: all but those of windows).",
    mutation="the free queue gives from its tail",
    built_in=True,
)
class EvictHead:
    def __init__(self) -> None:
        self.front: OrderedDict[int, None] = OrderedDict()
        self.untouched = 1
        """From here on nobody ever had a block: they stand between front and back."""
        self.back: OrderedDict[int, None] = OrderedDict()

    def before_blocks_taken(self, books: Books, event: BlocksTaken) -> Violation | None:
        count = len(event.blocks)
        head = self._head(books, count)
        if head != event.blocks:
            block = next((b for b, h in zip(event.blocks, head) if b != h), event.blocks[-1])
            return books.violation(
                f"handed out are {listed(event.blocks)}; the head of the free queue is {listed(head)}",
                block=block,
                blocks=[b for b in head if b not in event.blocks][:4],
            )
        while count and self.front:
            self.front.popitem(last=False)
            count -= 1
        fresh = min(count, books.num_blocks - self.untouched)
        self.untouched += fresh
        for _ in range(count - fresh):
            self.back.popitem(last=False)
        return None

    def _head(self, books: Books, count: int) -> list[int]:
        """The first of the free queue."""
        if count == 1 and self.untouched >= books.num_blocks:
            for block in self.front or self.back:
                return [block]
        queue = chain(self.front, range(self.untouched, books.num_blocks), self.back)
        return [*islice(queue, count)]

    def before_blocks_touched(self, books: Books, event: BlocksTouched) -> None:
        for block in event.blocks:
            if block not in books.ref_cnts and self.back.pop(block, self) is self:
                self.front.pop(block, None)

    def blocks_freed(self, books: Books, event: BlocksFreed) -> None:
        # Since 0.24 these two lists are vLLM's own.
        first: list[int] = []
        last: list[int] = []
        unhashed_first = books.release >= (0, 24)
        for block, count in zip(event.blocks, event.ref_cnts):
            if count == 0 and block:
                unhashed = not books.caching or block not in books.hashes
                (first if unhashed_first and unhashed else last).append(block)
        for block in reversed(first):
            self.front[block] = None
            self.front.move_to_end(block, last=False)
        for block in last:
            self.back[block] = None


@invariant(
    "kv-events",
    "Our events agree with vLLM's own KV events.",
    needs=("full", "kv-events"),
    releases=">=0.11,<0.34",
    doc="Hash for hash and in the same order, each time vLLM hands its events over.",
    mutation="vLLM does not report an eviction",
    built_in=True,
)
class KVEvents:
    def __init__(self) -> None:
        self.ours: list[tuple[str, int]] = []

    def blocks_cached(self, books: Books, event: BlocksCached) -> None:
        self.ours.extend(("stored", block_hash) for block_hash in event.hashes)

    def block_evicted(self, books: Books, event: BlockEvicted) -> None:
        self.ours.extend(("removed", block_hash) for block_hash in event.hashes)

    def prefix_reset(self, books: Books, event: PrefixCacheReset) -> None:
        if event.ok:
            self.ours.append(("cleared", 0))

    def kv_events_taken(self, books: Books, event: KVEventsTaken) -> Violation | None:
        ours, self.ours = self.ours, []
        theirs: list[tuple[str, int]] = []
        for what, hashes in event.events:
            theirs.extend((what, one) for one in (hashes if what != "cleared" else (0,)))
        return None if ours == theirs else self._differ(books, ours, theirs)

    def step_updated(self, books: Books, event: StepUpdated) -> Violation | None:
        # Handed over in update_from_output; in 0.11.0 and before, in schedule.
        if self.ours and books.release >= (0, 11, 2) and books.settings.get("kv_events"):
            ours, self.ours = self.ours, []
            return self._differ(books, ours, [])
        return None

    def _differ(self, books: Books, ours: list[Any], theirs: list[Any]) -> Violation:
        place = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs))
        )
        told = [
            f"{events[place][0]} {events[place][1]:016x}" if place < len(events) else "nothing"
            for events in (ours, theirs)
        ]
        block = None
        if place < len(ours):
            block = next((b for b, h in books.hashes.items() if ours[place][1] in h), None)
            block = block or next(
                (b for b, (_, h) in books.evicted_at.items() if ours[place][1] in h), None
            )
        return books.violation(
            f"of {many(len(ours), 'event')} of ours and {len(theirs)} of vLLM's, number {place + 1} is "
            f"{told[0]} here and {told[1]} there",
            block=block,
        )
