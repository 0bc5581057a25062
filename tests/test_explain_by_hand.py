"""``explain``: each cause and each reason, on events made by hand."""

import pytest
from recorded import admitted, arrived, ended, engine, looked_up, step, story, told, written

from vllm_trace.errors import UsageError
from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    KVGroup,
    PrefixCacheReset,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
)
from vllm_trace.explain.words import groups, ids, listed, many, times

# Causes of a miss -----------------------------------------------------------------------


def cause(tmp_path, events, name="b"):
    made = story(written(tmp_path, events), name)
    (line,) = [line for line in made.lines if line.kind == "looked up"]
    return line.facts["miss"]["cause"], line.text


def cached_by_a(hashes=(11, 12), **engine_settings):
    """Request a of 9 tokens leaves two full blocks in the cache."""
    return [
        engine(**engine_settings),
        arrived(0, "a", 9, hashes),
        *admitted(0, 9, [1, 2, 3], hashes, free=5),
        step(1, [0], [9], 5, new=[0]),
        *ended(0, [1, 2, 3]),
    ]


def test_none_shared(tmp_path):
    events = [*cached_by_a(), arrived(1, "b", 9, [21, 22]), looked_up(1, 9)]
    assert (
        "none shared",
        "prefix cache: 0 of 2 blocks hit; nobody had cached its first block (tokens 0–3)",
    ) == cause(tmp_path, events)


def test_shorter_than_a_block(tmp_path):
    events = [*cached_by_a(), arrived(1, "b", 3), looked_up(1, 3)]
    assert (
        "short",
        "prefix cache: nothing to look up: it is shorter than a block of 4 tokens",
    ) == cause(tmp_path, events)


def test_cache_off(tmp_path):
    events = [engine(enable_prefix_caching=False), arrived(0, "b", 9, [11, 12]), looked_up(0, 9)]
    assert ("cache off", "prefix cache: off in this engine, every token is computed") == cause(
        tmp_path, events
    )


def test_last_block_is_computed_for_its_logits(tmp_path):
    events = [*cached_by_a(), arrived(1, "b", 8, [11, 12]), looked_up(1, 8, 4, [[1]])]
    assert "logits" == cause(tmp_path, events)[0]


def test_evicted_then_taken(tmp_path):
    events = [
        *cached_by_a(),
        arrived(1, "c", 20),
        BlockEvicted(2, [12]),
        *admitted(1, 20, [3, 4, 5, 6, 2]),
        step(2, [1], [20], new=[1]),
        arrived(2, "b", 9, [11, 12]),
        looked_up(2, 9, 4, [[1]]),
    ]
    assert (
        "evicted",
        "prefix cache: 1 of 2 blocks hit: 1 (4 of 9 tokens); block 1 (tokens 4–7), cached by a in "
        "block 2 (event 5), was evicted at event 12 when c took that block",
    ) == cause(tmp_path, events)


def test_a_second_copy_keeps_the_hash_alive(tmp_path):
    """Duplicates are never merged: one copy evicted is no miss, the last one is."""
    events = [
        *cached_by_a(),
        BlocksCached(0, 0, 1, [7], [12]),
        BlockEvicted(2, [12]),
        arrived(1, "b", 9, [11, 12]),
        looked_up(1, 9, 4, [[1]]),
    ]
    kind, text = cause(tmp_path, events)
    assert "unread" == kind
    assert "was in the cache (block 7, from a at event 11) and was not taken" in text


def test_cache_was_reset(tmp_path):
    events = [
        *cached_by_a(),
        PrefixCacheReset(True),
        arrived(1, "b", 9, [11, 12]),
        looked_up(1, 9),
    ]
    kind, text = cause(tmp_path, events)
    assert "reset" == kind
    assert text.endswith("went when the prefix cache was reset (event 11)")


TOKENS = list(range(9))


@pytest.mark.parametrize(
    ("of_a", "of_b", "wanted", "words"),
    [
        ({"lora": "x"}, {"lora": "y"}, "lora", "but with LoRA x"),
        ({}, {"lora": "y"}, "lora", "but without a LoRA"),
        ({"salted": True}, {}, "salt", "but under a salt"),
        ({}, {"salted": True}, "salt", "but without a salt"),
        ({"salted": True}, {"salted": True}, "salt", "but under another salt"),
        ({}, {}, "none shared", "nobody had cached"),
    ],
)
def test_same_tokens_under_another_lora_or_salt(tmp_path, of_a, of_b, wanted, words):
    events = [
        engine(),
        arrived(0, "a", 9, [11, 12], token_ids=TOKENS, **of_a),
        *admitted(0, 9, [1, 2, 3], [11, 12]),
        arrived(1, "b", 9, [21, 22], token_ids=TOKENS, **of_b),
        looked_up(1, 9),
    ]
    kind, text = cause(tmp_path, events)
    assert wanted == kind
    assert words in text


