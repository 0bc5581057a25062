"""The real Scheduler, without a model, and mini's, over the same random workloads.

Equal after each call: the step's composition, tables and preemptions, the state of the pool, the queues, the counts
of every request, and the stream of events: what mini tells is what vLLM's own methods would tell if each were wrapped.
"""

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, KVCacheManager, SlidingWindowSpec
from vllm_trace.mini.request import Request, get_request_block_hasher, sha256
from vllm_trace.mini.scheduler import Scheduler, SchedulerConfig
from vllm_trace.patches.block_probes import blocks_wanted

from .conftest import hypothesis_settings, state_of_mini, state_of_real

BLOCK_SIZE = 8
MAX_MODEL_LEN = 128
STOP_TOKEN = 7
COUNTS = (
    "num_tokens",
    "num_computed_tokens",
    "num_in_flight_tokens",
    "num_output_placeholders",
    "num_stale_output_tokens",
    "num_preemptions",
    "shared_prefix_boundary",
    "block_hashes",
)


def wrap_real(scheduler, told):
    """Let the real scheduler's methods tell, each after it returned, what mini tells by itself."""
    manager = scheduler.kv_cache_manager
    pool = manager.block_pool

    def ids(blocks):
        return [block.block_id for block in blocks]

    def plain(block_hash):
        return None if block_hash is None else block_hash[:-4]

    def wrap(owner, name, wrapper):
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))

    def get_new_blocks(original, num_blocks):
        blocks = original(num_blocks)
        told.append(("blocks.taken", ids(blocks)))
        return blocks

    def maybe_evict(original, block):
        before = block.block_hash
        evicted = original(block)
        if evicted:
            told.append(("block.evicted", block.block_id, [plain(before)]))
        return evicted

    def touch(original, blocks):
        original(blocks)
        if blocks:
            told.append(("blocks.touched", ids(blocks), [block.ref_cnt for block in blocks]))

    def free_blocks(original, ordered_blocks):
        blocks = list(ordered_blocks)
        original(blocks)
        if blocks:
            told.append(("blocks.freed", ids(blocks), [block.ref_cnt for block in blocks]))

    def cache_full_blocks(
        original,
        *,
        request,
        blocks,
        num_cached_blocks,
        num_full_blocks,
        kv_cache_group_id,
        **kwargs,
    ):
        original(
            request=request,
            blocks=blocks,
            num_cached_blocks=num_cached_blocks,
            num_full_blocks=num_full_blocks,
            kv_cache_group_id=kv_cache_group_id,
            **kwargs,
        )
        full = blocks[num_cached_blocks:num_full_blocks]
        full = [block for block in full if block.block_hash is not None]
        hashes = [plain(block.block_hash) for block in full]
        if full:
            first = (kv_cache_group_id, num_cached_blocks)
            told.append(("blocks.cached", request.request_id, *first, ids(full), hashes))

    def get_computed_blocks(original, request, *args):
        found = original(request, *args)
        table = list(found[0].get_block_ids())
        table = table if any(table) else []
        told.append(("prefix.looked_up", request.request_id, request.num_tokens, found[1], table))
        return found

    def allocate_slots(original, request, num_new_tokens, num_new_computed_tokens=0, **kwargs):
        blocks = original(request, num_new_tokens, num_new_computed_tokens, **kwargs)
        free = pool.get_num_free_blocks()
        if blocks is None:
            wanted = count_wanted(request, num_new_tokens, num_new_computed_tokens, **kwargs)
            counts = (num_new_tokens, num_new_computed_tokens, free, wanted)
            told.append(("slots.refused", request.request_id, *counts))
        else:
            new = list(blocks.get_block_ids())
            new = new if any(new) else []
            hit = num_new_computed_tokens
            if new or hit:  # a call that needed no block is not told
                told.append(("slots.allocated", request.request_id, num_new_tokens, hit, new, free))
        return blocks

    def count_wanted(request, num_new, num_hit, new_computed_blocks=None, **kwargs):
        whole = kwargs.get("full_sequence_must_fit", False)
        wanted = blocks_wanted(manager, request, num_new, num_hit, new_computed_blocks, 0, whole)
        is_beside = kwargs.get("has_scheduled_reqs", False) and request.status.name != "RUNNING"
        return wanted + (manager.watermark_blocks if is_beside else 0)

    def free(original, request):
        original(request)
        told.append(("request.freed", request.request_id))

    def preempt(original, request, *args, **kwargs):
        lost = request.num_computed_tokens
        original(request, *args, **kwargs)
        told.append(("request.preempted", request.request_id, lost, pool.get_num_free_blocks()))

    def free_request(original, request, **kwargs):
        result = original(request, **kwargs)
        counts = (request.num_output_tokens, request.num_preemptions)
        reason = str(request.get_finished_reason())
        told.append(("request.finished", request.request_id, reason, *counts))
        return result

    def schedule(original):
        output = original()
        scheduled = output.num_scheduled_tokens
        told.append(
            ("step.scheduled", scheduler.current_step, list(scheduled), list(scheduled.values()))
        )
        return output

    wrap(pool, "get_new_blocks", get_new_blocks)
    wrap(pool, "_maybe_evict_cached_block", maybe_evict)
    wrap(pool, "touch", touch)
    wrap(pool, "free_blocks", free_blocks)
    wrap(pool, "cache_full_blocks", cache_full_blocks)
    wrap(manager, "get_computed_blocks", get_computed_blocks)
    wrap(manager, "allocate_slots", allocate_slots)
    wrap(manager, "free", free)
    wrap(scheduler, "_preempt_request", preempt)
    wrap(scheduler, "_free_request", free_request)
    wrap(scheduler, "schedule", schedule)


