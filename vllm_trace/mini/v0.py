"""The V0 engine's memory: fork and copy-on-write for beams, and swapping to CPU blocks instead of recomputing.

Follows: vLLM 0.8.5, core/block_manager.py, core/block/block_table.py, naive_block.py, cpu_gpu_block_allocator.py.
Leaves out: prefix caching (`PrefixCachingBlockAllocator`), sliding window, encoder tables, lookahead slots.

GPU ids come first, CPU ids after them, and there is no null block. A freed id is the next to be used:

>>> manager = BlockSpaceManager(block_size=2, num_gpu_blocks=4, num_cpu_blocks=3, watermark=0)
>>> manager.allocate("parent", 3)
>>> manager.fork("parent", "child")
>>> manager.get_block_table("child")
[0, 1]
>>> manager.append_slots("child", 1)       # the child writes into block 1, which it shares: copy it to 2 first
[(1, 2)]
>>> manager.append_slots("parent", 1)
[]
>>> manager.swap_out(["child"])            # GPU block -> CPU block, each counted from 0
[(0, 0), (2, 1)]
>>> manager.get_block_table("child"), manager.get_num_free_gpu_blocks()
([4, 5], 2)
>>> manager.swap_in(["child"])             # block 0 stayed with the parent, so the child gets a copy of its own
[(0, 2), (1, 3)]
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Hashable, Iterable, Sequence


class AllocStatus(enum.Enum):
    OK = "fits now"
    LATER = "fits when others have finished"
    NEVER = "does not fit even into an empty cache"


class BlockAllocator:
    """The ids of one device, with the number of tables that use each. vLLM: `NaiveBlockAllocator`."""

    def __init__(self, block_ids: Sequence[int]):
        self.first_id = block_ids[0] if block_ids else 0
        self.num_blocks = len(block_ids)
        self.free_block_ids = deque(block_ids)
        self.ref_cnt = dict.fromkeys(block_ids, 0)

    def allocate(self) -> int:
        """Raises: MemoryError when no block is free."""
        if not self.free_block_ids:
            raise MemoryError("no free block")
        block_id = self.free_block_ids.popleft()
        self.ref_cnt[block_id] = 1
        return block_id

    def free(self, block_id: int) -> None:
        self.ref_cnt[block_id] -= 1
        if self.ref_cnt[block_id] == 0:
            self.free_block_ids.appendleft(block_id)

    def get_num_free_blocks(self) -> int:
        return len(self.free_block_ids)

    def get_physical_block_id(self, block_id: int) -> int:
        """The number within the device's own cache, which is what a copy kernel needs."""
        return block_id - self.first_id


