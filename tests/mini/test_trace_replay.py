"""Random workloads through vLLM's real Scheduler, traced by the real hooks: no divergence, all invariants hold.

A fixed number of examples; more of them with ``VTRACE_HYPOTHESIS_EXAMPLES=600 pytest tests/mini``.
"""

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_trace.invariants.checking import check as check_invariants
from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, SlidingWindowSpec
from vllm_trace.replay import MODES, replay
from vllm_trace.trace import read_trace

from .conftest import NUM_EXAMPLES, hypothesis_settings

BLOCK_SIZE = 4
MAX_MODEL_LEN = 96
STOP_TOKEN = 9
WITHOUT_WORKERS = {
    "blocks-conserved", "single-owner", "ref-counts", "freed-once", "freed-tail-first",
    "nothing-held", "null-block", "hit-cached", "hash-chain", "evict-head", "preempt-needed",
    "refusal-needed", "token-budget", "table-covers", "tables-grow",
}  # fmt: skip
"""Rules that a scheduler's own events can break."""
GROUPS = {
    "full": [FullAttentionSpec(BLOCK_SIZE)],
    "window": [SlidingWindowSpec(BLOCK_SIZE, 12)],
    "hybrid": [FullAttentionSpec(BLOCK_SIZE), SlidingWindowSpec(BLOCK_SIZE, 12)],
}


class Workload:
    """Requests that come, go away and share prefixes, on a real scheduler without a model."""

    def __init__(self, real, folder, groups, num_blocks, seed, enable_caching, **config):
        self.real = real
        self.random = random.Random(seed)
        self.depth = 2 if config["async_scheduling"] else 1
        vllm_config = real.vllm_config(
            folder,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=enable_caching,
            **config,
        )
        self.scheduler = real.scheduler(vllm_config, groups, num_blocks)
        self.in_flight = deque()
        self.count = 0

    def arrive(self):
        prefix = [self.random.randrange(2)] * self.random.choice([0, 8, 17, 40])
        prompt = prefix + [self.random.randrange(3) for _ in range(self.random.randrange(1, 30))]
        self.count += 1
        self.scheduler.add_request(
            self.real.request(
                f"r{self.count:03}",
                prompt,
                BLOCK_SIZE,
                max_tokens=self.random.randrange(1, 24),
                priority=self.random.randrange(3),
                arrival_time=float(self.count),
                stop_token_ids=[STOP_TOKEN],
            )
        )

    def abort(self):
        name = self.random.choice(sorted(self.scheduler.requests))
        self.scheduler.finish_requests(name, self.real.RequestStatus.FINISHED_ABORTED)

    def plan(self):
        output = self.scheduler.schedule()
        if output.num_scheduled_tokens:
            requests = self.scheduler.requests
            sampling = [
                name for name in output.num_scheduled_tokens if not requests[name].is_prefill_chunk
            ]
            self.in_flight.append((output, sampling))

    def answer(self):
        output, sampling = self.in_flight.popleft()
        tokens = {n: [self.random.choice([0, 1, 2] * 10 + [STOP_TOKEN])] for n in sampling}
        self.scheduler.update_from_output(output, self.real.outcome(output, tokens))

    def run(self, num_steps):
        for step in range(num_steps + 400):
            while step < num_steps and self.random.random() < 0.3 and self.count < 20:
                self.arrive()
            if self.scheduler.requests and self.random.random() < 0.03:
                self.abort()
            self.plan()
            while len(self.in_flight) >= self.depth or (self.in_flight and step >= num_steps):
                self.answer()
            if step >= num_steps and not self.scheduler.requests:
                return


