"""What the backend cannot do, said before an engine is started and with what it can do."""

from __future__ import annotations

from typing import Any

from vllm_trace.errors import UsageError

BLOCK_SIZES = {"mini": (8, 16, 32, 64, 128, 256), "vllm": (8, 16, 32)}
"""Tokens in a block, by engine. V2 wants blocks that divide its partitions of 512."""

HEAD_SIZES = {
    "mini": tuple(range(8, 257, 8)),
    "vllm": (32, 64, 80, 96, 112, 120, 128, 192, 256),
}

CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")
DTYPES = ("float32", "float16", "bfloat16")

RELEASES = {"cpu": ("0.32",), "cuda": ("0.20",)}
"""Releases whose backend contract was read and run, by platform."""

OPS = ("paged_attention_v1", "paged_attention_v2")


def demand(choice: str, config: Any) -> None:
    """Raise ``UsageError`` with all that stands against ``choice`` for a ``VllmConfig``."""
    if choice == "engine":
        return
    engine = "vllm" if choice == "paged:vllm" else "mini"
    found = [
        *_against_release(),
        *_against_shape(engine, config),
        *_against_kernels(engine, config),
    ]
    if found:
        raise UsageError(
            f"--attention {choice}: {'; '.join(found)}",
            hint="--attention engine takes vLLM's own attention",
        )


def _against_release() -> list[str]:
    import vllm
    from vllm.platforms import current_platform

    platform = "cpu" if current_platform.is_cpu() else "cuda" if current_platform.is_cuda() else ""
    known = RELEASES.get(platform, ())
    if any(vllm.__version__.startswith(f"{release}.") for release in known):
        return []
    listed = "; ".join(f"{name}: vLLM {', '.join(r)}" for name, r in RELEASES.items())
    where = platform or current_platform.device_name
    return [f"vLLM {vllm.__version__} on {where} is not supported ({listed})"]


def _against_shape(engine: str, config: Any) -> list[str]:
    model, cache, said = config.model_config, config.cache_config, []
    head_size = model.get_head_size()
    if head_size not in HEAD_SIZES[engine]:
        said.append(f"head size {head_size} is not supported ({_listed(_sizes(engine))})")
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        said.append(f"dtype {dtype} is not supported ({_listed(DTYPES)})")
    if str(cache.cache_dtype) not in CACHE_DTYPES:
        said.append(f"a KV cache of {cache.cache_dtype} is not supported ({_listed(CACHE_DTYPES)})")
    size = cache.block_size
    if size and not any(size % one == 0 for one in BLOCK_SIZES[engine]):
        said.append(
            f"block size {size} is not supported (multiples of {_listed(BLOCK_SIZES[engine])})"
        )
    if model.use_mla:
        said.append("latent attention (MLA) is not supported (plain multi-head, GQA or MQA)")
    if config.speculative_config is not None:
        said.append("speculative decoding is not supported (one new token a sequence)")
    return said


def _against_kernels(engine: str, config: Any) -> list[str]:
    from vllm.platforms import current_platform

    if engine == "vllm":
        return _against_ops()
    if current_platform.is_cpu():
        return []
    try:
        import triton  # noqa: F401
    except ImportError:
        return [
            "Triton is not installed, and on CUDA the kernels are Triton's (pip install triton)"
        ]
    return []


def _against_ops() -> list[str]:
    import torch
    import vllm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    gone = [name for name in OPS if not hasattr(torch.ops._C, name)]
    if not gone:
        return []
    build = "CPU" if current_platform.is_cpu() else "CUDA"
    return [
        f"the {build} build of vLLM {vllm.__version__} has no {' and no '.join(gone)} (they are in CUDA builds up to "
        "0.20.x; --attention paged brings its own)"
    ]


def _sizes(engine: str) -> tuple[int | str, ...]:
    return ("multiples of 8 from 8 to 256",) if engine == "mini" else HEAD_SIZES[engine]


def _listed(values: Any) -> str:
    return "supported: " + ", ".join(map(str, values))
