"""The manager with a straight way for one token more beside the plain one: the same blocks, told in the same words."""

import random

import pytest

from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, KVCacheManager, SlidingWindowSpec
from vllm_trace.mini.request import Request, RequestStatus
from vllm_trace.replay.steady_manager import SteadyManager

KINDS = {
    "full": lambda size: [FullAttentionSpec(size)],
    "two groups": lambda size: [FullAttentionSpec(size), FullAttentionSpec(size)],
    "window": lambda size: [SlidingWindowSpec(size, 3 * size)],
}


class Side:
    def __init__(self, manage, groups, num_blocks, max_model_len, caching):
        self.told = []
        options = dict(enable_caching=caching, tell=self.told.append)
        self.manager = manage(num_blocks, groups, max_model_len, **options)
        self.requests = {}

    def admit(self, key, num_tokens, hashes):
        request = Request(key, num_prompt_tokens=num_tokens, block_hashes=hashes)
        hits, num_hit, _ = self.manager.get_computed_blocks(request)
        left = num_tokens - num_hit
        if self.manager.allocate_slots(request, left, num_hit, hits) is None:
            return False
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_tokens
        request.num_tokens += 1
        self.requests[key] = request
        return True

    def state(self):
        pool, held = self.manager.block_pool, self.manager.requests
        return (
            [block.block_id for block in pool.free_block_queue],
            [(block.ref_cnt, block.block_hash) for block in pool.blocks],
            {key: (self.manager.get_block_ids(key), held[key].num_cached_blocks, held[key].quiet_until)
             for key in held},
            [sorted((h, b.block_id) for h, b in cached.items())
             for cached in pool.cached_block_hash_to_block],
        )  # fmt: skip


def answer(call, *arguments):
    """Whether it was granted, or why it could not be asked."""
    try:
        return call(*arguments) not in (None, False)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_blocks, max_model_len", [(16, 40), (60, 40), (60, 1000)])
def test_one_token_more_is_the_same_on_both_ways(kind, size, caching, num_blocks, max_model_len):
    rng = random.Random(f"{kind} {size} {num_blocks}")
    groups = KINDS[kind](size)
    plain, steady = (
        Side(manage, groups, num_blocks * len(groups), max_model_len, caching)
        for manage in (KVCacheManager, SteadyManager)
    )
    sides = plain, steady
    straight = refused = 0
    for step in range(400):
        if rng.random() < 0.1:
            num_tokens = rng.randrange(1, 20)
            shared = rng.randrange(num_tokens // size + 1)
            own = [f"{step}-{i}" for i in range(1000 // size)]
            hashes = [f"common-{i}" for i in range(shared)] + own
            if rng.random() < 0.2:
                hashes = hashes[: num_tokens // size + 3]  # the rest is not known in time
            assert plain.admit(step, num_tokens, hashes) == steady.admit(step, num_tokens, hashes)
        if plain.requests and rng.random() < 0.05:
            key = rng.choice([*plain.requests])
            for side in sides:
                side.manager.free(side.requests.pop(key))
        for key in [*plain.requests]:
            ours, theirs = steady.requests[key], plain.requests[key]
            if rng.random() < 0.05:  # its last token did not come yet: async
                ours.num_tokens -= 1
                theirs.num_tokens -= 1
            given = answer(plain.manager.allocate_slots, theirs, 1)
            assert given == answer(steady.manager.append_slot, ours, steady.manager.requests[key])
            if given is not True or theirs.num_tokens >= max_model_len:
                refused += 1
                for side in sides:
                    side.manager.free(side.requests.pop(key))
                continue
            straight += 1
            for request in (ours, theirs):
                request.num_computed_tokens += 1
                request.num_tokens = request.num_computed_tokens + 1
        assert plain.told == steady.told
        plain.told.clear(), steady.told.clear()
        assert plain.state() == steady.state()
    assert straight > 100 and (refused or kind == "window")
