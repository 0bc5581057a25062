"""What is read in EngineCore: the scheduler, the KV-cache manager and the block pool.

A probe's body runs inside the hooked call: it makes its event there when the values are at
hand, and otherwise defers to the decoder that follows it, which runs at the end of the step.
What vLLM changes before then (a reference count, a hash, a queue's length) is read at once.
"""

from __future__ import annotations

import os
from itertools import compress
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
    EngineConfigured,
    EngineStopped,
    KVEventsTaken,
    KVGroup,
    PrefixCacheReset,
    PrefixLookedUp,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
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
    U64,
    UPDATED,
    pack_allocated,
    pack_cached,
    pack_grown,
    pack_taken,
    pack_updated,
)
from vllm_trace.recorder import Recorder

LOW_64 = (1 << 64) - 1


def short_hash(block_hash: Any) -> int:
    """Low 64 bits of a block hash, as vLLM's own KV events give it."""
    if isinstance(block_hash, int):
        return block_hash & LOW_64
    return int.from_bytes(block_hash[-8:], "big")


# The same of a key of the prefix map, which ends in four bytes of group id:
# ``hash_in_key(key, -12)`` is a tuple of one number.
hash_in_key = Struct(">Q").unpack_from


# A map over one of these runs in C; a comprehension costs a frame, once for each new block.
id_of = attrgetter("block_id")
ref_cnt_of = attrgetter("ref_cnt")
hash_of = attrgetter("block_hash")


def ids_of(groups: Any) -> BlockIds:
    """Block ids per KV-cache group of vLLM's lists of blocks."""
    return [[*map(id_of, blocks)] for blocks in groups]


# The engine -----------------------------------------------------------------------------


@probe()
def scheduler_made(defer, ended, self):
    defer(engine_configured, self, ended)


def engine_configured(rec: Recorder, scheduler: Any, at_ns: int) -> EngineConfigured:
    rec.state["hashes_told"] = {}
    config = scheduler.vllm_config
    limits, cache, parallel = config.scheduler_config, config.cache_config, config.parallel_config
    manager = scheduler.kv_cache_manager
    settings = {
        "model": model_name(str(config.model_config.model)),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": scheduler.max_model_len,
        "max_num_seqs": scheduler.max_num_running_reqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_num_scheduled_tokens": scheduler.max_num_scheduled_tokens,
        "long_prefill_token_threshold": limits.long_prefill_token_threshold,
        "enable_chunked_prefill": bool(limits.enable_chunked_prefill),
        "enable_prefix_caching": bool(manager.enable_caching),
        "prefix_caching_hash_algo": str(cache.prefix_caching_hash_algo),
        "policy": scheduler.policy.value,
        "async_scheduling": bool(limits.async_scheduling),
        "full_sequence_must_fit": bool(getattr(scheduler, "scheduler_reserve_full_isl", False)),
        "watermark_blocks": getattr(manager, "watermark_blocks", 0),
        "num_lookahead_tokens": scheduler.num_lookahead_tokens,
        "max_in_flight_tokens": getattr(config, "max_in_flight_tokens", None),
        "retention_interval": getattr(manager.coordinator, "retention_interval", None),
        "kv_cache_dtype": str(cache.cache_dtype),
        "kv_events": bool(manager.block_pool.enable_kv_cache_events),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_rank": parallel.data_parallel_rank,
        "num_query_heads": config.model_config.get_num_attention_heads(parallel),
        "num_kv_heads": config.model_config.get_num_kv_heads(parallel),
        "head_size": config.model_config.get_head_size(),
        "vllm_version": rec.notes.get("vllm", ""),
    }
    groups = [
        KVGroup(
            kind=type(group.kv_cache_spec).__name__,
            block_size=group.kv_cache_spec.block_size,
            layers=list(group.layer_names),
            sliding_window=getattr(group.kv_cache_spec, "sliding_window", None) or 0,
            page_size_bytes=group.kv_cache_spec.page_size_bytes,
        )
        for group in scheduler.kv_cache_config.kv_cache_groups
    ]
    return EngineConfigured(
        at_ns=at_ns,
        block_size=scheduler.block_size,
        hash_block_size=getattr(scheduler, "hash_block_size", None) or scheduler.block_size,
        num_blocks=manager.block_pool.num_gpu_blocks,
        groups=groups,
        settings=settings,
    )


