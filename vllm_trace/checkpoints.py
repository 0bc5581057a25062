"""The scenarios' tiny real checkpoints: made in a second, without network, the same bytes every time.

A checkpoint is a folder as the hub has them (config, safetensors, tokenizer), so vLLM loads it with nothing said.
Weights are seeded noise, scaled so that greedy outputs vary: attention is sharp enough to pick single tokens, and what
it adds is as large as the token's own embedding. Outputs read as words and never contain a special token.

Leaves out: meaning. The text that the models write is noise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RECIPE = 1
"""Raise it when the same configuration is to make other bytes: it is part of every cached folder's name."""

VOCAB_SIZE = 768
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # their ids are 0, 1, 2
PAD, BOS, EOS = range(3)

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_SHARED,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "hidden_act": "silu",
        "max_position_embeddings": 16384,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "tiny-opt": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        **_SHARED,
        "word_embed_proj_dim": 128,
        "ffn_dim": 256,
        "activation_function": "relu",
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
}

NAMES = tuple(CONFIGS)

#: How far the weights of each kind spread, in units of 1/sqrt(fan-in) (embeddings: absolute). Seen on vLLM 0.32.0 to
#: make outputs that neither settle on a token nor run in a circle.
SCALES = {
    "embed": 0.5,
    "position": 0.5,
    "query_key": 2.0,
    "value_out": 1.5,
    "mlp": 1.0,
    "lm_head": 2.0,
    "bias": 0.1,
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def checkpoint(name: str, cache_dir: Path | None = None) -> Path:
    """The folder of the checkpoint ``name``, made on the first call and reused afterwards.

    It lies in ``cache_dir``, or else in ``${VTRACE_CACHE:-~/.cache/vllm-trace}/checkpoints``, and appears there whole:
    two processes may make it at the same time.
    Raises: ``ValueError`` naming the known checkpoints.
    """
    if name not in CONFIGS:
        raise ValueError(f"unknown checkpoint {name!r}; known: {', '.join(NAMES)}")
    parent = Path(cache_dir) if cache_dir is not None else _default_cache()
    folder = parent / f"{name}-{_recipe_digest(name)}"
    if _is_whole(folder):
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
    try:
        _make(name, made)
        made.chmod(0o755)
        _publish(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _publish(made: Path, folder: Path) -> None:
    """Rename ``made`` to ``folder``. Who comes second leaves the first one's folder, unless files are missing there."""
    for _ in range(3):
        try:
            os.rename(made, folder)
            return
        except OSError:
            if _is_whole(folder):
                return
            if not folder.exists():
                raise
            # Someone emptied it. It moves away whole, so that nobody sees half of it.
            away = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
            try:
                os.rename(folder, away)
            except FileNotFoundError:
                pass  # another process was quicker
            shutil.rmtree(away, ignore_errors=True)
    raise OSError(f"cannot put a checkpoint at {folder}")


def _is_whole(folder: Path) -> bool:
    return all((folder / file).is_file() for file in FILES)


def _default_cache() -> Path:
    return (
        Path(os.environ.get("VTRACE_CACHE") or "~/.cache/vllm-trace").expanduser() / "checkpoints"
    )


def _recipe_digest(name: str) -> str:
    recipe = [RECIPE, name, CONFIGS[name], SCALES, SPECIAL_TOKENS, CHAT_TEMPLATE, TEXT]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def _make(name: str, folder: Path) -> None:
    from safetensors.numpy import save_file

    config = CONFIGS[name]
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)
    writable = _make_tokenizer(folder)
    tensors = {}
    for key, shape, kind in (
        _llama_weights(config) if name == "tiny-llama" else _opt_weights(config)
    ):
        tensors[key] = _weight(f"{name}/{key}", shape, kind)
    # A row of zeros has logit 0, and hundreds of other rows are around it: such a token is never the largest.
    for token_id in set(range(VOCAB_SIZE)) - writable:
        tensors["lm_head.weight"][token_id] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def _weight(label: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Uniform noise of the kind's scale, from raw bits: that stream numpy promises to keep."""
    import numpy as np

    if kind == "one":
        return np.ones(shape, np.float32)
    bits = np.random.PCG64(zlib.crc32(label.encode())).random_raw(int(np.prod(shape)))
    unit = (bits >> np.uint64(40)).astype(np.float32) / np.float32(
        2**23
    ) - 1  # [-1, 1), exact in float32
    fan_in = shape[-1] if kind not in ("embed", "position", "bias") else 1
    return (unit * np.float32(SCALES[kind] * (3 / fan_in) ** 0.5)).reshape(shape)


def _llama_weights(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Every tensor of the Llama-like model: name, shape ``[out, in]``, kind."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (VOCAB_SIZE, hidden), "embed"
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,), "one"
        yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden), "query_key"
        yield f"{layer}.self_attn.k_proj.weight", (kv, hidden), "query_key"
        yield f"{layer}.self_attn.v_proj.weight", (kv, hidden), "value_out"
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden), "value_out"
        yield f"{layer}.post_attention_layernorm.weight", (hidden,), "one"
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden), "mlp"
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden), "mlp"
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner), "mlp"
    yield "model.norm.weight", (hidden,), "one"
    yield "lm_head.weight", (VOCAB_SIZE, hidden), "lm_head"


