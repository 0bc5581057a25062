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
    query, largest, total, acc, start, length, limit, table, keys, values, dims, dims_k, dims_v, slopes,
    logit_scale, softcap,
    stride_kb, stride_kt, stride_vb, stride_vt,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The softmax so far, carried on over the TILE tokens from `start`.

    Shapes: `query [GROUP, HEAD]`, `largest`, `total [GROUP]`, `acc [GROUP, HEAD]`.
    """
    tokens = start + tl.arange(0, TILE)
    seen = tokens < length
    if WINDOW > 0:
        seen = seen & (tokens >= length - WINDOW)
    blocks = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < limit, other=0).to(tl.int64)
    offsets = tokens % BLOCK_SIZE
    key_at = keys + (blocks * stride_kb + offsets * stride_kt)[:, None] + dims_k[None, :]
    value_at = values + (blocks * stride_vb + offsets * stride_vt)[:, None] + dims_v[None, :]
    real = seen[:, None] & (dims < HEAD_SIZE)[None, :]
    key = tl.load(key_at, mask=real, other=0.0)
    value = tl.load(
        value_at, mask=real, other=0.0
    )  # slots of no token may hold NaN, and 0 * NaN is NaN
    logits = tl.dot(query, tl.trans(key.to(DOT)), input_precision="ieee") * logit_scale
    if SOFTCAP:
        logits = _capped(logits, softcap)
    if ALIBI:
        logits += slopes[:, None] * (tokens - length + 1)[None, :]
    if SOFTCAP or ALIBI:
        logits *= LOG2E
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
    first, last, length, table_width, seq, head, query_ptr, tables_ptr, keys, values, slopes_ptr, k_scale_ptr,
    scale, softcap,
    stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ks,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, KV_SCALES: tl.constexpr,
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
    if STAGES == 0:  # one tile, and its block ids do not wait for the length
        largest, total, acc = _tile(
            query, largest, total, acc, first * TILE, length, table_width * BLOCK_SIZE, table, keys, values,
            dims, dims_k, dims_v, slopes, logit_scale, softcap,
            stride_kb, stride_kt, stride_vb, stride_vt,
            HEAD_SIZE, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, ALIBI, DOT,
        )  # fmt: skip
    else:
        for tile in tl.range(first, last, num_stages=STAGES):
            largest, total, acc = _tile(
                query, largest, total, acc, tile * TILE, length, length, table, keys, values,
                dims, dims_k, dims_v, slopes, logit_scale, softcap,
                stride_kb, stride_kt, stride_vb, stride_vt,
                HEAD_SIZE, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, ALIBI, DOT,
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
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, KV_SCALES: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (KV heads, sequences). One program, one segment, no partner."""
    head = tl.program_id(0)
    seq = tl.program_id(1)
    length = tl.load(lens_ptr + seq)
    first, num_tiles = _num_tiles(length, TILE, WINDOW)
    _, total, acc = _attend(
        first, first + num_tiles, length, 0, seq, head, query_ptr, tables_ptr, key_cache, value_cache,
        slopes_ptr, k_scale_ptr, scale, softcap,
        stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
        stride_vb, stride_vt, stride_vh, stride_vd, stride_ks,
        GROUP, GROUP_PAD, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, TILE, X, WINDOW, SOFTCAP, ALIBI,
        KV_SCALES, DOT, STAGES,
    )  # fmt: skip
    _store(
        acc, total, seq, head, out_ptr, v_scale_ptr, out_scale, stride_os, stride_oh, stride_vs,
        GROUP, HEAD_SIZE, KV_SCALES,
    )  # fmt: skip


