"""Rows and slots."""

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed")

from vllm_trace.mini.block_table import PADDING_SLOT, BlockTable, slot_mapping  # noqa: E402


def test_slot_is_block_times_size_plus_offset():
    assert slot_mapping([7, 2], range(8), 4).tolist() == [28, 29, 30, 31, 8, 9, 10, 11]


def test_rows_grow_move_and_swap():
    table = BlockTable(max_num_reqs=3, max_num_blocks_per_req=4, block_size=4)
    table.add_row([5, 6], 0)
    table.append_row([7], 0)
    table.add_row([9], 1)
    assert table.get_row(0).tolist() == [5, 6, 7]
    table.swap_row(0, 1)
    assert (table.get_row(0).tolist(), table.get_row(1).tolist()) == ([9], [5, 6, 7])
    table.move_row(1, 2)
    assert table.get_row(2).tolist() == [5, 6, 7]
    table.add_row([1], 2)
    assert table.get_row(2).tolist() == [1]


def test_a_flat_batch_with_padding():
    table = BlockTable(2, 4, 4)
    table.add_row([5, 6], 0)
    table.add_row([9], 1)
    slots = table.compute_slot_mapping([0, 0, 1], [3, 4, 0], num_padded=5)
    assert slots.tolist() == [23, 24, 36, PADDING_SLOT, PADDING_SLOT]
