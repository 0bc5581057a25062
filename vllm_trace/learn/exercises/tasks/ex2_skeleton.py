"""Exercise 2: paged attention for one head, in torch.

`vllm-trace learn check ex2` compares it with dense attention; blocks that are not yours, and places
behind your last token, hold NaN.
"""

import torch


def simple_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
) -> torch.Tensor:
    """softmax(q k / sqrt(head_dim)) v over the first `context_len` tokens, which lie in blocks.

    q, result: [num_tokens, head_dim]; caches: [num_blocks, block_size, head_dim];
    block_table: [max_blocks], only the first context_len / block_size (rounded up) entries count.
    1. For each block of the table: its scores. 2. Softmax over all of them. 3. Weighted sum of v.
    """
    raise NotImplementedError("simple_paged_attention")
