"""Writing in Triton: K and V of new tokens to their slots, whole blocks within caches and between two.

Follows: vLLM 0.11.0, csrc/cache_kernels.cu (the learning plan's step 9).
Leaves out: checks of values: a slot or a block beyond the cache writes over memory of others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import cache as torch_cache
from ..attention.layouts import as_bytes, by_block
from ..attention.support import name_of
from .support import Scale, device_of, scales_of, strides_of

ROUNDER = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: added and taken off, float32 keeps no fraction, ties go to even


@triton.jit
def _stored(value, scale, LARGEST: tl.constexpr, ROUND: tl.constexpr):
    """Divided by the scale; for one byte, cut off at the largest that the cache can hold, and rounded for int8."""
    value = value / scale
    if LARGEST > 0:
        value = tl.clamp(value, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    if ROUND:
        value = (value + ROUNDER) - ROUNDER
    return value


@triton.jit
def reshape_and_cache_kernel(
    key_ptr, value_ptr, key_cache, value_cache, slots_ptr, k_scale_ptr, v_scale_ptr, k_scale, v_scale,
    stride_key, stride_key_head, stride_value, stride_value_head,
    stride_kb, stride_kt, stride_kh, stride_kx, stride_vb, stride_vt, stride_vh, stride_vd,
    stride_ks, stride_vs,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, X: tl.constexpr,
    KV_SCALES: tl.constexpr, LARGEST: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, KV heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    dims = tl.arange(0, HEAD_PAD)
    real = dims < HEAD_SIZE
    key = tl.load(key_ptr + token * stride_key + head * stride_key_head + dims, mask=real).to(
        tl.float32
    )
    value = tl.load(
        value_ptr + token * stride_value + head * stride_value_head + dims, mask=real
    ).to(tl.float32)
    if KV_SCALES:
        k_scale = tl.load(k_scale_ptr + head * stride_ks)
        v_scale = tl.load(v_scale_ptr + head * stride_vs)
    dims_k = dims
    if X > 0:
        dims_k = dims // X * stride_kx + dims % X
    key_at = (
        key_cache + block * stride_kb + offset * stride_kt + head.to(tl.int64) * stride_kh + dims_k
    )
    value_at = (
        value_cache
        + block * stride_vb
        + offset * stride_vt
        + head.to(tl.int64) * stride_vh
        + dims * stride_vd
    )
    key = _stored(key, k_scale, LARGEST, ROUND)
    value = _stored(value, v_scale, LARGEST, ROUND)
    tl.store(key_at, key.to(key_cache.dtype.element_ty), mask=real)
    tl.store(value_at, value.to(value_cache.dtype.element_ty), mask=real)


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
    *,
    layout: str = "flash",
    validate: bool = True,
) -> None:
    """Write each token's K and V to its slot; slot -1 is padding. Slots are not checked, whatever `validate` says."""
    strides = strides_of(key_cache, value_cache, layout)
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        key, value = key.contiguous(), value.contiguous()
    scales = scales_of(k_scale, v_scale, slot_mapping)
    one_byte = key_cache.dtype.itemsize == 1
    if key_cache.dtype == torch.int8:
        largest = 127.0
    else:
        largest = torch.finfo(key_cache.dtype).max if one_byte else 0.0
    with device_of(key):
        if len(slot_mapping):
            reshape_and_cache_kernel[(len(slot_mapping), strides.num_kv_heads)](
                key, value, key_cache, value_cache, slot_mapping, scales.k_ptr, scales.v_ptr, scales.k, scales.v,
                key.stride(0), key.stride(1), value.stride(0), value.stride(1),
                stride_ks=scales.stride_k, stride_vs=scales.stride_v, HEAD_SIZE=strides.head_size,
                HEAD_PAD=triton.next_power_of_2(strides.head_size), BLOCK_SIZE=strides.block_size,
                KV_SCALES=scales.by_tensor, LARGEST=largest, ROUND=key_cache.dtype == torch.int8,
                num_warps=1, **strides.arguments,
            )  # fmt: skip


@triton.jit
def copy_blocks_kernel(
    source_ptr, target_ptr, pairs_ptr, part_size, source_block, source_part, target_block, target_part,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: (pairs, parts of a block that lie in one piece, chunks of a part)."""
    pair = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    elements = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    source = tl.load(pairs_ptr + pair * 2).to(tl.int64)
    target = tl.load(pairs_ptr + pair * 2 + 1).to(tl.int64)
    real = elements < part_size
    moved = tl.load(source_ptr + source * source_block + part * source_part + elements, mask=real)
    tl.store(target_ptr + target * target_block + part * target_part + elements, moved, mask=real)


def copy_blocks(
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    block_mapping: Tensor,
    *,
    layout: str = "flash",
) -> None:
    """Copy whole blocks inside the caches of every layer. Pairs are not checked."""
    for cache in (*key_caches, *value_caches):
        swap_blocks(cache, cache, block_mapping, layout=layout)


def swap_blocks(
    source: Tensor, target: Tensor, block_mapping: Tensor, *, layout: str = "flash"
) -> None:
    """Copy whole blocks from one cache to another. Between a CPU and a GPU the torch form does it: it is a memcpy."""
    if source.device != target.device:
        return torch_cache.swap_blocks(source, target, block_mapping, layout=layout)
    source, target = as_bytes(by_block(source, layout)), as_bytes(by_block(target, layout))
    if source.shape[1:] != target.shape[1:] or source.dtype != target.dtype:
        raise ValueError(
            f"blocks of shape {list(source.shape[1:])}, {name_of(source.dtype)} do not fit into blocks of shape "
            f"{list(target.shape[1:])}, {name_of(target.dtype)}"
        )
    size, parts, from_part, to_part = _parts_of(source, target)
    pairs = block_mapping.to(source.device).contiguous()
    chunk = min(4096, triton.next_power_of_2(size))
    with device_of(source):
        if len(pairs):
            copy_blocks_kernel[(len(pairs), parts, triton.cdiv(size, chunk))](
                source, target, pairs, size, source.stride(0), from_part, target.stride(0), to_part, CHUNK=chunk
            )  # fmt: skip
    return None


def _parts_of(source: Tensor, target: Tensor) -> tuple[int, int, int, int]:
    """A block as parts that lie in one piece in both caches: their size, their number, their two strides.

    Raises: ValueError when parts would have to be told by two strides.
    """
    dims = sorted(range(1, source.dim()), key=lambda dim: source.stride(dim))
    size = 1
    outer: list[tuple[int, tuple[int, int]]] = []
    for dim in dims:
        length, strides = source.shape[dim], (source.stride(dim), target.stride(dim))
        if length == 1:
            continue
        if not outer and strides == (size, size):
            size *= length
        elif outer and all(s == t * outer[-1][0] for s, t in zip(strides, outer[-1][1])):
            outer[-1] = (outer[-1][0] * length, outer[-1][1])
        else:
            outer.append((length, strides))
    if len(outer) > 1:
        raise ValueError(
            "blocks that lie scattered in more than one dimension: the torch form copies them"
        )
    parts, (from_part, to_part) = outer[0] if outer else (1, (0, 0))
    return size, parts, from_part, to_part
