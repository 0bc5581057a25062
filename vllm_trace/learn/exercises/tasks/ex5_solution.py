"""Exercise 5, solved."""

from collections.abc import Collection, Hashable


def block_hashes(tokens: list[int], block_size: int, salt: str = "") -> list[Hashable]:
    hashes: list[Hashable] = []
    parent: Hashable = ("salt", salt)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = hash((parent, tuple(tokens[start : start + block_size])))
        hashes.append(parent)
    return hashes


def num_hit_tokens(
    hashes: list[Hashable], cached: Collection[Hashable], num_tokens: int, block_size: int
) -> int:
    most = (num_tokens - 1) // block_size
    found = 0
    for each in hashes[:most]:
        if each not in cached:
            break
        found += 1
    return found * block_size
