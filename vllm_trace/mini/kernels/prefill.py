"""Prefill in Triton: several new tokens for each sequence, behind what is cached of it already.

Follows: vLLM 0.11.0, vllm/attention/ops/prefix_prefill.py (the learning plan's step 6); vLLM 0.20.2,
triton_unified_attention.py for putting a token's query heads side by side; Dao et al. 2022 (FlashAttention).
Leaves out: reading the chunk's own K and V from anywhere but the cache; checks of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import LOG2E, LOWEST, _capped
from .support import Scale, check, common_arguments, device_of, strides_of, tile_of


@triton.jit
def context_attention_kernel(
    out_ptr, query_ptr, key_cache, value_cache, tables_ptr, lens_ptr, slopes_ptr, k_scale_ptr,
    v_scale_ptr, starts_ptr, scale, out_scale, softcap,
    stride_os, stride_oh, stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ks, stride_vs,
    GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, QUERIES: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, KV_SCALES: tl.constexpr,
    CAUSAL: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (parts of QUERIES tokens of the longest chunk, KV heads, sequences).

    A row of the dot is one query head of one token: token * GROUP_ROWS + head in the group.
    """
    part = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.program_id(2)
    begin = tl.load(starts_ptr + seq)
    chunk = tl.load(starts_ptr + seq + 1) - begin
    if part * QUERIES >= chunk:
        return
    length = tl.load(lens_ptr + seq)
    rows = tl.arange(0, QUERIES * GROUP_ROWS)
    tokens = part * QUERIES + rows // GROUP_ROWS
    heads = head * GROUP + rows % GROUP_ROWS
    own = length - chunk + tokens  # where the rows' tokens stand in the sequence
    dims = tl.arange(0, HEAD_PAD)
    live = (tokens < chunk) & (rows % GROUP_ROWS < GROUP)
    real = live[:, None] & (dims < HEAD_SIZE)[None, :]
    at = (begin + tokens).to(tl.int64)
    query = tl.load(
        query_ptr + (at * stride_qs + heads * stride_qh)[:, None] + dims[None, :], mask=real, other=0.0
    ).to(DOT)  # fmt: skip
    logit_scale = scale
    if KV_SCALES:
        logit_scale = scale * tl.load(k_scale_ptr + head * stride_ks)
    if not (SOFTCAP or ALIBI):
        logit_scale = logit_scale * LOG2E
    if ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=live, other=0.0)
    table = tables_ptr + seq.to(tl.int64) * stride_ts
    keys = key_cache + head.to(tl.int64) * stride_kh
    values = value_cache + head.to(tl.int64) * stride_vh
    dims_k = dims
    if X > 0:
        dims_k = dims // X * stride_kx + dims % X
    dims_v = dims * stride_vd

    # What the first token of the part sees first, and the last one last.
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - chunk + part * QUERIES - WINDOW + 1, 0) // TILE
    last = length
    if CAUSAL:
        last = tl.minimum(length, length - chunk + part * QUERIES + QUERIES)
    largest = tl.full([QUERIES * GROUP_ROWS], LOWEST, tl.float32)
    total = tl.zeros([QUERIES * GROUP_ROWS], tl.float32)
    acc = tl.zeros([QUERIES * GROUP_ROWS, HEAD_PAD], tl.float32)
    for tile in tl.range(first, tl.cdiv(last, TILE), num_stages=STAGES):
        there = tile * TILE + tl.arange(0, TILE)
        blocks = tl.load(table + there // BLOCK_SIZE, mask=there < length, other=0).to(tl.int64)
        offsets = there % BLOCK_SIZE
        exists = (there < length)[:, None] & (dims < HEAD_SIZE)[None, :]
        key_at = keys + (blocks * stride_kb + offsets * stride_kt)[:, None] + dims_k[None, :]
        value_at = values + (blocks * stride_vb + offsets * stride_vt)[:, None] + dims_v[None, :]
        key = tl.load(key_at, mask=exists, other=0.0)
        value = tl.load(value_at, mask=exists, other=0.0)
        logits = tl.dot(query, tl.trans(key.to(DOT)), input_precision="ieee") * logit_scale
        distance = there[None, :] - own[:, None]
        if SOFTCAP:
            logits = _capped(logits, softcap)
        if ALIBI:
            logits += slopes[:, None] * distance
        if SOFTCAP or ALIBI:
            logits *= LOG2E
        seen = (there < length)[None, :]
        if CAUSAL:
            seen = seen & (distance <= 0)
        if WINDOW > 0:
            seen = seen & (distance > -WINDOW)
        logits = tl.where(seen, logits, float("-inf"))
        now = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(
            weights.to(DOT), value.to(DOT), acc * shrink[:, None], input_precision="ieee"
        )  # fmt: skip
        largest = now
    result = acc * (out_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    if KV_SCALES:
        result *= tl.load(v_scale_ptr + head * stride_vs)
    out_at = out_ptr + (at * stride_os + heads * stride_oh)[:, None] + dims[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=real)


def context_attention_fwd(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
    *,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = 0,
    softcap: float = 0.0,
    causal: bool = True,
    layout: str = "flash",
    out: Tensor | None = None,
    max_query_len: int | None = None,
    validate: bool = True,
) -> Tensor:
    """Each chunk attends to what was cached before it, and causally to itself; the torch form's twin.

    Values are not checked, whatever `validate` says. Without `max_query_len` the number of queries stands in for it:
    nothing waits for the GPU, but programs without work are launched.
    Raises: ValueError for shapes, dtypes and devices that the kernel does not take.
    """
    out = torch.empty_like(query) if out is None else out
    num_seqs = len(query_start_loc) - 1
    check(query, key_cache, value_cache, block_tables, seq_lens, layout, out, num_seqs)
    num_kv_heads = strides_of(key_cache, value_cache, layout).num_kv_heads
    group = query.shape[1] // num_kv_heads
    group_rows = triton.next_power_of_2(group)
    # 64 rows fill Hopper's matrix instruction; the accumulator of larger heads takes the registers of more.
    queries = max(1, (128 if query.shape[2] <= 128 else 64) // group_rows)
    if query.dtype == torch.float32:
        queries = max(1, 32 // group_rows)
    queries = max(queries, triton.cdiv(16, group_rows))
    arguments = common_arguments(
        out, query, key_cache, value_cache, block_tables, seq_lens, scale, k_scale, v_scale,
        alibi_slopes, sliding_window, softcap, layout,
    )  # fmt: skip
    tile = tile_of(query.shape[2], max(key_cache.element_size(), query.element_size()))
    longest = len(query) if max_query_len is None else max_query_len
    grid = (triton.cdiv(longest, queries), num_kv_heads, num_seqs)
    with device_of(query):
        if num_seqs and longest:
            context_attention_kernel[grid](
                **arguments, starts_ptr=query_start_loc, GROUP=group, GROUP_ROWS=group_rows, QUERIES=queries,
                TILE=tile, CAUSAL=causal, STAGES=3, num_warps=8 if queries * group_rows >= 128 else 4,
                num_stages=3,
            )  # fmt: skip
    return out
