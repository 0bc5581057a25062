"""Attention over a cache that lies in blocks, in plain torch: write K and V to slots, read them through block tables.

Follows: vLLM 0.11.0, csrc/attention/ (V1, V2 and its reduce), csrc/cache_kernels.cu, vllm/attention/ops/paged_attn.py
(`forward_decode`, the V1/V2 rule) and prefix_prefill.py; Kwon et al. 2023, section 4.
Leaves out: speed, ALiBi, sliding windows, soft caps, block-sparse attention, heads that are spread over devices.

Shapes, the same in every function here:

    key, value                     [num_tokens, num_kv_heads, head_size]
    query, out                     [num_tokens, num_heads, head_size]; when decoding, one token for each sequence
    key_cache, value_cache         [num_blocks, block_size, num_kv_heads, head_size]
    block_tables                   [num_seqs, max_num_blocks]: row i names the blocks of sequence i, in order
    seq_lens                       [num_seqs]: tokens in the cache, those of this step included
    slot_mapping                   [num_tokens]: block * block_size + offset; -1 for padding

vLLM's own V1/V2 kernels want their caches in another order, see `to_kernel_layout`. The arithmetic is float32 whatever
the caches hold. A float8 cache holds values divided by `k_scale` and `v_scale`.

With grouped-query attention `num_heads // num_kv_heads` neighbouring query heads read one KV head.

Two tokens, two heads, one block, by hand: equal keys weigh both values alike.

>>> cache = torch.zeros(2, 2, 1, 2), torch.zeros(2, 2, 1, 2)      # two blocks of two slots
>>> key, value = torch.ones(2, 1, 2), torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]])
>>> reshape_and_cache(key, value, *cache, torch.tensor([2, 3]))   # both slots of block 1
>>> table, length = torch.tensor([[1]]), torch.tensor([2])
>>> paged_attention_v1(torch.ones(1, 2, 2), *cache, table, length, scale=1.0).tolist()
[[[2.0, 2.0], [2.0, 2.0]]]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PARTITION_SIZE = 512  # tokens that one V2 partition covers
MAX_V1_SEQ_LEN = 8192  # V1 keeps all logits of a sequence in shared memory, which ends here


# -- writing -----------------------------------------------------------------------------------------------------


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write each token's K and V to its slot. Padding tokens (slot -1) are not written."""
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        stored = new[real] if scale == 1.0 else new[real] / scale
        block_size = cache.shape[1]
        # torch cannot scatter into float8, but any dtype can be viewed as bytes.
        _as_bytes(cache)[slots // block_size, slots % block_size] = _as_bytes(
            stored.to(cache.dtype)
        )


def copy_blocks(
    key_caches: Sequence[Tensor], value_caches: Sequence[Tensor], block_mapping: Tensor
) -> None:
    """Copy whole blocks inside the caches of every layer: what copy-on-write does when a shared block is written to.

    Shapes: `block_mapping [num_pairs, 2]`, (from, to). No block may be on both sides: the pairs have no order.
    """
    for cache in (*key_caches, *value_caches):
        swap_blocks(cache, cache, block_mapping)


def swap_blocks(source: Tensor, target: Tensor, block_mapping: Tensor) -> None:
    """Copy whole blocks from one cache to another, as when a sequence is swapped to the CPU or back.

    Shapes: `block_mapping [num_pairs, 2]`, (block of `source`, block of `target`).
    """
    from_blocks, to_blocks = block_mapping.unbind(1)
    moved = _as_bytes(source)[from_blocks.to(source.device)]
    _as_bytes(target)[to_blocks.to(target.device)] = moved.to(target.device)


# -- reading: one new token for each sequence --------------------------------------------------------------------


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
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Attention of each sequence's newest token, by the kernel that the rule chooses for the batch."""
    num_seqs, num_heads, _ = query.shape
    kernel = (
        paged_attention_v1
        if use_v1(int(seq_lens.max()), num_seqs, num_heads)
        else paged_attention_v2
    )
    return kernel(query, key_cache, value_cache, block_tables, seq_lens, scale, k_scale, v_scale)