def test_other_lora_without_tokens_is_not_claimed(tmp_path):
    events = [*cached_by_a(), arrived(1, "b", 9, [21, 22], lora="y"), looked_up(1, 9)]
    made = story(written(tmp_path, events), "b")
    assert "none shared" == made.lines[1].facts["miss"]["cause"]
    assert any("token ids were not recorded (--tokens)" in line for line in made.unknown)


def test_one_group_of_a_hybrid_model_lost_the_block(tmp_path):
    both = [
        KVGroup("FullAttentionSpec", 4, ["layers.0"]),
        KVGroup("SlidingWindowSpec", 4, ["layers.1"], sliding_window=4),
    ]
    events = [
        engine(groups=both),
        arrived(0, "a", 9, [11, 12]),
        looked_up(0, 9, 0, [[], []]),
        BlocksTaken([1, 2, 3]),
        BlocksTaken([4, 5, 6]),
        BlocksCached(0, 0, 0, [1, 2], [11, 12]),
        BlocksCached(0, 1, 0, [4, 5], [11, 12]),
        SlotsAllocated(0, 9, 0, [[1, 2, 3], [4, 5, 6]], [], 2),
        BlockEvicted(4, [11]),
        arrived(1, "b", 9, [11, 12]),
        looked_up(1, 9, 0, [[], []]),
    ]
    kind, text = cause(tmp_path, events)
    assert "group" == kind
    assert "in KV group 1 (SlidingWindowSpec), though other groups still have it" in text
    assert "got 1–3 | 4–6 (logical 0–2); 2 left free" in told(tmp_path, "a")


# Waiting --------------------------------------------------------------------------------


def test_why_it_waited_follows_the_scheduler(tmp_path):
    """Behind one that was refused; no look at the queue while preempting; full; spent; refused."""
    events = [
        engine(num_blocks=4, max_num_seqs=2, max_num_scheduled_tokens=12),
        arrived(0, "a", 4),
        *admitted(0, 4, [1], free=2),
        step(1, [0], [4], 2, new=[0]),
        arrived(1, "big", 16),
        arrived(2, "b", 8),
        looked_up(1, 16),
        SlotsRefused(1, 11, 0, 2),
        step(2, [0], [1], 2, num_waiting=2),
        RequestFreed(1),
        RequestFinished(1, 3, "abort", 0, 0),
        step(3, [0, 9], [1, 1], 2, num_waiting=1),
        step(4, [0], [12], 2, num_waiting=1),
        RequestPreempted(0, 5, 3),
        step(5, [], [], 3, num_waiting=2, preempted=[0]),
        looked_up(2, 8),
        SlotsRefused(2, 8, 0, 1),
        step(6, [0], [1], 1, num_waiting=1),
        step(7, [0], [1], 1, num_waiting=1),
        *admitted(2, 8, [2, 3]),
        step(8, [2], [8], new=[2]),
    ]
    assert [
        "step 2: waited behind big, which the pool refused, 4 blocks wanted and 2 free",
        "step 3: waited; no place in the batch, which is full with 2 (max_num_seqs)",
        "step 4: waited; others had spent the step's budget of 12 tokens",
        "step 5: waited; nobody is admitted in a step that preempts",
        "step 6: waited; the pool refused it once: 2 blocks wanted; 1 free",
        "step 7: waited; why is not recorded",
    ] == [text for text in told(written(tmp_path, events), "b") if ": waited" in text]


def test_preempted_for_another_and_back_with_its_own_blocks(tmp_path):
    events = [
        engine(num_blocks=4),
        arrived(0, "old", 4, [11]),
        arrived(1, "young", 8, [21, 22]),
        *admitted(0, 4, [1], [11], free=2),
        *admitted(1, 8, [2, 3], [21, 22]),
        step(1, [0, 1], [4, 8], new=[0, 1]),
        SlotsRefused(0, 1, 0, 0),
        BlocksFreed([3, 2], [0, 0]),
        RequestFreed(1),
        RequestPreempted(1, 8, 2),
        BlocksTaken([3]),
        SlotsAllocated(0, 1, 0, [[3]], [], 1),
        step(2, [0], [1], 1, preempted=[1]),
        *ended(0, [1, 3]),
        looked_up(1, 9, 8, [[2, 4]]),
        BlocksTaken([3]),
        SlotsAllocated(1, 1, 8, [[3]], [[2, 4]], 0),
        step(3, [1], [1], resumed=[1]),
    ]
    folder = written(tmp_path, events)
    said = told(folder, "young")
    assert (
        "preempted for old, which needed 1 block (refused at event N, 0 free); 8 computed tokens "
        "given up; gave back 3 2 (event N)"
    ) in said
    assert (
        "step 3: back in the batch, 1 step after its preemption; of the 8 tokens given up, 8 came "
        "back from the prefix cache and none are computed again"
    ) in said
    assert "next owner: old took 3" in said
    assert "the trace ends while the request runs, holding 2 4 3" in said
    assert "refused: 1 block wanted, 0 free; young was preempted for it (event N)" in told(
        folder, "old"
    )


