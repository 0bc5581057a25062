"""What the kernels read: for each request a row of block ids, and for each token the slot where its K and V go.

Follows: vLLM 0.11.0, v1/worker/block_table.py (the last one in numpy); later releases compute the same on the device.
Leaves out: kernel blocks smaller than manager blocks, context parallelism, copies to a device.

    position 5, block size 4, row [7, 2]:   row[5 // 4] = 2,   slot = 2 * 4 + 5 % 4 = 9
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

IntArray = Sequence[int] | np.ndarray
PADDING_SLOT = -1  # a token that stands for nothing: its K and V are not written


def slot_mapping(table: IntArray, positions: IntArray, block_size: int) -> np.ndarray:
    """The slot of each position.

    Shapes: `table [num_blocks]`, `positions [num_tokens]`, returns `[num_tokens]`, int64.
    >>> slot_mapping([7, 2], [3, 4, 5], block_size=4).tolist()
    [31, 8, 9]
    """
    table, positions = np.asarray(table, np.int64), np.asarray(positions, np.int64)
    return table[positions // block_size] * block_size + positions % block_size


class BlockTable:
    """One row for each request of the batch. Rows move when requests leave; a row's number is not a request."""

    def __init__(self, max_num_reqs: int, max_num_blocks_per_req: int, block_size: int):
        self.block_size = block_size
        self.table = np.zeros((max_num_reqs, max_num_blocks_per_req), np.int32)
        self.num_blocks_per_row = np.zeros(max_num_reqs, np.int32)

    def add_row(self, block_ids: IntArray, row: int) -> None:
        """A new or resumed request: its whole table."""
        self.num_blocks_per_row[row] = 0
        self.append_row(block_ids, row)

    def append_row(self, block_ids: IntArray, row: int) -> None:
        """The blocks that a running request got in this step."""
        start = self.num_blocks_per_row[row]
        self.table[row, start : start + len(block_ids)] = block_ids
        self.num_blocks_per_row[row] += len(block_ids)

    def move_row(self, source: int, target: int) -> None:
        self.add_row(self.get_row(source), target)

    def swap_row(self, one: int, other: int) -> None:
        self.table[[one, other]] = self.table[[other, one]]
        self.num_blocks_per_row[[one, other]] = self.num_blocks_per_row[[other, one]]

    def get_row(self, row: int) -> np.ndarray:
        return self.table[row, : self.num_blocks_per_row[row]].copy()

    def compute_slot_mapping(
        self, rows: np.ndarray, positions: np.ndarray, num_padded: int = 0
    ) -> np.ndarray:
        """Slots of a flat batch: token i belongs to `rows[i]` and stands at `positions[i]`; padding follows.

        Shapes: `rows [num_tokens]`, `positions [num_tokens]`, returns `[max(num_tokens, num_padded)]`.
        """
        rows, positions = np.asarray(rows, np.int64), np.asarray(positions, np.int64)
        block_ids = self.table[rows, positions // self.block_size].astype(np.int64)
        slots = np.full(max(len(positions), num_padded), PADDING_SLOT, np.int64)
        slots[: len(positions)] = block_ids * self.block_size + positions % self.block_size
        return slots