class Twins:
    """Two schedulers; arrivals, aborts and sampled tokens go to both, and every planned step is compared."""

    def __init__(
        self,
        real,
        folder,
        groups,
        num_blocks,
        seed,
        *,
        retention_interval,
        enable_caching,
        watermark,
        **config,
    ):
        self.names = real
        self.random = random.Random(seed)
        self.depth = 2 if config["async_scheduling"] else 1
        vllm_config = real.vllm_config(
            folder,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=enable_caching,
            watermark=watermark,
            **config,
        )
        self.real = real.scheduler(vllm_config, groups, num_blocks, retention_interval)
        manager = KVCacheManager(
            num_blocks,
            groups,
            MAX_MODEL_LEN,
            enable_caching=enable_caching,
            max_in_flight_tokens=vllm_config.max_in_flight_tokens,
            watermark=watermark,
            retention_interval=retention_interval,
            rules=real.rules,
        )
        self.told, self.told_by_real = [], []
        manager.tell = manager.block_pool.tell = self.told.append
        self.mini = Scheduler(manager, SchedulerConfig(**config), tell=manager.tell)
        wrap_real(self.real, self.told_by_real)
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256, real.none_hash)
        self.in_flight = deque()
        self.count = self.num_preempted = self.num_aborted = 0

    def arrive(self):
        prefix = [self.random.randrange(2)] * self.random.choice([0, 8, 17, 40])
        prompt = prefix + [self.random.randrange(3) for _ in range(self.random.randrange(1, 40))]
        self.count += 1
        options = dict(
            max_tokens=self.random.randrange(1, 40),
            priority=self.random.randrange(3),
            arrival_time=float(self.count),
            stop_token_ids=[STOP_TOKEN],
        )
        name = f"r{self.count:03}"
        self.real.add_request(self.names.request(name, prompt, BLOCK_SIZE, **options))
        self.mini.add_request(Request(name, prompt, block_hasher=self.hasher, **options))

    def abort(self):
        name = self.random.choice(list(self.mini.requests))
        self.num_aborted += 1
        self.real.finish_requests(name, self.names.RequestStatus.FINISHED_ABORTED)
        self.mini.finish_requests([name])

    def plan(self):
        expected, actual = self.real.schedule(), self.mini.schedule()
        assert list(expected.num_scheduled_tokens.items()) == list(
            actual.num_scheduled_tokens.items()
        )
        assert expected.preempted_req_ids == set(actual.preempted_req_ids)
        assert expected.finished_req_ids == set(actual.finished_req_ids)
        starts, tables = {}, {}
        for new in expected.scheduled_new_reqs:
            starts[new.req_id], tables[new.req_id] = new.num_computed_tokens, new.block_ids
        cached = expected.scheduled_cached_reqs
        for name, start, blocks in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids
        ):
            starts[name], tables[name] = (
                start,
                blocks or tuple([] for _ in self.mini.kv_cache_manager.groups),
            )
        assert starts == actual.num_computed_tokens
        assert tables == actual.new_block_ids
        fresh, resumed = actual.scheduled_new_reqs, actual.scheduled_resumed_reqs
        if self.real.use_v2_model_runner:  # it is told of resumed requests as of new ones
            fresh, resumed = fresh + resumed, []
        assert [new.req_id for new in expected.scheduled_new_reqs] == fresh
        assert cached.resumed_req_ids == set(resumed)
        self.num_preempted += len(actual.preempted_req_ids)
        samples = [
            name
            for name, num_tokens in actual.num_scheduled_tokens.items()
            if actual.num_computed_tokens[name] + num_tokens >= self.mini.requests[name].num_tokens
        ]
        if actual.num_scheduled_tokens:
            self.in_flight.append((expected, actual, samples))
        self.compare()

    def answer(self):
        expected, actual, samples = self.in_flight.popleft()
        tokens = {
            name: [self.random.choice([0, 0, 1, 2, 3] * 8 + [STOP_TOKEN])] for name in samples
        }
        self.real.update_from_output(expected, self.names.outcome(expected, tokens))
        self.mini.update_from_output(actual, tokens)
        self.compare()

    def compare(self):
        assert self.told_by_real == self.told
        self.told_by_real.clear()
        self.told.clear()
        assert state_of_real(self.real.kv_cache_manager) == state_of_mini(
            self.mini.kv_cache_manager
        )
        assert [request.request_id for request in self.real.running] == [
            r.request_id for r in self.mini.running
        ]
        assert [request.request_id for request in self.real.waiting] == [
            r.request_id for r in self.mini.waiting
        ]
        assert set(self.real.requests) == set(self.mini.requests)
        for name, request in self.mini.requests.items():
            twin = self.real.requests[name]
            assert self.real.kv_cache_manager.get_block_ids(
                name
            ) == self.mini.kv_cache_manager.get_block_ids(name)
            for field in COUNTS:
                assert getattr(twin, field) == getattr(request, field), field

    def run(self, num_steps):
        for _ in range(num_steps):
            while self.random.random() < 0.3 and self.count < 30:
                self.arrive()
            if self.mini.requests and self.random.random() < 0.03:
                self.abort()
            self.plan()
            while len(self.in_flight) >= self.depth:
                self.answer()
        for _ in range(2000):  # nobody new: everything drains
            if not self.mini.requests:
                break
            self.plan()
            while len(self.in_flight) >= self.depth or (
                self.in_flight and self.random.random() < 0.2
            ):
                self.answer()
        while self.in_flight:
            self.answer()
        assert not self.mini.requests and not self.real.requests
        assert (
            self.mini.kv_cache_manager.block_pool.get_num_free_blocks()
            == len(state_of_mini(self.mini.kv_cache_manager)["ref_cnt"]) - 1
        )


