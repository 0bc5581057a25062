"""BlockPool by hand: what is in the free queue, what is found, what is told."""

import pytest

from vllm_trace.mini.block_pool import BlockPool
from vllm_trace.mini.rules import rules_for


def queue(pool):
    return [block.block_id for block in pool.free_block_queue]


def test_the_worked_example_of_the_facts():
    """40 blocks, a request held 1, 2, 3 (hashed) and 4 (not full): the two orders in which they come back."""
    for release, expected in {
        "0.32.0": [4, *range(5, 40), 3, 2, 1],
        "0.20.2": [*range(5, 40), 4, 3, 2, 1],
    }.items():
        pool = BlockPool(40, rules=rules_for(release))
        blocks = pool.get_new_blocks(4)
        pool.cache_full_blocks("r", blocks, 0, 3, ["A", "B", "C"])
        pool.free_blocks(reversed(blocks))
        assert queue(pool) == expected


def test_duplicates_stay_and_take_over():
    pool = BlockPool(4)
    one, two, three = pool.get_new_blocks(3)
    for block in (one, two, three):
        pool.cache_full_blocks("r", [block], 0, 1, ["A"])
    assert pool.get_cached_block("A", [0]) == [one]
    pool.evict_blocks([2])
    assert pool.get_cached_block("A", [0]) == [one]
    pool.evict_blocks([1])
    assert pool.get_cached_block("A", [0]) == [three]
    pool.evict_blocks([3, 3])
    assert pool.get_cached_block("A", [0]) is None
    assert not pool.cached_block_hash_to_block[0].duplicates


def test_groups_do_not_see_each_other():
    pool = BlockPool(4, num_groups=2)
    one, two = pool.get_new_blocks(2)
    pool.cache_full_blocks("r", [one], 0, 1, ["A"], group_id=0)
    assert pool.get_cached_block("A", [0, 1]) is None
    pool.cache_full_blocks("r", [two], 0, 1, ["A"], group_id=1)
    assert pool.get_cached_block("A", [0, 1]) == [one, two]


def test_null_block_is_never_handed_out():
    pool = BlockPool(3)
    assert [block.block_id for block in pool.get_new_blocks(2)] == [1, 2]
    with pytest.raises(ValueError, match="1 blocks wanted, 0 are free"):
        pool.get_new_blocks(1)


@pytest.mark.parametrize("release, ref_cnt", [("0.32.0", 1), ("0.33.0", 0)])
def test_null_block_ref_cnt_drifts_until_0_32(release, ref_cnt):
    pool = BlockPool(3, rules=rules_for(release))
    pool.touch([pool.null_block])
    assert pool.null_block.ref_cnt == ref_cnt
    pool.free_blocks([pool.null_block])
    assert queue(pool) == [1, 2]


def test_reset_only_when_nothing_is_held():
    pool = BlockPool(3)
    blocks = pool.get_new_blocks(1)
    pool.cache_full_blocks("r", blocks, 0, 1, ["A"])
    assert not pool.reset_prefix_cache()
    pool.free_blocks(blocks)
    assert pool.reset_prefix_cache()
    assert pool.get_cached_block("A", [0]) is None and queue(pool) == [2, 1]


def test_too_few_hashes_is_an_error():
    pool = BlockPool(4)
    with pytest.raises(ValueError, match="'r': 2 blocks are full, 1 hashes known"):
        pool.cache_full_blocks("r", pool.get_new_blocks(2), 0, 2, ["A"])


def test_what_is_told():
    told = []
    pool = BlockPool(3, tell=told.append)
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks("r", blocks, 0, 2, ["A", "B"], block_mask=[False, True])
    pool.free_blocks(reversed(blocks))
    pool.touch(pool.get_cached_block("B", [0]))
    pool.get_new_blocks(1)
    pool.evict_blocks([2])
    pool.get_new_blocks(0)
    assert told == [
        ("blocks.taken", [1, 2]),
        ("blocks.cached", "r", 0, 0, [2], ["B"]),
        ("blocks.freed", [2, 1], [0, 0]),
        ("blocks.touched", [2], [1]),
        ("blocks.taken", [1]),
        ("block.evicted", 2, ["B"]),
    ]
