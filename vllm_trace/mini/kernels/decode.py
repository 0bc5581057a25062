"""Decode in Triton: one new token for each sequence, K and V read once for all query heads that share them.

Follows: vLLM 0.11.0, csrc/attention/attention_kernels.cuh (V1, V2, its reduce); the learning plan's steps 7, 8 and 10;
Kwon et al. 2023, section 5.1; Dao et al. 2023 ("Flash-Decoding") for splitting the context; Osama et al. 2023
("Stream-K") for cutting all work into equal shares.
Leaves out: what `support.py` refuses. Tables, lengths and slots are not checked here: an entry beyond the cache reads
or writes memory of others. The torch form checks them.

V1 gives a program one (sequence, KV head): everything that it needs it reads itself. V2 lays the tiles of all
sequences and KV heads in a row and cuts the row into equal shares, whatever the lengths are:

    tiles     | s0 h0      | s0 h1      | s1 h0 | s1 h1 | s2 h0              | s2 h1              |
    programs  |     0     |     1     |     2     |     3     |     4     |     5     |     6     |

A program that holds a segment (one sequence, one KV head) from end to end writes its output. Otherwise it leaves
what it has in a scratch (weighted sum, largest logit, sum of weights) and counts itself in; the last one to arrive at a
segment weighs the pieces, as `paged_attention_v2_reduce` does, in the same launch.

Logits are kept in units of log2, so that `exp2` serves, which is an instruction of the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(
    -1.0e30
)  # the largest logit of nothing; finite, so that no -inf - -inf arises


@triton.jit
def _capped(logits, softcap):
    """softcap * tanh(logits / softcap), with tanh from one exponential."""
    return softcap * (1 - 2 / (tl.exp2(logits * (2 * LOG2E / softcap)) + 1))


@triton.jit
def _tile(
    query, largest, total, acc, start, length, table, keys, values, dims, dims_k, dims_v, slopes,
    logit_scale, softcap,
    stride_kb, stride_kt, stride_vb, stride_vt,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The softmax so far, carried on over the TILE tokens from `start`.

    Shapes: `query [GROUP, HEAD]`, `largest`, `total [GROUP]`, `acc [GROUP, HEAD]`.
    """
    tokens = start + tl.arange(0, TILE)
    seen = tokens < length
    if WINDOW > 0:
        seen = seen & (tokens >= length - WINDOW)
    if MASKED:
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < length, other=0).to(tl.int64)
    else:
        blocks = tl.load(table + tokens // BLOCK_SIZE).to(tl.int64)
    offsets = tokens % BLOCK_SIZE
    key_at = keys + (blocks * stride_kb + offsets * stride_kt)[:, None] + dims_k[None, :]
    value_at = values + (blocks * stride_vb + offsets * stride_vt)[:, None] + dims_v[None, :]
    HEAD: tl.constexpr = dims.shape[0]
    if MASKED or HEAD > HEAD_SIZE:
        # Slots that no token owns may hold NaN, and 0 * NaN is NaN.
        real = seen[:, None] & (dims < HEAD_SIZE)[None, :]
        key = tl.load(key_at, mask=real, other=0.0)
        value = tl.load(value_at, mask=real, other=0.0)
    else:
        key = tl.load(key_at)
        value = tl.load(value_at)
    logits = tl.dot(query, tl.trans(key.to(DOT)), input_precision="ieee") * logit_scale
    if SOFTCAP:
        logits = _capped(logits, softcap)
    if ALIBI:
        logits += slopes[:, None] * (tokens - length + 1)[None, :]
    if SOFTCAP or ALIBI:
        logits *= LOG2E
    if MASKED:
        logits = tl.where(seen[None, :], logits, float("-inf"))
    now = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp2(logits - now[:, None])
    shrink = tl.exp2(largest - now)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(DOT), value.to(DOT), acc, input_precision="ieee")
    return now, total, acc


