"""Exercise 3: three layouts of a cache, benchmarked.

    layout 1   [num_blocks, block_size, num_heads, head_dim]
    layout 2   [num_blocks, num_heads, block_size, head_dim]
    layout 3   [num_heads, num_blocks, block_size, head_dim]

`vllm-trace learn check ex3` tests the three functions, times attention over each layout on your
machine, draws a plot, and asks about it.
"""

import torch


def make_cache(
    layout: int, num_blocks: int, block_size: int, num_heads: int, head_dim: int
) -> torch.Tensor:
    """A cache of zeros (torch.zeros) in that layout."""
    raise NotImplementedError("make_cache")


def write_token(
    cache: torch.Tensor, layout: int, block: int, place: int, vectors: torch.Tensor
) -> None:
    """Store the vectors of one token, [num_heads, head_dim], at a place of a block."""
    raise NotImplementedError("write_token")


def read_head(cache: torch.Tensor, layout: int, blocks: torch.Tensor, head: int) -> torch.Tensor:
    """Everything in these blocks of one head: [len(blocks) * block_size, head_dim]."""
    raise NotImplementedError("read_head")
