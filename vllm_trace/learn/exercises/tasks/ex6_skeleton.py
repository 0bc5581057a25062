"""Exercise 6: copy-on-write.

Sequences that fork share all their blocks, the last one too, though it is not full. Whoever writes
into a shared block first gets a copy of it. `vllm-trace learn check ex6` carries out your copies on
a memory and looks whether every sequence still reads its own tokens.
"""


class ForkingBlockManager:
    """Blocks with reference counts. Blocks are numbered from 0."""

    def __init__(self, num_blocks: int, block_size: int):
        raise NotImplementedError("__init__")

    def allocate(self, seq_id: int, num_tokens: int) -> None:
        """Blocks for a new sequence of that many tokens. MemoryError when there are too few."""
        raise NotImplementedError("allocate")

    def fork(self, parent: int, child: int) -> None:
        """The child holds what the parent holds. Nothing is copied."""
        raise NotImplementedError("fork")

    def append(self, seq_id: int) -> list[tuple[int, int]]:
        """Make room for one more token; return the copies (from, to) to be done before it is written.

        A new block when the last one is full; a copy when the last one is shared; else nothing.
        MemoryError when there is no free block, and then nothing has changed.
        """
        raise NotImplementedError("append")

    def free(self, seq_id: int) -> None:
        """The sequence is gone; blocks that nobody holds any more are free."""
        raise NotImplementedError("free")

    def get_block_table(self, seq_id: int) -> list[int]:
        raise NotImplementedError("get_block_table")

    def get_num_free_blocks(self) -> int:
        raise NotImplementedError("get_num_free_blocks")
