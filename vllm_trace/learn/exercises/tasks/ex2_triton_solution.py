"""Exercise 2 in Triton, solved."""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    out, q, k_cache, v_cache, block_table, context_len, scale,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    dims = tl.arange(0, HEAD_DIM)
    places = tl.arange(0, BLOCK_SIZE)
    query = tl.load(q + token * HEAD_DIM + dims)
    largest = tl.full([], -1e30, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    summed = tl.zeros([HEAD_DIM], tl.float32)
    for logical in range(0, tl.cdiv(context_len, BLOCK_SIZE)):
        block = tl.load(block_table + logical)
        inside = logical * BLOCK_SIZE + places < context_len
        at = block * BLOCK_SIZE * HEAD_DIM + places[:, None] * HEAD_DIM + dims[None, :]
        key = tl.load(k_cache + at, mask=inside[:, None], other=0.0)
        value = tl.load(v_cache + at, mask=inside[:, None], other=0.0)
        scores = tl.sum(key * query[None, :], axis=1) * scale
        scores = tl.where(inside, scores, -1e30)
        now = tl.maximum(largest, tl.max(scores, axis=0))
        shrink = tl.exp(largest - now)
        weights = tl.where(inside, tl.exp(scores - now), 0.0)
        total = total * shrink + tl.sum(weights, axis=0)
        summed = summed * shrink + tl.sum(weights[:, None] * value, axis=0)
        largest = now
    tl.store(out + token * HEAD_DIM + dims, summed / total)


def simple_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
) -> torch.Tensor:
    out = torch.empty_like(q)
    block_size, head_dim = k_cache.shape[1:]
    kernel[(q.shape[0],)](
        out, q, k_cache, v_cache, block_table, context_len, head_dim**-0.5,
        HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
    )  # fmt: skip
    return out
