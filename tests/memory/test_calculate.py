"""The calculator's sums: by hand, by simulation, by the real manager, and the tutorial's numbers."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import needs_vllm

from vllm_trace.errors import UsageError
from vllm_trace.memory import calculate, keynumbers, shapes, workload
from vllm_trace.memory.calculate import Setting, blocks_of
from vllm_trace.memory.workload import Request, Workload

V100, LLAMA = shapes.GPUS["v100-32gb"], shapes.MODELS["llama-2-7b"]


def setting(**more):
    return Setting(V100, LLAMA, **more).checked()


# Sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kv_dtype", "tp", "expected"),
    [
        ("llama-2-7b", "float16", 1, 32 * 2 * 32 * 128 * 2),
        (
            "llama-2-13b",
            "float16",
            1,
            40 * 2 * 40 * 128 * 2,
        ),  # the paper's 800 KiB, for its OPT-13B
        ("opt-13b", "float16", 1, 800 * 1024),
        ("llama-3-8b", "float16", 1, 128 * 1024),
        ("llama-3-8b", "fp8", 1, 64 * 1024),
        ("llama-3-8b", "float16", 4, 32 * 1024),
        ("llama-3.1-70b", "float16", 8, 80 * 2 * 128 * 2),
        ("llama-3.1-70b", "float16", 16, 80 * 2 * 128 * 2),  # 8 KV heads on 16 ranks: each twice
        ("deepseek-v3", "bfloat16", 8, 61 * 576 * 2),  # the latent vector is on every rank
    ],
)
def test_bytes_of_a_token(name, kv_dtype, tp, expected):
    assert expected == shapes.MODELS[name].token_bytes(kv_dtype, tp)


def test_the_pool_by_hand():
    made = setting(utilization=0.9)
    left = 32 * 2**30 * 0.9 - 2**30 - 6_738_415_616 * 2
    assert int(left) == made.kv_bytes
    assert int(left) // (16 * 524288) == made.num_blocks == made.usable_blocks + 1


@needs_vllm
@pytest.mark.parametrize("name", [n for n, m in shapes.MODELS.items() if not m.latent])
def test_a_page_is_as_large_as_vllm_says(name):
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    shape = shapes.MODELS[name]
    for tp, dtype in ((1, torch.float16), (shape.num_heads, torch.float32)):
        spec = FullAttentionSpec(
            block_size=16,
            num_kv_heads=shape.kv_heads_of_a_rank(tp),
            head_size=shape.head_size,
            dtype=dtype,
        )
        made = Setting(V100, shape, kv_dtype=str(dtype).removeprefix("torch."), tp=tp)
        assert spec.page_size_bytes * shape.num_layers == made.block_bytes


@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [
        ("llama-2-7b", "Llama", dict(hidden_size=4096, intermediate_size=11008, vocab_size=32000)),
        ("llama-2-13b", "Llama", dict(hidden_size=5120, intermediate_size=13824, vocab_size=32000)),
        ("llama-2-70b", "Llama", dict(hidden_size=8192, intermediate_size=28672, vocab_size=32000)),
        ("llama-3-8b", "Llama", dict(hidden_size=4096, intermediate_size=14336, vocab_size=128256)),
        (
            "llama-3.1-70b",
            "Llama",
            dict(hidden_size=8192, intermediate_size=28672, vocab_size=128256),
        ),
        (
            "llama-3.1-405b",
            "Llama",
            dict(hidden_size=16384, intermediate_size=53248, vocab_size=128256),
        ),
        ("qwen2.5-7b", "Qwen2", dict(hidden_size=3584, intermediate_size=18944, vocab_size=152064)),
        (
            "mistral-7b-v0.3",
            "Mistral",
            dict(hidden_size=4096, intermediate_size=14336, vocab_size=32768),
        ),
        ("opt-125m", "OPT", dict(hidden_size=768, ffn_dim=3072, vocab_size=50272)),
        ("opt-13b", "OPT", dict(hidden_size=5120, ffn_dim=20480, vocab_size=50272)),
    ],
)
def test_the_number_of_weights_is_that_of_a_model_of_this_shape(name, kind, config):
    """transformers builds the model without memory; the preset's count is what it comes to."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    shape = shapes.MODELS[name]
    heads = dict(
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.max_model_len,
    )
    if kind == "OPT":
        heads |= dict(word_embed_proj_dim=config["hidden_size"])
    else:
        heads |= dict(num_key_value_heads=shape.num_kv_heads, tie_word_embeddings=False)
    made = getattr(transformers, f"{kind}Config")(**config, **heads)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(made)
    assert shape.num_params == sum(weight.numel() for weight in model.parameters())