# What is missing ------------------------------------------------------------------------


def test_truncated_and_dropped(tmp_path):
    events = cached_by_a()[:7]
    made = story(written(tmp_path, events, ended="killed", dropped=3), "a")
    assert made.unknown == [
        "main-7: 3 events were dropped",
        "main-7: truncated (the process was killed)",
        "the trace does not hold the end of this request",
        "where events were dropped is not known: numbers of blocks can be wrong after",
    ]
    assert "the trace ends while the request runs, holding 1–3" == made.lines[-1].text


def test_trace_that_begins_after_the_engine(tmp_path):
    events = cached_by_a()[1:]
    made = story(written(tmp_path, events), "a")
    assert any(line.startswith("the trace begins after the engine did") for line in made.unknown)
    assert "finished" in {line.kind for line in made.lines}


def test_names(tmp_path):
    events = [
        engine(), arrived(0, "chat-1-0a1b2c3d", 4), arrived(1, "chat-2-0a1b2c3e", 4),
        arrived(2, "twice", 4), arrived(3, "twice", 5),
    ]  # fmt: skip
    folder = written(tmp_path, events)
    assert "chat-2-0a1b2c3e" == story(folder, "chat-2").request
    with pytest.raises(UsageError, match="'chat' may be any of 2 requests: chat-1-0a1b2c3d"):
        story(folder, "chat")
    with pytest.raises(UsageError, match="did you mean 'twice'"):
        story(folder, "twoce")
    with pytest.raises(UsageError, match="unknown request ''"):
        story(folder, "")
    assert ["others have the same name; ask for them as #3"] == [
        line for line in story(folder, "twice").unknown if "same name" in line
    ]
    assert 3 == story(folder, "#3").number


def test_a_long_prefill_is_told_in_eight_lines(tmp_path):
    events = [engine(num_blocks=400), arrived(0, "a", 1200)]
    events += [looked_up(0, 1200), SlotsAllocated(0, 64, 0, [list(range(1, 17))], [], 1)]
    events += [
        step(n, [0], [64 if n < 19 else 48], new=[0] if n == 1 else []) for n in range(1, 20)
    ]
    said = [line.text for line in story(written(tmp_path, events), "a").lines]
    chunks = [text for text in said if "chunk" in text]
    assert 8 == len(chunks)
    assert "steps 7–18: chunks 7–18: tokens 384–1151" == chunks[6]
    assert "step 19: chunk 19 of 19: tokens 1152–1199" == chunks[7]


def test_traces_of_several_processes_read_alike(tmp_path):
    """A worker's file beside it changes neither names nor what is told."""
    events = cached_by_a()
    alone = told(written(tmp_path / "one", events), "a")
    folder = written(tmp_path / "two", events)
    worker = written(tmp_path / "w", [StepScheduled(1, 1, 1, 0, 0, 0, 0, [], [])], role="worker")
    (file,) = worker.glob("*.vtrace")
    file.rename(folder / "worker-8.vtrace")
    assert alone == told(folder, "a")
    assert 0 == story(folder, "a").number


# Words ----------------------------------------------------------------------------------


def test_words():
    assert "no blocks, 1 block, 2 blocks" == ", ".join(many(n, "block") for n in (0, 1, 2))
    assert "once twice 3 times" == " ".join(times(n) for n in (1, 2, 3))
    assert "a; a and b; a, b and c; a, b, c and 2 more" == "; ".join(
        listed(list("abcde")[:n]) for n in (1, 2, 3, 5)
    )
    assert "1–3 7 9 10" == ids([1, 2, 3, 7, 9, 10])
    assert "· · 3" == ids([0, 0, 3])
    assert "6 5 4" == ids([6, 5, 4])
    assert "1 3 5 7 9 11 13 15 … 39" == ids(list(range(1, 41, 2)))
    assert "1–3 | 4" == groups([[1, 2, 3], [4]])
