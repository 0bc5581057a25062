"""The blocks of the KV cache: who is free, in what order they are reused, and which hash is found where.

Follows: vLLM 0.32.0, v1/core/block_pool.py and v1/core/kv_cache_utils.py; older and newer releases by `rules`.
Leaves out: KV events, residency metrics, several pools, blocks that carry two hashes (Mamba's partial blocks).

Four blocks by hand, 0.32 rules. Block 0 is the null block, so the queue begins as 1 2 3:

>>> pool = BlockPool(4)
>>> one, two, three = pool.get_new_blocks(3)         # queue: empty
>>> pool.cache_full_blocks("r", [one, two, three], 0, 2, [b"A", b"B"])
>>> pool.free_blocks([three, two, one])              # tail first, as a request is freed
>>> [block.block_id for block in pool.free_block_queue]
[3, 2, 1]
>>> pool.touch(pool.get_cached_block(b"A", [0]))     # 3 had no hash: it went to the front. A hit takes 1 out
>>> [block.block_id for block in pool.free_block_queue]
[3, 2]
>>> [block.block_id for block in pool.get_new_blocks(2)]
[3, 2]
>>> pool.get_cached_block(b"B", [0]) is None         # 2 was reused, so B is evicted
True
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import compress, repeat
from typing import Any

from .rules import Rules, rules_for

Fact = tuple[Any, ...]  # what happened: (kind, *fields)
Tell = Callable[[Fact], object]


class KVCacheBlock:
    """One physical block. It is in the free queue exactly when `ref_cnt` is 0 and it is not the null block."""

    __slots__ = (
        "block_id",
        "ref_cnt",
        "block_hash",
        "group_id",
        "is_null",
        "prev_free_block",
        "next_free_block",
    )

    def __init__(self, block_id: int):
        self.block_id = block_id
        self.ref_cnt = 0
        self.block_hash: Hashable | None = None  # set while the block is full and findable
        self.group_id = 0  # of the hash: one hash names different blocks in different groups
        self.is_null = False
        self.prev_free_block = self.next_free_block = self

    def __repr__(self) -> str:
        return (
            f"KVCacheBlock({self.block_id}, ref_cnt={self.ref_cnt}, block_hash={self.block_hash!r})"
        )


class FreeKVCacheBlockQueue:
    """Free blocks in eviction order: a ring of links through the blocks, closed by one sentinel.

    A linked list and not a deque, because a prefix hit takes a block out of the middle.
    """

    def __init__(self, blocks: Iterable[KVCacheBlock]):
        self.end = KVCacheBlock(-1)
        self.num_free_blocks = 0
        self.append_n(list(blocks))

    def popleft_n(self, num_blocks: int) -> list[KVCacheBlock]:
        """The next `num_blocks` to be reused."""
        block = self.end.next_free_block
        popped = []
        for _ in range(num_blocks):
            popped.append(block)
            block = block.next_free_block
        self.end.next_free_block = block
        block.prev_free_block = self.end
        self.num_free_blocks -= num_blocks
        return popped

    def remove(self, block: KVCacheBlock) -> None:
        """Take one block out, wherever it stands."""
        before, after = block.prev_free_block, block.next_free_block
        before.next_free_block = after
        after.prev_free_block = before
        self.num_free_blocks -= 1

    def append_n(self, blocks: Sequence[KVCacheBlock]) -> None:
        """To the end: reused last."""
        self._insert_between(self.end.prev_free_block, blocks, self.end)

    def prepend_n(self, blocks: Sequence[KVCacheBlock]) -> None:
        """To the front, in the order given: reused next."""
        self._insert_between(self.end, blocks, self.end.next_free_block)

    def _insert_between(
        self, before: KVCacheBlock, blocks: Sequence[KVCacheBlock], after: KVCacheBlock
    ) -> None:
        for block in blocks:
            before.next_free_block = block
            block.prev_free_block = before
            before = block
        before.next_free_block = after
        after.prev_free_block = before
        self.num_free_blocks += len(blocks)

    def __iter__(self) -> Iterator[KVCacheBlock]:
        block = self.end.next_free_block
        while block is not self.end:
            yield block
            block = block.next_free_block

    def __len__(self) -> int:
        return self.num_free_blocks


class BlockHashToBlockMap(dict):
    """hash -> the block that a lookup finds, for one group.

    Equal blocks are not merged, so that tables only ever grow. The first one cached is found; the others wait in
    `duplicates`, in the order in which they were cached, and the next one takes its place when it is evicted.
    """

    __slots__ = ("duplicates",)

    def __init__(self) -> None:
        super().__init__()
        self.duplicates: dict[Hashable, list[KVCacheBlock]] = {}

    def add_duplicate(self, block_hash: Hashable, block: KVCacheBlock) -> None:
        self.duplicates.setdefault(block_hash, []).append(block)

    def remove_duplicate(self, block_hash: Hashable, block: KVCacheBlock) -> None:
        """Forget `block`, one of several under `block_hash`; another one stays findable."""
        waiting = self.duplicates[block_hash]
        if self[block_hash] is block:
            self[block_hash] = waiting.pop(0)
        else:
            waiting.remove(block)
        if not waiting:
            del self.duplicates[block_hash]


class BlockPool:
    """All blocks, the free queue, and one hash map per KV cache group. Groups share the blocks.

    `tell((kind, *fields))` hears `block.evicted`, `blocks.taken`, `blocks.touched`, `blocks.cached`, `blocks.freed`;
    a call that concerns no block at all is not told.
    """

    def __init__(
        self,
        num_gpu_blocks: int,
        enable_caching: bool = True,
        num_groups: int = 1,
        rules: Rules | None = None,
        tell: Tell | None = None,
    ):
        self.num_gpu_blocks = num_gpu_blocks
        self.enable_caching = enable_caching
        self.rules = rules or rules_for("0.32.0")
        self.tell = tell
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_gpu_blocks)]
        self.free_block_queue = FreeKVCacheBlockQueue(self.blocks)
        self.cached_block_hash_to_block = [BlockHashToBlockMap() for _ in range(num_groups)]
        # Stands in a table where a block is no longer needed. It is never owned and never written.
        self.null_block = self.free_block_queue.popleft_n(1)[0]
        self.null_block.is_null = True

    def get_num_free_blocks(self) -> int:
        return self.free_block_queue.num_free_blocks

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take blocks from the front of the free queue. One that still has a hash is evicted by this.

        Raises: ValueError when fewer are free; callers ask first.
        """
        queue = self.free_block_queue
        if num_blocks > queue.num_free_blocks:
            raise ValueError(f"{num_blocks} blocks wanted, {queue.num_free_blocks} are free")
        blocks = queue.popleft_n(num_blocks)
        self._evict(blocks)
        for block in blocks:
            block.ref_cnt = 1
        if self.tell is not None and blocks:
            self.tell(("blocks.taken", [block.block_id for block in blocks]))
        return blocks

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """One more owner for each block; a free one leaves the queue."""
        counted = blocks if self.rules.null_block_counted else _without_null(blocks)
        for block in counted:
            ref_cnt = block.ref_cnt
            if not ref_cnt and not block.is_null:
                self.free_block_queue.remove(block)
            block.ref_cnt = ref_cnt + 1
        if self.tell is not None and blocks:
            ref_cnts = [block.ref_cnt for block in blocks]
            self.tell(("blocks.touched", ids_of(blocks), ref_cnts))

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """One owner less for each block; those without an owner go back to the queue, first given, first reused."""
        if self.tell is not None:
            ordered_blocks = list(ordered_blocks)
        counted = ordered_blocks if self.rules.null_block_counted else _without_null(ordered_blocks)
        reuse_next: list[KVCacheBlock] = []
        reuse_last: list[KVCacheBlock] = []
        # A block nobody can find is worth nothing: since 0.24 it is reused while its memory is still warm.
        reuse_unhashed = reuse_next if self.rules.unhashed_blocks_first else reuse_last
        for block in counted:
            block.ref_cnt -= 1
            if block.ref_cnt == 0 and not block.is_null:
                (reuse_unhashed if block.block_hash is None else reuse_last).append(block)
        if reuse_next:
            self.free_block_queue.prepend_n(reuse_next)
        self.free_block_queue.append_n(reuse_last)
        if self.tell is not None and ordered_blocks:
            ref_cnts = [block.ref_cnt for block in ordered_blocks]
            self.tell(("blocks.freed", ids_of(ordered_blocks), ref_cnts))

    def cache_full_blocks(
        self,
        request: Hashable,
        blocks: Sequence[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_hashes: Sequence[Hashable],
        group_id: int = 0,
        block_mask: Sequence[bool] | None = None,
    ) -> None:
        """Give `blocks[num_cached_blocks:num_full_blocks]` their hashes, so that others can find them.

        Null blocks, and blocks that `block_mask` leaves out, stay without one.
        Raises: ValueError when fewer hashes are known than blocks are full.
        """
        if len(block_hashes) < num_full_blocks:
            raise ValueError(
                f"request {request!r}: {num_full_blocks} blocks are full, {len(block_hashes)} hashes known"
            )
        full_blocks = blocks[num_cached_blocks:num_full_blocks]
        hashes = block_hashes[num_cached_blocks:num_full_blocks]
        if block_mask is not None or (full_blocks and full_blocks[0].is_null):  # nulls stand first
            wanted = block_mask or repeat(True)
            mask = [not block.is_null and keep for block, keep in zip(full_blocks, wanted)]
            full_blocks = [*compress(full_blocks, mask)]
            hashes = [*compress(hashes, mask)]
        cached = self.cached_block_hash_to_block[group_id]
        first_under = cached.setdefault
        if len(self.cached_block_hash_to_block) > 1:  # they share the blocks
            for block in full_blocks:
                block.group_id = group_id
        for block, block_hash in zip(full_blocks, hashes):
            block.block_hash = block_hash
            if first_under(block_hash, block) is not block:
                cached.add_duplicate(block_hash, block)
        if self.tell is not None and full_blocks:
            ids = ids_of(full_blocks)
            self.tell(("blocks.cached", request, group_id, num_cached_blocks, ids, hashes))

    def get_cached_block(
        self, block_hash: Hashable, group_ids: Sequence[int]
    ) -> list[KVCacheBlock] | None:
        """The block of each group under this hash, or None when one of the groups lacks it."""
        found = [
            self.cached_block_hash_to_block[group_id].get(block_hash) for group_id in group_ids
        ]
        return None if None in found else found  # type: ignore[return-value]

    def evict_blocks(self, block_ids: Iterable[int]) -> None:
        """Forget the hashes of these blocks. Owners keep them."""
        self._evict(self.blocks[block_id] for block_id in block_ids)

    def reset_prefix_cache(self) -> bool:
        """Forget every hash; the order of the free queue stays. False, and nothing done, while blocks are in use."""
        if self.free_block_queue.num_free_blocks != self.num_gpu_blocks - 1:
            return False
        for cached in self.cached_block_hash_to_block:
            cached.clear()
            cached.duplicates.clear()
        for block in self.blocks:
            block.block_hash = None
        return True

    def _evict(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Forget the hashes of those blocks that have one."""
        maps, tell = self.cached_block_hash_to_block, self.tell
        for block in blocks:
            block_hash = block.block_hash
            if block_hash is None:
                continue
            block.block_hash = None
            cached = maps[block.group_id]
            if cached.duplicates and block_hash in cached.duplicates:
                cached.remove_duplicate(block_hash, block)
            else:
                del cached[block_hash]
            if tell is not None:
                tell(("block.evicted", block.block_id, [block_hash]))


def ids_of(blocks: Iterable[KVCacheBlock]) -> list[int]:
    return [block.block_id for block in blocks]


def _without_null(blocks: Iterable[KVCacheBlock]) -> list[KVCacheBlock]:
    return [block for block in blocks if not block.is_null]
