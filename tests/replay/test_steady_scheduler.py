"""The scheduler that passes over quiet requests beside the one that looks at everybody: the same plans and blocks."""

import random
from collections import deque

import pytest

from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, KVCacheManager, SlidingWindowSpec
from vllm_trace.mini.request import Request
from vllm_trace.mini.scheduler import Scheduler, SchedulerConfig
from vllm_trace.replay.steady_manager import SteadyManager
from vllm_trace.replay.steady_scheduler import SteadyScheduler

BLOCK_SIZE, MAX_MODEL_LEN = 4, 80
KINDS = {
    "full": [FullAttentionSpec(BLOCK_SIZE)],
    "two groups": [FullAttentionSpec(BLOCK_SIZE), FullAttentionSpec(BLOCK_SIZE)],
    "window": [SlidingWindowSpec(BLOCK_SIZE, 12)],
}


class Side:
    def __init__(self, make, manage, groups, num_blocks, config):
        self.told = []
        manager = manage(num_blocks, groups, MAX_MODEL_LEN, tell=self.told.append)
        self.scheduler = make(manager, config, self.told.append)

    def plan(self):
        """(what is planned, what was told of it)."""
        output = self.scheduler.schedule()
        # The steady one tells of steps and ends in its answers only.
        told = [f for f in self.told if f[0] not in ("step.scheduled", "request.finished")]
        self.told.clear()
        lists = output.scheduled_new_reqs, output.scheduled_resumed_reqs, output.preempted_req_ids
        return output, ([*output.num_scheduled_tokens.items()], lists, told)


def request(key, rng):
    prompt = rng.randrange(1, 40)
    shared = rng.randrange(0, prompt // BLOCK_SIZE + 1)
    common = [f"common-{i}" for i in range(shared)]
    hashes = [*common, *(f"{key}-{i}" for i in range(shared, MAX_MODEL_LEN // BLOCK_SIZE))]
    options = dict(
        num_prompt_tokens=prompt, max_tokens=rng.randrange(1, 30), block_hashes=hashes,
        priority=rng.randrange(3), arrival_time=float(key),
    )  # fmt: skip
    return lambda: Request(key, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("budget", [7, 20, 200])
@pytest.mark.parametrize("num_blocks", [24, 44, 200])
@pytest.mark.parametrize("depth, is_async", [(1, False), (2, False), (2, True)])
def test_no_plan_changes(kind, policy, budget, num_blocks, depth, is_async):
    """``depth`` is how many steps are planned before the first of them is answered."""
    groups = KINDS[kind]
    config = SchedulerConfig(
        max_num_batched_tokens=budget, max_num_seqs=6, policy=policy, async_scheduling=is_async
    )
    num_quiet = 0
    for seed in range(3):
        rng = random.Random(seed)
        plain, steady = (
            Side(*make, groups, num_blocks * len(groups), config)
            for make in ((Scheduler, KVCacheManager), (SteadyScheduler, SteadyManager))
        )
        in_flight = deque()
        for step in range(120):
            if rng.random() < 0.3 and step < 90:
                make = request(step, rng)
                plain.scheduler.add_request(make())
                steady.scheduler.add_request(make())
            if rng.random() < 0.04 and plain.scheduler.requests:
                gone = [rng.choice([*plain.scheduler.requests])]
                plain.scheduler.finish_requests(gone)
                steady.scheduler.finish_requests(gone)
            (output, theirs), (other, ours) = plain.plan(), steady.plan()
            assert theirs == ours, f"seed {seed}, step {step}"
            num_quiet += bool(steady.scheduler.steady.members)
            requests, keys = plain.scheduler.requests, [*output.num_scheduled_tokens]
            counts = [int(not requests[key].is_prefill_chunk) for key in keys]
            if keys:
                in_flight.append((output, other, keys, counts))
            if len(in_flight) >= depth or (in_flight and not keys):
                output, other, keys, counts = in_flight.popleft()
                stops = {k: "stop" for k, n in zip(keys, counts) if n and rng.random() < 0.02}
                sampled = dict(zip(keys, counts))
                finished = plain.scheduler.update_from_output(output, sampled, stops)
                assert finished == steady.scheduler.answer(other, counts, stops)
    assert num_quiet or kind == "window" or depth > 1