GROUPS = {
    "full": [FullAttentionSpec(BLOCK_SIZE)],
    "window": [SlidingWindowSpec(BLOCK_SIZE, 20)],
    "full and window": [FullAttentionSpec(BLOCK_SIZE), SlidingWindowSpec(BLOCK_SIZE, 12)],
}


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("name", GROUPS)
def test_every_step_equals_vllm(real, tmp_path, name, async_scheduling):
    seen = {"preempted": 0, "aborted": 0, "requests": 0}

    @hypothesis_settings()
    @given(
        seed=st.integers(0, 2**32),
        num_blocks=st.sampled_from([18, 19, 22, 26, 36]),
        policy=st.sampled_from(["fcfs", "priority"]),
        max_num_batched_tokens=st.sampled_from([16, 24, 50, 200]),
        max_num_seqs=st.sampled_from([2, 4, 8, 16]),
        long_prefill_token_threshold=st.sampled_from([0, 0, 9]),
        long_prefill_token_threshold_adaptive=st.booleans(),
        scheduler_reserve_full_isl=st.booleans(),
        enable_caching=st.sampled_from([True, True, True, False]),
        watermark=st.sampled_from([0.0, 0.0, 0.1]),
        retention_interval=st.sampled_from([None, 0]),
    )
    def run(seed, num_blocks, **options):
        options["max_num_seqs"] = min(options["max_num_seqs"], options["max_num_batched_tokens"])
        num_blocks *= len(GROUPS[name])
        twins = Twins(
            real,
            tmp_path,
            GROUPS[name],
            num_blocks,
            seed,
            async_scheduling=async_scheduling,
            **options,
        )
        twins.run(40)
        seen["preempted"] += twins.num_preempted
        seen["aborted"] += twins.num_aborted
        seen["requests"] += twins.count

    run()
    # A workload that never preempts or aborts would prove little.
    assert seen["preempted"] > 5 and seen["aborted"] > 5, seen