@triton.jit
def _attend(
    first, last, length, seq, head, query_ptr, tables_ptr, keys, values, slopes_ptr, k_scale_ptr, 
    scale, softcap,
    stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ks,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, KV_SCALES: tl.constexpr, MASK_ALL: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles `first` to `last` (exclusive) of one sequence and KV head: largest logit, sum of weights, weighted sum."""
    rows = tl.arange(0, GROUP_PAD)  # query heads of the group, padded to the smallest dot
    dims = tl.arange(0, HEAD_PAD)
    heads = head * GROUP + rows
    real = (rows < GROUP)[:, None] & (dims < HEAD_SIZE)[None, :]
    query = tl.load(
        query_ptr + seq.to(tl.int64) * stride_qs + (heads * stride_qh)[:, None] + dims[None, :],
        mask=real, other=0.0,
    ).to(DOT)  # fmt: skip
    logit_scale = scale
    if KV_SCALES:
        logit_scale = scale * tl.load(k_scale_ptr + head * stride_ks)
    if not (SOFTCAP or ALIBI):
        logit_scale = logit_scale * LOG2E
    slopes = tl.zeros([GROUP_PAD], tl.float32)
    if ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=rows < GROUP, other=0.0)
    table = tables_ptr + seq.to(tl.int64) * stride_ts
    keys += head.to(tl.int64) * stride_kh
    values += head.to(tl.int64) * stride_vh
    dims_k = dims
    if X > 0:
        dims_k = dims // X * stride_kx + dims % X
    dims_v = dims * stride_vd

    largest = tl.full([GROUP_PAD], LOWEST, tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    masked_from = last
    if not MASK_ALL:
        masked_from = tl.minimum(last, length // TILE)
    for tile in tl.range(first, masked_from, num_stages=STAGES):
        largest, total, acc = _tile(
            query, largest, total, acc, tile * TILE, length, table, keys, values,
            dims, dims_k, dims_v, slopes, logit_scale, softcap,
            stride_kb, stride_kt, stride_vb, stride_vt,
            HEAD_SIZE, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, ALIBI, MASK_ALL, DOT,
        )  # fmt: skip
    if not MASK_ALL:
        if masked_from < last:
            largest, total, acc = _tile(
                query, largest, total, acc, masked_from * TILE, length, table, keys, values,
                dims, dims_k, dims_v, slopes, logit_scale, softcap,
                stride_kb, stride_kt, stride_vb, stride_vt,
                HEAD_SIZE, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, ALIBI, True, DOT,
            )  # fmt: skip
    return largest, total, acc


@triton.jit
def _store(
    acc, total, seq, head, out_ptr, v_scale_ptr, out_scale, stride_os, stride_oh, stride_vs,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, KV_SCALES: tl.constexpr,
):  # fmt: skip
    """Divide by the sum of weights and write; a sequence of no tokens gets zeros."""
    rows = tl.arange(0, acc.shape[0])
    dims = tl.arange(0, acc.shape[1])
    result = acc * (out_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    if KV_SCALES:
        result *= tl.load(v_scale_ptr + head * stride_vs)
    at = out_ptr + seq.to(tl.int64) * stride_os + ((head * GROUP + rows) * stride_oh)[:, None]
    real = (rows < GROUP)[:, None] & (dims < HEAD_SIZE)[None, :]
    tl.store(at + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _num_tiles(lengths, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """First tile and number of tiles of each sequence. An empty one has one tile: somebody must write its zeros."""
    first = lengths * 0
    if WINDOW > 0:
        first = tl.maximum(lengths - WINDOW, 0) // TILE
    return first, tl.maximum(tl.cdiv(lengths, TILE) - first, 1)


@triton.jit
def paged_attention_v1_kernel(
    out_ptr, query_ptr, key_cache, value_cache, tables_ptr, lens_ptr, slopes_ptr, k_scale_ptr,
    v_scale_ptr, scale, out_scale, softcap,
    stride_os, stride_oh, stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ks, stride_vs,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, KV_SCALES: tl.constexpr, MASK_ALL: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (KV heads, sequences). One program, one segment, no partner."""
    head = tl.program_id(0)
    seq = tl.program_id(1)
    length = tl.load(lens_ptr + seq)
    first, num_tiles = _num_tiles(length, TILE, WINDOW)
    largest, total, acc = _attend(
        first, first + num_tiles, length, seq, head, query_ptr, tables_ptr, key_cache, value_cache,
        slopes_ptr, k_scale_ptr, scale, softcap,
        stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
        stride_vb, stride_vt, stride_vh, stride_vd, stride_ks,
        GROUP, GROUP_PAD, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, TILE, X, WINDOW, SOFTCAP, ALIBI,
        KV_SCALES, MASK_ALL, DOT, STAGES,
    )  # fmt: skip
    _store(
        acc, total, seq, head, out_ptr, v_scale_ptr, out_scale, stride_os, stride_oh, stride_vs,
        GROUP, HEAD_SIZE, KV_SCALES,
    )  # fmt: skip


@triton.jit
def _reduce(
    begin, end, quota, acc_ptr, stats_ptr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_PAD: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Weigh the pieces of the segment that covers `begin` to `end` of the row of tiles.

    A program has two places in the scratch: the first for a piece that it took over from the program before it, the
    second for a piece that goes on in the next. PIECES of them are read at once.
    Shapes: scratch `acc [programs, 2, GROUP, HEAD]`, `stats [programs, 2, 2, GROUP]`, float32.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_PAD)
    first = begin // quota
    count = (end - 1) // quota - first + 1
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for start in tl.range(0, count, PIECES, num_stages=1):
        pieces = start + tl.arange(0, PIECES)
        programs = first + pieces
        second = (pieces == 0) & (begin % quota != 0)
        place = programs * 2 + second.to(tl.int32)
        real = (pieces < count)[:, None] & (rows < GROUP)[None, :]
        stats_at = stats_ptr + (place * (2 * GROUP))[:, None] + rows[None, :]
        maxima = tl.load(stats_at, mask=real, other=LOWEST, cache_modifier=".cg")
        sums = tl.load(stats_at + GROUP, mask=real, other=0.0, cache_modifier=".cg")
        acc_at = (
            acc_ptr + (place * (GROUP * HEAD_PAD))[:, None, None] + (rows * HEAD_PAD)[None, :, None]
        )
        parts = tl.load(
            acc_at + dims[None, None, :], mask=real[:, :, None], other=0.0, cache_modifier=".cg"
        )
        now = tl.maximum(largest, tl.max(maxima, 0))
        weights = tl.exp2(maxima - now[None, :])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(sums * weights, 0)
        acc = acc * shrink[:, None] + tl.sum(parts * weights[:, :, None], 0)
        largest = now
    return total, acc


@triton.jit
def paged_attention_v2_kernel(
    out_ptr, query_ptr, key_cache, value_cache, tables_ptr, lens_ptr, slopes_ptr, k_scale_ptr,
    v_scale_ptr, acc_ptr, stats_ptr, arrivals_ptr, num_seqs, scale, out_scale, softcap,
    stride_os, stride_oh, stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ks, stride_vs,
    NUM_KV_HEADS: tl.constexpr, SEQS_PAD: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, KV_SCALES: tl.constexpr, MASK_ALL: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (programs). Each takes an equal share of the row of tiles."""
    program = tl.program_id(0)
    seqs = tl.arange(0, SEQS_PAD)
    lengths = tl.load(lens_ptr + seqs, mask=seqs < num_seqs, other=0)
    _, counts = _num_tiles(lengths, TILE, WINDOW)
    counts = tl.where(seqs < num_seqs, counts, 0)
    ends = tl.cumsum(counts, 0) * NUM_KV_HEADS  # where each sequence ends in the row of tiles
    all_tiles = tl.max(ends, 0)
    quota = tl.cdiv(all_tiles, tl.num_programs(0))
    work = program * quota
    stop = tl.minimum(work + quota, all_tiles)
    while work < stop:
        seq = tl.sum((ends <= work).to(tl.int32), 0)
        seq_end = tl.min(tl.where(ends > work, ends, all_tiles), 0)
        length = tl.load(lens_ptr + seq)
        first, num_tiles = _num_tiles(length, TILE, WINDOW)
        seq_begin = seq_end - num_tiles * NUM_KV_HEADS
        head = (work - seq_begin) // num_tiles
        begin = seq_begin + head * num_tiles
        end = begin + num_tiles
        until = tl.minimum(stop, end)
        largest, total, acc = _attend(
            first + work - begin, first + until - begin, length, seq, head, query_ptr, tables_ptr,
            key_cache, value_cache, slopes_ptr, k_scale_ptr, scale, softcap,
            stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
            stride_vb, stride_vt, stride_vh, stride_vd, stride_ks,
            GROUP, GROUP_PAD, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, TILE, X, WINDOW, SOFTCAP, ALIBI,
            KV_SCALES, MASK_ALL, DOT, STAGES,
        )  # fmt: skip
        if until - work == num_tiles:
            _store(
                acc, total, seq, head, out_ptr, v_scale_ptr, out_scale, stride_os, stride_oh,
                stride_vs, GROUP, HEAD_SIZE, KV_SCALES,
            )  # fmt: skip
        else:
            rows = tl.arange(0, GROUP_PAD)
            dims = tl.arange(0, HEAD_PAD)
            place = program * 2 + (work != program * quota).to(tl.int32)
            stats_at = stats_ptr + place * (2 * GROUP) + rows
            tl.store(stats_at, largest, mask=rows < GROUP)
            tl.store(stats_at + GROUP, total, mask=rows < GROUP)
            acc_at = (
                acc_ptr + place * (GROUP * HEAD_PAD) + (rows * HEAD_PAD)[:, None] + dims[None, :]
            )
            tl.store(acc_at, acc, mask=(rows < GROUP)[:, None])
            tl.debug_barrier()  # every thread's stores come before the count
            pieces = (end - 1) // quota - begin // quota + 1
            arrival_at = arrivals_ptr + seq * NUM_KV_HEADS + head
            arrived = tl.atomic_add(arrival_at, 1, sem="acq_rel")
            if arrived == pieces - 1:
                tl.store(arrival_at, 0)  # ready for the next launch
                all_total, all_acc = _reduce(
                    begin, end, quota, acc_ptr, stats_ptr, GROUP, ROWS, HEAD_PAD, PIECES
                )
                _store(
                    all_acc, all_total, seq, head, out_ptr, v_scale_ptr, out_scale, stride_os,
                    stride_oh, stride_vs, GROUP, HEAD_SIZE, KV_SCALES,
                )  # fmt: skip
        work = until
