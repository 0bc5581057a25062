"""``mini``'s manager, with a straight way for the commonest of all calls: one token more for a request that decodes.

Of a request's calls of ``allocate_slots`` while it decodes, two out of a block size do something: the token that fills
its last block, and the one after it, which needs a new block. Here each of them is one piece of code instead of the
many that serve every case. Whatever is not exactly one of the two goes ``mini``'s own way.
"""

from __future__ import annotations

from vllm_trace.mini.kv_cache_manager import KVCacheManager, RequestBlocks
from vllm_trace.mini.request import Request


class SteadyManager(KVCacheManager):
    """The same blocks, and the same told of them, as ``KVCacheManager``."""

    @property
    def is_plain(self) -> bool:
        """What ``append_slot`` is for: one group of full attention, with prefix caching."""
        return (
            len(self.groups) == 1
            and not self.has_windows
            and self.enable_caching
            and self.block_size > 1
        )

    def append_slot(self, request: Request, held: RequestBlocks) -> bool:
        """``allocate_slots(request, 1)`` for a request that runs; False when it is refused."""
        if not self.is_plain:
            return self.allocate_slots(request, 1) is not None
        table, num_tokens = held.tables[0], request.num_computed_tokens + 1
        num_blocks = len(table)
        num_slots = num_blocks * self.block_size
        if num_tokens == num_slots:
            hashes = request.block_hashes
            if (
                held.num_cached_blocks == num_blocks - 1 < len(hashes)
                and num_tokens <= request.num_tokens
            ):
                block, block_hash = table[-1], hashes[num_blocks - 1]
                block.block_hash = block_hash
                cached = self.block_pool.cached_block_hash_to_block[0]
                if cached.setdefault(block_hash, block) is not block:
                    cached.add_duplicate(block_hash, block)
                held.num_cached_blocks = num_blocks
                held.quiet_until = num_slots
                if self.tell is not None:
                    key, ids = request.request_id, [block.block_id]
                    self.tell(("blocks.cached", key, 0, ids, [block_hash]))
                return True
        elif num_tokens == num_slots + 1 and held.quiet_until == num_slots < self.max_model_len:
            queue = self.block_pool.free_block_queue
            if queue.num_free_blocks:
                (block,) = self.block_pool.get_new_blocks(1)
                table.append(block)
                held.quiet_until = num_slots + self.block_size - 1
                if self.tell is not None:
                    key, given = request.request_id, [[block.block_id]]
                    self.tell(("slots.allocated", key, 1, 0, given, queue.num_free_blocks))
                return True
        return self.allocate_slots(request, 1) is not None
