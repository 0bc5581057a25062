"""KVCacheManager without vLLM: hits, windows, refusals, and the rules of other releases."""

import pytest

from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, KVCacheManager, SlidingWindowSpec
from vllm_trace.mini.request import Request, RequestStatus
from vllm_trace.mini.rules import rules_for


def prompt(name, num_tokens, hashes):
    return Request(name, num_prompt_tokens=num_tokens, block_hashes=hashes)


def admit(manager, request):
    hits, num_hit_tokens, request.shared_prefix_boundary = manager.get_computed_blocks(request)
    new = manager.allocate_slots(request, request.num_tokens - num_hit_tokens, num_hit_tokens, hits)
    if new is not None:
        request.num_computed_tokens = request.num_tokens
        request.status = RequestStatus.RUNNING
    return num_hit_tokens


def test_a_fully_cached_prompt_computes_its_last_block_again():
    manager = KVCacheManager(8, [FullAttentionSpec(4)], 64)
    admit(manager, prompt("a", 8, "AB"))
    assert admit(manager, prompt("b", 8, "AB")) == 4
    assert manager.get_block_ids("b") == ([1, 3],)


def test_two_equal_prompts_in_one_step_share_blocks_before_they_are_computed():
    manager = KVCacheManager(8, [FullAttentionSpec(4)], 64)
    admit(manager, prompt("a", 9, "AB"))
    assert admit(manager, prompt("b", 9, "AB")) == 8
    assert [manager.block_pool.blocks[i].ref_cnt for i in (1, 2, 3, 4)] == [2, 2, 1, 1]


def test_refusal_changes_nothing():
    told = []
    manager = KVCacheManager(4, [FullAttentionSpec(4)], 64, tell=told.append)
    assert manager.allocate_slots(prompt("a", 16, "ABCD"), 16) is None
    assert told == [("slots.refused", "a", 16, 0, 3, 4)]
    assert manager.get_block_ids("a") == ([],) and manager.block_pool.get_num_free_blocks() == 3


def test_decoding_inside_a_block_needs_nothing():
    manager = KVCacheManager(8, [FullAttentionSpec(4)], 64)
    request = prompt("a", 5, "A")
    admit(manager, request)
    for num_tokens, ids in ((6, [1, 2]), (7, [1, 2]), (8, [1, 2]), (9, [1, 2, 3])):
        request.append_output_tokens(1)
        if num_tokens == 8:
            request.block_hashes.append("B")
        manager.allocate_slots(request, 1)
        request.num_computed_tokens += 1
        assert (request.num_tokens, manager.get_block_ids("a")) == (num_tokens, (ids,))
    assert manager.block_pool.blocks[2].block_hash == "B"


def test_a_window_gives_its_head_back_and_keeps_positions():
    manager = KVCacheManager(12, [SlidingWindowSpec(4, sliding_window=8)], 64)
    request = prompt("a", 12, "ABC")
    admit(manager, request)
    request.append_output_tokens(1)
    manager.allocate_slots(request, 1)
    assert manager.get_block_ids("a") == ([0, 2, 3, 4],)


def test_full_attention_and_window_agree_on_a_hit():
    groups = [FullAttentionSpec(4), SlidingWindowSpec(4, sliding_window=8)]
    manager = KVCacheManager(30, groups, 64)
    admit(manager, prompt("a", 17, "ABCD"))
    hits, num_hit_tokens, boundary = manager.get_computed_blocks(prompt("b", 17, "ABCD"))
    assert [[block.block_id for block in table] for table in hits] == [[1, 2, 3, 4], [0, 0, 8, 9]]
    assert (num_hit_tokens, boundary) == (16, 0)
    manager.block_pool.evict_blocks(
        [9]
    )  # the window's last block: it can only resume where two are in a row
    hits, num_hit_tokens, boundary = manager.get_computed_blocks(prompt("b", 17, "ABCD"))
    assert [[block.block_id for block in table] for table in hits] == [[1, 2, 3], [0, 7, 8]]
    assert (num_hit_tokens, boundary) == (12, 16)


def test_sparse_window_cache_keeps_what_a_resend_needs():
    for release, hashed in {
        "0.32.0": [None, "B", "C", None],
        "0.20.2": ["A", "B", "C", "D"],
    }.items():
        manager = KVCacheManager(
            12,
            [SlidingWindowSpec(4, sliding_window=8)],
            64,
            retention_interval=0,
            rules=rules_for(release),
        )
        admit(manager, prompt("a", 16, "ABCD"))
        assert [block.block_hash for block in manager.get_blocks("a")[0]] == hashed


def test_head_first_without_caching_in_0_8_5():
    for release, queue in {"0.8.5": [3, 4, 1, 2], "0.9.2": [3, 4, 2, 1]}.items():
        manager = KVCacheManager(
            5, [FullAttentionSpec(4)], 64, enable_caching=False, rules=rules_for(release)
        )
        request = prompt("a", 8, "")
        admit(manager, request)
        manager.free(request)
        assert [block.block_id for block in manager.block_pool.free_block_queue] == queue


def test_null_head_is_freed_until_0_32():
    for release, ids in {"0.32.0": [3, 2, 0], "0.33.0": [3, 2]}.items():
        told = []
        manager = KVCacheManager(
            12,
            [SlidingWindowSpec(4, sliding_window=8)],
            64,
            rules=rules_for(release),
            tell=told.append,
        )
        request = prompt("a", 12, "ABC")
        admit(manager, request)
        manager.remove_skipped_blocks("a", 12)
        manager.free(request)
        assert told[-2][:2] == ("blocks.freed", ids)


def test_watermark_keeps_blocks_for_those_who_run():
    for release, fits in {"0.32.0": False, "0.20.2": True}.items():
        manager = KVCacheManager(
            10, [FullAttentionSpec(4)], 64, watermark=0.3, rules=rules_for(release)
        )
        admitted = manager.allocate_slots(prompt("a", 28, "ABCDEFG"), 28) is not None
        assert admitted is fits


def test_who_does_not_fit_as_a_whole_is_refused_the_chunk_and_until_0_20_all_that_is_left():
    for release, num_tokens in {"0.32.0": 4, "0.20.2": 28}.items():
        told = []
        manager = KVCacheManager(
            6, [FullAttentionSpec(4)], 64, rules=rules_for(release), tell=told.append
        )
        request = prompt("a", 28, "ABCDEFG")
        assert manager.allocate_slots(request, 4, full_sequence_must_fit=True) is None
        assert [("slots.refused", "a", num_tokens, 0, 5, 7)] == told


def test_groups_of_different_block_sizes_are_refused():
    with pytest.raises(ValueError, match="different block sizes"):
        KVCacheManager(8, [FullAttentionSpec(4), SlidingWindowSpec(8, 8)], 64)


def test_nothing_to_allocate_is_an_error():
    with pytest.raises(ValueError, match="'a'"):
        KVCacheManager(8, [FullAttentionSpec(4)], 64).allocate_slots(prompt("a", 4, "A"), 0)
