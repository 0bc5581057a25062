"""Which blocks a request holds: prefix hits, new slots, blocks that left the window, the end.

Follows: vLLM 0.32.0, v1/core/kv_cache_manager.py and kv_cache_coordinator.py.
Leaves out: groups of different block sizes, KV connectors, context parallelism, and what
`single_type_kv_cache_manager` leaves out.

A block size of 4, a pool of 8, a prompt of 9 tokens, then the same prompt again:

>>> from .request import Request
>>> manager = KVCacheManager(8, [FullAttentionSpec(block_size=4)], max_model_len=32)
>>> first = Request("first", num_prompt_tokens=9, block_hashes=["A", "B"])
>>> manager.allocate_slots(first, 9) and manager.get_block_ids("first")
([1, 2, 3],)
>>> second = Request("second", num_prompt_tokens=9, block_hashes=["A", "B"])
>>> hits, num_hit_tokens, _ = manager.get_computed_blocks(second)
>>> manager.allocate_slots(second, 1, num_hit_tokens, hits) and manager.get_block_ids("second")
([1, 2, 4],)
>>> manager.free(first); manager.free(second)   # 3 and 4 hold no full block: reused first, the latest of them next
>>> [block.block_id for block in manager.block_pool.free_block_queue]
[4, 3, 5, 6, 7, 2, 1]
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .block_pool import BlockPool, KVCacheBlock, Tell, ids_of
from .request import Request, RequestStatus
from .rules import Rules, rules_for
from .single_type_kv_cache_manager import (
    FullAttentionManager,
    FullAttentionSpec,
    SlidingWindowManager,
    SlidingWindowSpec,
)

Blocks = tuple[Sequence[KVCacheBlock], ...]  # one sequence for each group


class RequestBlocks:
    """What one request holds. All groups have the same block size, so their tables have the same length."""

    __slots__ = ("tables", "num_cached_blocks", "quiet_until")

    def __init__(self, tables: list[list[KVCacheBlock]]):
        self.tables = tables  # in logical order, for each group
        self.num_cached_blocks = 0
        # Up to this many tokens no block is needed, none becomes full, none leaves a window. Decoding lives here.
        self.quiet_until = 0


class KVCacheManager:
    """One pool, one or several groups, and the blocks of every request that is running.

    `rules` says which release to be equal to; `tell((kind, *fields))` hears what happened, inner events first; a call
    of `allocate_slots` that needed no block is not told.
    """

    def __init__(
        self,
        num_blocks: int,
        groups: Sequence[FullAttentionSpec | SlidingWindowSpec],
        max_model_len: int,
        *,
        enable_caching: bool = True,
        max_in_flight_tokens: int | None = None,
        watermark: float = 0.0,
        retention_interval: int | None = None,
        rules: Rules | None = None,
        tell: Tell | None = None,
    ):
        if len({group.block_size for group in groups}) != 1:
            raise ValueError(
                f"groups of different block sizes are not followed by mini: {list(groups)}"
            )
        self.rules = rules or rules_for("0.32.0")
        self.tell = tell
        self.groups = tuple(groups)
        self.block_size = groups[0].block_size
        self.max_model_len = max_model_len
        self.enable_caching = enable_caching
        self.watermark_blocks = int(watermark * num_blocks) if self.rules.watermark else 0
        self.retention_interval = retention_interval if self.rules.sparse_window_cache else None
        self.block_pool = BlockPool(num_blocks, enable_caching, len(groups), self.rules, tell)
        in_flight = max_model_len if max_in_flight_tokens is None else max_in_flight_tokens
        self.managers = tuple(
            SlidingWindowManager(spec, self.block_pool, in_flight, max_model_len)
            if isinstance(spec, SlidingWindowSpec)
            else FullAttentionManager(spec, self.block_pool)
            for spec in groups
        )
        # Only windows lose blocks while a request runs.
        self._windows = [
            (i, m) for i, m in enumerate(self.managers) if isinstance(m, SlidingWindowManager)
        ]
        self.has_windows = bool(self._windows)
        # Groups of one kind are looked up together; full attention first, as it bounds the others.
        kinds: dict[FullAttentionSpec | SlidingWindowSpec, list[int]] = {}
        for group_id, spec in enumerate(groups):
            kinds.setdefault(spec, []).append(group_id)
        self._kinds = sorted(
            kinds.values(), key=lambda ids: isinstance(groups[ids[0]], SlidingWindowSpec)
        )
        self.no_blocks: Blocks = tuple(() for _ in groups)
        self.requests: dict[Hashable, RequestBlocks] = {}

    def get_computed_blocks(self, request: Request) -> tuple[Blocks, int, int]:
        """The longest cached prefix: its blocks for each group, its tokens, and where one group's longer hit ended.

        At least one token is left to compute, because its logits are needed: a fully cached prompt loses a block.
        """
        blocks, num_hit_blocks, longest = self.no_blocks, 0, 0
        if self.enable_caching and not request.skip_reading_prefix_cache:
            max_blocks = (request.num_tokens - 1) // self.block_size
            blocks, num_hit_blocks, longest = self._find_longest_cache_hit(
                request.block_hashes, max_blocks
            )
            if not num_hit_blocks:
                blocks = self.no_blocks
        num_hit_tokens = num_hit_blocks * self.block_size
        boundary = longest * self.block_size if longest > num_hit_blocks else 0
        if self.tell is not None:
            ids = _ids(blocks)
            key = request.request_id
            self.tell(("prefix.looked_up", key, request.num_tokens, num_hit_tokens, ids))
        return blocks, num_hit_tokens, boundary

    def _find_longest_cache_hit(
        self, block_hashes: Sequence[Hashable], max_blocks: int
    ) -> tuple[Blocks, int, int]:
        """The longest prefix on which every kind of group agrees: each accepts the length so far or shortens it.

        Units: blocks. Returns also the longest hit that any kind had.
        """
        if len(self.groups) == 1:
            (only,) = self.managers[0].find_longest_cache_hit(block_hashes, max_blocks, [0])
            return (only,), len(only), len(only)
        tables: list[list[KVCacheBlock]] = [[] for _ in self.groups]
        full_hit: dict[int, int] = {}
        agreed, longest = max_blocks, 0
        # With full attention and one other kind a single pass is enough: the second cannot lengthen the first.
        one_pass = len(self._kinds) == 2 and isinstance(
            self.groups[self._kinds[0][0]], FullAttentionSpec
        )
        while True:
            length = agreed
            for kind, group_ids in enumerate(self._kinds):
                if kind in full_hit:  # a prefix of a full-attention hit is a hit
                    length = min(length, full_hit[kind])
                    continue
                hits = self.managers[group_ids[0]].find_longest_cache_hit(
                    block_hashes, length, group_ids
                )
                length = len(hits[0])
                for group_id, table in zip(group_ids, hits):
                    tables[group_id] = table
                if isinstance(self.groups[group_ids[0]], FullAttentionSpec):
                    full_hit[kind] = length
                longest = max(longest, length)
            if length >= agreed:
                break
            agreed = length
            if one_pass:
                break
        for kind in full_hit:
            for group_id in self._kinds[kind]:
                del tables[group_id][agreed:]
        return tuple(tables), agreed, longest

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: Blocks | None = None,
        num_lookahead_tokens: int = 0,
        *,
        full_sequence_must_fit: bool = False,
        has_scheduled_reqs: bool = True,
    ) -> Blocks | None:
        """Slots for the next `num_new_tokens` of a request: the new blocks of each group, or None if they do not fit.

        |- computed -|- hit -|- new -|- lookahead -|
                             |- new blocks cover these, where the last block has no room -|
                     |- hashed as far as blocks are full and tokens are known -|
        """
        held = self.requests.get(request.request_id)
        num_slots = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
        if held is not None and num_slots <= held.quiet_until:
            return self.no_blocks
        if not num_new_tokens and not num_new_computed_tokens:
            raise ValueError(f"request {request.request_id!r}: no new tokens and no hit")
        if held is not None:
            return self.grow(request, held, num_new_tokens, 0, num_lookahead_tokens)
        hits = new_computed_blocks or self.no_blocks
        num_computed = request.num_computed_tokens + num_new_computed_tokens
        num_slots = min(num_slots + num_new_computed_tokens, self.max_model_len)
        is_beside = has_scheduled_reqs and request.status is not RequestStatus.RUNNING
        num_left_free = self.watermark_blocks if is_beside else 0
        num_usable = self.block_pool.free_block_queue.num_free_blocks - num_left_free
        whole = min(request.num_tokens, self.max_model_len) if full_sequence_must_fit else 0
        most = whole if whole > num_slots else num_slots
        # More than this is never needed, not even if every hit lies in the free queue.
        if -(-most // self.block_size) * len(self.groups) > num_usable:
            num_wanted = self._count_wanted(whole, hits, num_computed, capped=True) if whole else 0
            if num_wanted > num_usable and not self.rules.whole_sequence_test_inside:
                num_new_tokens = whole - num_computed
            elif num_slots > whole or self._windows:  # else the whole sequence needs no less
                num_wanted = max(num_wanted, self._count_wanted(num_slots, hits, num_computed))
            if num_wanted > num_usable:
                num_wanted += num_left_free
                self._refuse(request, num_new_tokens, num_new_computed_tokens, num_wanted)
                return None

        held = self.requests[request.request_id] = RequestBlocks([*map(list, self.no_blocks)])
        if num_new_computed_tokens:
            self._add_hits(held, hits, num_computed)
        return self.grow(
            request, held, num_new_tokens, num_new_computed_tokens, num_lookahead_tokens
        )

    def grow(
        self,
        request: Request,
        held: RequestBlocks,
        num_new_tokens: int,
        num_hit_tokens: int = 0,
        num_lookahead_tokens: int = 0,
    ) -> Blocks | None:
        """What `allocate_slots` does for a request that runs, or may: take blocks, hash those that become full.

        Leaves behind what left a window. Sees up to how many tokens there will be nothing to do.
        """
        num_processed = num_computed = request.num_computed_tokens + num_hit_tokens
        if self._windows:
            # Before the test, and even if the request is then refused: what left the window may be what is missing.
            if self.rules.windows_follow_processed:
                num_processed = max(0, num_computed - request.num_in_flight_tokens)
            self._remove_skipped_blocks(held, num_processed)
        num_tokens = num_computed + num_new_tokens
        num_slots = num_tokens + num_lookahead_tokens
        if num_slots > self.max_model_len:
            num_slots = self.max_model_len
        tables, block_size, pool = held.tables, self.block_size, self.block_pool
        num_missing = -(-num_slots // block_size) - len(tables[0])
        new_blocks = self.no_blocks
        if num_missing > 0:
            if num_missing * len(tables) > pool.free_block_queue.num_free_blocks:
                num_wanted = num_missing * len(tables)
                self._refuse(request, num_new_tokens, num_hit_tokens, num_wanted)
                return None
            new_blocks = ()
            for table in tables:
                blocks = pool.get_new_blocks(num_missing)
                table += blocks
                new_blocks += (blocks,)

        num_blocks = len(tables[0])
        held.quiet_until = num_blocks * block_size
        if self.enable_caching:
            if num_tokens > request.num_tokens:
                num_tokens = request.num_tokens  # draft tokens may still be rejected
            num_full = num_tokens // block_size
            if num_full > held.num_cached_blocks:
                self._cache_blocks(request, held, num_full)
            if held.num_cached_blocks < num_blocks:
                held.quiet_until = (held.num_cached_blocks + 1) * block_size - 1
        for _, manager in self._windows:
            num_skipped = manager.get_num_skipped_blocks(num_processed)
            held.quiet_until = min(held.quiet_until, manager.get_next_skip(num_skipped))

        if self.tell is not None and (num_missing > 0 or num_hit_tokens):
            num_free = pool.free_block_queue.num_free_blocks
            key, ids = request.request_id, _ids(new_blocks)
            self.tell(("slots.allocated", key, num_new_tokens, num_hit_tokens, ids, num_free))
        return new_blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Hash the blocks that are full at `num_computed_tokens`; for tokens that became known after their step."""
        held = self.requests.get(request.request_id)
        num_full = num_computed_tokens // self.block_size
        if held is not None and self.enable_caching and num_full > held.num_cached_blocks:
            self._cache_blocks(request, held, num_full)

    def remove_skipped_blocks(self, request_id: Hashable, num_processed_tokens: int) -> None:
        """Free what left a window, tail first; the null block takes its place, so positions stay where they are."""
        held = self.requests.get(request_id)
        if held is not None:
            self._remove_skipped_blocks(held, num_processed_tokens)

    def _remove_skipped_blocks(self, held: RequestBlocks, num_processed_tokens: int) -> None:
        null_block = self.block_pool.null_block
        for group_id, manager in self._windows:
            table = held.tables[group_id]
            skipped: list[KVCacheBlock] = []
            last = min(manager.get_num_skipped_blocks(num_processed_tokens), len(table))
            for i in range(last - 1, -1, -1):
                if table[i] is null_block:
                    break  # what is before was skipped earlier
                skipped.append(table[i])
                table[i] = null_block
            if skipped:
                self.block_pool.free_blocks(skipped)

    def free(self, request: Request) -> None:
        """Give back all blocks, tail first: the tail of a prefix is the part least likely to be hit."""
        held = self.requests.pop(request.request_id, None)
        tail_first = self.rules.free_tail_first or self.enable_caching
        for table in held.tables if held is not None else self.no_blocks:
            if not self.rules.null_head_freed:
                table = self._without_null_head(table)
            self.block_pool.free_blocks(reversed(table) if tail_first else table)
        if self.tell is not None:
            self.tell(("request.freed", request.request_id))

    def get_blocks(self, request_id: Hashable) -> Blocks:
        """The whole table of a request, for each group."""
        held = self.requests.get(request_id)
        return self.no_blocks if held is None else tuple(held.tables)

    def get_block_ids(self, request_id: Hashable) -> tuple[list[int], ...]:
        return tuple(ids_of(table) for table in self.get_blocks(request_id))

    def reset_prefix_cache(self) -> bool:
        return self.block_pool.reset_prefix_cache()

    def _count_wanted(
        self, num_slots: int, hits: Blocks, num_computed: int, capped: bool = False
    ) -> int:
        """How many free blocks a new request uses up: new ones, and hits that nobody holds now."""
        num_required = -(-num_slots // self.block_size)
        needed = 0
        for manager, group_hits in zip(self.managers, hits):
            num_blocks = num_required
            if capped and manager.max_admission_blocks is not None:
                num_blocks = min(num_blocks, manager.max_admission_blocks)
            num_skipped = manager.get_num_skipped_blocks(num_computed)
            needed += max(0, num_blocks - max(num_skipped, len(group_hits)))
            for block in group_hits[num_skipped:]:
                if block.ref_cnt == 0 and not block.is_null:
                    needed += 1
        return needed

    def _add_hits(self, held: RequestBlocks, hits: Blocks, num_computed: int) -> None:
        """Take the hits of every group before any new block is taken, which could otherwise evict one of them."""
        for manager, table, group_hits in zip(self.managers, held.tables, hits):
            num_skipped = manager.get_num_skipped_blocks(num_computed)
            in_window = group_hits[num_skipped:] if num_skipped else group_hits
            self.block_pool.touch(in_window)
            table.extend([self.block_pool.null_block] * num_skipped)
            table.extend(in_window)
        held.num_cached_blocks = len(held.tables[0])

    def _cache_blocks(self, request: Request, held: RequestBlocks, num_full_blocks: int) -> None:
        num_cached_blocks = held.num_cached_blocks
        held.num_cached_blocks = num_full_blocks
        mask = None
        for group_id, table in enumerate(held.tables):
            if self._windows:
                mask = self.managers[group_id].reachable_block_mask(
                    request, num_cached_blocks, num_full_blocks, self.retention_interval
                )
            self.block_pool.cache_full_blocks(
                request.request_id,
                table,
                num_cached_blocks,
                num_full_blocks,
                request.block_hashes,
                group_id,
                mask,
            )

    def _without_null_head(self, table: Sequence[KVCacheBlock]) -> Sequence[KVCacheBlock]:
        first = next((i for i, block in enumerate(table) if not block.is_null), len(table))
        return table[first:] if first else table

    def _refuse(
        self, request: Request, num_new_tokens: int, num_hit_tokens: int, num_wanted: int
    ) -> None:
        if self.tell is not None:
            num_free = self.block_pool.get_num_free_blocks()
            key = request.request_id
            self.tell(("slots.refused", key, num_new_tokens, num_hit_tokens, num_free, num_wanted))


def _ids(blocks: Blocks) -> list[list[int]]:
    """The ids of each group; no lists at all when there is no block."""
    ids = [ids_of(table) for table in blocks]
    return ids if any(ids) else []
