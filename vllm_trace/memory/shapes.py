"""Models and GPUs as a KV cache sees them: bytes a token, bytes of weights, bytes of memory.

Leaves out: sliding windows and state-space layers (their models hold less than is said here), weights that
tensor parallelism does not split (norms, less than 0.1 %), pipeline parallelism.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError, unknown

GIB = 1 << 30

DTYPES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
"""Bytes of an element. ``int4`` is for weights only; scales of quantised weights come on top (a few per cent)."""

KV_DTYPES = ("auto", "float32", "float16", "bfloat16", "fp8", "int8")
"""``auto`` is the dtype of the weights, or float16 where weights are smaller than that."""


@dataclass(frozen=True)
class GPU:
    """One device.

    Units: GiB as the driver counts them (where ECC takes its bits from the memory, 6 % less than is printed on the
    card), GB/s as the data sheet says.
    """

    name: str
    memory_gib: float
    bandwidth_gb_s: float
    source: str


def _gpus() -> dict[str, GPU]:
    rows = [
        # name, MiB as nvidia-smi or rocm-smi has them, GB/s, where the speed is written
        ("t4", 15360, 320, "NVIDIA T4 product brief, table 2"),
        ("v100-16gb", 16384, 900, "NVIDIA V100 data sheet (2020), SXM2"),
        ("v100-32gb", 32768, 900, "NVIDIA V100 data sheet (2020), SXM2"),
        ("a10g", 23028, 600, "AWS G5 page; NVIDIA A10G product brief"),
        ("l4", 23034, 300, "NVIDIA L4 data sheet (2023)"),
        ("rtx-4090", 24564, 1008, "NVIDIA Ada GPU architecture whitepaper (2022), table 2"),
        ("l40s", 46068, 864, "NVIDIA L40S data sheet (2023)"),
        ("a100-40gb", 40960, 1555, "NVIDIA A100 data sheet (2021), SXM4 40GB"),
        ("a100-80gb", 81920, 2039, "NVIDIA A100 data sheet (2021), SXM4 80GB"),
        ("h100-80gb", 81559, 3350, "NVIDIA H100 data sheet (2023), SXM5"),
        ("h200", 143771, 4800, "NVIDIA H200 data sheet (2024), SXM"),
        ("mi300x", 196592, 5300, "AMD Instinct MI300X data sheet (2023)"),
    ]
    return {
        name: GPU(name, round(mib / 1024, 1), float(speed), source)
        for name, mib, speed, source in rows
    }


GPUS = _gpus()


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the size of its KV cache, and how many weights stand beside it.

    ``latent`` is for multi-head latent attention: elements of the one vector a token and layer (its heads share it,
    and every tensor-parallel rank holds all of it); 0 means keys and values for each KV head.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_params: int
    max_model_len: int
    source: str
    latent: int = 0
    weight_bytes: int = 0
    """Measured, where files of weights are there; 0: ``num_params`` times the dtype."""

    def checked(self) -> ModelShape:
        """Return self. Raises: ``UsageError`` for a shape that no model has."""
        for field in ("num_layers", "num_heads", "num_kv_heads", "head_size", "max_model_len"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} is {getattr(self, field)}, not 1 or more")
        if self.num_params < 0:
            raise UsageError(f"num_params is {self.num_params}, not 0 or more")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"{self.num_heads} query heads do not share {self.num_kv_heads} KV heads evenly",
                hint="num_heads is a multiple of num_kv_heads (equal: MHA, 1: MQA, between: GQA)",
            )
        return self

    @property
    def attention(self) -> str:
        """MHA, GQA, MQA or MLA."""
        if self.latent:
            return "MLA"
        if self.num_kv_heads == self.num_heads:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else "GQA"

    def kv_heads_of_a_rank(self, tp: int) -> int:
        """KV heads on each of ``tp`` ranks; fewer heads than ranks are held several times.

        Source: vLLM 0.32.0, config/model.py, ``ModelConfig.get_num_kv_heads``.
        Raises: ``UsageError`` when the heads cannot be split.
        """
        if tp < 1:
            raise UsageError(f"--tp is {tp}, not 1 or more")
        if self.num_heads % tp:
            near = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            fitting = min(near, key=lambda n: (abs(n - tp), n))
            raise UsageError(
                f"{self.num_heads} attention heads cannot be split over {tp} ranks",
                hint=f"The nearest number of ranks that fits {self.name}: {fitting}",
            )
        if self.latent:
            return 1
        if max(tp, self.num_kv_heads) % min(tp, self.num_kv_heads):
            raise UsageError(f"{self.num_kv_heads} KV heads cannot be split over {tp} ranks")
        return max(1, self.num_kv_heads // tp)

    def token_bytes(self, kv_dtype: str = "float16", tp: int = 1) -> int:
        """Bytes of one token's keys and values in all layers, on one rank.

        >>> MODELS["llama-2-7b"].token_bytes(), MODELS["llama-3-8b"].token_bytes()
        (524288, 131072)
        """
        heads = self.kv_heads_of_a_rank(tp)
        elements = self.latent or 2 * heads * self.head_size
        return int(self.num_layers * elements * DTYPES[kv_dtype])

    def weights_of_a_rank(self, dtype: str, tp: int = 1) -> int:
        """Bytes of weights on one rank."""
        return int((self.weight_bytes or self.num_params * DTYPES[dtype]) / tp)


def _models() -> dict[str, ModelShape]:
    hub = "config.json of {} (hub)"
    rows = [
        # layers, query heads, KV heads, head size, parameters, positions, where the shape is written
        ("opt-125m", 12, 12, 12, 64, 125_239_296, 2048, "facebook/opt-125m"),
        ("opt-13b", 40, 40, 40, 128, 12_853_473_280, 2048, "facebook/opt-13b"),
        ("gpt2", 12, 12, 12, 64, 124_439_808, 1024, "openai-community/gpt2"),
        ("llama-2-7b", 32, 32, 32, 128, 6_738_415_616, 4096, "meta-llama/Llama-2-7b-hf"),
        ("llama-2-13b", 40, 40, 40, 128, 13_015_864_320, 4096, "meta-llama/Llama-2-13b-hf"),
        ("llama-2-70b", 80, 64, 8, 128, 68_976_648_192, 4096, "meta-llama/Llama-2-70b-hf"),
        ("llama-3-8b", 32, 32, 8, 128, 8_030_261_248, 8192, "meta-llama/Meta-Llama-3-8B"),
        ("llama-3.1-70b", 80, 64, 8, 128, 70_553_706_496, 131072, "meta-llama/Llama-3.1-70B"),
        ("llama-3.1-405b", 126, 128, 8, 128, 405_853_388_800, 131072, "meta-llama/Llama-3.1-405B"),
        ("qwen2.5-7b", 28, 28, 4, 128, 7_615_616_512, 32768, "Qwen/Qwen2.5-7B-Instruct"),
        ("mistral-7b-v0.3", 32, 32, 8, 128, 7_248_023_552, 32768, "mistralai/Mistral-7B-v0.3"),
    ]
    made = {
        name: ModelShape(name, layers, heads, kv, size, params, length, hub.format(repository))
        for name, layers, heads, kv, size, params, length, repository in rows
    }
    made["deepseek-v3"] = ModelShape(
        "deepseek-v3", 61, 128, 128, 128, 671_026_419_200, 163840,
        hub.format("deepseek-ai/DeepSeek-V3") + ": kv_lora_rank 512 + qk_rope_head_dim 64",
        latent=576,
    )  # fmt: skip
    for name, positions in (("tiny-llama", 16384), ("tiny-opt", 2048)):
        kv, params = (2, 492_160) if name == "tiny-llama" else (4, 724_224)
        made[name] = ModelShape(
            name, 2, 4, kv, 32, params, positions, "vllm_trace/checkpoints.py, CONFIGS"
        )
    return made


MODELS = _models()


def model_named(name: str) -> ModelShape:
    """A preset, or the shape that stands in a folder with a ``config.json``.

    Raises: ``UsageError`` naming the nearest preset.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".json" or name.startswith((".", "/", "~")):
        return shape_in(path)
    raise unknown(
        "model", name, MODELS, f"Known: {', '.join(MODELS)}; or a folder with a config.json"
    )


