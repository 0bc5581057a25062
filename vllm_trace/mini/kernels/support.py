"""What the Triton kernels take, and where the elements of a cache lie.

Leaves out: what the values say.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..attention import support as torch_support

LAYOUTS = torch_support.LAYOUTS


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
            f"a {_name(cache_dtype)} cache with {_name(dtype)} queries: the kernels read a cache of the queries' dtype, "
            f"a smaller one, float8 or int8"
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


def check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    layout: str,
    out: Tensor,
) -> None:
    """Raises: ValueError when a shape, dtype or device is not what a kernel can take."""
    torch_support.check_shapes(query, key_cache, value_cache, block_tables, seq_lens, layout, out)
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
