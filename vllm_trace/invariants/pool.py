"""The pool's part of the books: references, the places that hold a block, and hashes, each counted apart."""

from __future__ import annotations

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    PrefixCacheReset,
)
from vllm_trace.invariants.windows import PassedBlocks

NULL_BLOCK = 0


class PoolBooks:
    """What the pool's own events add up to; ``Books`` knows the rest of the engine."""

    number: int
    step: int
    scheduling: bool
    windowed: list[int]
    passed: PassedBlocks
    freed: list[tuple[int, BlocksFreed]]

    def begin_pool(self) -> None:
        """A new pool: nothing is taken, nothing is cached."""
        self.last_pool_event = "the pool was made"

        self.ref_cnts: dict[int, int] = {}
        """Blocks with a count above zero, by our own counting; never the null block."""
        self.held: dict[int, int] = {}
        """How many places in tables hold a block."""
        self.unbalanced: set[int] = set()
        """Blocks whose reference count is not the number of places that hold them."""
        self.taken_at: dict[int, tuple[int, int]] = {}
        """(event, step) in which a block was last handed out."""
        self.hashes: dict[int, tuple[int, ...]] = {}
        """Hashes under which a block can be hit."""
        self.evicted_at: dict[int, tuple[int, tuple[int, ...]]] = {}
        """(event, hashes) of a block's last eviction."""
        self._touched: set[int] = set()

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds; the null block is not one of them."""
        return len(self.ref_cnts)

    def blocks_taken(self, event: BlocksTaken) -> None:
        self.scheduling = True
        blocks, refs = event.blocks, self.ref_cnts
        if self.windowed:
            self.passed.forget(blocks)
        at = (self.number, self.step + 1)
        self.last_pool_event = "blocks.taken"
        if len(blocks) == 1:  # for a request that decodes: most of them
            (block,) = blocks
            if block and block not in refs and block not in self.held:
                refs[block] = 1
                self.taken_at[block] = at
                self.unbalanced.add(block)
                return
        elif (
            refs.keys().isdisjoint(blocks)
            and self.held.keys().isdisjoint(blocks)
            and NULL_BLOCK not in blocks
        ):
            refs.update(dict.fromkeys(blocks, 1))
            self.taken_at.update(dict.fromkeys(blocks, at))
            self.unbalanced.update(blocks)
            return
        for block in filter(None, blocks):
            refs[block] = refs.get(block, 0) + 1
            self.taken_at[block] = at
            self._weigh(block)

    def blocks_touched(self, event: BlocksTouched) -> None:
        self._set_counts(event)
        if self.windowed:
            self._touched.update(event.blocks)
        self.last_pool_event = "blocks.touched"

    def blocks_freed(self, event: BlocksFreed) -> None:
        self._set_counts(event)
        self.freed.append((self.number, event))
        self.last_pool_event = "blocks.freed"

    def _set_counts(self, event: BlocksTouched | BlocksFreed) -> None:
        refs, blocks = self.ref_cnts, event.blocks
        given_up = len(event.ref_cnts) == len(blocks) and not any(event.ref_cnts)
        if given_up and [*map(self.held.get, blocks)].count(1) == len(blocks):
            # A request that shares nothing gives back: each is held, and counts nothing from here on.
            for block in blocks:
                refs.pop(block, None)
            self.unbalanced.update(blocks)
            return
        for block, count in zip(blocks, event.ref_cnts, strict=True):
            if block:
                if count > 0:
                    refs[block] = count
                else:
                    refs.pop(block, None)
                self._weigh(block)

    def _weigh(self, block: int) -> None:
        if self.ref_cnts.get(block, 0) == self.held.get(block, 0):
            self.unbalanced.discard(block)
        else:
            self.unbalanced.add(block)

    def _hold(self, block: int) -> None:
        self.held[block] = self.held.get(block, 0) + 1
        self._weigh(block)

    def _hold_new(self, blocks: list[int]) -> None:
        held = self.held
        if len(blocks) == 1:
            (block,) = blocks
            if block not in held and self.ref_cnts.get(block) == 1:
                held[block] = 1
                self.unbalanced.discard(block)
                return
        counts = [*map(self.ref_cnts.get, blocks)]
        if counts.count(1) == len(counts) and held.keys().isdisjoint(blocks):
            held.update(dict.fromkeys(blocks, 1))
            self.unbalanced.difference_update(blocks)
            return
        for block in filter(None, blocks):
            self._hold(block)

    def _let_go(self, block: int) -> None:
        left = self.held.get(block, 0) - 1
        if left > 0:
            self.held[block] = left
        else:
            self.held.pop(block, None)
        self._weigh(block)

    def _let_go_of(self, blocks: list[int]) -> None:
        """The same for many, all at once where nobody else holds or counts any of them."""
        held, refs = self.held, self.ref_cnts
        if [*map(held.get, blocks)].count(1) == len(blocks) and refs.keys().isdisjoint(blocks):
            for block in blocks:
                del held[block]
            self.unbalanced.difference_update(blocks)
            return
        for block in filter(None, blocks):
            self._let_go(block)

    def blocks_cached(self, event: BlocksCached) -> None:
        hashes = self.hashes
        for block, block_hash in zip(event.blocks, event.hashes, strict=True):
            known = hashes.get(block)
            if known is None:
                hashes[block] = (block_hash,)
            elif block_hash not in known:
                hashes[block] = (*known, block_hash)

    def block_evicted(self, event: BlockEvicted) -> None:
        self.hashes.pop(event.block, None)
        self.evicted_at[event.block] = (self.number, tuple(event.hashes))

    def prefix_reset(self, event: PrefixCacheReset) -> None:
        if event.ok:
            self.hashes.clear()
        self.last_pool_event = "prefix.reset"