def shape_in(path: Path) -> ModelShape:
    """The shape of a downloaded model: a folder with ``config.json``, or that file.

    Raises: ``UsageError`` when there is none, or it says nothing of heads and layers.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{file} holds no JSON object")
    config = config.get("text_config", config)  # models with images keep the decoder's part apart
    files = [one.stat().st_size for one in file.parent.glob("*.safetensors")]
    try:
        heads = _first(config, "num_attention_heads", "n_head")
        hidden = _first(config, "hidden_size", "n_embd")
        latent = int(config.get("kv_lora_rank") or 0)
        return ModelShape(
            name=file.parent.resolve().name,
            num_layers=_first(config, "num_hidden_layers", "n_layer"),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            num_params=0,
            max_model_len=_first(config, "max_position_embeddings", "n_positions"),
            source=str(file),
            latent=latent + int(config.get("qk_rope_head_dim") or 0) if latent else 0,
            weight_bytes=sum(files),
        ).checked()
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"{file} does not say the shape of a decoder: {error}",
            hint="Give it by hand: --layers --heads --kv-heads --head-size --params",
        ) from None


def _first(config: dict[str, Any], *names: str) -> int:
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise KeyError(f"no {names[0]}")


def gpu_named(name: str, memory_gib: float | None = None) -> GPU:
    """A preset, or one of the size given. Raises: ``UsageError`` for an unknown name or a size of nothing."""
    if name and name.lower() not in GPUS:
        if near := [known for known in GPUS if known.startswith(name.lower())]:
            raise UsageError(f"unknown GPU {name!r}; did you mean {' or '.join(map(repr, near))}?")
        raise unknown("GPU", name, GPUS, f"Known: {', '.join(GPUS)}; or --gpu-memory GIB")
    found = GPUS[name.lower()] if name else GPU("", 0.0, 0.0, "given by --gpu-memory")
    if memory_gib is None:
        return found
    if not 0 < memory_gib < 1 << 20:
        raise UsageError(f"--gpu-memory is {memory_gib:g} GiB, not more than 0")
    return replace(found, name=f"{memory_gib:g} GiB", memory_gib=memory_gib)
