"""mini's engine does what vLLM does, on both checkpoints: the same tokens, by the same steps, in the same blocks.

Tokens can only be compared where the largest logit is clear: in these workloads it leads by more than 2e-4, and float32
moves a logit by less than 6e-5.
"""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: mini's engine cannot run")
for library in ("numpy", "safetensors", "tokenizers"):
    pytest.importorskip(library, reason=f"the engine and its checkpoints need {library}")

from vllm_trace.checkpoints import NAMES, checkpoint  # noqa: E402
from vllm_trace.mini.engine import LLMEngine  # noqa: E402
from vllm_trace.mini.model import load_model  # noqa: E402
from vllm_trace.mini.scheduler import SchedulerConfig  # noqa: E402
from vllm_trace.runner import let_vllm_look_at_llvmlite  # noqa: E402

ENGINES = []  # kept: the end of an old engine would take the process groups of a new one with it


def tokens(seed, length):
    """A prompt of random words."""
    return torch.randint(3, 768, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


SHORT = [tokens(seed, length) for seed, length in enumerate([1, 6, 31, 32, 33, 64, 65, 100])]
SYSTEM = tokens(99, 70)
# What is asked, in rounds; what a round left in the prefix cache the next one may hit. Options have vLLM's names.
WORKLOADS = {
    "batch": dict(rounds=[SHORT], max_tokens=[40, 3, 17, 32, 33, 1, 40, 25]),
    "chunked": dict(
        rounds=[[tokens(1, 150), tokens(2, 30), tokens(3, 97), tokens(4, 64)]],
        max_num_batched_tokens=64,
        max_num_seqs=4,
    ),
    "prefix": dict(
        rounds=[
            [SYSTEM + tokens(7, 9)],
            [SYSTEM + tokens(8, length) for length in (1, 20, 58)],
            [SYSTEM, SYSTEM[:64], SYSTEM],
        ]
    ),
    "prefix, small steps": dict(
        rounds=[[SYSTEM + tokens(17, 40)], [SYSTEM + tokens(seed, 40) for seed in (18, 19)]],
        max_num_batched_tokens=48,
        max_num_seqs=4,
    ),
    "no prefix cache": dict(rounds=[[SYSTEM], [SYSTEM, SYSTEM]], enable_prefix_caching=False),
    "evict": dict(
        rounds=[[tokens(1, 120)], [tokens(2, 180)], [tokens(1, 120)]],
        blocks=9,
        max_model_len=256,
        max_tokens=20,
    ),
    "preempt": dict(
        rounds=[[tokens(seed, 60) for seed in (10, 11, 12)]],
        blocks=9,
        max_model_len=256,
        max_tokens=60,
    ),
    "preempt, many": dict(
        rounds=[[tokens(seed, 20 + 9 * seed) for seed in range(10)]],
        blocks=12,
        max_model_len=256,
        max_tokens=50,
        max_num_batched_tokens=64,
        max_num_seqs=8,
    ),
    "past 512": dict(
        rounds=[[tokens(1, 505), tokens(2, 700), tokens(3, 1030)]],
        blocks=120,
        max_model_len=2048,
        max_num_batched_tokens=512,
    ),
}


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_vllm(name, workload, monkeypatch):
    expected = on_vllm(name, monkeypatch, **WORKLOADS[workload])
    actual = on_mini(name, **WORKLOADS[workload])

    assert expected["tokens"] == actual["tokens"]
    assert expected["num_cached_tokens"] == actual["num_cached_tokens"]
    assert expected["preempted"] == actual["preempted"]
    assert expected["steps"] == actual["steps"]
    # Each workload shows what it is named for.
    assert workload.startswith("preempt") == bool(actual["preempted"])
    assert workload.startswith(("prefix", "evict")) == (sum(actual["num_cached_tokens"]) > 0)
    if workload == "evict":
        assert 96 > actual["num_cached_tokens"][2]  # of the three full blocks that were there once
    if workload == "chunked":
        assert any(
            {1} < {count for count, _ in step.values()} for step in actual["steps"]
        )  # decodes beside a chunk
    assert (workload == "past 512") == ("v2" in actual["kernels"])


def test_equal_to_vllm_past_8192(monkeypatch):
    """A prompt that crosses 8192 tokens while decoding: V1 is out of the question there."""
    workload = dict(
        rounds=[[tokens(5, 8180)]],
        blocks=280,
        max_model_len=8704,
        max_num_batched_tokens=512,
        max_tokens=30,
    )
    expected = on_vllm("tiny-llama", monkeypatch, **workload)
    actual = on_mini("tiny-llama", **workload)
    assert expected["tokens"] == actual["tokens"]
    assert expected["steps"] == actual["steps"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        dict(block_size=1, blocks=400),
        dict(block_size=16),
        dict(block_size=5),
        dict(max_num_batched_tokens=7),
        dict(max_num_seqs=1),
        dict(blocks=8, max_model_len=224),
        dict(blocks=8, max_model_len=224, enable_prefix_caching=False),
        dict(max_num_batched_tokens=50, max_num_seqs=3, blocks=8, max_model_len=224),
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
def test_paging_changes_no_token(name, options):
    """Blocks, chunks, hits and preemptions change where and when, never what: without any cache it is the same."""
    prompts = [*SHORT[:5], tokens(50, 120), SHORT[4] + tokens(51, 9), SHORT[4]]
    expected = [without_cache(name, prompt, 25) for prompt in prompts]
    options = {"blocks": 64, "max_model_len": 256, **options}
    assert (
        expected
        == on_mini(name, rounds=[prompts[:4], prompts[4:]], max_tokens=25, **options)["tokens"]
    )


def test_steps_by_hand():
    """A step is a schedule: 40 tokens in chunks of 16 make two steps without a token and one with; then one each."""
    engine = LLMEngine(
        checkpoint("tiny-llama"), scheduler_config=SchedulerConfig(max_num_batched_tokens=16)
    )
    engine.add_request("a", tokens(1, 40), max_tokens=3, ignore_eos=True)
    outputs = [engine.step() for _ in range(5)]

    assert [[], []] == outputs[:2]
    assert [[("a", 1, None)], [("a", 1, None)], [("a", 1, "length")]] == [
        [(output.request_id, len(output.new_token_ids), output.finish_reason) for output in step]
        for step in outputs[2:]
    ]
    assert not engine.has_unfinished_requests()
    assert [] == engine.step()


def test_worker_tables_are_the_managers():
    """Every step, every row and slot that the kernels read is what the manager holds for that request."""
    checked = []

    def tell(fact):
        kind, *fields = fact
        if kind != "batch.prepared":
            return
        step, req_ids, counts, tables, slots = fields
        manager, slots = engine.scheduler.kv_cache_manager, iter(slots)
        for req_id, count, table in zip(req_ids, counts, tables):
            assert manager.get_block_ids(req_id) == (table,), f"step {step}, request {req_id}"
            end = engine.scheduler.requests[
                req_id
            ].num_computed_tokens  # already counted as computed when planned
            assert [table[p // 16] * 16 + p % 16 for p in range(end - count, end)] == [
                next(slots) for _ in range(count)
            ]
            checked.append(req_id)

    engine = LLMEngine(
        checkpoint("tiny-llama"), num_gpu_blocks=20, max_model_len=256, tell=tell,
        scheduler_config=SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4),
    )  # fmt: skip
    engine.generate([tokens(seed, 20 + 9 * seed) for seed in range(9)], 30, ignore_eos=True)
    assert len(checked) > 9 * 30


def test_generate_keeps_to_itself():
    """Tokens of requests that were queued by hand would have nowhere to go."""
    engine = LLMEngine(checkpoint("tiny-llama"))
    engine.add_request("a", [5], max_tokens=2)
    with pytest.raises(ValueError, match="requests are under way"):
        engine.generate([[5]])
    while engine.has_unfinished_requests():
        engine.step()
    assert [without_cache("tiny-llama", [5], 4)] == engine.generate([[5]], 4)


def test_abort_and_stop():
    """An aborted request leaves at once, its row is reused, and the others do not notice."""
    prompts = {key: tokens(seed, 40) for seed, key in enumerate("abcd")}
    alone = {key: without_cache("tiny-opt", prompt, 12) for key, prompt in prompts.items()}
    engine = LLMEngine(checkpoint("tiny-opt"), scheduler_config=SchedulerConfig(max_num_seqs=3))
    made = {key: [] for key in prompts}
    for key in "abc":
        engine.add_request(
            key, prompts[key], 12, stop_token_ids=[alone["c"][4]] if key == "c" else []
        )
    reasons = {}
    for step in range(40):
        if step == 3:
            engine.abort_request(["a", "nobody"])
            engine.add_request("d", prompts["d"], 12)
        for output in engine.step():
            made[output.request_id] += output.new_token_ids
            reasons[output.request_id] = output.finish_reason

    assert {"a": alone["a"][:3], "b": alone["b"], "c": alone["c"][:5], "d": alone["d"]} == made
    assert {"a": None, "b": "length", "c": "stop", "d": "length"} == reasons
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.num_gpu_blocks - 1 == pool.get_num_free_blocks()
    assert {} == engine.runner.rows


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "0 prompt tokens; 1 to 255 are possible"),
        ([5] * 256, {}, "256 prompt tokens; 1 to 255"),
        ([5, 768], {}, "token ids are 0 to 767"),
        ([-1], {}, "token ids are 0 to 767"),
        ([5], {"max_tokens": 0}, "max_tokens is 0, not 1 or more"),
    ],
)
def test_requests_refused(prompt, options, message):
    engine = LLMEngine(checkpoint("tiny-llama"), max_model_len=256)
    with pytest.raises(ValueError, match=message):
        engine.add_request("a", prompt, **options)
    assert not engine.has_unfinished_requests()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(max_model_len=256, num_gpu_blocks=16),
            "blocks of 16, one of them the null block, hold 240 tokens",
        ),
        (dict(max_model_len=16385, num_gpu_blocks=2000), "this model has 16384 positions"),
        (
            dict(scheduler_config=SchedulerConfig(async_scheduling=True)),
            "async_scheduling must be off",
        ),
        (dict(block_size=24), "block size 24 does not divide 512"),
        (
            dict(scheduler_config=SchedulerConfig(enable_chunked_prefill=False)),
            "raise max_num_batched_tokens",
        ),
    ],
)
def test_engines_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LLMEngine(checkpoint("tiny-llama"), **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "mamba"}', "mini follows llama and opt; .* is 'mamba'"),
        ('{"model_type": "llama"}', r"holds no \*.safetensors"),
    ],
)
def test_models_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def without_cache(name, prompt, max_tokens):
    """The same model without blocks: every token is computed again for every new one, by torch's own attention."""
    model = load_model(checkpoint(name))

    def attend(layer, query, key, value):
        key, value = (
            kv.repeat_interleave(model.num_heads // model.num_kv_heads, dim=1)
            for kv in (key, value)
        )
        heads_first = (tensor.transpose(0, 1) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True
        ).transpose(0, 1)

    made = list(prompt)
    for _ in range(max_tokens):
        hidden = model.forward(torch.tensor(made), torch.arange(len(made)), attend)
        made.append(int(model.compute_logits(hidden[-1:]).argmax()))
    return made[len(prompt) :]


def on_mini(
    name,
    rounds,
    max_tokens=40,
    blocks=64,
    max_model_len=512,
    block_size=32,
    enable_prefix_caching=True,
    **scheduler,
):
    cached, preempted, kernels, steps = {}, [], set(), []

    def tell(fact):
        kind, *fields = fact
        if kind == "slots.allocated":
            cached.setdefault(
                fields[0], fields[2]
            )  # a first admission; later ones are after a preemption
        elif kind == "request.preempted":
            preempted.append(fields[0])
        elif kind == "attention.decoded":
            kernels.add(fields[1])
        elif kind == "batch.prepared":
            _, req_ids, counts, tables, _ = fields
            steps.append(
                {req_id: (count, table) for req_id, count, table in zip(req_ids, counts, tables)}
            )

    engine = LLMEngine(
        checkpoint(name),
        block_size=block_size,
        num_gpu_blocks=blocks,
        max_model_len=max_model_len,
        enable_prefix_caching=enable_prefix_caching,
        scheduler_config=SchedulerConfig(**scheduler),
        tell=tell,
    )
    made = []
    for prompts in rounds:
        made += engine.generate(prompts, max_tokens, ignore_eos=True)
    return {
        "tokens": made,
        "num_cached_tokens": [cached[str(i)] for i in range(len(made))],
        "preempted": preempted,
        "steps": steps,
        "kernels": kernels,
    }


def on_vllm(name, monkeypatch, rounds, max_tokens=40, blocks=64, max_model_len=512, **options):
    vllm = pytest.importorskip(
        "vllm", reason="vllm is not installed: mini's tokens cannot be compared with the real ones"
    )
    let_vllm_look_at_llvmlite()  # other tests load numba
    llm = vllm.LLM(
        str(checkpoint(name)),
        dtype="float32",
        block_size=32,
        num_gpu_blocks_override=blocks,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=True,
        use_tqdm_on_load=False,
        seed=0,
        **options,
    )
    ENGINES.append(llm)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule, preempt = scheduler.schedule, scheduler._preempt_request
    steps, preempted = [], []

    def short(req_id):  # vLLM hangs a random part on the number that `generate` gave
        return req_id.split("-")[0]

    def record_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        counts, table = output.num_scheduled_tokens, scheduler.kv_cache_manager.get_block_ids
        if counts:
            steps.append(
                {short(req_id): (count, list(table(req_id)[0])) for req_id, count in counts.items()}
            )
        return output

    def record_preempt(request, *args, **kwargs):
        preempted.append(short(request.request_id))
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "schedule", record_schedule)
    monkeypatch.setattr(scheduler, "_preempt_request", record_preempt)
    outputs = []
    for prompts in rounds:
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        params = [
            vllm.SamplingParams(temperature=0, ignore_eos=True, max_tokens=limit, detokenize=False)
            for limit in limits
        ]
        outputs += llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "num_cached_tokens": [output.num_cached_tokens for output in outputs],
        "preempted": preempted,
        "steps": steps,
    }
