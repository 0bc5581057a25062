"""The blocks of an engine's KV cache as plain K and V, whichever backend laid them out.

Source: vLLM 0.20.2 and 0.32.0: ``get_kv_cache_shape`` of each backend; csrc/cpu/cpu_attn_vec.hpp and cpu_attn_amx.hpp
for what ``cpu_attn_reshape_and_cache`` does to a block. Seen on both: a block written by vLLM reads back as it was.

Shapes: every function takes the cache of one layer and block ids, and returns copies of K and V
``[num_ids, block_size, num_kv_heads, head_size]`` on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_trace.backend.paged import FLOAT8, VllmEngine, split_cache

Blocks = tuple[Tensor, Tensor]


def blocks_of(impl: Any, layer: Any, kv_cache: Tensor, ids: Tensor) -> Blocks:
    """K and V of some blocks.

    Raises: NotImplementedError for a backend whose layout is not known here.
    """
    reader = _READERS.get(type(impl).__name__)
    if reader is None:
        raise NotImplementedError(f"the cache layout of {type(impl).__name__} is not known")
    keys, values = reader(impl, layer, kv_cache, ids.to(kv_cache.device))
    stored = FLOAT8.get(str(impl.kv_cache_dtype))
    if stored is not None and keys.dtype == torch.uint8:
        keys, values = keys.view(stored), values.view(stored)
    return keys.cpu(), values.cpu()


def block_size_of(impl: Any, kv_cache: Tensor) -> int:
    """Tokens in a block of the kernel. It is the third dimension of every layout but Triton's in the fourth place."""
    return kv_cache.shape[2]


def _cpu(impl: Any, layer: Any, kv_cache: Tensor, ids: Tensor) -> Blocks:
    """0.32 (blocks, heads, N, 2D): the first half of each head's memory is K, the second V.

    Plain (``vec``, ``vec16``): V as it is, K turned: [D, N]. ``amx``: two neighbours of
    D (K) or of the tokens (V) side by side in tiles of 16.
    """
    picked = kv_cache[ids]
    num, heads, size, double = picked.shape
    dim = double // 2
    halves = picked.reshape(num, heads, 2, size * dim)
    keys, values = halves[:, :, 0], halves[:, :, 1]
    if layer.isa == "amx":
        keys = keys.reshape(num, heads, size // 16, dim // 2, 16, 2).permute(0, 1, 2, 4, 3, 5)
        values = values.reshape(num, heads, dim // 16, size // 2, 16, 2).permute(0, 1, 3, 5, 2, 4)
    elif layer.isa in ("vec", "vec16"):
        keys = keys.reshape(num, heads, dim, size).transpose(2, 3)
    else:
        raise NotImplementedError(f"the cache layout of the CPU kernel {layer.isa!r} is not known")
    shape = (num, heads, size, dim)
    return keys.reshape(shape).transpose(1, 2), values.reshape(shape).transpose(1, 2)


def _five(impl: Any, layer: Any, kv_cache: Tensor, ids: Tensor) -> Blocks:
    """0.20 FlashAttention (2, blocks, N, heads, D)."""
    picked = kv_cache[:, ids]
    return picked[0], picked[1]


def _triton(impl: Any, layer: Any, kv_cache: Tensor, ids: Tensor) -> Blocks:
    """0.20 Triton (blocks, 2, N, heads, D)."""
    picked = kv_cache[ids]
    return picked[:, 0], picked[:, 1]


def _paged(impl: Any, layer: Any, kv_cache: Tensor, ids: Tensor) -> Blocks:
    keys, values = split_cache(kv_cache, impl.shape)
    return keys[ids], values[ids]


def _paged_vllm(impl: Any, layer: Any, kv_cache: Tensor, ids: Tensor) -> Blocks:
    """The ops' own: K [heads, D/x, N, x], V [heads, D, N]."""
    keys, values = VllmEngine.split(kv_cache, impl.shape)
    picked = keys[ids].transpose(2, 3).flatten(3)  # [n, heads, N, D]
    return picked.transpose(1, 2), values[ids].permute(0, 3, 1, 2)


_READERS: dict[str, Callable[[Any, Any, Tensor, Tensor], Blocks]] = {
    "CPUAttentionBackendImpl": _cpu,
    "FlashAttentionImpl": _five,
    "TritonAttentionImpl": _triton,
    "PagedImpl": _paged,
    "PagedVllmImpl": _paged_vllm,
}
