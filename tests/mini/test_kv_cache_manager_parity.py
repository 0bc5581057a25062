"""The real KVCacheManager and mini's, driven by the same operations: equal block for block after each of them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, KVCacheManager, SlidingWindowSpec
from vllm_trace.mini.request import Request, RequestStatus, get_request_block_hasher, sha256

from .conftest import hypothesis_settings, state_of_mini, state_of_real

BLOCK_SIZE = 4
MAX_MODEL_LEN = 96

FULL = FullAttentionSpec(BLOCK_SIZE)


def window(tokens):
    return SlidingWindowSpec(BLOCK_SIZE, tokens)


GROUPS = {
    "full": [FULL],
    "window": [window(9)],
    "short window": [window(3)],
    "full and window": [FULL, window(10)],
    "window and full": [window(8), FULL],
    "two full, one window": [FULL, FULL, window(13)],
    "full and two windows": [FULL, window(6), window(17)],
    "two windows": [window(7), window(15)],
    "three of Gemma": [window(12), window(12), FULL],
}


class Twins:
    """Two managers; every operation is done to both and every answer compared."""

    def __init__(self, real, groups, num_blocks, seed, **options):
        self.real_names = real
        self.random = random.Random(seed)
        watermark = options.pop("watermark")
        caching = options.pop("enable_caching")
        retention = options.pop("retention_interval")
        in_flight = options.pop("max_in_flight_tokens")
        common = dict(max_model_len=MAX_MODEL_LEN, enable_caching=caching, watermark=watermark)
        common |= dict(retention_interval=retention, max_in_flight_tokens=in_flight)
        self.real = real.manager(num_blocks, groups, **common)
        self.mini = KVCacheManager(num_blocks, groups, rules=real.rules, **common)
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256, real.none_hash)
        self.waiting, self.running = [], []
        self.count = 0

    def step(self):
        choice = self.random.random()
        if choice < 0.22 or not (self.running or self.waiting):
            self.arrive()
        elif choice < 0.45 and self.waiting:
            self.admit(self.random.choice(self.waiting))
        elif choice < 0.85 and self.running:
            self.proceed(self.random.choice(self.running))
        elif choice < 0.93 and self.running:
            self.leave(self.random.choice(self.running), again=self.random.random() < 0.4)
        elif choice < 0.95:
            ids = self.random.sample(range(1, self.mini.block_pool.num_gpu_blocks), 2)
            self.real.evict_blocks(dict.fromkeys(ids))
            self.mini.block_pool.evict_blocks(ids)
        elif choice < 0.96:
            assert self.real.reset_prefix_cache() == self.mini.reset_prefix_cache()
        self.compare()

    def arrive(self):
        # Few distinct tokens and few prefixes, so that hits, near hits and duplicates are common.
        prefix = [self.random.randrange(3)] * self.random.choice([0, 5, 8, 12, 21, 40])
        prompt = prefix + [self.random.randrange(2) for _ in range(self.random.randrange(1, 30))]
        self.count += 1
        name = f"r{self.count}"
        real = self.real_names.request(name, prompt, BLOCK_SIZE)
        mini = Request(name, prompt, block_hasher=self.hasher)
        assert real.block_hashes == mini.block_hashes
        self.waiting.append((real, mini))

    def admit(self, pair):
        real, mini = pair
        real_hit, real_tokens, boundary = self.real.get_computed_blocks(real)
        mini_hit, mini_tokens, mini_boundary = self.mini.get_computed_blocks(mini)
        assert (real_tokens, boundary) == (mini_tokens, mini_boundary)
        assert list(real_hit.get_block_ids()) == [
            [block.block_id for block in table] for table in mini_hit
        ]
        real.shared_prefix_boundary = mini.shared_prefix_boundary = boundary
        num_new = self.random.randint(1, mini.num_tokens - mini_tokens)
        options = dict(
            num_new_computed_tokens=mini_tokens,
            num_lookahead_tokens=self.random.choice([0, 0, 0, 3]),
            full_sequence_must_fit=self.random.random() < 0.5,
            has_scheduled_reqs=bool(self.running),
        )
        if self.allocate(pair, num_new, real_hit, mini_hit, options):
            self.waiting.remove(pair)
            self.running.append(pair)
            real.status = self.real_names.RequestStatus.RUNNING
            mini.status = RequestStatus.RUNNING
            real.num_computed_tokens = mini.num_computed_tokens = mini_tokens + num_new

    def proceed(self, pair):
        real, mini = pair
        if mini.num_tokens >= MAX_MODEL_LEN - 1:
            return self.leave(pair, again=False)
        if mini.num_computed_tokens >= mini.num_tokens:
            token = self.random.randrange(2)
            real.append_output_token_ids(token)
            mini.append_output_token_ids([token])
            assert real.block_hashes == mini.block_hashes
        # Mostly one token, sometimes a chunk, sometimes beyond what is known (a step planned ahead).
        num_new = self.random.choice([1, 1, 1, self.random.randint(1, 12)])
        real.num_in_flight_tokens = mini.num_in_flight_tokens = self.random.choice([0, 0, num_new])
        num_new = min(num_new, MAX_MODEL_LEN - mini.num_computed_tokens)
        if self.allocate(
            pair, num_new, None, None, dict(num_lookahead_tokens=self.random.choice([0, 0, 0, 2]))
        ):
            real.num_computed_tokens += num_new
            mini.num_computed_tokens += num_new
            if mini.num_computed_tokens > mini.num_tokens:
                tokens = [
                    self.random.randrange(2)
                    for _ in range(mini.num_computed_tokens - mini.num_tokens)
                ]
                real.append_output_token_ids(tokens)
                mini.append_output_token_ids(tokens)
                self.real.cache_blocks(real, real.num_computed_tokens)
                self.mini.cache_blocks(mini, mini.num_computed_tokens)

    def allocate(self, pair, num_new, real_hit, mini_hit, options):
        real, mini = pair
        expected = self.real.allocate_slots(real, num_new, new_computed_blocks=real_hit, **options)
        actual = self.mini.allocate_slots(mini, num_new, new_computed_blocks=mini_hit, **options)
        assert (expected is None) == (actual is None)
        if expected is None:
            return False
        assert list(expected.get_block_ids()) == [
            [block.block_id for block in blocks] for blocks in actual
        ]
        return True

    def leave(self, pair, again):
        real, mini = pair
        self.real.free(real)
        self.mini.free(mini)
        self.running.remove(pair)
        if again:  # preempted: computed tokens are forgotten, known tokens stay
            real.status, mini.status = (
                self.real_names.RequestStatus.PREEMPTED,
                RequestStatus.PREEMPTED,
            )
            real.num_computed_tokens = mini.num_computed_tokens = 0
            real.num_in_flight_tokens = mini.num_in_flight_tokens = 0
            self.waiting.append(pair)

    def compare(self):
        assert state_of_real(self.real) == state_of_mini(self.mini)
        for real, mini in self.running:
            assert self.real.get_block_ids(real.request_id) == self.mini.get_block_ids(
                mini.request_id
            )


@pytest.mark.parametrize("name", GROUPS)
def test_every_block_equals_vllm(real, name):
    @hypothesis_settings()
    @given(
        seed=st.integers(0, 2**32),
        num_blocks=st.integers(8, 70),
        enable_caching=st.sampled_from([True, True, True, False]),
        watermark=st.sampled_from([0.0, 0.0, 0.1]),
        retention_interval=st.sampled_from([None, 0, 0, 16]),
        max_in_flight_tokens=st.sampled_from([None, 8, 64]),
    )
    def run(seed, num_blocks, **options):
        if (
            not any(hasattr(group, "sliding_window") for group in GROUPS[name])
            and options["retention_interval"]
        ):
            options["retention_interval"] = 0  # vLLM refuses an interval where it has no effect
        twins = Twins(real, GROUPS[name], num_blocks, seed, **options)
        for _ in range(120):
            twins.step()

    run()