def paged_attention_v1(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """One pass over each sequence: all logits, one softmax, one weighted sum.

    The CUDA kernel runs the loop's body once for each sequence and head; here a body does all heads of a sequence.
    """
    out = torch.empty_like(query)
    for seq, length in enumerate(seq_lens.tolist()):
        keys = _gather(key_cache, block_tables[seq], 0, length, k_scale)
        values = _gather(value_cache, block_tables[seq], 0, length, v_scale)
        logits = _logits(query[seq : seq + 1], keys, scale)
        out[seq] = _weighted_sum(torch.softmax(logits, dim=-1), values)[0]
    return out


def paged_attention_v2(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Every sequence in partitions of 512 tokens that know nothing of each other, then one reduce.

        tokens   0 ........ 511 | 512 ...... 1023 | 1024 .. seq_len
                 tmp_out[0]       tmp_out[1]        tmp_out[2]        each divided by its own exp_sums
                 max_logits[0]    max_logits[1]     max_logits[2]     what the reduce needs to weigh them

    Raises: ValueError when a block would lie in two partitions.
    """
    block_size = key_cache.shape[1]
    if PARTITION_SIZE % block_size:
        raise ValueError(
            f"block size {block_size} does not divide the partition size {PARTITION_SIZE}"
        )
    num_seqs, num_heads, head_size = query.shape
    num_partitions = -(-int(seq_lens.max()) // PARTITION_SIZE)
    exp_sums = query.new_zeros((num_seqs, num_heads, num_partitions), dtype=torch.float32)
    max_logits = torch.full_like(exp_sums, -torch.inf)  # a partition without tokens gets no weight
    tmp_out = exp_sums.new_zeros((num_seqs, num_heads, num_partitions, head_size))
    for seq, length in enumerate(seq_lens.tolist()):
        for part, start in enumerate(range(0, length, PARTITION_SIZE)):
            end = min(start + PARTITION_SIZE, length)
            keys = _gather(key_cache, block_tables[seq], start, end, k_scale)
            values = _gather(value_cache, block_tables[seq], start, end, v_scale)
            logits = _logits(query[seq : seq + 1], keys, scale)
            largest = logits.amax(dim=-1, keepdim=True)
            weights = torch.exp(logits - largest)
            total = weights.sum(dim=-1, keepdim=True)
            max_logits[seq, :, part] = largest[:, 0, 0]
            exp_sums[seq, :, part] = total[:, 0, 0]
            tmp_out[seq, :, part] = _weighted_sum(weights / total, values)[0]
    return paged_attention_v2_reduce(exp_sums, max_logits, tmp_out).to(query.dtype)


def paged_attention_v2_reduce(exp_sums: Tensor, max_logits: Tensor, tmp_out: Tensor) -> Tensor:
    """Weigh the partitions as one softmax over the whole sequence would have.

    A partition's sum was taken relative to its own maximum; multiplied by exp(own maximum - overall maximum), all sums
    are relative to the same one and can be compared.

    Shapes: `exp_sums`, `max_logits [num_seqs, num_heads, num_partitions]`, `tmp_out [..., num_partitions, head_size]`.
    """
    rescaled = exp_sums * torch.exp(max_logits - max_logits.amax(dim=-1, keepdim=True))
    weights = rescaled / rescaled.sum(dim=-1, keepdim=True)
    return torch.einsum("shp,shpd->shd", weights, tmp_out)


# -- reading: several new tokens for each sequence ---------------------------------------------------------------


def context_attention_fwd(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Prefill: the chunk of each sequence attends to what was cached before it, and causally to itself.

    The chunk's own K and V are in the cache already, so a prefix hit, an earlier chunk and the chunk itself read alike:

        cached   | context of an earlier step or request | this chunk  |
        query                                            |q q q q q q q|   the last one sees seq_len tokens

    Shapes: `query_start_loc [num_seqs + 1]`: sequence i owns `query[query_start_loc[i]:query_start_loc[i + 1]]`.
    """
    out = torch.empty_like(query)
    starts = query_start_loc.tolist()
    for seq, length in enumerate(seq_lens.tolist()):
        begin, end = starts[seq], starts[seq + 1]
        keys = _gather(key_cache, block_tables[seq], 0, length, k_scale)
        values = _gather(value_cache, block_tables[seq], 0, length, v_scale)
        positions = torch.arange(length, device=query.device)
        own = positions[length - (end - begin) :]  # where the chunk's tokens stand
        logits = _logits(query[begin:end], keys, scale)
        logits.masked_fill_(positions > own[:, None], -torch.inf)
        out[begin:end] = _weighted_sum(torch.softmax(logits, dim=-1), values)
    return out


# -- what all of them share --------------------------------------------------------------------------------------


def _gather(cache: Tensor, table: Tensor, start: int, end: int, scale: float) -> Tensor:
    """Tokens `start` to `end` of one sequence, collected from its blocks.

    Shapes: `table [max_num_blocks]`, returns `[end - start, num_kv_heads, head_size]`, float32.
    """
    block_size = cache.shape[1]
    first = start // block_size
    blocks = table[first : -(-end // block_size)]
    # What lies behind the last token of a block is left from an earlier owner and is cut off.
    tokens = _as_bytes(cache)[blocks].flatten(0, 1)[
        start - first * block_size : end - first * block_size
    ]
    tokens = tokens.view(cache.dtype).float()
    return tokens if scale == 1.0 else tokens * scale


def _logits(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Shapes: `query [num_tokens, num_heads, head_size]`, returns `[num_heads, num_tokens, num_keys]`."""
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads = keys.shape[1]
    grouped = query.float().reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_size)
    return torch.einsum("qkgd,skd->kgqs", grouped, keys).flatten(0, 1) * scale


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Shapes: `weights [num_heads, num_tokens, num_keys]`, returns `[num_tokens, num_heads, head_size]`."""
    grouped = weights.unflatten(0, (values.shape[1], -1))
    return torch.einsum("kgqs,skd->qkgd", grouped, values).flatten(1, 2)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory for indexing: float8 as uint8, everything else as it is."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


# -- the layout of vLLM's kernels --------------------------------------------------------------------------------


def to_kernel_layout(key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor]:
    """The caches as `torch.ops._C.paged_attention_v1` reads them: a thread takes 16 bytes of K at a time.

    Shapes: returns K `[num_blocks, num_kv_heads, head_size / x, block_size, x]`, where x elements are 16 bytes, and
    V `[num_blocks, num_kv_heads, head_size, block_size]`.
    """
    x = 16 // key_cache.element_size()
    keys = key_cache.permute(0, 2, 3, 1).unflatten(2, (-1, x)).transpose(3, 4)
    return keys.contiguous(), value_cache.permute(0, 2, 3, 1).contiguous()


def from_kernel_layout(key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor]:
    """The way back."""
    keys = key_cache.transpose(3, 4).flatten(2, 3).permute(0, 3, 1, 2)
    return keys.contiguous(), value_cache.permute(0, 3, 1, 2).contiguous()
