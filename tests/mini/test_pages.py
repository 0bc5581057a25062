"""Pages: sharing, divergence, and that nothing is lost whatever is done."""

import random

import pytest

from vllm_trace.mini.pages import BlockManager, Sequence, SimpleBlockManager


def test_prompts_with_the_same_start_share_full_pages():
    manager = BlockManager(num_pages=8, page_size=2)
    one, other = Sequence([1, 2, 3]), Sequence([1, 2, 4, 5])
    manager.allocate(one)
    manager.allocate(other)
    assert (one.page_table, other.page_table) == ([0, 1], [0, 2])
    assert manager.pages[0].ref_count == 2
    manager.free(one)
    assert manager.pages[0].ref_count == 1 and list(manager.free_pages) == [3, 4, 5, 6, 7, 1]


def test_beams_diverge_by_copy():
    manager = BlockManager(num_pages=8, page_size=4)
    parent = Sequence([1, 2, 3, 4, 5])
    manager.allocate(parent)
    beams = [parent, manager.fork(parent), manager.fork(parent)]
    copies = [manager.append(beam, 6 + i) for i, beam in enumerate(beams)]
    assert copies == [[(1, 2)], [(1, 3)], []]  # the last one keeps the page
    assert [beam.page_table for beam in beams] == [[0, 2], [0, 3], [0, 1]]


def test_a_refused_prompt_changes_nothing():
    manager = BlockManager(num_pages=2, page_size=2)
    assert not manager.can_allocate(Sequence([1] * 5))
    with pytest.raises(MemoryError):
        manager.allocate(Sequence([1, 2, 3, 4, 5]))
    assert len(manager.free_pages) == 2 and not manager.full_pages


def test_counts_always_equal_tables():
    chance = random.Random(0)
    manager, sequences = BlockManager(num_pages=40, page_size=3), []
    for _ in range(3000):
        try:
            choice = chance.random()
            if choice < 0.2 or not sequences:
                sequence = Sequence([chance.randrange(2) for _ in range(chance.randrange(1, 12))])
                manager.allocate(sequence)
                sequences.append(sequence)
            elif choice < 0.3:
                sequences.append(manager.fork(chance.choice(sequences)))
            elif choice < 0.85:
                manager.append(chance.choice(sequences), chance.randrange(2))
            else:
                manager.free(sequences.pop(chance.randrange(len(sequences))))
        except MemoryError:
            if sequences:
                manager.free(sequences.pop())
        users = [page_id for sequence in sequences for page_id in sequence.page_table]
        assert [page.ref_count for page in manager.pages] == [users.count(i) for i in range(40)]
        assert sorted(set(users)) == sorted(set(range(40)) - set(manager.free_pages))
        for sequence in sequences:
            assert len(sequence.page_table) == -(-len(sequence.token_ids) // 3)


def test_simple_block_manager():
    manager = SimpleBlockManager(num_blocks=4, block_size=16)
    assert manager.allocate(1, 3) == manager.get_block_table(1) == [0, 1, 2]
    with pytest.raises(MemoryError, match="2 blocks wanted, 1 are free"):
        manager.allocate(2, 2)
    manager.free(1)
    assert manager.allocate(2, 4) == [0, 1, 2, 3]
