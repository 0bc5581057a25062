"""What each kind of attention keeps of a request, and which prefix counts as a hit for it.

Follows: vLLM 0.32.0, v1/core/single_type_kv_cache_manager.py and v1/kv_cache_interface.py.
Leaves out: Mamba, chunked-local and cross attention, EAGLE's lookahead.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import islice

from .block_pool import BlockPool, KVCacheBlock
from .request import Request


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class FullAttentionSpec:
    """A group of layers that attend to every earlier token."""

    block_size: int


@dataclass(frozen=True)
class SlidingWindowSpec:
    """A group of layers that attend to the last `sliding_window` tokens, the current one included."""

    block_size: int
    sliding_window: int


class FullAttentionManager:
    """What a kind of attention needs to keep. Full attention needs all."""

    max_admission_blocks: int | None = None

    def __init__(self, spec: FullAttentionSpec | SlidingWindowSpec, pool: BlockPool):
        self.block_size = spec.block_size
        self.block_pool = pool

    def find_longest_cache_hit(
        self, block_hashes: Sequence[Hashable], max_blocks: int, group_ids: Sequence[int]
    ) -> list[list[KVCacheBlock]]:
        """The longest run of cached blocks from the start, for each of the groups, which all must have it."""
        if len(group_ids) == 1:
            cached: dict[Hashable, KVCacheBlock]
            cached = self.block_pool.cached_block_hash_to_block[group_ids[0]]
            hits = []
            for block_hash in islice(block_hashes, max_blocks):
                block = cached.get(block_hash)
                if block is None:
                    break  # hashes are chained: every later one misses too
                hits.append(block)
            return [hits]
        per_hash = []
        for block_hash in islice(block_hashes, max_blocks):
            found = self.block_pool.get_cached_block(block_hash, group_ids)
            if found is None:
                break
            per_hash.append(found)
        return [[found[i] for found in per_hash] for i in range(len(group_ids))]

    def get_num_skipped_blocks(self, num_computed_tokens: int) -> int:
        """Blocks at the head that no later token attends to."""
        return 0

    def reachable_block_mask(
        self, request: Request, first: int, last: int, retention_interval: int | None
    ) -> list[bool] | None:
        """Which of the blocks `first` to `last` (exclusive) deserve a hash; None for all."""
        return None


class SlidingWindowManager(FullAttentionManager):
    """Keeps the blocks of the window; a hit needs only the last few blocks of the prefix.

    Block size 4, window 8: the token after 12 computed ones sees tokens 5 to 12, so block 0 is skipped.
    """

    def __init__(
        self,
        spec: SlidingWindowSpec,
        pool: BlockPool,
        max_in_flight_tokens: int,
        max_model_len: int,
    ):
        super().__init__(spec, pool)
        self.sliding_window = spec.sliding_window
        # A hit needs this many blocks in a row before the resumed token.
        self.num_blocks_for_hit = cdiv(self.sliding_window - 1, self.block_size)
        # The window, what is computed ahead of it, and one block because a window may begin inside a block.
        longest = min(self.sliding_window - 1 + max_in_flight_tokens, max_model_len)
        self.max_admission_blocks = cdiv(longest, self.block_size) + 1

    def find_longest_cache_hit(
        self, block_hashes: Sequence[Hashable], max_blocks: int, group_ids: Sequence[int]
    ) -> list[list[KVCacheBlock]]:
        """From the right: the last place with enough cached blocks in a row. Null blocks stand for what is before."""
        null_block = self.block_pool.null_block
        run: list[list[KVCacheBlock]] = []  # the blocks of one run, last one first
        for i in range(max_blocks - 1, -1, -1):
            found = self.block_pool.get_cached_block(block_hashes[i], group_ids)
            if found is None:
                run = []
                continue
            run.append(found)
            if len(run) >= self.num_blocks_for_hit:
                return [
                    [null_block] * i + [found[g] for found in reversed(run)]
                    for g in range(len(group_ids))
                ]
        # A shorter run counts too when it reaches back to the first token.
        return [[found[g] for found in reversed(run)] for g in range(len(group_ids))]

    def get_num_skipped_blocks(self, num_computed_tokens: int) -> int:
        return max(0, num_computed_tokens - self.sliding_window + 1) // self.block_size

    def get_next_skip(self, num_skipped_blocks: int) -> int:
        """At how many computed tokens one block more is skipped."""
        return (num_skipped_blocks + 1) * self.block_size + self.sliding_window - 1

    def reachable_block_mask(
        self, request: Request, first: int, last: int, retention_interval: int | None
    ) -> list[bool] | None:
        """Blocks of the runs that a hit can end with: at each multiple of `retention_interval`, and at two boundaries.

        A later request resumes at the last token of this prompt, or where it leaves a prefix that others share.
        Units: `retention_interval` in tokens; None keeps all, 0 keeps the boundaries only.
        """
        need = self.num_blocks_for_hit
        mask = [False] * (last - first)
        if retention_interval != 0:
            per_segment = 1 if retention_interval is None else retention_interval // self.block_size
            if need >= per_segment:
                return None
            mask = [i % per_segment >= per_segment - need for i in range(first, last)]
        if retention_interval is not None:
            for boundary in (request.num_prompt_tokens - 1, request.shared_prefix_boundary):
                end = boundary // self.block_size
                for i in range(max(first, end - need), min(last, end)):
                    mask[i - first] = True
        return mask
