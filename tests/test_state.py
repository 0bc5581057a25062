"""The fold that every reader asks: tables, owners, counts, hashes."""

import pytest
from helpers import configured

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    PrefixCacheReset,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    StepScheduled,
)
from vllm_trace.state import KVState, computes_prompt


def after(*events):
    state = KVState()
    for event in (configured(), *events):
        state.apply(event)
    return state


def arrived(request, num_prompt_tokens=40):
    return RequestArrived(request, 1, f"r-{request}", num_prompt_tokens, 8, 0, 0.0, [], {})


def step(number, requests, num_tokens, num_free_blocks=5, **more):
    return StepScheduled(number, 1, 1, 1, 0, num_free_blocks, 0, requests, num_tokens, **more)


FIRST = (
    arrived(0),
    BlocksTaken([1, 2]),
    BlocksCached(0, 0, 0, [1], [77]),
    SlotsAllocated(0, 40, 0, [[1, 2]], [], 6),
    step(1, [0], [40], 6, new=[0]),
)


def test_a_request_gets_blocks():
    state = after(*FIRST)
    assert {0: [[1, 2]]} == state.tables
    assert {1: 1, 2: 1} == state.ref_cnts
    assert {1: [77]} == state.hashes
    assert ({0: 40}, {0: 40}, 6) == (state.computed, state.num_prompt_tokens, state.num_free_blocks)


def test_a_hit_shares_blocks_and_counts_as_computed():
    state = after(
        *FIRST,
        arrived(1),
        BlocksTouched([1], [2]),
        BlocksTaken([3]),
        SlotsAllocated(1, 8, 32, [[3]], [[1]], 5),
        step(2, [0, 1], [1, 8], new=[1]),
    )
    assert {0: [[1, 2]], 1: [[1, 3]]} == state.tables
    assert {1: 2, 2: 1, 3: 1} == state.ref_cnts
    assert {0: 41, 1: 40} == state.computed


def test_preemption_takes_the_table_and_the_progress():
    state = after(
        *FIRST,
        BlocksFreed([2, 1], [0, 0]),
        RequestFreed(0),
        RequestPreempted(0, 40, 8),
    )
    assert ({}, {}, {0: 0}, 8) == (
        state.tables,
        state.ref_cnts,
        state.computed,
        state.num_free_blocks,
    )
    assert {1: [77]} == state.hashes  # free, and still in the prefix cache


def test_a_finished_request_is_gone():
    state = after(
        *FIRST, BlocksFreed([2, 1], [0, 0]), RequestFreed(0), RequestFinished(0, 9, "stop", 1, 0)
    )
    assert ({}, {}, {}) == (state.tables, state.computed, state.num_prompt_tokens)


def test_an_evicted_block_has_no_hash():
    assert {} == after(*FIRST, BlockEvicted(1, [77])).hashes


def test_a_reset_that_was_refused_changes_nothing():
    assert {1: [77]} == after(*FIRST, PrefixCacheReset(False)).hashes
    assert {} == after(*FIRST, PrefixCacheReset(True)).hashes


def test_what_a_sliding_window_left_behind_is_the_null_block():
    state = after(
        *FIRST,
        BlocksFreed([1], [0]),
        BlocksTaken([5]),
        SlotsAllocated(0, 1, 0, [[5]], [], 6),
    )
    assert {0: [[0, 2, 5]]} == state.tables
    # A finished request's blocks are not taken for that.
    state = after(
        *FIRST,
        arrived(1),
        SlotsAllocated(1, 8, 0, [[3]], [], 5),
        BlocksFreed([2, 1], [0, 0]),
        RequestFreed(0),
        SlotsAllocated(1, 1, 0, [[1]], [], 5),
    )
    assert [[3, 1]] == state.tables[1]


def test_a_new_engine_begins_afresh():
    state = after(*FIRST, configured(num_blocks=5))
    assert ({}, {}, {}, 4) == (state.tables, state.ref_cnts, state.hashes, state.num_free_blocks)


@pytest.mark.parametrize(
    ("count", "before", "more", "expected"),
    [
        (1, 39, {}, True),
        (1, 40, {}, False),
        (5, 40, {}, False),  # drafts
        (1, None, {}, False),
        (2, None, {}, True),
        (4, None, {"num_spec_tokens": {0: 3}}, False),
        (1, None, {"new": [0]}, True),
        (1, None, {"resumed": [0]}, True),
    ],
)
def test_what_is_computed_is_of_the_prompt_or_a_decode(count, before, more, expected):
    """None: hits are not recorded, and so it is not known where a request stands."""
    assert expected == computes_prompt(step(1, [0], [count], **more), 0, count, before, 40)