def _opt_weights(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Every tensor of the OPT-like model: name, shape ``[out, in]``, kind."""
    hidden, inner = config["hidden_size"], config["ffn_dim"]
    yield "model.decoder.embed_tokens.weight", (VOCAB_SIZE, hidden), "embed"
    # OPT keeps two rows before the first position.
    yield (
        "model.decoder.embed_positions.weight",
        (config["max_position_embeddings"] + 2, hidden),
        "position",
    )
    for i in range(config["num_hidden_layers"]):
        layer = f"model.decoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            kind = "query_key" if projection in ("q_proj", "k_proj") else "value_out"
            yield f"{layer}.self_attn.{projection}.weight", (hidden, hidden), kind
            yield f"{layer}.self_attn.{projection}.bias", (hidden,), "bias"
        yield f"{layer}.fc1.weight", (inner, hidden), "mlp"
        yield f"{layer}.fc1.bias", (inner,), "bias"
        yield f"{layer}.fc2.weight", (hidden, inner), "mlp"
        yield f"{layer}.fc2.bias", (hidden,), "bias"
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            yield f"{layer}.{norm}.weight", (hidden,), "one"
            yield f"{layer}.{norm}.bias", (hidden,), "bias"
    yield "model.decoder.final_layer_norm.weight", (hidden,), "one"
    yield "model.decoder.final_layer_norm.bias", (hidden,), "bias"
    yield "lm_head.weight", (VOCAB_SIZE, hidden), "lm_head"


def _make_tokenizer(folder: Path) -> set[int]:
    """Write a byte-level BPE tokenizer learnt from `TEXT`; return the ids of the tokens that print as plain text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(
            f"the tokenizer's text gives {tokenizer.get_vocab_size()} tokens, {VOCAB_SIZE} are wanted"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    texts = {i: tokenizer.decode([i], skip_special_tokens=True) for i in range(VOCAB_SIZE)}
    return {i for i, text in texts.items() if text and text.isascii() and text.isprintable()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


#: What the tokenizer learns its words from.
TEXT = """\
Hello, my name is Ada and I keep the books of a small library by the sea. The capital of France is Paris, the capital of
Japan is Tokyo, and the president of the United States is elected every four years. The future of computing is shared.

You are a helpful assistant. Answer the question in one short sentence. If you do not know the answer, say so. A user asks,
the system waits, the model writes one token, and then another token, until there is nothing more to say.

A page of memory holds sixteen tokens. When a request arrives, the scheduler looks whether its first words were seen before;
blocks that hold the same words are shared, and only the rest is computed. Every running request grows by one token in each
step. When no block is free, the youngest request gives its blocks back and begins again later. The block table says where
each page lies, the slot says where each token goes, and the queue of free blocks says which page is used next.

Once upon a time there was a river that wanted to know where the rain comes from. It asked the hills, and the hills pointed
at the clouds; it asked the clouds, and they pointed at the sea. So the river went down through green fields and white
stone, past the old mill and under seven bridges, and when it reached the sea it found that it had always been there.

Good morning! How much does a ticket cost? Seven tickets for children are 35, one ticket for an adult is 12, and dogs travel
without paying. The train leaves from platform 4 at 09:26 and arrives at 18:07. Please bring warm clothes, bread, apples,
water, a map, and something to read. We will walk along the coast for three hours, rest under the big tree, and come home
before night. Write a poem about winter; explain how a kernel reads memory; count from 1 to 10: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10.

def attention(query, key, value): scores = query @ key.T / sqrt(head_size); return softmax(scores) @ value
"""  # noqa: E501 (its line ends are part of the recipe)
