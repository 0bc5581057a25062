"""Two decoders, written as what they compute: Llama-like and OPT-like, from a checkpoint folder.

Follows: modeling_llama.py and modeling_opt.py of transformers; Touvron et al. 2023, Zhang et al. 2022, Su et al. 2021.
Leaves out: training, quantisation, tensor parallelism, RoPE scaling, OPT with projections around it (350m) or with
layer norm behind attention, attention biases in Llama.

A model knows nothing of blocks. It is handed `attend(layer, query, key, value)`, and the engine decides there what
earlier tokens are and where they lie:

    token ids, positions --> embed --> [ attend + mlp ] x layers --> hidden states --> logits
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# (layer, query [num_tokens, num_heads, head_size], key and value [num_tokens, num_kv_heads, head_size]) -> like query
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def load_model(folder: str | Path) -> LlamaForCausalLM | OPTForCausalLM:
    """The model in `folder` (config.json and *.safetensors), in float32.

    Raises: ValueError for a kind of model, or a variant of one, that mini does not follow.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds: dict[str, type[LlamaForCausalLM] | type[OPTForCausalLM]] = {
        "llama": LlamaForCausalLM,
        "opt": OPTForCausalLM,
    }
    if config.get("model_type") not in kinds:
        raise ValueError(
            f"mini follows {' and '.join(kinds)}; {folder} is {config.get('model_type')!r}"
        )
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(file))
    if not weights:
        raise ValueError(f"{folder} holds no *.safetensors")
    return kinds[config["model_type"]](
        config, {name: weight.float() for name, weight in weights.items()}
    )


def _token_ids(value: int | list[int] | None) -> list[int]:
    """config.json gives no id, one, or a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


class LlamaForCausalLM:
    """RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU."""

    def __init__(self, config: dict, weights: dict[str, Tensor]):
        if (
            config.get("attention_bias")
            or config.get("mlp_bias")
            or config.get("hidden_act", "silu") != "silu"
        ):
            raise ValueError("mini follows Llama without biases and with silu")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"mini follows plain rotary positions, not {rope}")
        self.weights = weights
        self.vocab_size = config["vocab_size"]
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config.get("num_key_value_heads") or self.num_heads
        self.head_size = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.max_model_len = config["max_position_embeddings"]
        self.eos_token_ids = _token_ids(config.get("eos_token_id"))
        self.rms_norm_eps = config.get("rms_norm_eps", 1e-6)
        self.rope_theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
        self.tie_word_embeddings = config.get("tie_word_embeddings", False)

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Shapes: `input_ids`, `positions [num_tokens]`, returns `[num_tokens, hidden_size]`."""
        w = self.weights
        cos, sin = self._rotation(positions)
        hidden = F.embedding(input_ids, w["model.embed_tokens.weight"])
        for i in range(self.num_layers):
            layer = f"model.layers.{i}"
            normed = self._rms_norm(hidden, f"{layer}.input_layernorm")
            query, key, value = (
                F.linear(normed, w[f"{layer}.self_attn.{name}_proj.weight"]).unflatten(
                    -1, (-1, self.head_size)
                )
                for name in "qkv"
            )
            attended = attend(i, _rotate(query, cos, sin), _rotate(key, cos, sin), value).flatten(1)
            hidden = hidden + F.linear(attended, w[f"{layer}.self_attn.o_proj.weight"])
            normed = self._rms_norm(hidden, f"{layer}.post_attention_layernorm")
            gate = F.silu(F.linear(normed, w[f"{layer}.mlp.gate_proj.weight"]))
            up = F.linear(normed, w[f"{layer}.mlp.up_proj.weight"])
            hidden = hidden + F.linear(gate * up, w[f"{layer}.mlp.down_proj.weight"])
        return self._rms_norm(hidden, "model.norm")

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Shapes: `hidden [num_tokens, hidden_size]`, returns `[num_tokens, vocab_size]`."""
        return F.linear(
            hidden,
            self.weights[
                "model.embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight"
            ],
        )

    def _rms_norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.rms_norm_eps)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for each position and pair of dimensions: `[num_tokens, 1, head_size / 2]`."""
        exponents = (
            torch.arange(0, self.head_size, 2, device=positions.device).float() / self.head_size
        )
        angles = positions.float()[:, None, None] * self.rope_theta**-exponents
        return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dimension i together with dimension i + head_size / 2, so that a product depends on the distance only."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)  # angles are float32


class OPTForCausalLM:
    """Layer norm before each part, learned positions, biases everywhere, ReLU."""

    def __init__(self, config: dict, weights: dict[str, Tensor]):
        plain = config.get("word_embed_proj_dim", config["hidden_size"]) == config["hidden_size"]
        if (
            not plain
            or not config.get("do_layer_norm_before", True)
            or config.get("activation_function", "relu") != "relu"
        ):
            raise ValueError(
                "mini follows OPT without projections, with layer norm before attention, with relu"
            )
        # Older checkpoints leave out the first part of every name.
        self.weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
        self.vocab_size = config["vocab_size"]
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = self.num_kv_heads = config["num_attention_heads"]
        self.head_size = config["hidden_size"] // self.num_heads
        self.max_model_len = config["max_position_embeddings"]
        self.eos_token_ids = _token_ids(config.get("eos_token_id"))
        self.tie_word_embeddings = config.get("tie_word_embeddings", True)

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Shapes: `input_ids`, `positions [num_tokens]`, returns `[num_tokens, hidden_size]`."""
        w = self.weights
        hidden = F.embedding(input_ids, w["decoder.embed_tokens.weight"])
        # OPT keeps two rows before the first position.
        hidden = hidden + F.embedding(positions + 2, w["decoder.embed_positions.weight"])
        for i in range(self.num_layers):
            layer = f"decoder.layers.{i}"
            normed = self._layer_norm(hidden, f"{layer}.self_attn_layer_norm")
            query, key, value = (
                self._linear(normed, f"{layer}.self_attn.{name}_proj").unflatten(
                    -1, (-1, self.head_size)
                )
                for name in "qkv"
            )
            attended = attend(i, query, key, value).flatten(1)
            hidden = hidden + self._linear(attended, f"{layer}.self_attn.out_proj")
            normed = self._layer_norm(hidden, f"{layer}.final_layer_norm")
            hidden = hidden + self._linear(
                F.relu(self._linear(normed, f"{layer}.fc1")), f"{layer}.fc2"
            )
        return self._layer_norm(hidden, "decoder.final_layer_norm")

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Shapes: `hidden [num_tokens, hidden_size]`, returns `[num_tokens, vocab_size]`."""
        return F.linear(
            hidden,
            self.weights[
                "decoder.embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight"
            ],
        )

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        )
