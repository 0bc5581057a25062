"""Exercise 1, solved."""


class SimpleBlockManager:
    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.free_blocks = list(range(num_blocks))
        self.block_tables: dict[int, list[int]] = {}

    def allocate(self, seq_id: int, num_blocks: int) -> list[int]:
        if num_blocks > len(self.free_blocks):
            raise MemoryError(f"{num_blocks} wanted, {len(self.free_blocks)} free")
        taken, self.free_blocks = self.free_blocks[:num_blocks], self.free_blocks[num_blocks:]
        self.block_tables.setdefault(seq_id, []).extend(taken)
        return taken

    def free(self, seq_id: int) -> None:
        self.free_blocks = self.block_tables.pop(seq_id) + self.free_blocks

    def get_block_table(self, seq_id: int) -> list[int]:
        return list(self.block_tables[seq_id])

    def get_num_free_blocks(self) -> int:
        return len(self.free_blocks)
