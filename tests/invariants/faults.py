"""Faults for a real engine: each breaks vLLM in one place while it runs, as a bug in it would.

A fault changes vLLM's own classes before tracing is attached, so the probes see what the faulty
engine does. ``fault_runs`` runs them.
"""

import functools
import time

from invariants.surgery import Fault, into

FAULTS: list[Fault] = []

fault = into(FAULTS)

# The pool -------------------------------------------------------------------------------


@fault(
    "the free queue loses a block that is given back",
    invariant="blocks-conserved", kind="request.preempted",
)  # fmt: skip
def lost_in_the_queue(surgeon):
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    def make(append_n):
        def faulty(self, blocks):
            append_n(self, blocks[1:] if blocks and surgeon.once() else blocks)

        return faulty

    surgeon.replace(FreeKVCacheBlockQueue, "append_n", make)


@fault(
    "a hit block goes into a table without touch being called",
    invariant="single-owner", kind="slots.allocated", scenario="parallel",
)  # fmt: skip
def hit_not_touched(surgeon):
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    def make(add_local_computed_blocks):
        def faulty(self, request_id, new_computed_blocks, *rest):
            if new_computed_blocks and surgeon.once():
                self.req_to_blocks[request_id].extend(new_computed_blocks)
                self.num_cached_block[request_id] = len(new_computed_blocks)
            else:
                add_local_computed_blocks(self, request_id, new_computed_blocks, *rest)

        return faulty

    surgeon.replace(SingleTypeKVCacheManager, "add_local_computed_blocks", make)


@fault(
    "touch passes over the last block of a hit",
    invariant="ref-counts", kind="blocks.touched", scenario="parallel",
)  # fmt: skip
def touch_skips_one(surgeon):
    from vllm.v1.core.block_pool import BlockPool

    def make(touch):
        def faulty(self, blocks):
            touch(self, blocks[:-1] if blocks and surgeon.once() else blocks)

        return faulty

    surgeon.replace(BlockPool, "touch", make)


@fault("a request's first block is given back twice", invariant="freed-once", kind="blocks.freed")
def freed_twice(surgeon):
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    def make(pop_blocks_for_free):
        def faulty(self, request_id):
            blocks = pop_blocks_for_free(self, request_id)
            return [blocks[0], *blocks] if blocks and surgeon.once() else blocks

        return faulty

    surgeon.replace(SingleTypeKVCacheManager, "pop_blocks_for_free", make)


@fault(
    "free gives a request's blocks back from the head",
    invariant="freed-tail-first", kind="blocks.freed",
)  # fmt: skip
def freed_head_first(surgeon):
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    def make(free):
        def faulty(self, request_id):
            surgeon.strike()
            self.block_pool.free_blocks(self.pop_blocks_for_free(request_id))

        return faulty

    surgeon.replace(SingleTypeKVCacheManager, "free", make)


@fault("free forgets a request's last block", invariant="nothing-held", kind="request.freed")
def block_leaked(surgeon):
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    def make(pop_blocks_for_free):
        def faulty(self, request_id):
            blocks = pop_blocks_for_free(self, request_id)
            return blocks[:-1] if blocks and surgeon.once() else blocks

        return faulty

    surgeon.replace(SingleTypeKVCacheManager, "pop_blocks_for_free", make)


@fault(
    "the blocks of an aborted request are not freed",
    invariant="nothing-held", kind="request.finished", scenario="abort",
)  # fmt: skip
def abort_not_freed(surgeon):
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import RequestStatus

    def make(_free_request_blocks):
        def faulty(self, request):
            held = self.kv_cache_manager.get_block_ids(request.request_id)[0]
            if request.status == RequestStatus.FINISHED_ABORTED and held:
                surgeon.strike()
            else:
                _free_request_blocks(self, request)

        return faulty

    surgeon.replace(Scheduler, "_free_request_blocks", make)


@fault(
    "the pool hands out the null block",
    invariant="null-block", kind="blocks.taken", scenario="batch",
)  # fmt: skip
def null_block_taken(surgeon):
    from vllm.v1.core.block_pool import BlockPool

    def make(get_new_blocks):
        def faulty(self, num_blocks):
            if num_blocks == 1 and surgeon.once():
                self.null_block.ref_cnt += 1
                return [self.null_block]
            return get_new_blocks(self, num_blocks)

        return faulty

    surgeon.replace(BlockPool, "get_new_blocks", make)


# The prefix cache -----------------------------------------------------------------------


