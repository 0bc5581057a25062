"""Exercise 1: a simple block manager.

`vllm-trace learn check ex1` runs it: first the deep dive's assertion, then the same calls that a
real vLLM's BlockPool got.
"""


class SimpleBlockManager:
    """Free blocks in a list, and a table for each sequence. Blocks are numbered from 0."""

    def __init__(self, num_blocks: int, block_size: int):
        raise NotImplementedError("__init__")

    def allocate(self, seq_id: int, num_blocks: int) -> list[int]:
        """Give the sequence more blocks and return the new ones; all of them, or MemoryError and none."""
        raise NotImplementedError("allocate")

    def free(self, seq_id: int) -> None:
        """Take back everything that the sequence holds. It is used again before other free blocks."""
        raise NotImplementedError("free")

    def get_block_table(self, seq_id: int) -> list[int]:
        """The sequence's blocks in logical order. What a caller does to the list must not matter."""
        raise NotImplementedError("get_block_table")

    def get_num_free_blocks(self) -> int:
        raise NotImplementedError("get_num_free_blocks")
