"""What is read of the KV-cache manager and of the block pool. How probes work: ``scheduler_probes``."""

from __future__ import annotations

import inspect
from operator import attrgetter
from struct import Struct
from typing import Any

from vllm_trace.events import (
    BlockEvicted,
    BlockIds,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    KVEventsTaken,
    PrefixCacheReset,
    PrefixLookedUp,
    RequestFreed,
    SlotsAllocated,
    SlotsRefused,
)
from vllm_trace.hooks.table import probe
from vllm_trace.packing import (
    ALLOCATED,
    CACHED,
    I16,
    NO_HIT,
    NO_HIT_BLOCKS,
    ONE_HASH,
    ONE_ID,
    TAKEN,
    U32,
    pack_allocated,
    pack_cached,
    pack_taken_allocated,
)
from vllm_trace.recorder import Recorder

LOW_64 = (1 << 64) - 1


def short_hash(block_hash: Any) -> int:
    """Low 64 bits of a block hash, as vLLM's own KV events give it."""
    if isinstance(block_hash, int):
        return block_hash & LOW_64
    return int.from_bytes(block_hash[-8:], "big")


# The same of a key of the prefix map, which ends in four bytes of group id:
# ``hash_in_key(key, -12)`` is a tuple of one number, ``key[HASH_IN_KEY]`` its bytes.
hash_in_key = Struct(">Q").unpack_from
HASH_IN_KEY = slice(-12, -4)


# A map over one of these runs in C; a comprehension costs a frame, once for each new block.
id_of = attrgetter("block_id")
ref_cnt_of = attrgetter("ref_cnt")
hash_of = attrgetter("block_hash")


def ids_of(groups: Any) -> BlockIds:
    """Block ids per KV-cache group of vLLM's lists of blocks."""
    return [[*map(id_of, blocks)] for blocks in groups]


# The KV-cache manager -------------------------------------------------------------------


@probe()
def get_computed_blocks(defer, result, request):
    defer(prefix_looked_up, request, result, request.num_tokens, len(request.block_hashes))


def prefix_looked_up(
    rec: Recorder, request: Any, result: Any, num_tokens: int, num_hashes: int
) -> PrefixLookedUp:
    number = rec.numbers[request.request_id]
    told = rec.state.setdefault("hashes_told", {})
    new = request.block_hashes[told.get(number, 0) : num_hashes]
    told[number] = num_hashes
    return PrefixLookedUp(
        number, num_tokens, result[1], ids_of(result[0].blocks), [short_hash(h) for h in new]
    )


@probe(
    otherwise={  # since 0.32
        "full_sequence_must_fit": False,
        "reserved_blocks": 0,
        "has_scheduled_reqs": False,
    },
)
def allocate_slots(
    append,
    recorder,
    keep,
    result,
    self,
    request,
    num_new_tokens,
    num_new_computed_tokens,
    new_computed_blocks,
    num_lookahead_tokens,
    full_sequence_must_fit,
    reserved_blocks,
    has_scheduled_reqs,
):
    # Called once for each running request: what is rare is a call away.
    if result is self.empty_kv_cache_blocks and new_computed_blocks is None:
        if recorder.tight:
            keep(request)
    elif result is None:
        append(
            slots_refused(
                recorder,
                self,
                request,
                num_new_tokens,
                num_new_computed_tokens,
                new_computed_blocks,
                num_lookahead_tokens,
                full_sequence_must_fit,
                reserved_blocks,
                has_scheduled_reqs,
            )
        )
    else:
        append(
            slots_allocated(
                recorder,
                self,
                request,
                result.blocks,
                num_new_tokens,
                num_new_computed_tokens,
                new_computed_blocks,
            )
        )


def slots_allocated(
    rec: Recorder, manager: Any, request: Any, new: Any, num_new: int, num_hit: int, hits: Any
) -> SlotsAllocated | bytes:
    number = rec.numbers.get(request.request_id)
    if number is None:
        number = rec.numbers[request.request_id]
    free = manager.block_pool.free_block_queue.num_free_blocks
    kept = len(rec.kept) if rec.tight else -1
    if num_hit or len(new) != 1 or len(new[0]) != 1:
        hit_blocks = ids_of(hits.blocks) if num_hit else []
        return SlotsAllocated(number, num_new, num_hit, ids_of(new), hit_blocks, free, kept)
    # A request that decodes got its next block.
    block = new[0][0]
    block_id, pending = block.block_id, rec.pending
    last = len(pending) - 1  # CPython has a short way for an index that is not negative
    if last >= 0 and pending[last] is block:
        # As ``get_new_blocks`` left it: the two events in one piece.
        pending[last] = b""
        return pack_taken_allocated(
            TAKEN, block_id, ALLOCATED, number, U32, num_new, NO_HIT, block_id,
            NO_HIT_BLOCKS, free, I16, kept,
        )  # fmt: skip
    return pack_allocated(
        ALLOCATED, number, U32, num_new, NO_HIT, block_id, NO_HIT_BLOCKS, free, I16, kept
    )


def slots_refused(
    rec: Recorder,
    manager: Any,
    request: Any,
    num_new: int,
    num_hit: int,
    hits: Any,
    num_ahead: int,
    whole: bool,
    reserved: int,
    others_scheduled: bool,
) -> SlotsRefused:
    free = manager.block_pool.free_block_queue.num_free_blocks
    kept = len(rec.kept) if rec.tight else -1
    wanted = blocks_wanted(manager, request, num_new, num_hit, hits, num_ahead, whole)
    if wanted:
        wanted += reserved
        if others_scheduled and request.status.name in ("WAITING", "PREEMPTED"):
            wanted += manager.watermark_blocks
    return SlotsRefused(rec.numbers[request.request_id], num_new, num_hit, free, kept, wanted)


