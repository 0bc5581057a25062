"""The V0 manager by hand: the order of ids, forks, copies, swaps."""

from vllm_trace.mini.v0 import AllocStatus, BlockSpaceManager


def test_a_freed_id_is_the_next_one():
    manager = BlockSpaceManager(2, 6, 0, watermark=0)
    manager.allocate("a", 4)
    manager.allocate("b", 2)
    manager.free("a")
    manager.allocate("c", 6)
    assert manager.get_block_table("c") == [1, 0, 3]


def test_new_blocks_come_before_the_copy_of_the_shared_one():
    manager = BlockSpaceManager(4, 8, 0, watermark=0)
    manager.allocate("parent", 6)
    manager.fork("parent", "child")
    assert manager.append_slots("child", 3) == [(1, 3)]
    assert manager.get_block_table("child") == [0, 3, 2]
    assert manager.append_slots("parent", 1) == []


def test_forks_of_one_sequence_copy_until_one_is_left():
    manager = BlockSpaceManager(4, 8, 0, watermark=0)
    manager.allocate(0, 5)
    for child in (1, 2):
        manager.fork(0, child)
    assert [manager.append_slots(i) for i in range(3)] == [[(1, 2)], [(1, 3)], []]


def test_swap_out_and_in():
    manager = BlockSpaceManager(2, 4, 4, watermark=0)
    manager.allocate("a", 3)
    manager.allocate("b", 2)
    assert manager.can_swap_out(["a"])
    assert manager.swap_out(["a"]) == [(0, 0), (1, 1)]
    assert (manager.get_block_table("a"), manager.get_num_free_cpu_blocks()) == ([4, 5], 2)
    assert manager.can_swap_in(["a"]) is AllocStatus.OK
    assert manager.swap_in(["a"]) == [(0, 1), (1, 0)]
    assert manager.append_slots("a") == []


def test_admission_has_a_watermark():
    manager = BlockSpaceManager(1, 10, 0, watermark=0.2)
    assert [manager.can_allocate(n) for n in (8, 9)] == [AllocStatus.OK, AllocStatus.NEVER]
    manager.allocate("a", 5)
    assert manager.can_allocate(4) is AllocStatus.LATER
    assert manager.can_append_slots(["a"], 5) and not manager.can_append_slots(["a"], 6)
