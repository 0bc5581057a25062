"""Real traces, made once a session: every scenario, a hybrid model, every fault."""

import json

import pytest

from invariants import fault_runs, faults

#: Six layers in three KV-cache groups, two of them with a sliding window of two blocks.
GEMMA = dict(
    architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", vocab_size=768, hidden_size=128,
    num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    intermediate_size=256, hidden_activation="gelu_pytorch_tanh", max_position_embeddings=4096,
    rms_norm_eps=1e-6, rope_theta=10000.0, rope_local_base_freq=10000.0, sliding_window=64,
    query_pre_attn_scalar=32, torch_dtype="float32", bos_token_id=2, eos_token_id=1, pad_token_id=0,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
)  # fmt: skip

HYBRID = """
title = "Three groups, two of them with a sliding window"
shows = "hits, refusals and preemptions while windows pass over blocks"
seed = 3
[engine]
model = "{model}"
load_format = "dummy"
skip_tokenizer_init = true
dtype = "float32"
block_size = 32
max_model_len = 512
num_gpu_blocks_override = 60
max_num_batched_tokens = 128
[prefixes]
shared = 200
[[requests]]
name = "a"
count = 6
prefix = "shared"
tokens = 30
max_tokens = 60
every = 5
[[requests]]
name = "b"
count = 6
tokens = 150
max_tokens = 80
every = 3
[[requests]]
name = "c"
count = 4
prefix = "shared"
tokens = 10
max_tokens = 30
step = 120
every = 5
"""


@pytest.fixture(scope="session")
def traces(tmp_path_factory):
    """``traces(scenario, **engine_args)``: its trace on a real engine, recorded once."""
    pytest.importorskip("vllm", reason="vLLM is not installed: no engine to record")
    made = {}

    def trace(scenario, **engine_args):
        key = (scenario, tuple(engine_args))
        if key not in made:
            folder = tmp_path_factory.mktemp("trace") / "trace"
            made[key] = fault_runs.record(scenario, folder, engine_args=engine_args)
        return made[key]

    return trace


@pytest.fixture(scope="session")
def hybrid_scenario(tmp_path_factory):
    """A scenario file for a model with several KV-cache groups."""
    folder = tmp_path_factory.mktemp("hybrid")
    (folder / "config.json").write_text(json.dumps(GEMMA))
    path = folder / "hybrid.toml"
    path.write_text(HYBRID.format(model=folder))
    return str(path)


@pytest.fixture(scope="session")
def caught(tmp_path_factory):
    """Every fault, run on a real engine and judged; in the order of ``faults.FAULTS``."""
    pytest.importorskip("vllm", reason="vLLM is not installed: nothing to break")
    folder = tmp_path_factory.mktemp("faults")
    return {one.id: fault_runs.run(one, folder / one.id) for one in faults.FAULTS}