def blocks_wanted(
    manager: Any, request: Any, num_new: int, num_hit: int, hits: Any, num_ahead: int, whole: bool
) -> int:
    """vLLM's own count of the free blocks that a refused call needed, made again: nothing has changed since.

    0 where its way of counting is another one; a refusal is told all the same.
    Source: vLLM 0.32 and 0.33, ``KVCacheManager.allocate_slots``; 0.20.2, ``can_fit_full_sequence``.
    """
    num_computed = request.num_computed_tokens + num_hit
    end = num_computed + num_new
    goals = [(min(end + num_ahead, manager.max_model_len), end, False)]
    if whole:
        tokens = min(request.num_tokens, manager.max_model_len)
        goals.append((tokens, tokens, True))
    given = {
        "request_id": request.request_id,
        "new_computed_blocks": (hits or manager.empty_kv_cache_blocks).blocks,
        "num_encoder_tokens": 0,
        "total_computed_tokens": num_computed,
        "num_local_computed_tokens": num_computed,
        "prefill_end": max(request.num_prompt_tokens, request.num_tokens - 1),
    }
    try:
        count = manager.coordinator.get_num_blocks_to_allocate
        known = inspect.signature(count).parameters  # 0.20 lacks the last two
        given = {name: value for name, value in given.items() if name in known}
        return max(
            count(
                num_tokens=num_tokens,
                num_tokens_main_model=num_main,
                apply_admission_cap=capped,
                **given,
            )
            for num_tokens, num_main, capped in goals
        )
    except (AttributeError, TypeError):
        return 0


@probe()
def can_fit_full_sequence(
    append, numbers, recorder, result, self, request, num_new_computed_tokens, new_computed_blocks
):
    if not result:
        hit = num_new_computed_tokens
        append(
            SlotsRefused(
                numbers[request.request_id],
                min(request.num_tokens, self.max_model_len) - request.num_computed_tokens - hit,
                hit,
                self.block_pool.free_block_queue.num_free_blocks,
                len(recorder.kept) if recorder.tight else -1,
                blocks_wanted(self, request, 0, hit, new_computed_blocks, 0, True),
            )
        )


@probe()
def free(append, numbers, request):
    append(RequestFreed(numbers[request.request_id]))


@probe()
def take_events(defer, result):
    if result:
        defer(kv_events_taken, result)


def kv_events_taken(rec: Recorder, events: list[Any]) -> KVEventsTaken:
    names = {"BlockStored": "stored", "BlockRemoved": "removed", "AllBlocksCleared": "cleared"}
    return KVEventsTaken(
        [
            (
                names.get(type(event).__name__, type(event).__name__),
                [short_hash(h) for h in getattr(event, "block_hashes", None) or ()],
            )
            for event in events
        ]
    )


# The block pool -------------------------------------------------------------------------


@probe()
def get_new_blocks(append, num_blocks, result):
    if num_blocks == 1:
        append(result[0])  # until ``slots_allocated`` says to whom; else ``packing.encoded``
    else:
        append(BlocksTaken([*map(id_of, result)]))


@probe()
def remove_cached_block_hashes(append, result, block):
    if result:
        append(BlockEvicted(block.block_id, [hash_in_key(key, -12)[0] for key in result]))


def _hash_before(block):
    return block.block_hash


@probe(before=_hash_before)
def maybe_evict_cached_block(append, result, seen, block):
    if result:
        append(BlockEvicted(block.block_id, [hash_in_key(seen, -12)[0]]))


@probe()
def touch(append, blocks):
    if blocks:
        append(BlocksTouched([*map(id_of, blocks)], [*map(ref_cnt_of, blocks)]))


@probe()
def cache_full_blocks(
    append, numbers, request, blocks, num_cached_blocks, num_full_blocks, kv_cache_group_id
):
    if num_full_blocks - num_cached_blocks == 1:
        # A request that decodes fills one block at a time: no list is made for it.
        block = blocks[num_cached_blocks]
        key = block._block_hash  # `block_hash` is a property: a call
        if key:
            number = numbers.get(request.request_id)  # a subclass is slow to index
            if number is None:
                number = numbers[request.request_id]
            append(
                pack_cached(
                    CACHED,
                    number,
                    kv_cache_group_id,
                    U32,
                    num_cached_blocks,
                    ONE_ID,
                    block.block_id,
                    ONE_HASH,
                    key[HASH_IN_KEY],
                )
            )
    # Null blocks and those that a sliding window will never hit again get no hash.
    elif full := [*filter(hash_of, blocks[num_cached_blocks:num_full_blocks])]:
        append(
            BlocksCached(
                numbers[request.request_id],
                kv_cache_group_id,
                num_cached_blocks,
                [*map(id_of, full)],
                [hash_in_key(block.block_hash, -12)[0] for block in full],
            )
        )


@probe(as_list=("ordered_blocks",))
def free_blocks(append, ordered_blocks):
    if ordered_blocks:
        append(BlocksFreed([*map(id_of, ordered_blocks)], [*map(ref_cnt_of, ordered_blocks)]))


@probe()
def reset_prefix_cache(append, result):
    append(PrefixCacheReset(result))
