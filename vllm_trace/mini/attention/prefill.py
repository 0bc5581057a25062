"""Reading, several new tokens for each sequence: prefill with context.

Follows: vLLM 0.11.0, vllm/attention/ops/prefix_prefill.py `context_attention_fwd` (the learning plan's step 6).
Leaves out: reading the chunk's own K and V from anywhere but the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import Reader, Scale, size_of
from .logits import Bend, by_token, weighted_sum
from .support import check_shapes, check_tables


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
    """The chunk of each sequence attends to what was cached before it, and causally to itself.

    The chunk's own K and V are in the cache already, so a prefix hit, an earlier chunk and the chunk itself read alike:

        cached   | context of an earlier step or request | this chunk  |
        query                                            |q q q q q q q|   the last one sees seq_len tokens

    Shapes: `query_start_loc [num_seqs + 1]`: sequence i owns `query[query_start_loc[i]:query_start_loc[i + 1]]`.
    Queries that no sequence owns (padding) are not written. With `causal` off every query sees the whole sequence.
    """
    num_seqs = len(query_start_loc) - 1
    if validate:
        check_shapes(query, key_cache, value_cache, block_tables, seq_lens, layout, out, num_seqs)
        num_blocks, block_size = size_of(key_cache, layout)
        check_tables(block_tables, seq_lens[:num_seqs], block_size, num_blocks)
        _check_chunks(query_start_loc, seq_lens, len(query))
    bend = Bend(scale, alibi_slopes, sliding_window, softcap, causal)
    reader = Reader(key_cache, value_cache, k_scale, v_scale, layout)
    out = torch.empty_like(query) if out is None else out
    starts = query_start_loc.tolist()
    for seq, length in enumerate(seq_lens[:num_seqs].tolist()):
        begin, end = starts[seq], starts[seq + 1]
        if begin == end:
            continue
        own = torch.arange(length - (end - begin), length, device=query.device)
        first = bend.first_key(length - (end - begin))
        rows = bend.rows(query[begin:end], reader.num_kv_heads)
        logits = bend.logits(rows, reader.keys(block_tables[seq], first, length), own, first)
        values = reader.values(block_tables[seq], first, length)
        weights = torch.softmax(logits, dim=-1)
        out[begin:end] = by_token(weighted_sum(weights, values), len(own))
    return out


def _check_chunks(query_start_loc: Tensor, seq_lens: Tensor, num_tokens: int) -> None:
    """Raises: ValueError that names the first sequence whose chunk is negative, too long or behind the queries."""
    starts = query_start_loc.tolist()
    for seq, length in enumerate(seq_lens[: len(starts) - 1].tolist()):
        chunk = starts[seq + 1] - starts[seq]
        if not 0 <= chunk <= length or starts[seq] < 0 or starts[seq + 1] > num_tokens:
            raise ValueError(
                f"sequence {seq} of {length} tokens has the queries {starts[seq]} to {starts[seq + 1]} of {num_tokens}"
            )