def model_name(model: str) -> str:
    """A hub name as it is, of a local folder only its name: traces travel."""
    return os.path.basename(model.rstrip("/")) if os.path.isabs(model) else model


@probe(flush=True)
def engine_shut_down(append, recorder, ended):
    append(EngineStopped(ended))
    recorder.steady_of = None  # it may go


# Requests -------------------------------------------------------------------------------


@probe()
def add_request(defer, recorder, ended, request):
    number = recorder.arrive(request.request_id)
    defer(request_arrived, number, request, ended, len(request.block_hashes))


def request_arrived(
    rec: Recorder, number: int, request: Any, at_ns: int, num_hashes: int
) -> RequestArrived:
    rec.state.setdefault("hashes_told", {})[number] = num_hashes
    headers = request.trace_headers or {}
    tokens = request.prompt_token_ids if rec.options.tokens else None
    return RequestArrived(
        request=number,
        at_ns=at_ns,
        request_id=request.request_id,
        num_prompt_tokens=request.num_prompt_tokens,
        max_tokens=request.max_tokens,
        priority=request.priority,
        arrival_unix=request.arrival_time,
        block_hashes=[short_hash(h) for h in request.block_hashes[:num_hashes]],
        sampling=_sampling(request.sampling_params),
        lora=request.lora_request.lora_name if request.lora_request else None,
        salted=bool(request.cache_salt),
        traceparent=headers.get("traceparent"),
        token_ids=list(tokens) if tokens is not None else None,
    )


def _sampling(params: Any) -> dict[str, Any]:
    if params is None:
        return {}
    names = ("n", "temperature", "top_p", "top_k", "seed", "min_tokens", "ignore_eos")
    return {name: getattr(params, name, None) for name in names}


@probe()
def free_request(defer, recorder, ended, request):
    defer(request_finished, recorder.retire(request.request_id), request, ended)


def request_finished(rec: Recorder, number: int, request: Any, at_ns: int) -> RequestFinished:
    rec.state.get("hashes_told", {}).pop(number, None)
    return RequestFinished(
        request=number,
        at_ns=at_ns,
        reason=str(request.get_finished_reason()),
        num_output_tokens=request.num_output_tokens,
        num_preemptions=request.num_preemptions,
    )


def _computed_before(request):
    return request.num_computed_tokens


