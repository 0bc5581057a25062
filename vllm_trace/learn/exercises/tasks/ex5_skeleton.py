"""Exercise 5: hashes of prefixes.

`vllm-trace learn check ex5` compares the hits with those of a real vLLM's prefix cache.
"""

from collections.abc import Collection, Hashable


def block_hashes(tokens: list[int], block_size: int, salt: str = "") -> list[Hashable]:
    """One hash for each full block. It stands for the block and everything before it, and the salt."""
    raise NotImplementedError("block_hashes")


def num_hit_tokens(
    hashes: list[Hashable], cached: Collection[Hashable], num_tokens: int, block_size: int
) -> int:
    """Tokens of a prompt of `num_tokens` that need not be computed.

    Whole blocks from the start up to the first one that is not cached; at least one token is left
    to compute, because somebody must make logits.
    """
    raise NotImplementedError("num_hit_tokens")
