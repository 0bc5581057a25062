"""Launching decode: V1, V2, and how V2 cuts its work.

Follows: vLLM 0.11.0, csrc/attention/paged_attention_v1.cu and _v2.cu (the launchers; the learning plan's step 7) and
paged_attn.py `forward_decode` (step 5).
Leaves out: values. Shapes and dtypes are checked, table entries and lengths are not, since that would wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..attention import use_v1
from .decode import (
    paged_attention_v1_kernel,
    paged_attention_v2_kernel,
    paged_attention_v2_splits_kernel,
)
from .support import Scale, check, common_arguments, device_of, strides_of, tile_of


@dataclass(frozen=True)
class Plan:
    """How the work of a call is cut: into `shares` that are alike, or each sequence into splits of `chunk` tiles.

    With neither, a program takes a sequence and KV head whole, as V1 does.
    """

    tile: int  # tokens read at once
    shares: int = 0  # for each KV head
    chunk: int = 0
    stages: int = 5  # depth of the pipeline that loads tiles; block ids take every other stage; 0: a split is one tile
    warps: int = 4
    pieces: int = 16  # pieces of a segment that the reduce reads at once

    @property
    def cut(self) -> str:
        """In a word: whole, shares or splits."""
        return "shares" if self.shares else "splits" if self.chunk else "whole"


@cache
def _num_sms(device: torch.device) -> int:
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 4


def v1_plan(
    num_seqs: int, num_kv_heads: int, head_size: int, element_size: int, device: torch.device | str
) -> Plan:
    """While every program is resident a deep pipeline pays; when they queue, more of them on a multiprocessor do."""
    many = num_seqs * num_kv_heads > 2 * _num_sms(torch.device(device))
    return Plan(tile_of(head_size, element_size), stages=3 if many else 5)


def v2_plan(
    num_seqs: int,
    num_kv_heads: int,
    max_seq_len: int,
    head_size: int,
    element_size: int = 2,
    device: torch.device | str = "cuda",
    seq_lens_cpu: Tensor | Sequence[int] | None = None,
) -> Plan:
    """Fill the multiprocessors once or twice; figures in `reports/bench/kernels.md`.

    Sequences that are known to be alike (one alone, or `seq_lens_cpu` says so) are cut alike, and programs know what to
    read without knowing the lengths. Else the row of all tiles is cut into shares. Either way the result is right for
    any lengths.
    """
    device = torch.device(device)
    sms = _num_sms(device)
    tile = tile_of(head_size, element_size)
    if not _alike(num_seqs, max_seq_len, seq_lens_cpu):
        return Plan(min(tile, 32), shares=max(1, 4 * sms // num_kv_heads), warps=2)
    segments = num_seqs * num_kv_heads
    for small in (min(tile, 32), tile):
        if segments * triton.cdiv(max_seq_len, small) <= 1.2 * sms:
            return Plan(small, chunk=1, stages=0, warps=2)
    splits = max(1, 2 * sms // segments)
    if splits == 1:
        return v1_plan(num_seqs, num_kv_heads, head_size, element_size, device)
    return Plan(tile, chunk=triton.cdiv(triton.cdiv(max_seq_len, tile), splits), warps=2)


def _alike(num_seqs: int, max_seq_len: int, seq_lens_cpu: Tensor | Sequence[int] | None) -> bool:
    if num_seqs <= 1 or seq_lens_cpu is None:
        return num_seqs <= 1
    return max_seq_len * num_seqs <= 1.15 * int(sum(seq_lens_cpu))


def forward_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
    *,
    max_seq_len: int | None = None,
    **options: Any,
) -> Tensor:
    """V1 or V2, by the rule that the torch form follows too. Without `max_seq_len` this waits for the GPU."""
    if max_seq_len is None:
        max_seq_len = int(seq_lens.max()) if len(seq_lens) else 0
    num_seqs, num_heads, _ = query.shape
    kernel = paged_attention_v1 if use_v1(max_seq_len, num_seqs, num_heads) else paged_attention_v2
    caches = (key_cache, value_cache, block_tables, seq_lens)
    return kernel(query, *caches, scale, k_scale, v_scale, max_seq_len=max_seq_len, **options)


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
    seq_lens_cpu: Tensor | Sequence[int] | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """One program for each sequence and KV head: what the torch form does, on the GPU.

    Shapes: as in `mini.attention`. Values are not checked, whatever `validate` says. `max_seq_len` and `seq_lens_cpu`
    are V2's and not looked at.
    Raises: ValueError for shapes, dtypes and devices that the kernel does not take.
    """
    out = torch.empty_like(query) if out is None else out
    check(query, key_cache, value_cache, block_tables, seq_lens, layout, out)
    num_seqs, _, head_size = query.shape
    num_kv_heads = strides_of(key_cache, value_cache, layout).num_kv_heads
    if plan is None:
        size = max(query.element_size(), key_cache.element_size())
        plan = v1_plan(num_seqs, num_kv_heads, head_size, size, query.device)
    arguments = common_arguments(
        out, query, key_cache, value_cache, block_tables, seq_lens, scale, k_scale, v_scale,
        alibi_slopes, sliding_window, softcap, layout,
    )  # fmt: skip
    if num_seqs:
        with device_of(query):
            paged_attention_v1_kernel[(num_kv_heads, num_seqs)](
                **arguments, **_compiled(plan, query, num_kv_heads)
            )
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
    seq_lens_cpu: Tensor | Sequence[int] | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """The context in pieces that several programs read; whoever ends a sequence's head last puts them together.

    Shapes: as in `mini.attention`. Values are not checked, whatever `validate` says: no length may exceed `max_seq_len`
    (without it: what the tables hold). `seq_lens_cpu` is a hint: lengths that the host happens to know, see `v2_plan`.
    Nothing waits for the GPU.
    Raises: ValueError for shapes, dtypes and devices that the kernel does not take.
    """
    out = torch.empty_like(query) if out is None else out
    check(query, key_cache, value_cache, block_tables, seq_lens, layout, out)
    num_seqs, _, head_size = query.shape
    strides = strides_of(key_cache, value_cache, layout)
    num_kv_heads = strides.num_kv_heads
    longest = max(1, max_seq_len or block_tables.shape[1] * strides.block_size)
    if sliding_window:
        longest = min(longest, sliding_window)
    if plan is None:
        size = max(query.element_size(), key_cache.element_size())
        alike = seq_lens_cpu if not sliding_window else None
        plan = v2_plan(num_seqs, num_kv_heads, longest, head_size, size, query.device, alike)
    arguments = common_arguments(
        out, query, key_cache, value_cache, block_tables, seq_lens, scale, k_scale, v_scale,
        alibi_slopes, sliding_window, softcap, layout,
    )  # fmt: skip
    if not num_seqs:
        return out
    with device_of(query):
        compiled = _compiled(plan, query, num_kv_heads)
        if plan.cut == "whole":
            paged_attention_v1_kernel[(num_kv_heads, num_seqs)](**arguments, **compiled)
            return out
        # A window that begins inside a tile takes one more.
        tiles = triton.cdiv(longest, plan.tile) + bool(sliding_window)
        splits = triton.cdiv(tiles, plan.chunk) if plan.chunk else 0
        group = query.shape[1] // num_kv_heads
        arguments |= _scratch(
            query.device, num_kv_heads * (2 * plan.shares + num_seqs * splits),
            group * arguments["HEAD_PAD"], 2 * group, num_seqs * num_kv_heads,
        )  # fmt: skip
        group_rows = triton.next_power_of_2(group)
        pieces = _pieces(plan, group_rows, arguments["HEAD_PAD"])
        arguments.update(ROWS=group_rows, PIECES=pieces)
        if plan.shares:
            paged_attention_v2_kernel[(num_kv_heads, plan.shares)](
                **arguments, **compiled, num_seqs=num_seqs, SEQS_PAD=_padded(num_seqs)
            )
        else:
            paged_attention_v2_splits_kernel[(num_kv_heads, splits, num_seqs)](
                **arguments, **compiled, table_width=block_tables.shape[1], chunk=plan.chunk
            )
    return out


def _compiled(plan: Plan, query: Tensor, num_kv_heads: int) -> dict[str, int]:
    """What decides which program Triton makes, besides dtypes and layout.

    Larger accumulators get more warps than the plan says, which is made for groups up to 16, heads up to 128 and 16
    bits: where registers run out, ptxas has been seen to make programs that compute wrongly.
    """
    _, num_heads, head_size = query.shape
    group = num_heads // num_kv_heads
    rows = max(16, triton.next_power_of_2(group))  # of a dot, at least
    times = rows // 16 * triton.cdiv(head_size, 128) * (query.element_size() // 2)
    warps = min(8, plan.warps * times)
    shape = dict(GROUP=group, GROUP_PAD=rows, TILE=plan.tile, STAGES=plan.stages)
    return dict(**shape, num_warps=warps, num_stages=max(1, plan.stages))


def _pieces(plan: Plan, group_rows: int, head_pad: int) -> int:
    """As many as leave the reduce some registers."""
    return max(1, min(plan.pieces, 8192 // (group_rows * head_pad)))


def _padded(num_seqs: int) -> int:
    """1, 4, 16, 64, …: few enough that few variants are compiled."""
    return 1 << (max(0, num_seqs - 1).bit_length() + 1) // 2 * 2


_SCRATCH: dict[tuple[torch.device, int], tuple[Tensor, Tensor, Tensor]] = {}


def _scratch(
    device: torch.device, places: int, acc_size: int, stats_size: int, segments: int
) -> dict[str, Tensor]:
    """Where programs leave pieces, kept for the next call on the same stream: kernels leave `arrivals` at zero."""
    sizes = (places * acc_size, places * stats_size, segments)
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    held = _SCRATCH.get((device, stream))
    if held is None or any(len(tensor) < size for tensor, size in zip(held, sizes)):
        acc, stats, arrivals = map(triton.next_power_of_2, sizes)
        held = (
            torch.empty(acc, dtype=torch.float32, device=device),
            torch.empty(stats, dtype=torch.float32, device=device),
            torch.zeros(arrivals, dtype=torch.int32, device=device),
        )
        # What is allocated while a CUDA graph is captured belongs to that graph, zeroing included.
        if not (on_gpu and torch.cuda.is_current_stream_capturing()):
            _SCRATCH[device, stream] = held
    return dict(zip(("acc_ptr", "stats_ptr", "arrivals_ptr"), held))
