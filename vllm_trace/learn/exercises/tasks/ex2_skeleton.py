"""Exercise 2: paged attention for one head, in torch.

`vllm-trace learn check ex2` compares it with dense attention; blocks that are not yours, and places
behind your last token, hold NaN.
"""

import torch
from torch import Tensor


def simple_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_len: int
) -> Tensor:
    """softmax(q k / sqrt(head_dim)) v over the first `context_len` tokens, which lie in blocks.

    q, result: [num_tokens, head_dim]; caches: [num_blocks, block_size, head_dim];
    block_table: [max_blocks], only the first context_len / block_size (rounded up) entries count.
    1. For each block of the table: its scores. 2. Softmax over all of them. 3. Weighted sum of v.
    """
    raise NotImplementedError("simple_paged_attention")


if __name__ == "__main__":
    print(
        simple_paged_attention(
            *map(torch.ones, [(1, 2), (1, 4, 2), (1, 4, 2)]), torch.tensor([0]), 3
        )
    )
