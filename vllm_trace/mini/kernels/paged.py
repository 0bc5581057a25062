"""Launching decode: what the kernels of `decode.py` are called with.

Follows: vLLM 0.11.0, csrc/attention/paged_attention_v1.cu and _v2.cu (the launchers; the learning plan's step 7).
Leaves out: values. Shapes and dtypes are checked, table entries and lengths are not, since that would wait for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .decode import paged_attention_v1_kernel, paged_attention_v2_kernel
from .support import check, device_of, dot_type, strides_of

Scale = float | Tensor


@dataclass(frozen=True)
class Plan:
    """How the work of a call is cut. `programs` 0: one for each sequence and KV head (V1)."""

    tile: int  # tokens read at once
    programs: int
    stages: int = 5  # depth of the pipeline that loads tiles; block ids take every other stage
    warps: int = 4
    pieces: int = 8  # pieces of a segment that the reduce reads at once


@cache
def _num_sms(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 4
    )


def v1_plan(head_size: int, element_size: int) -> Plan:
    """Tiles of at most 16 KiB of K."""
    return Plan(_tile(head_size, element_size, 64), 0)


def v2_plan(
    num_seqs: int,
    num_kv_heads: int,
    max_seq_len: int,
    head_size: int,
    element_size: int = 2,
    device: torch.device | str = "cuda",
) -> Plan:
    """Enough programs for every multiprocessor, and tiles small enough that there is one for each program."""
    programs = 2 * _num_sms(torch.device(device))
    tile = _tile(head_size, element_size, 64)
    while tile > 16 and num_seqs * num_kv_heads * triton.cdiv(max_seq_len, tile) < programs:
        tile //= 2
    return Plan(tile, programs)


def _padded(num_seqs: int) -> int:
    """1, 4, 16, 64, …: few enough that few variants are compiled."""
    return 1 << (max(0, num_seqs - 1).bit_length() + 1) // 2 * 2


def _tile(head_size: int, element_size: int, most: int) -> int:
    return max(16, min(most, 16384 // (triton.next_power_of_2(head_size) * element_size)))


def paged_attention_v1(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
    *,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = 0,
    softcap: float = 0.0,
    layout: str = "flash",
    out: Tensor | None = None,
    max_seq_len: int | None = None,
    validate: bool = True,
    plan: Plan | None = None,
) -> Tensor:
    """One program for each sequence and KV head: what the torch form does, on the GPU.

    Shapes: as in `mini.attention`. Values are not checked, whatever `validate` says.
    Raises: ValueError for shapes, dtypes and devices that the kernel does not take.
    """
    out = torch.empty_like(query) if out is None else out
    check(query, key_cache, value_cache, block_tables, seq_lens, layout, out)
    num_kv_heads = strides_of(key_cache, value_cache, layout).num_kv_heads
    plan = plan or v1_plan(query.shape[2], key_cache.element_size())
    arguments, options = _arguments(
        out, query, key_cache, value_cache, block_tables, seq_lens, scale, k_scale, v_scale,
        alibi_slopes, sliding_window, softcap, layout, plan,
    )  # fmt: skip
    with device_of(query):
        if len(query):
            paged_attention_v1_kernel[(num_kv_heads, len(query))](**arguments, **options)
    return out


def paged_attention_v2(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
    *,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = 0,
    softcap: float = 0.0,
    layout: str = "flash",
    out: Tensor | None = None,
    max_seq_len: int | None = None,
    validate: bool = True,
    plan: Plan | None = None,
) -> Tensor:
    """All sequences cut into equal shares; whoever finishes a sequence's head last puts its pieces together.

    Shapes: as in `mini.attention`. Values are not checked, whatever `validate` says. `max_seq_len` only chooses the
    tile; without it the width of the tables stands in for it, and nothing waits for the GPU.
    Raises: ValueError for shapes, dtypes and devices that the kernel does not take.
    """
    out = torch.empty_like(query) if out is None else out
    check(query, key_cache, value_cache, block_tables, seq_lens, layout, out)
    num_seqs, num_heads, head_size = query.shape
    strides = strides_of(key_cache, value_cache, layout)
    if plan is None:
        longest = max_seq_len or block_tables.shape[1] * strides.block_size
        if sliding_window:
            longest = min(longest, sliding_window)
        plan = v2_plan(
            num_seqs,
            strides.num_kv_heads,
            longest,
            head_size,
            key_cache.element_size(),
            query.device,
        )
    arguments, options = _arguments(
        out, query, key_cache, value_cache, block_tables, seq_lens, scale, k_scale, v_scale,
        alibi_slopes, sliding_window, softcap, layout, plan,
    )  # fmt: skip
    group = num_heads // strides.num_kv_heads
    acc, stats, arrivals = _scratch(
        query.device, plan.programs * 2 * group * arguments["HEAD_PAD"], plan.programs * 4 * group,
        num_seqs * strides.num_kv_heads,
    )  # fmt: skip
    with device_of(query):
        if num_seqs:
            paged_attention_v2_kernel[(plan.programs,)](
                **arguments, **options, acc_ptr=acc, stats_ptr=stats, arrivals_ptr=arrivals,
                num_seqs=num_seqs, NUM_KV_HEADS=strides.num_kv_heads,
                SEQS_PAD=_padded(num_seqs), ROWS=triton.next_power_of_2(group),
                PIECES=plan.pieces,
            )  # fmt: skip
    return out


def _arguments(
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
    plan: Plan,
) -> tuple[dict[str, Any], dict[str, int]]:
    """What both kernels take, and how Triton shall compile it."""
    strides = strides_of(key_cache, value_cache, layout)
    _, num_heads, head_size = query.shape
    group = num_heads // strides.num_kv_heads
    scales = {"k": (query, 0), "v": (query, 0)}  # a pointer that is never read
    by_tensor = isinstance(k_scale, Tensor) or isinstance(v_scale, Tensor)
    if by_tensor:
        for name, value in (("k", k_scale), ("v", v_scale)):
            value = torch.as_tensor(value, dtype=torch.float32, device=query.device).reshape(-1)
            scales[name] = value, int(len(value) > 1)
        k_scale = v_scale = 1.0
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(query.device, torch.float32)
    arguments = dict(
        out_ptr=out, query_ptr=query, key_cache=key_cache, value_cache=value_cache,
        tables_ptr=block_tables, lens_ptr=seq_lens,
        slopes_ptr=query if alibi_slopes is None else alibi_slopes,
        k_scale_ptr=scales["k"][0], v_scale_ptr=scales["v"][0],
        scale=float(scale) * k_scale, out_scale=v_scale, softcap=float(softcap),
        stride_os=out.stride(0), stride_oh=out.stride(1),
        stride_qs=query.stride(0), stride_qh=query.stride(1), stride_ts=block_tables.stride(0),
        stride_ks=scales["k"][1], stride_vs=scales["v"][1],
        GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)), HEAD_SIZE=head_size,
        HEAD_PAD=triton.next_power_of_2(head_size), BLOCK_SIZE=strides.block_size, TILE=plan.tile,
        WINDOW=int(sliding_window or 0), SOFTCAP=softcap != 0, ALIBI=alibi_slopes is not None,
        KV_SCALES=by_tensor, MASK_ALL=True, DOT=dot_type(query.dtype), STAGES=plan.stages,
        **strides.arguments,
    )  # fmt: skip
    return arguments, dict(num_warps=plan.warps, num_stages=plan.stages)


_SCRATCH: dict[tuple[torch.device, int], tuple[Tensor, Tensor, Tensor]] = {}


def _scratch(
    device: torch.device, acc: int, stats: int, arrivals: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where programs leave pieces, kept for the next call on the same stream: the kernel leaves `arrivals` at zero."""
    sizes = (acc, stats, arrivals)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _SCRATCH.get((device, stream))
    if held is not None and all(len(tensor) >= size for tensor, size in zip(held, sizes)):
        return held
    made = tuple(
        torch.zeros(triton.next_power_of_2(size), dtype=dtype, device=device)
        for size, dtype in zip(sizes, (torch.float32, torch.float32, torch.int32))
    )
    # What a CUDA graph allocates while it is captured belongs to that graph.
    if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        _SCRATCH[device, stream] = made
    return made