@pytest.mark.slow
@pytest.mark.parametrize("kind", GROUPS)
def test_traces_of_random_workloads_replay(real, kind, tmp_path_factory):
    from vllm_trace import hooks
    from vllm_trace.options import Options

    preempted = []

    @hypothesis_settings(max(10, NUM_EXAMPLES // 3))
    @given(
        seed=st.integers(0, 2**32 - 1),
        spare=st.sampled_from([0, 0, 1, 3, 9, 30]),
        max_num_batched_tokens=st.sampled_from([8, 16, 33, 128]),
        max_num_seqs=st.sampled_from([1, 3, 8]),
        policy=st.sampled_from(["fcfs", "priority"]),
        async_scheduling=st.booleans(),
        enable_caching=st.booleans(),
        threshold=st.sampled_from([0, 7]),
    )
    def check(
        seed,
        spare,
        max_num_batched_tokens,
        max_num_seqs,
        policy,
        async_scheduling,
        enable_caching,
        threshold,
    ):
        folder = tmp_path_factory.mktemp("replay")
        hooks.attach(Options(dir=str(folder / "trace")))
        try:
            Workload(
                real,
                folder,
                GROUPS[kind],
                len(GROUPS[kind]) * -(-MAX_MODEL_LEN // BLOCK_SIZE) + 2 + spare,
                seed,
                enable_caching,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=max_num_seqs,
                policy=policy,
                async_scheduling=async_scheduling,
                long_prefill_token_threshold=threshold,
                enable_chunked_prefill=True,
            ).run(40)
        finally:
            hooks.detach()
        for mode in MODES:
            trace = read_trace(folder / "trace")
            result = replay(trace, mode)
            assert result.divergence is None, (mode, result.divergence)
            assert result.passed, (mode, result.not_judged, result.num_consumed, result.num_events)
        judged = check_invariants(read_trace(folder / "trace"))
        assert [] == [j.violation or j.reason for j in judged.of("violated") + judged.of("raised")]
        # Without a model there is no worker, and without caching no prefix: their rules have nothing to judge.
        assert WITHOUT_WORKERS - {j.invariant.id for j in judged.of("holds")} <= (
            set() if enable_caching else {"hit-cached", "hash-chain"}
        )
        events = [*read_trace(folder / "trace").events()]
        preempted.append(any(event.kind == "request.preempted" for event in events))
        refused = [event for event in events if event.kind == "slots.refused"]
        assert [] == [e for e in refused if e.num_wanted_blocks <= e.num_free_blocks]

    check()
    # A window keeps so few blocks that these pools are never too small for it.
    assert any(preempted) or kind == "window", (
        "no workload preempted anybody: the pools are too large to tell much"
    )


@pytest.fixture(scope="module")
def asked(real, tmp_path_factory):
    """A trace of requests one behind the other, with the same tokens under LoRAs and salts."""
    from vllm.lora.request import LoRARequest

    from vllm_trace import hooks
    from vllm_trace.options import Options

    folder = tmp_path_factory.mktemp("asked")
    tokens, a, b = list(range(10, 20)), LoRARequest("a", 1, "/a"), LoRARequest("b", 2, "/b")
    requests = {
        "plain": (tokens, {}),
        "same": (tokens, {}),
        "with-salt": (tokens, {"cache_salt": "s"}),
        "with-lora-a": (tokens, {"lora_request": a}),
        "with-lora-a-again": (tokens, {"lora_request": a}),
        "with-lora-b": (tokens, {"lora_request": b}),
        "shorter": (tokens[:3], {}),
        "other": ([7] * 10, {}),
        "large": ([100 + i for i in range(92)], {}),
        "late": (tokens, {}),
    }
    hooks.attach(Options(dir=str(folder / "trace"), tokens=True))
    try:
        load = Workload(
            real, folder, GROUPS["full"], MAX_MODEL_LEN // BLOCK_SIZE + 2, 0, True,
            max_num_batched_tokens=128, max_num_seqs=8, policy="fcfs", async_scheduling=False,
            long_prefill_token_threshold=0, enable_chunked_prefill=True,
        )  # fmt: skip
        for place, (name, (prompt, more)) in enumerate(requests.items()):
            load.scheduler.add_request(
                real.request(name, prompt, BLOCK_SIZE, 1, arrival_time=float(place), **more)
            )
            while load.scheduler.requests:
                load.plan()
                load.answer()
    finally:
        hooks.detach()
    return folder / "trace"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plain", "0 of 2 blocks hit; nobody had cached its first block (tokens 0–3)"),
        ("same", "2 of 2 blocks hit"),
        ("with-salt", "0 of 2 blocks hit; plain has the same tokens in block 0 (tokens 0–3), but without a salt"),
        ("with-lora-a", "0 of 2 blocks hit; plain has the same tokens in block 0 (tokens 0–3), but without a LoRA"),
        ("with-lora-a-again", "2 of 2 blocks hit"),
        ("with-lora-b", "but without a LoRA"),
        ("shorter", "nothing to look up: it is shorter than a block of 4 tokens"),
        ("other", "nobody had cached its first block"),
        ("late", "when large took that block"),
    ],
)  # fmt: skip
def test_why_a_prefix_was_not_hit_in_the_real_manager(asked, name, said):
    from vllm_trace.explain import explain

    lines = explain(read_trace(asked), name).lines
    (text,) = (line.text for line in lines if line.kind == "looked up")
    assert said in text


def test_with_loras_and_salts_nothing_diverges(asked):
    assert all(replay(read_trace(asked), mode).passed for mode in MODES)
