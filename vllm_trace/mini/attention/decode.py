"""Reading, one new token for each sequence: V1, V2 with its reduce, and the rule that chooses.

Follows: vLLM 0.11.0, csrc/attention/attention_kernels.cuh (the learning plan's steps 7 and 8), paged_attn.py
`forward_decode` (step 5); Kwon et al. 2023, section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layouts import Reader, Scale, size_of
from .logits import Bend, add_weighted_sum, by_token
from .support import check_shapes, check_tables

PARTITION_SIZE = 512  # tokens that one V2 partition covers
WALK = 512  # tokens that are collected at a time: a matter of speed only
MAX_V1_SEQ_LEN = 8192  # V1 keeps all logits of a sequence in shared memory, which ends here


def use_v1(max_seq_len: int, num_seqs: int, num_heads: int) -> bool:
    """vLLM's rule: V1 while its logits fit, unless one long sequence would leave the GPU idle.

    V1 works on `num_seqs * num_heads` (sequence, head) pairs at once. Above 512 of them, partitions bring nothing.

    >>> use_v1(512, 4, 8), use_v1(513, 4, 8), use_v1(513, 129, 4), use_v1(8193, 129, 4)
    (True, False, True, False)
    """
    num_partitions = -(-max_seq_len // PARTITION_SIZE)
    return max_seq_len <= MAX_V1_SEQ_LEN and (num_partitions == 1 or num_seqs * num_heads > 512)


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
    """Attention of each sequence's newest token, by the kernel that the rule chooses for the batch.

    `options` are V1's and V2's: `alibi_slopes`, `sliding_window`, `softcap`, `layout`, `out`, `validate`.
    """
    num_seqs, num_heads, _ = query.shape
    if max_seq_len is None:
        max_seq_len = int(seq_lens.max()) if len(seq_lens) else 0
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
) -> Tensor:
    """All logits of a sequence first, one softmax over them, then the weighted sum.

    The CUDA kernel runs the loop's body once for each sequence and head; here a body does all heads of a sequence.
    """
    if validate:
        _check(query, key_cache, value_cache, block_tables, seq_lens, layout, out)
    bend = Bend(scale, alibi_slopes, sliding_window, softcap, causal=False)  # nothing lies behind
    reader = Reader(key_cache, value_cache, k_scale, v_scale, layout)
    out = torch.empty_like(query) if out is None else out
    for seq, length in enumerate(seq_lens[: len(query)].tolist()):
        rows = bend.rows(query[seq, None], reader.num_kv_heads)
        first = bend.first_key(length - 1)
        found, _, _ = _attend(bend, rows, reader, block_tables[seq], first, length, length - 1)
        out[seq] = by_token(found, 1)[0]
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
) -> Tensor:
    """Every sequence in partitions of 512 tokens that know nothing of each other, then one reduce.

        tokens   0 ........ 511 | 512 ...... 1023 | 1024 .. seq_len
                 tmp_out[0]       tmp_out[1]        tmp_out[2]        each divided by its own exp_sums
                 max_logits[0]    max_logits[1]     max_logits[2]     what the reduce needs to weigh them

    Raises: ValueError when a block would lie in two partitions.
    """
    if validate:
        _check(query, key_cache, value_cache, block_tables, seq_lens, layout, out)
    _, block_size = size_of(key_cache, layout)
    if PARTITION_SIZE % block_size:
        raise ValueError(
            f"block size {block_size} does not divide the partition size {PARTITION_SIZE}: V1 takes any"
        )
    bend = Bend(scale, alibi_slopes, sliding_window, softcap, causal=False)  # nothing lies behind
    num_seqs, num_heads, head_size = query.shape
    lengths = seq_lens[:num_seqs].tolist()
    num_partitions = max(1, -(-max(lengths, default=0) // PARTITION_SIZE))
    exp_sums = query.new_zeros((num_seqs, num_heads, num_partitions), dtype=torch.float32)
    max_logits = torch.full_like(exp_sums, -torch.inf)  # a partition without tokens gets no weight
    tmp_out = exp_sums.new_zeros((num_seqs, num_heads, num_partitions, head_size))
    reader = Reader(key_cache, value_cache, k_scale, v_scale, layout)
    for seq, length in enumerate(lengths):
        rows = bend.rows(query[seq, None], reader.num_kv_heads)
        for start, end in _parts(bend.first_key(length - 1), length, PARTITION_SIZE):
            part, table = start // PARTITION_SIZE, block_tables[seq]
            found, largest, total = _attend(bend, rows, reader, table, start, end, length - 1)
            tmp_out[seq, :, part] = by_token(found, 1)[0]
            max_logits[seq, :, part] = largest.flatten()
            exp_sums[seq, :, part] = total.flatten()
    reduced = paged_attention_v2_reduce(exp_sums, max_logits, tmp_out)
    return reduced.to(query.dtype) if out is None else out.copy_(reduced)


def paged_attention_v2_reduce(exp_sums: Tensor, max_logits: Tensor, tmp_out: Tensor) -> Tensor:
    """Weigh the partitions as one softmax over the whole sequence would have.

    A partition's sum was taken relative to its own maximum; multiplied by exp(own maximum - overall maximum), all sums
    are relative to the same one and can be compared. A sequence whose partitions are all empty gets zeros.

    Shapes: `exp_sums`, `max_logits [num_seqs, num_heads, num_partitions]`, `tmp_out [..., num_partitions, head_size]`.
    """
    largest = max_logits.amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    rescaled = exp_sums * torch.exp(max_logits - largest)
    total = rescaled.sum(dim=-1, keepdim=True)
    weights = rescaled / total.masked_fill(total == 0.0, 1.0)
    return torch.einsum("shp,shpd->shd", weights, tmp_out)


def _attend(
    bend: Bend, rows: Tensor, reader: Reader, table: Tensor, start: int, end: int, position: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one token to a stretch of its sequence: the output, the largest logit and the sum of exponentials.

    Both walks over the cache go WALK tokens at a time, so that what is collected stays in a CPU's cache.
    """
    if start >= end:
        none = rows.new_zeros((*rows.shape[:2], 1))
        return torch.zeros_like(rows), none, none
    own = table.new_tensor([position])
    parts = _parts(start, end, WALK)
    found = [bend.logits(rows, reader.keys(table, *part), own, part[0]) for part in parts]
    logits = torch.cat(found, dim=-1) if len(found) > 1 else found[0]
    largest = logits.amax(dim=-1, keepdim=True)
    weights = logits.sub_(largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    weights /= total
    out = torch.zeros_like(rows)
    for first, last in parts:
        add_weighted_sum(
            out, weights[..., first - start : last - start], reader.values(table, first, last)
        )
    return out, largest, total


def _parts(first: int, length: int, size: int) -> list[tuple[int, int]]:
    """The partitions that hold the tokens from `first` to `length`.

    >>> _parts(700, 1100, 512)
    [(700, 1024), (1024, 1100)]
    """
    starts = range(first // size * size, length, size)
    return [(max(start, first), min(start + size, length)) for start in starts]


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    layout: str,
    out: Tensor | None,
) -> None:
    check_shapes(query, key_cache, value_cache, block_tables, seq_lens, layout, out)
    num_blocks, block_size = size_of(key_cache, layout)
    check_tables(block_tables, seq_lens[: len(query)], block_size, num_blocks)