@probe(before=_computed_before)
def preempt_request(append, numbers, seen, self, request):
    free = self.kv_cache_manager.block_pool.get_num_free_blocks()
    append(RequestPreempted(numbers[request.request_id], seen, free))


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
    sleeps=True,
)
def allocate_slots(
    append,
    numbers,
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
    if result is self.empty_kv_cache_blocks and new_computed_blocks is None:
        if recorder.tight:
            keep(request)
    elif result is None:
        free = self.block_pool.free_block_queue.num_free_blocks
        number = numbers[request.request_id]
        kept = len(recorder.kept) if recorder.tight else -1
        wanted = blocks_wanted(
            self,
            request,
            num_new_tokens,
            num_new_computed_tokens,
            new_computed_blocks,
            num_lookahead_tokens,
            full_sequence_must_fit,
        )
        if wanted:
            wanted += reserved_blocks
            if has_scheduled_reqs and request.status.name in ("WAITING", "PREEMPTED"):
                wanted += self.watermark_blocks
        append(SlotsRefused(number, num_new_tokens, num_new_computed_tokens, free, kept, wanted))
    elif not num_new_computed_tokens and len(result.blocks) == 1 == len(result.blocks[0]):
        # A request that decodes got its next block.
        append(
            pack_allocated(
                ALLOCATED,
                numbers[request.request_id],
                U32,
                num_new_tokens,
                NO_HIT,
                result.blocks[0][0].block_id,
                NO_HIT_BLOCKS,
                self.block_pool.free_block_queue.num_free_blocks,
                I16,
                len(recorder.kept) if recorder.tight else -1,
            )
        )
    else:
        append(
            SlotsAllocated(
                numbers[request.request_id],
                num_new_tokens,
                num_new_computed_tokens,
                ids_of(result.blocks),
                ids_of(new_computed_blocks.blocks) if num_new_computed_tokens else (),
                self.block_pool.free_block_queue.num_free_blocks,
                len(recorder.kept) if recorder.tight else -1,
            )
        )


def blocks_wanted(
    manager: Any, request: Any, num_new: int, num_hit: int, hits: Any, num_ahead: int, whole: bool
) -> int:
    """vLLM's own count of the free blocks that a refused call needed, made again: nothing has changed since.

    0 where its way of counting is another one; a refusal is told all the same.
    Source: vLLM 0.32 and 0.33, ``KVCacheManager.allocate_slots``.
    """
    num_computed = request.num_computed_tokens + num_hit
    end = num_computed + num_new
    goals = [(min(end + num_ahead, manager.max_model_len), end, False)]
    if whole:
        tokens = min(request.num_tokens, manager.max_model_len)
        goals.append((tokens, tokens, True))
    try:
        return max(
            manager.coordinator.get_num_blocks_to_allocate(
                request_id=request.request_id,
                num_tokens=num_tokens,
                new_computed_blocks=(hits or manager.empty_kv_cache_blocks).blocks,
                num_encoder_tokens=0,
                total_computed_tokens=num_computed,
                num_local_computed_tokens=num_computed,
                num_tokens_main_model=num_main,
                apply_admission_cap=capped,
                prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
            )
            for num_tokens, num_main, capped in goals
        )
    except (AttributeError, TypeError):
        return 0


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
def get_new_blocks(append, recorder, num_blocks, result):
    if recorder.quiet and num_blocks == 1:
        append(result)  # `schedule` replaces it, when it knows whose it is
    elif num_blocks == 1:
        append(pack_taken(TAKEN, result[0].block_id))
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
            append(
                pack_cached(
                    CACHED,
                    numbers[request.request_id],
                    kv_cache_group_id,
                    U32,
                    num_cached_blocks,
                    ONE_ID,
                    block.block_id,
                    ONE_HASH,
                    key[-12:-4],
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


# The step -------------------------------------------------------------------------------

# A step is *steady* when every running request decodes one token, as many as in the step before, and
# nobody finished. Then nobody came either (there would be more) and nobody was preempted (a step that
# preempts lets nobody in, so there would be fewer): the same requests in the same order, which needs
# no comparing of names.

# Most calls of ``allocate_slots`` need no block, and where those stand among the others follows from
# the composition of the step; unless somebody was preempted, for who had been scheduled and then gave
# way is in no composition. So these calls are noted one by one only in a step that might preempt:
# one that begins with fewer free blocks than it could ask for (``recorder.tight``).


# ``len`` of vLLM's queues is a call into Python: who is known and does not run, waits.


# A step is *quiet* when whoever is there decodes, nobody waits, and the pool cannot run short. Then no
# call of ``allocate_slots`` is refused and most change nothing, so it sleeps: thirty wrapped calls
# less. What was taken is still seen where it is taken, and whom it went to is what the scheduler tells
# the workers (``new_block_ids``).


def _fall_asleep(self, recorder):
    quiet = (
        recorder.may_sleep
        and len(self.running) == len(self.requests) <= recorder.steady
        and not recorder.tight
        and recorder.steady_of is self
    )
    if quiet is not recorder.quiet:
        recorder.set_quiet(quiet)
    return quiet


@probe(before=_fall_asleep)
def schedule(append, recorder, numbers, next_step, seen, result, started, ended, self):
    result.vtrace_step = step = next_step()
    free = self.kv_cache_manager.block_pool.free_block_queue.num_free_blocks
    running, scheduled = len(self.running), len(result.num_scheduled_tokens)
    pending = recorder.pending
    if recorder.planned is not None:
        recorder.spell_out_planned()
    if seen and pending:
        # After each block that was taken, for whom ``allocate_slots`` took it.
        cached = result.scheduled_cached_reqs
        takers = [*compress(cached.req_ids, cached.new_block_ids)]
        left = len(takers)
        for place, taken in enumerate(pending):
            if type(taken) is list and left:
                block = taken[0].block_id
                number = numbers[takers[-left]]
                left -= 1
                pending[place] = pack_grown(
                    TAKEN,
                    block,
                    ALLOCATED,
                    number,
                    U32,
                    1,
                    NO_HIT,
                    block,
                    NO_HIT_BLOCKS,
                    free + left,
                    I16,
                    -1,
                )
                recorder.num_doubles += 1
    if (
        scheduled == recorder.steady == running == result.total_num_scheduled_tokens
        and recorder.steady_of is self
        and not result.finished_req_ids
    ):
        kept = len(recorder.kept) if recorder.tight else -1
        waiting = 0 if len(self.requests) == running else len(self.waiting)
        recorder.planned = (step, started, ended - started, running, waiting, free, kept)
        recorder.planned_of = result
        recorder.planned_at = len(pending)
        recorder.tight = free < recorder.steady_need
    else:
        append(
            StepScheduled(
                step,
                started,
                ended - started,
                running,
                len(self.waiting),
                free,
                len(recorder.kept) if recorder.tight else -1,
                *composition_of_step(recorder, result),
                {},
                kept_in_step(recorder, result),
            )
        )
        uniform = scheduled == running == result.total_num_scheduled_tokens
        note_composition(recorder, self, scheduled if uniform else -1, free)
    if recorder.kept:
        recorder.kept.clear()


def note_composition(rec: Recorder, scheduler: Any, decoding: int, free: int) -> None:
    """Keep what the next steps are compared with: ``decoding`` requests, one token each; -1 if it is not so."""
    # The last token of a prompt is one token too, and is followed by more.
    if any(r.num_computed_tokens < r.num_tokens for r in scheduler.running):
        decoding = -1
    rec.steady, rec.steady_of = decoding, scheduler
    rec.steady_need, need = blocks_a_step_may_need(scheduler)
    rec.tight = free < (need if decoding < 0 else rec.steady_need)
    rec.may_sleep = (
        decoding > 0 and "allocate_slots" in rec.sleepers and grows_by_one_block(scheduler)
    )


def grows_by_one_block(scheduler: Any) -> bool:
    """Whether a request that decodes takes at most one block, of one table, and gives none back."""
    groups = scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    spec = groups[0].kv_cache_spec if len(groups) == 1 else None
    return (
        type(spec).__name__ == "FullAttentionSpec"
        and not getattr(spec, "sliding_window", None)
        and spec.block_size > 1
        and not scheduler.num_lookahead_tokens
        and not getattr(scheduler, "num_spec_tokens", 0)
        and scheduler.connector is None
    )


def blocks_a_step_may_need(scheduler: Any) -> tuple[int, int]:
    """Upper bounds for what the requests that run now can ask for in the next step.

    The first for when each decodes, the second for when some are within their prompt.
    """
    manager, running = scheduler.kv_cache_manager, len(scheduler.running)
    groups = len(manager.kv_cache_config.kv_cache_groups)
    ahead = scheduler.num_lookahead_tokens + getattr(scheduler, "num_spec_tokens", 0)
    smallest = min(
        (group.kv_cache_spec.block_size for group in manager.kv_cache_config.kv_cache_groups),
        default=1,
    )
    decoding = running * (2 + ahead // smallest)
    budget = -(-scheduler.max_num_scheduled_tokens // smallest)
    return groups * decoding, groups * (decoding + budget)


@probe()
def schedule_light(append, recorder, next_step, result, started, ended, self):
    result.vtrace_step = step = next_step()
    free = self.kv_cache_manager.block_pool.free_block_queue.num_free_blocks
    running, scheduled = len(self.running), len(result.num_scheduled_tokens)
    if recorder.planned is not None:
        recorder.spell_out_planned()
    if (
        scheduled == recorder.steady == running == result.total_num_scheduled_tokens
        and recorder.steady_of is self
        and not result.finished_req_ids
        and not recorder.pending
    ):
        waiting = 0 if len(self.requests) == running else len(self.waiting)
        recorder.planned = (step, started, ended - started, running, waiting, free)
        recorder.planned_of = result
        recorder.planned_at = 0
    else:
        uniform = scheduled == running == result.total_num_scheduled_tokens
        recorder.steady, recorder.steady_of = scheduled if uniform else -1, self
        append(
            StepScheduled(
                step,
                started,
                ended - started,
                running,
                len(self.waiting),
                free,
                0,
                *composition_of_step(recorder, result),
            )
        )


def composition_of_step(rec: Recorder, out: Any) -> tuple[Any, ...]:
    """Requests, token counts, new, resumed, preempted, finished: of a ``SchedulerOutput``."""
    cached = out.scheduled_cached_reqs
    return (
        rec.numbers_of(out.num_scheduled_tokens),
        [*out.num_scheduled_tokens.values()],
        rec.numbers_of(data.req_id for data in out.scheduled_new_reqs),
        rec.numbers_of(r for r in cached.req_ids if r in cached.resumed_req_ids),
        sorted(rec.numbers_of(out.preempted_req_ids or ())),
        sorted(rec.numbers_of(out.finished_req_ids)),
    )


def kept_in_step(rec: Recorder, out: Any) -> Any:
    """Whose calls needed no block, in a step where the composition does not tell.

    One that was scheduled and then had to give way is not part of the step any more.
    """
    if not out.preempted_req_ids:
        return ()
    return rec.numbers_of(request.request_id for request in rec.kept)


@probe()
def update_from_output(append, recorder, started, ended, scheduler_output, model_runner_output):
    sampled = model_runner_output.sampled_token_ids
    one_each = (
        # Nobody gets two without speculation, so it is one each when nobody got none.
        len(scheduler_output.num_scheduled_tokens) == len(sampled)
        and type(sampled) is list
        and [] not in sampled
        and not scheduler_output.scheduled_spec_decode_tokens
        and not recorder.with_tokens
    )
    pending = recorder.pending
    if (
        recorder.planned_of is scheduler_output
        and one_each
        and len(pending) == recorder.planned_at
        and recorder.write_steady_step(
            recorder.planned, started, ended - started, pending, recorder.num_doubles
        )
    ):
        recorder.planned = recorder.planned_of = None
        if pending:
            pending.clear()
            recorder.num_doubles = 0
    else:
        step = getattr(scheduler_output, "vtrace_step", 0)
        if one_each:
            append(pack_updated(UPDATED, step, U64, started, U64, ended - started))
        else:
            append(
                StepUpdated(
                    step,
                    started,
                    ended - started,
                    *outcome_of_step(recorder, scheduler_output, model_runner_output),
                )
            )
        recorder.flush()


@probe()
def update_from_output_light(append, recorder, started, ended, scheduler_output):
    if (
        recorder.planned_of is scheduler_output
        and not recorder.pending
        and recorder.write_steady_step_alone(recorder.planned, started, ended - started)
    ):
        recorder.planned = recorder.planned_of = None
    else:
        append(StepUpdated(getattr(scheduler_output, "vtrace_step", 0), started, ended - started))
        recorder.flush()


def outcome_of_step(rec: Recorder, out: Any, made: Any) -> tuple[Any, Any]:
    """Tokens that each request of the step got: their numbers, and with ``--tokens`` their ids.

    The numbers are None when each got one. vLLM cuts a request's list in place where it stopped,
    so these are the tokens that count.
    """
    sampled = made.sampled_token_ids
    if not len(sampled):
        return [0] * len(out.num_scheduled_tokens), None
    counts = [*map(len, sampled)]
    if counts.count(1) == len(out.num_scheduled_tokens) and not rec.options.tokens:
        return None, None
    if made.req_ids != [*out.num_scheduled_tokens]:
        index = made.req_id_to_index
        sampled = [sampled[index[r]] if r in index else () for r in out.num_scheduled_tokens]
        counts = [*map(len, sampled)]
    tokens = [[int(t) for t in row] for row in sampled] if rec.options.tokens else None
    return counts, tokens