class BlockTable:
    """The blocks of one sequence and how many of their slots are filled."""

    def __init__(
        self,
        block_size: int,
        allocator: BlockAllocator,
        block_ids: Iterable[int] = (),
        num_full_slots: int = 0,
    ):
        self.block_size = block_size
        self.allocator = allocator
        self.physical_block_ids = list(block_ids)
        self.num_full_slots = num_full_slots

    def append_tokens(self, num_tokens: int) -> list[tuple[int, int]]:
        """Slots for tokens at the end. Returns the copies (from, to) of blocks that were shared.

        As vLLM does, new blocks are taken first and the shared block is replaced after that.
        """
        num_required = -(-(self.num_full_slots + num_tokens) // self.block_size)
        first_written = self.num_full_slots // self.block_size
        for _ in range(num_required - len(self.physical_block_ids)):
            self.physical_block_ids.append(self.allocator.allocate())
        copies = []
        for i in range(first_written, num_required):
            shared = self.physical_block_ids[i]
            if self.allocator.ref_cnt[shared] > 1:
                self.allocator.free(shared)
                self.physical_block_ids[i] = self.allocator.allocate()
                copies.append((shared, self.physical_block_ids[i]))
        self.num_full_slots += num_tokens
        return copies

    def get_num_blocks_touched_by_append(self, num_tokens: int) -> int:
        """The most blocks that `append_tokens` could take: one to copy, and new ones."""
        room = self.block_size - self.num_full_slots % self.block_size
        return 1 + -(-(num_tokens - room) // self.block_size)

    def fork(self) -> BlockTable:
        """The same blocks for a second sequence. Nothing is copied until one of them writes."""
        for block_id in self.physical_block_ids:
            self.allocator.ref_cnt[block_id] += 1
        return BlockTable(
            self.block_size, self.allocator, self.physical_block_ids, self.num_full_slots
        )

    def free(self) -> None:
        for block_id in self.physical_block_ids:
            self.allocator.free(block_id)
        self.physical_block_ids = []

    def move_to(self, allocator: BlockAllocator) -> list[tuple[int, int]]:
        """Exchange every block for one of another device. Returns (from, to) as the devices count them."""
        sources, device = self.physical_block_ids, self.allocator
        self.free()
        self.physical_block_ids = [allocator.allocate() for _ in sources]
        self.allocator = allocator
        return [
            (device.get_physical_block_id(source), allocator.get_physical_block_id(target))
            for source, target in zip(sources, self.physical_block_ids)
        ]


class BlockSpaceManager:
    """The tables of all sequences. vLLM: `SelfAttnBlockSpaceManager`.

    `watermark` is the share of GPU blocks that a new sequence must leave free, so that running ones can go on.
    """

    def __init__(
        self, block_size: int, num_gpu_blocks: int, num_cpu_blocks: int, watermark: float = 0.01
    ):
        self.block_size = block_size
        self.watermark_blocks = int(watermark * num_gpu_blocks)
        self.gpu = BlockAllocator(range(num_gpu_blocks))
        self.cpu = BlockAllocator(range(num_gpu_blocks, num_gpu_blocks + num_cpu_blocks))
        self.block_tables: dict[Hashable, BlockTable] = {}

    def can_allocate(self, num_tokens: int) -> AllocStatus:
        num_required = -(-num_tokens // self.block_size)
        if self.gpu.num_blocks - num_required < self.watermark_blocks:
            return AllocStatus.NEVER
        fits = self.gpu.get_num_free_blocks() - num_required >= self.watermark_blocks
        return AllocStatus.OK if fits else AllocStatus.LATER

    def allocate(self, seq_id: Hashable, num_tokens: int) -> None:
        """Blocks for a prompt."""
        table = BlockTable(self.block_size, self.gpu)
        table.append_tokens(num_tokens)
        self.block_tables[seq_id] = table

    def can_append_slots(self, seq_ids: Iterable[Hashable], num_tokens: int = 1) -> bool:
        touched = sum(
            self.block_tables[seq_id].get_num_blocks_touched_by_append(num_tokens)
            for seq_id in seq_ids
        )
        return touched <= self.gpu.get_num_free_blocks()

    def append_slots(self, seq_id: Hashable, num_tokens: int = 1) -> list[tuple[int, int]]:
        """Slots for new tokens. Returns what `copy_blocks` must copy before they are written."""
        return self.block_tables[seq_id].append_tokens(num_tokens)

    def fork(self, parent_id: Hashable, child_id: Hashable) -> None:
        self.block_tables[child_id] = self.block_tables[parent_id].fork()

    def free(self, seq_id: Hashable) -> None:
        if seq_id in self.block_tables:
            self.block_tables.pop(seq_id).free()

    def get_block_table(self, seq_id: Hashable) -> list[int]:
        return list(self.block_tables[seq_id].physical_block_ids)

    def can_swap_out(self, seq_ids: Iterable[Hashable]) -> bool:
        return self._can_move(seq_ids, self.cpu, num_tokens=0) is AllocStatus.OK

    def can_swap_in(self, seq_ids: Iterable[Hashable], num_tokens: int = 0) -> AllocStatus:
        return self._can_move(seq_ids, self.gpu, num_tokens)

    def swap_out(self, seq_ids: Iterable[Hashable]) -> list[tuple[int, int]]:
        """Preemption without recomputing: returns what `swap_blocks` must copy, GPU block to CPU block."""
        return self._move(seq_ids, self.cpu)

    def swap_in(self, seq_ids: Iterable[Hashable]) -> list[tuple[int, int]]:
        """Back again: CPU block to GPU block. The ids are new ones."""
        return self._move(seq_ids, self.gpu)

    def get_num_free_gpu_blocks(self) -> int:
        return self.gpu.get_num_free_blocks()

    def get_num_free_cpu_blocks(self) -> int:
        return self.cpu.get_num_free_blocks()

    def _move(self, seq_ids: Iterable[Hashable], target: BlockAllocator) -> list[tuple[int, int]]:
        return [pair for seq_id in seq_ids for pair in self.block_tables[seq_id].move_to(target)]

    def _can_move(
        self, seq_ids: Iterable[Hashable], target: BlockAllocator, num_tokens: int
    ) -> AllocStatus:
        """vLLM's estimate: the full blocks of all tables, and what appending to each could touch."""
        tables = [self.block_tables[seq_id] for seq_id in seq_ids]
        touched = sum(table.get_num_blocks_touched_by_append(num_tokens) for table in tables)
        touched += sum(table.num_full_slots // self.block_size for table in tables)
        if target.num_blocks < touched:
            return AllocStatus.NEVER
        watermark = self.watermark_blocks if target is self.gpu else 0
        return (
            AllocStatus.OK
            if target.get_num_free_blocks() - touched >= watermark
            else AllocStatus.LATER
        )
