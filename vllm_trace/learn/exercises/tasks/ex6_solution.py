"""Exercise 6, solved."""


class ForkingBlockManager:
    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.free_blocks = list(range(num_blocks))
        self.ref_cnt = [0] * num_blocks
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def allocate(self, seq_id: int, num_tokens: int) -> None:
        need = -(-num_tokens // self.block_size)
        if need > len(self.free_blocks):
            raise MemoryError(f"{need} blocks wanted")
        self.tables[seq_id] = [self._take() for _ in range(need)]
        self.lengths[seq_id] = num_tokens

    def fork(self, parent: int, child: int) -> None:
        self.tables[child] = list(self.tables[parent])
        self.lengths[child] = self.lengths[parent]
        for block in self.tables[child]:
            self.ref_cnt[block] += 1

    def append(self, seq_id: int) -> list[tuple[int, int]]:
        table, copies = self.tables[seq_id], []
        if self.lengths[seq_id] % self.block_size == 0:
            table.append(self._take())
        elif self.ref_cnt[table[-1]] > 1:
            shared = table[-1]
            table[-1] = self._take()
            self.ref_cnt[shared] -= 1
            copies.append((shared, table[-1]))
        self.lengths[seq_id] += 1
        return copies

    def free(self, seq_id: int) -> None:
        del self.lengths[seq_id]
        for block in self.tables.pop(seq_id):
            self.ref_cnt[block] -= 1
            if self.ref_cnt[block] == 0:
                self.free_blocks.append(block)

    def get_block_table(self, seq_id: int) -> list[int]:
        return list(self.tables[seq_id])

    def get_num_free_blocks(self) -> int:
        return len(self.free_blocks)

    def _take(self) -> int:
        if not self.free_blocks:
            raise MemoryError("no free block")
        block = self.free_blocks.pop(0)
        self.ref_cnt[block] = 1
        return block
