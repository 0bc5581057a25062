"""Exercise 2: paged attention for one head, in Triton.

`vllm-trace learn check ex2-triton` runs it on the GPU, or in Triton's interpreter where there is none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_len: int
) -> Tensor:
    """Launch `kernel` for every row of q. Shapes as in the torch exercise; dims are powers of two."""
    raise NotImplementedError("simple_paged_attention")


if __name__ == "__main__":
    print(
        simple_paged_attention(
            *map(torch.ones, [(1, 2), (1, 4, 2), (1, 4, 2)]), torch.tensor([0]), 3
        )
    )