# Schemes ---------------------------------------------------------------------------------


def test_waste_by_hand():
    work = Workload("by hand", (Request(20, 13), Request(5, 1)), "")
    made = setting(max_model_len=64)
    reserved, pow2, exact, paged = calculate.wastes(made, work)
    # 32 and 5 tokens are held; 2 and 1 blocks.
    assert (128, 20 + 16 + 5 + 1, 37, 48) == tuple(w.tokens for w in (reserved, pow2, exact, paged))
    assert [1 - 37 / 128, 1 - 37 / 42, 0, 1 - 37 / 48] == [
        w.at_end for w in (reserved, pow2, exact, paged)
    ]
    # Over life: 20, 21, … 32 tokens in 13 steps, always 2 blocks; 5 tokens in one.
    used = sum(range(20, 33)) + 5
    assert 1 - used / (13 * 64 + 64) == reserved.over_life
    assert 1 - used / (13 * 32 + 16) == paged.over_life


requests = st.lists(
    st.builds(Request, st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=20
)


@given(requests, st.integers(1, 200))
def test_paged_memory_counted_block_by_block(asked, block_size):
    """A table that grows as tokens come has as many blocks as the formula says, and the sums agree."""
    made = setting(block_size=block_size, max_model_len=400)
    used = kept = 0
    for request in asked:
        table = 0
        for tokens in range(1, request.prompt + request.output):
            if tokens > table * block_size:
                table += 1
            if tokens >= request.prompt:
                used += tokens
                kept += table * block_size
        assert table == blocks_of(request.held, block_size)
        assert table * block_size == made.reserve("paged", request)
    assert (used, kept) == calculate._over_life(made, "paged", asked)


@given(requests, st.integers(1, 64))
def test_order_of_the_schemes(asked, block_size):
    """Nothing is better than exact; paging loses less than a block each; reserving is the worst."""
    made = setting(block_size=block_size, max_model_len=400)
    for request in asked:
        exact = made.reserve("exact", request)
        assert exact <= made.reserve("paged", request) < exact + block_size
        assert exact <= made.reserve("pow2", request) <= made.reserve("reserved", request) == 400


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 20), st.integers(0, 99))
def test_users_fit_and_one_more_does_not(held, block_size, num_blocks):
    count = calculate.fitting(held, block_size, num_blocks)
    sizes = [blocks_of(held[i % len(held)], block_size) for i in range(count + 1)]
    assert sum(sizes[:count]) <= num_blocks < sum(sizes)


def test_scaling_grows_only_for_pages():
    rows = calculate.scaling(setting(), [Request(100, 100)])
    assert [512, 1024, 2048, 4096] == [row.max_model_len for row in rows]
    assert 1 == len({row.paged for row in rows})
    assert sorted({row.reserved for row in rows}, reverse=True) == [row.reserved for row in rows]