@triton.jit
def _leave(
    place, largest, total, acc, acc_ptr, stats_ptr,
    GROUP: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    """Put a piece into the scratch: `acc [places, GROUP, HEAD]`, `stats [places, 2, GROUP]`, float32."""
    rows = tl.arange(0, acc.shape[0])
    dims = tl.arange(0, HEAD_PAD)
    real = rows < GROUP
    stats_at = stats_ptr + place * (2 * GROUP) + rows
    tl.store(stats_at, largest, mask=real)
    tl.store(stats_at + GROUP, total, mask=real)
    acc_at = acc_ptr + place * (GROUP * HEAD_PAD) + (rows * HEAD_PAD)[:, None] + dims[None, :]
    tl.store(acc_at, acc, mask=real[:, None])
    tl.debug_barrier()  # every thread's stores come before the count of who arrived


@triton.jit
def _reduce(
    base, skip, step, count, acc_ptr, stats_ptr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_PAD: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Weigh `count` pieces, which lie at `base` and every `step` behind it; the first of them `skip` further.

    PIECES of them are read at once.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_PAD)
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for start in tl.range(0, count, PIECES, num_stages=1):
        pieces = start + tl.arange(0, PIECES)
        place = base + pieces * step + tl.where(pieces == 0, skip, 0)
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
def _snapped(quota, counts, real):
    """When all sequences are alike, shares end where sequences do, if that makes them at most 6 % larger."""
    most = tl.max(counts, 0)
    alike = tl.min(tl.where(real, counts, most), 0) == most
    whole = tl.cdiv(quota, most) * most  # several sequences to a share
    part = tl.cdiv(most, tl.maximum(most // quota, 1))  # several shares to a sequence
    better = tl.where(quota >= most, whole, part)
    return tl.where(alike & (better * 16 <= quota * 17), better, quota)


@triton.jit
def paged_attention_v2_kernel(
    out_ptr, query_ptr, key_cache, value_cache, tables_ptr, lens_ptr, slopes_ptr, k_scale_ptr,
    v_scale_ptr, acc_ptr, stats_ptr, arrivals_ptr, num_seqs, scale, out_scale, softcap,
    stride_os, stride_oh, stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ks, stride_vs,
    SEQS_PAD: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, KV_SCALES: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (KV heads, shares). The heads of a share walk side by side: a token's heads are neighbours in memory."""
    head = tl.program_id(0)
    share = tl.program_id(1)
    seqs = tl.arange(0, SEQS_PAD)
    lengths = tl.load(lens_ptr + seqs, mask=seqs < num_seqs, other=0)
    _, counts = _num_tiles(lengths, TILE, WINDOW)
    ends = tl.cumsum(
        tl.where(seqs < num_seqs, counts, 0), 0
    )  # of each sequence in the row of tiles
    all_tiles = tl.max(ends, 0)
    quota = tl.cdiv(all_tiles, tl.num_programs(1))
    quota = _snapped(quota, counts, seqs < num_seqs)
    work = share * quota
    stop = tl.minimum(work + quota, all_tiles)
    while work < stop:
        seq = tl.sum((ends <= work).to(tl.int32), 0)
        end = tl.min(tl.where(ends > work, ends, all_tiles), 0)
        length = tl.load(lens_ptr + seq)
        first, num_tiles = _num_tiles(length, TILE, WINDOW)
        begin = end - num_tiles
        until = tl.minimum(stop, end)
        largest, total, acc = _attend(
            first + work - begin, first + until - begin, length, 0, seq, head, query_ptr, tables_ptr,
            key_cache, value_cache, slopes_ptr, k_scale_ptr, scale, softcap,
            stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
            stride_vb, stride_vt, stride_vh, stride_vd, stride_ks,
            GROUP, GROUP_PAD, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, TILE, X, WINDOW, SOFTCAP, ALIBI,
            KV_SCALES, DOT, STAGES,
        )  # fmt: skip
        if until - work == num_tiles:
            _store(
                acc, total, seq, head, out_ptr, v_scale_ptr, out_scale, stride_os, stride_oh,
                stride_vs, GROUP, HEAD_SIZE, KV_SCALES,
            )  # fmt: skip
        else:
            # A share has two places: the first for a piece that it took over, the second for one that goes on.
            step = tl.num_programs(0) * 2
            place = share * step + head * 2 + (work != share * quota).to(tl.int32)
            _leave(place, largest, total, acc, acc_ptr, stats_ptr, GROUP, HEAD_PAD)
            first_share = begin // quota
            pieces = (end - 1) // quota - first_share + 1
            arrival_at = arrivals_ptr + seq * tl.num_programs(0) + head
            arrived = tl.atomic_add(arrival_at, 1, sem="acq_rel")
            if arrived == pieces - 1:
                tl.store(arrival_at, 0)  # ready for the next launch
                all_total, all_acc = _reduce(
                    first_share * step + head * 2, (begin % quota != 0).to(tl.int32), step, pieces,
                    acc_ptr, stats_ptr, GROUP, ROWS, HEAD_PAD, PIECES,
                )  # fmt: skip
                _store(
                    all_acc, all_total, seq, head, out_ptr, v_scale_ptr, out_scale, stride_os,
                    stride_oh, stride_vs, GROUP, HEAD_SIZE, KV_SCALES,
                )  # fmt: skip
        work = until


@triton.jit
def paged_attention_v2_splits_kernel(
    out_ptr, query_ptr, key_cache, value_cache, tables_ptr, lens_ptr, slopes_ptr, k_scale_ptr,
    v_scale_ptr, acc_ptr, stats_ptr, arrivals_ptr, table_width, chunk, scale, out_scale, softcap,
    stride_os, stride_oh, stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ks, stride_vs,
    ROWS: tl.constexpr, PIECES: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, KV_SCALES: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (KV heads, splits of the longest sequence, sequences). A split is `chunk` tiles, whatever the lengths are.

    What is read is known from the grid, so nobody waits for lengths. With STAGES 0, for batches so small that every
    tile has a program, block ids do not wait either: three loads in a row (lengths and ids, K and V, the pieces) are
    what such a batch costs. Entries of a table behind the last block are read then, but not followed.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    length = tl.load(lens_ptr + seq)
    first, num_tiles = _num_tiles(length, TILE, WINDOW)
    pieces = tl.cdiv(num_tiles, chunk)
    begin = split * chunk
    largest, total, acc = _attend(
        first + begin, first + tl.minimum(begin + chunk, num_tiles), length, table_width, seq, head,
        query_ptr, tables_ptr, key_cache, value_cache, slopes_ptr, k_scale_ptr, scale, softcap,
        stride_qs, stride_qh, stride_ts, stride_kb, stride_kt, stride_kh, stride_kx,
        stride_vb, stride_vt, stride_vh, stride_vd, stride_ks,
        GROUP, GROUP_PAD, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, TILE, X, WINDOW, SOFTCAP, ALIBI,
        KV_SCALES, DOT, STAGES,
    )  # fmt: skip
    if (pieces == 1) & (split == 0):
        _store(
            acc, total, seq, head, out_ptr, v_scale_ptr, out_scale, stride_os, stride_oh,
            stride_vs, GROUP, HEAD_SIZE, KV_SCALES,
        )  # fmt: skip
    elif split < pieces:
        segment = seq * tl.num_programs(0) + head
        first_place = segment * tl.num_programs(1)
        _leave(first_place + split, largest, total, acc, acc_ptr, stats_ptr, GROUP, HEAD_PAD)
        arrived = tl.atomic_add(arrivals_ptr + segment, 1, sem="acq_rel")
        if arrived == pieces - 1:
            tl.store(arrivals_ptr + segment, 0)  # ready for the next launch
            all_total, all_acc = _reduce(
                first_place, 0, 1, pieces, acc_ptr, stats_ptr, GROUP, ROWS, HEAD_PAD, PIECES,
            )  # fmt: skip
            _store(
                all_acc, all_total, seq, head, out_ptr, v_scale_ptr, out_scale, stride_os,
                stride_oh, stride_vs, GROUP, HEAD_SIZE, KV_SCALES,
            )  # fmt: skip
