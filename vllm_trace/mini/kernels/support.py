"""What the Triton kernels take, and where the elements of a cache lie.

Leaves out: what the values say.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..attention import support as torch_support
from ..attention.support import name_of

Scale = float | Tensor


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU (TRITON_INTERPRET=1 when Triton was imported)."""
    return bool(knobs.runtime.interpret)


def unsupported(
    *,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    layout: str = "flash",
    device: torch.device | str | None = None,
) -> list[str]:
    """Sentences that say what stands in the way, each with what is supported; none if nothing does."""
    wrong = torch_support.unsupported(
        head_size=head_size, num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=block_size,
        dtype=dtype, cache_dtype=cache_dtype, layout=layout,
    )  # fmt: skip
    cache_dtype = cache_dtype or dtype
    if cache_dtype.itemsize > 1 and cache_dtype.itemsize >= dtype.itemsize and cache_dtype != dtype:
        wrong.append(
            f"a {name_of(cache_dtype)} cache with {name_of(dtype)} queries: the kernels read a cache of the queries' "
            f"dtype, a smaller one, float8 or int8"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() or not interpreted() else "cpu"
    device = torch.device(device)
    if device.type == "cpu" and not interpreted():
        wrong.append("device cpu: Triton needs a GPU, or TRITON_INTERPRET=1 before it is imported")
    if device.type == "cuda" and not torch.cuda.is_available():
        wrong.append("device cuda: torch sees no CUDA device; the torch form runs on the CPU")
    elif device.type == "cuda" and cache_dtype == torch.float8_e4m3fn:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            wrong.append(
                f"a float8_e4m3fn cache on compute capability {capability[0]}.{capability[1]}: it needs 8.9 or newer"
            )
    return wrong


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What the operands of a dot are turned into: the queries' dtype. The interpreter's dot knows no bfloat16."""
    if interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]


@dataclass(frozen=True)
class Strides:
    """Sizes and strides of a pair of caches, whatever the layout."""

    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_size: int
    arguments: dict[str, int]  # as the kernels name them


def strides_of(key_cache: Tensor, value_cache: Tensor, layout: str) -> Strides:
    """Units: elements."""
    if layout == "split":
        num_blocks, heads, parts, block_size, x = key_cache.shape
        kb, kh, kx, kt, _ = key_cache.stride()
        vb, vh, vd, vt = value_cache.stride()
        head_size = parts * x
    else:
        order = {"flash": (0, 1, 2, 3), "heads": (0, 2, 1, 3), "planes": (1, 2, 0, 3)}[layout]
        key, value = key_cache.permute(order), value_cache.permute(order)
        num_blocks, block_size, heads, head_size = key.shape
        (kb, kt, kh, _), (vb, vt, vh, vd) = key.stride(), value.stride()
        kx = x = 0
    return Strides(num_blocks, block_size, heads, head_size, dict(
        stride_kb=kb, stride_kt=kt, stride_kh=kh, stride_kx=kx,
        stride_vb=vb, stride_vt=vt, stride_vh=vh, stride_vd=vd, X=x,
    ))  # fmt: skip


@dataclass(frozen=True)
class Scales:
    """`k_scale` and `v_scale` as kernels take them: as numbers, or as one number or more for every KV head."""

    by_tensor: bool
    k: float
    v: float
    k_ptr: Tensor
    v_ptr: Tensor
    stride_k: int
    stride_v: int


def scales_of(k_scale: Scale, v_scale: Scale, unread: Tensor) -> Scales:
    """`unread` is passed where a kernel wants a pointer that it never follows."""
    if not isinstance(k_scale, Tensor) and not isinstance(v_scale, Tensor):
        return Scales(False, float(k_scale), float(v_scale), unread, unread, 0, 0)
    k, v = (
        torch.as_tensor(scale, dtype=torch.float32, device=unread.device).reshape(-1)
        for scale in (k_scale, v_scale)
    )
    return Scales(True, 1.0, 1.0, k, v, int(len(k) > 1), int(len(v) > 1))


def tile_of(head_size: int, element_size: int) -> int:
    """Tokens that fit into 16 KiB of K, from 16 to 64."""
    return max(16, min(64, 16384 // (triton.next_power_of_2(head_size) * element_size)))


def common_arguments(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Scale,
    v_scale: Scale,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    softcap: float,
    layout: str,
) -> dict[str, Any]:
    """What every attention kernel takes."""
    strides = strides_of(key_cache, value_cache, layout)
    scales = scales_of(k_scale, v_scale, query)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(query.device, torch.float32)
    return dict(
        out_ptr=out, query_ptr=query, key_cache=key_cache, value_cache=value_cache,
        tables_ptr=block_tables, lens_ptr=seq_lens,
        slopes_ptr=query if alibi_slopes is None else alibi_slopes,
        k_scale_ptr=scales.k_ptr, v_scale_ptr=scales.v_ptr,
        scale=float(scale) * scales.k, out_scale=scales.v, softcap=float(softcap),
        stride_os=out.stride(0), stride_oh=out.stride(1),
        stride_qs=query.stride(0), stride_qh=query.stride(1), stride_ts=block_tables.stride(0),
        stride_ks=scales.stride_k, stride_vs=scales.stride_v,
        HEAD_SIZE=strides.head_size, HEAD_PAD=triton.next_power_of_2(strides.head_size),
        BLOCK_SIZE=strides.block_size, WINDOW=int(sliding_window or 0), SOFTCAP=softcap != 0,
        ALIBI=alibi_slopes is not None, KV_SCALES=scales.by_tensor, DOT=dot_type(query.dtype),
        **strides.arguments,
    )  # fmt: skip


def check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    layout: str,
    out: Tensor,
    num_seqs: int | None = None,
) -> None:
    """Raises: ValueError when a shape, dtype or device is not what a kernel can take."""
    torch_support.check_shapes(
        query, key_cache, value_cache, block_tables, seq_lens, layout, out, num_seqs
    )
    strides = strides_of(key_cache, value_cache, layout)
    wrong = unsupported(
        head_size=query.shape[2], num_heads=query.shape[1], num_kv_heads=strides.num_kv_heads,
        block_size=strides.block_size, dtype=query.dtype, cache_dtype=key_cache.dtype,
        layout=layout, device=query.device,
    )  # fmt: skip
    tensors = dict(
        key_cache=key_cache,
        value_cache=value_cache,
        block_tables=block_tables,
        seq_lens=seq_lens,
        out=out,
    )
    wrong += [
        f"{name} is on {tensor.device}, query on {query.device}: all must be on one device"
        for name, tensor in tensors.items()
        if tensor.device != query.device
    ]
    if query.stride(-1) != 1 or out.stride(-1) != 1:
        wrong.append("the last dimension of query and out must be contiguous")
    if wrong:
        raise ValueError("; ".join(wrong))


def device_of(tensor: Tensor):
    """The tensor's GPU as the current one: Triton launches there."""
    return (
        torch.cuda.device(tensor.device)
        if tensor.device.type == "cuda"
        else contextlib.nullcontext()
    )
