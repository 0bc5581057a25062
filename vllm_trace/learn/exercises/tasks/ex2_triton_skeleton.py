"""Exercise 2: paged attention for one head, in Triton.

`vllm-trace learn check ex2-triton` runs it on the GPU, or in Triton's interpreter where there is none.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    out, q, k_cache, v_cache, block_table, context_len, scale,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program for one token: tl.program_id(0) is its row of q and out.

    Go through the blocks with a running maximum, sum and weighted sum. Load with a mask: what lies
    behind context_len is NaN, and 0 times NaN is NaN.
    """
    # TODO: write it
    tl.static_assert(HEAD_DIM > 0)


def simple_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
) -> torch.Tensor:
    """Launch `kernel` for every row of q. Shapes as in the torch exercise; dims are powers of two."""
    raise NotImplementedError("simple_paged_attention")