@fault(
    "the prefix map still finds a block after its eviction",
    invariant="hit-cached", kind="prefix.looked_up", scenario="evict",
)  # fmt: skip
def stale_hit(surgeon):
    from vllm.v1.core.block_pool import BlockPool

    seen = {}

    def make(get_cached_block):
        def faulty(self, block_hash, groups):
            found = get_cached_block(self, block_hash, groups)
            if found is None and block_hash in seen and surgeon.strike():
                return seen[block_hash]
            return found

        return faulty

    def remember(cache_full_blocks):
        def same(
            self, request, blocks, num_cached_blocks, num_full_blocks, block_size,
            kv_cache_group_id, block_mask=None,
        ):  # fmt: skip
            cache_full_blocks(
                self, request, blocks, num_cached_blocks, num_full_blocks, block_size,
                kv_cache_group_id, block_mask,
            )  # fmt: skip
            for place in range(num_cached_blocks, num_full_blocks):
                seen.setdefault(request.block_hashes[place], [blocks[place]])

        return same

    surgeon.replace(BlockPool, "get_cached_block", make)
    surgeon.replace(BlockPool, "cache_full_blocks", remember)


@fault(
    "the prefix map gives the block of another hash",
    invariant="hash-chain", kind="prefix.looked_up", scenario="prefix",
)  # fmt: skip
def wrong_prefix_hit(surgeon):
    from vllm.v1.core.block_pool import BlockPool

    last = []

    def make(get_cached_block):
        def faulty(self, block_hash, groups):
            found = get_cached_block(self, block_hash, groups)
            if found is None:
                return None
            last.append(found)
            return last[-2] if len(last) == 3 and surgeon.strike() else found

        return faulty

    surgeon.replace(BlockPool, "get_cached_block", make)


@fault(
    "the free queue gives blocks from its tail",
    invariant="evict-head", kind="blocks.taken", scenario="evict",
)  # fmt: skip
def taken_from_the_tail(surgeon):
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    def make(popleft_n):
        def faulty(self, n):
            surgeon.strike()
            blocks = self.get_all_free_blocks()[-n:]
            for block in blocks:
                self.remove(block)
            return blocks

        return faulty

    surgeon.replace(FreeKVCacheBlockQueue, "popleft_n", make)


@fault(
    "freed blocks without a hash go to the end of the queue, as before 0.32",
    invariant="evict-head", kind="blocks.taken", scenario="batch", steps_late=2,
)  # fmt: skip
def old_queue_order(surgeon):
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    def make(prepend_n):
        def faulty(self, blocks):
            if blocks:
                surgeon.strike()
            self.append_n(blocks)

        return faulty

    surgeon.replace(FreeKVCacheBlockQueue, "prepend_n", make)


@fault(
    "an eviction is not among vLLM's own KV events",
    invariant="kv-events", kind="kv_events.taken", scenario="evict", kv_events_config=None,
)  # fmt: skip
def eviction_not_told(surgeon):
    from vllm.v1.core.block_pool import BlockPool

    def make(_emit_block_removed_events):
        def faulty(self, block_hashes):
            if block_hashes and surgeon.once():
                return
            _emit_block_removed_events(self, block_hashes)

        return faulty

    surgeon.replace(BlockPool, "_emit_block_removed_events", make)


# The schedule ---------------------------------------------------------------------------


@fault(
    "the scheduler preempts a request although everybody fits",
    invariant="preempt-needed", kind="request.preempted", scenario="batch",
)  # fmt: skip
def preempted_without_need(surgeon):
    from vllm.v1.core.sched.scheduler import Scheduler

    def make(schedule):
        def faulty(self, *rest, **more):
            if len(self.running) > 2 and self.current_step > 4 and surgeon.once():
                self._preempt_request(self.running.pop(), time.monotonic())
            return schedule(self, *rest, **more)

        return faulty

    surgeon.replace(Scheduler, "schedule", make)


@fault(
    "allocate_slots refuses although there is room",
    invariant="refusal-needed", kind="slots.refused", scenario="batch",
)  # fmt: skip
def refused_without_need(surgeon):
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    def make(allocate_slots):
        @functools.wraps(allocate_slots)  # with the signature, which the probe reads
        def faulty(self, request, *rest, **more):
            if request.num_computed_tokens > 60 and surgeon.once():
                return None
            return allocate_slots(self, request, *rest, **more)

        return faulty

    surgeon.replace(KVCacheManager, "allocate_slots", make)