def test_the_bound_is_reading_everything_once():
    made = setting()
    seconds = (6_738_415_616 * 2 + 10 * 100 * 524288) / 900e9
    assert pytest.approx(10 / seconds) == calculate.bound(made, 10, 100)
    assert calculate.bound(dataclasses.replace(made, gpu=shapes.gpu_named("", 32)), 10, 100) is None


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 100), st.integers(1, 40))
def test_sharing_counted_by_content(users, prefix, own, block_size):
    """A set of (position, content) of full blocks finds the same number of blocks."""
    if prefix + own == 0:
        return
    made = calculate.sharing(users, prefix, own, block_size)
    pool, apart = set(), 0
    for user in range(users):
        tokens = ["shared"] * prefix + [f"user {user}"] * own
        for first in range(0, len(tokens), block_size):
            block = tokens[first : first + block_size]
            # A block with the prompt's last token is computed by everybody.
            found = len(block) == block_size and first + block_size < len(tokens)
            pool.add((first, *block) if found else (user, first, *block))
            apart += 1
    assert (apart, len(pool)) == (made.apart, made.shared)


# The tutorial ----------------------------------------------------------------------------


def test_the_key_numbers():
    """Recomputed here without the calculator where that is possible."""
    found = {one.claim: one for one in keynumbers.key_numbers()}
    waste, nothing, both, anywhere, tokens, blocks, longer = found.values()
    assert waste.holds and waste.value == pytest.approx(0.77, abs=0.03)
    assert not nothing.holds and 0.005 < nothing.value < 0.04  # the paper: under 4 %
    kv = 32 * 2**30 * 0.9 - 2**30 - 8_030_261_248 * 2
    assert both.holds
    assert both.found.startswith(f"{int(kv // (131072 * 4096))} and {both.value}")
    assert both.value == (kv // (131072 * 16) - 1) // 64
    assert not anywhere.holds
    assert tokens.holds and tokens.value == pytest.approx(99 * 500 / (100 * 600))
    assert not blocks.holds and blocks.value == pytest.approx(99 * 31 / (100 * 38))
    assert not longer.holds and longer.value == pytest.approx(99 * 31 / (100 * 57))


# Workloads -------------------------------------------------------------------------------


def test_drawn_lengths_are_the_same_for_a_seed_and_have_the_sources_mean():
    first, again = (workload.drawn("sharegpt", 10_000, 1 << 20, seed) for seed in (1, 1))
    assert first == again != workload.drawn("sharegpt", 10_000, 1 << 20, 2)
    prompts = [request.prompt for request in first.requests]
    outputs = [request.output for request in first.requests]
    assert pytest.approx(161.31, rel=0.05) == sum(prompts) / len(prompts)
    assert pytest.approx(337.99, rel=0.05) == sum(outputs) / len(outputs)


def test_requests_are_cut_to_the_model():
    made = workload.cut("", [Request(100, 1), Request(60, 60), Request(3, 4)], 64, "")
    assert (Request(63, 1), Request(60, 4), Request(3, 4)) == made.requests
    assert 2 == made.num_cut


def test_a_shape_read_from_a_model_folder(tmp_path):
    config = dict(
        num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    made = shapes.model_named(str(tmp_path))
    assert (3, 4, 2, 16, 128) == (
        made.num_layers,
        made.num_heads,
        made.num_kv_heads,
        made.head_size,
        made.max_model_len,
    )
    assert 1000 == made.weights_of_a_rank("float16")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="does not say the shape"):
        shapes.model_named(str(tmp_path))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UsageError, match="no JSON"):
        shapes.model_named(str(tmp_path))


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_the_tiny_checkpoints_are_what_the_presets_say(name, tmp_path):
    pytest.importorskip("tokenizers", reason="checkpoints are made with tokenizers")
    from vllm_trace.checkpoints import checkpoint

    read, preset = shapes.shape_in(checkpoint(name, tmp_path)), shapes.MODELS[name]
    same = ("num_layers", "num_heads", "num_kv_heads", "head_size", "max_model_len")
    assert [getattr(preset, field) for field in same] == [getattr(read, field) for field in same]
    assert preset.num_params * 4 == pytest.approx(read.weight_bytes, rel=0.01)