@fault(
    "the scheduler gives itself more tokens for a step than it was configured with",
    invariant="token-budget", kind="step.scheduled", scenario="chunked",
    max_num_batched_tokens=256, max_num_scheduled_tokens=64,
)  # fmt: skip
def over_budget(surgeon):
    from vllm.v1.core.sched.scheduler import Scheduler

    def make(schedule):
        def faulty(self, *rest, **more):
            if self.current_step == 3:
                surgeon.strike()
                self.max_num_scheduled_tokens = 256
            return schedule(self, *rest, **more)

        return faulty

    surgeon.replace(Scheduler, "schedule", make)


@fault(
    "the attention metadata give another longest sequence than the batch has",
    invariant="kernel-variant", kind="attention.planned", scenario="batch",
)  # fmt: skip
def metadata_of_another_batch(surgeon):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    def make(build):
        def faulty(self, *rest, **more):
            made = build(self, *rest, **more)
            if made.max_query_len == 1 and surgeon.once():
                made.max_seq_len += 1
            return made

        return faulty

    surgeon.replace(CPUAttentionMetadataBuilder, "build", make)


# Tables ---------------------------------------------------------------------------------


@fault(
    "allocate_slots takes a block more than the tokens need",
    invariant="table-covers", kind="step.scheduled", scenario="batch",
)  # fmt: skip
def one_block_too_many(surgeon):
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    def make(allocate_new_blocks):
        def faulty(self, request_id, num_tokens, num_tokens_main_model):
            if num_tokens > 64 and surgeon.once():
                num_tokens += self.block_size
            return allocate_new_blocks(self, request_id, num_tokens, num_tokens_main_model)

        return faulty

    surgeon.replace(SingleTypeKVCacheManager, "allocate_new_blocks", make)


@fault(
    "a worker writes a new block over the last one of its row",
    invariant="tables-grow", kind="table.changed", scenario="batch",
)  # fmt: skip
def row_overwritten(surgeon):
    from vllm.v1.worker.block_table import BlockTable

    def make(append_row):
        def faulty(self, block_ids, row_idx):
            if block_ids and self.num_blocks_per_row[row_idx] > 0 and surgeon.once():
                self.num_blocks_per_row[row_idx] -= 1
            append_row(self, block_ids, row_idx)

        return faulty

    surgeon.replace(BlockTable, "append_row", make)


@fault(
    "the rows of two requests are swapped in the worker",
    invariant="worker-table", kind="slots.mapped",
)  # fmt: skip
def rows_swapped(surgeon):
    from vllm.v1.worker.block_table import BlockTable

    def make(commit_block_table):
        def faulty(self, num_reqs):
            if num_reqs > 1 and surgeon.once():
                self.block_table.np[[0, 1]] = self.block_table.np[[1, 0]]
            commit_block_table(self, num_reqs)

        return faulty

    surgeon.replace(BlockTable, "commit_block_table", make)


@fault(
    "a worker shifts the first token of a step by one slot",
    invariant="slot-mapping", kind="slots.mapped", scenario="batch",
)  # fmt: skip
def slot_shifted(surgeon):
    from vllm.v1.worker.block_table import BlockTable

    def make(compute_slot_mapping):
        def faulty(self, num_reqs, query_start_loc, positions):
            compute_slot_mapping(self, num_reqs, query_start_loc, positions)
            if len(positions) == num_reqs and surgeon.once():
                self.slot_mapping.gpu[0] += 1

        return faulty

    surgeon.replace(BlockTable, "compute_slot_mapping", make)


@fault(
    "a worker computes a token again that it has computed",
    invariant="positions-advance", kind="slots.mapped", scenario="batch",
)  # fmt: skip
def token_computed_again(surgeon):
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def make(_prepare_inputs):
        def faulty(self, scheduler_output, num_scheduled_tokens):
            decodes = scheduler_output.total_num_scheduled_tokens == len(num_scheduled_tokens)
            if decodes and surgeon.once():
                self.input_batch.num_computed_tokens_cpu[0] -= 1
            return _prepare_inputs(self, scheduler_output, num_scheduled_tokens)

        return faulty

    surgeon.replace(GPUModelRunner, "_prepare_inputs", make)


@fault(
    "two requests get the same row in the worker",
    invariant="slots-distinct", kind="slots.mapped",
)  # fmt: skip
def row_given_twice(surgeon):
    from vllm.v1.worker.block_table import BlockTable

    def make(commit_block_table):
        def faulty(self, num_reqs):
            if num_reqs > 1 and surgeon.once():
                self.block_table.np[1] = self.block_table.np[0]
            commit_block_table(self, num_reqs)

        return faulty

    surgeon.replace(BlockTable, "commit_block_table", make)
