"""``diff``: names, blocks and settings that differ, in two small traces made by hand."""

from itertools import count

import msgspec
import pytest
from recorded import (
    admitted,
    arrived,
    compared,
    edited,
    ended,
    engine,
    looked_up,
    step,
    updated,
    written,
)

from vllm_trace.cli import main
from vllm_trace.diff import diff
from vllm_trace.diff.align import Renaming
from vllm_trace.diff.tokens import ownership
from vllm_trace.diff.words import render
from vllm_trace.errors import TraceError
from vllm_trace.events import (
    BlocksTaken,
    KVGroup,
    RequestArrived,
    SlotsAllocated,
    StepScheduled,
    TableRowChanged,
)
from vllm_trace.trace import read_trace


def work(blocks=(1, 2, 3), hashes=(11, 12), names=("a", "b"), tokens=((1,), (2,)), **settings):
    """Two requests of two steps each, one after the other, the second with the first one's blocks."""
    first, second = names
    numbers = count(1)
    x, y, z = blocks
    return [
        engine(**settings),
        arrived(0, first, 9, hashes),
        *admitted(0, 9, [x, y, z], hashes, free=5),
        step(next(numbers), [0], [9], 5, new=[0]),
        updated(1, [tokens[0]]),
        *ended(0, [x, y, z]),
        arrived(1, second, 9, hashes),
        looked_up(1, 9, 8, [[x, y]]),
        BlocksTaken([z]),
        SlotsAllocated(1, 1, 8, [[z]], [[x, y]], 5),
        step(next(numbers), [1], [1], 5, new=[1], finished=[0]),
        updated(2, [tokens[1]]),
        *ended(1, [x, y, z]),
    ]


def test_renamed_blocks_by_hand(tmp_path):
    a = written(tmp_path / "a", work())
    found = compared(a, written(tmp_path / "b", work(blocks=(7, 5, 2))))
    assert (None, ["order"], 4) == (
        found.divergence, [one.kind for one in found.renamed], found.renamed[0].a.event
    )  # fmt: skip
    assert "blocks.taken blocks=[7, 5, 2]" == found.renamed[0].b.said


def test_a_renaming_that_is_not_one_to_one_diverges(tmp_path):
    def other(events):
        events[12].blocks[0] = [7, 6]  # the hit is in blocks that the first request never had

    a = written(tmp_path / "a", work())
    found = compared(a, edited(written(tmp_path / "x", work()), tmp_path / "b", other))
    assert ("order", 13) == (found.divergence.kind, found.divergence.a.event)
    assert "block 1 of A was block 1 of B so far, and is 7 here" == found.divergence.note


def test_what_reads_the_same_and_means_another_block_is_said(tmp_path):
    """Blocks are taken under other names, and then one is called by A's name."""

    def other(events):
        events[3].blocks[0] = 9

    a = written(tmp_path / "a", work())
    found = compared(a, edited(written(tmp_path / "x", work()), tmp_path / "b", other))
    first = found.divergence
    assert first.a.said == first.b.said
    assert "block 1 of A was block 9 of B so far, and is 1 here" == first.note
    assert first.note in render(found)


def test_renaming():
    names = Renaming(fixed=(0,))
    assert names.fits([1, 2, 1], [5, 6, 5])
    assert not names.fits([3, 1], [7, 6])
    assert names.fits([3], [8])  # what did not fit left nothing behind
    assert not names.fits([0], [4])
    assert not names.fits([4], [5])
    assert not names.fits([1], [])
    assert (1, 0, 9) == (names.in_a(5), names.in_a(0), names.in_a(9))


def test_requests_are_matched_without_the_random_suffix(tmp_path):
    a = written(tmp_path / "a", work(names=("0-a4c7e176", "1-0badcafe")))
    b = written(tmp_path / "b", work(names=("0-11111111", "1-22222222")))
    found = compared(a, b)
    assert (True, "name without vLLM's random suffix") == (found.is_same, found.matched_by)


def test_requests_are_matched_by_arrival_when_no_name_is_in_both(tmp_path):
    a = written(tmp_path / "a", work())
    found = compared(a, written(tmp_path / "b", work(names=("c", "d"))))
    assert found.is_same
    assert "order of arrival, because no name is in both" == found.matched_by


def test_a_request_that_only_one_has(tmp_path):
    a = written(tmp_path / "a", work())
    found = compared(a, written(tmp_path / "b", work(names=("a", "c"))))
    assert (["b"], ["c"], False) == (found.only_a, found.only_b, found.is_same)
    assert "request.arrived" == found.divergence.a.said.split()[0]


def test_sampled_tokens_are_named_as_a_cause(tmp_path):
    def warm(events):
        for event in events:
            if type(event) is RequestArrived:
                event.sampling = {"temperature": 1.0}

    a = edited(written(tmp_path / "x", work()), tmp_path / "a", warm)
    b = edited(written(tmp_path / "y", work(tokens=((1,), (3,)))), tmp_path / "b", warm)
    found = compared(a, b)
    assert ("b", 0, 2, 3) == (
        found.outputs[0].request, found.outputs[0].position,
        found.outputs[0].token_a, found.outputs[0].token_b,
    )  # fmt: skip
    assert "drawn at random" in found.verdict.text
    assert "A: no worker's tables and slots are recorded" in found.verdict.not_checked


def test_both_write_one_block(tmp_path):
    """The second request is given a block that the first still has, without a take of its own."""
    events = [
        engine(),
        arrived(0, "a", 4),
        arrived(1, "b", 4),
        *admitted(0, 4, [1]),
        SlotsAllocated(1, 4, 0, [[1]], [], 7),
        step(1, [0, 1], [4, 4], new=[0, 1]),
        updated(1, [[1], [1]]),
    ]
    (breach,) = ownership(read_trace(written(tmp_path, events)), {0: "a", 1: "b"})
    assert (8, "two owners", "b and a both write block 1") == (
        breach.event,
        breach.kind,
        breach.text,
    )


def test_idle_steps_are_no_difference(tmp_path):
    """An engine in a process of its own makes a step of nothing to tell who finished."""
    events = work()
    second = next(i for i, e in enumerate(events) if type(e) is StepScheduled and e.step == 2)
    later = [
        msgspec.structs.replace(e, step=3) if getattr(e, "step", 0) == 2 else e
        for e in events[second:]
    ]
    later[0] = msgspec.structs.replace(later[0], finished=[])
    idle = [step(2, [], [], 8, finished=[0]), updated(2, [])]
    arrival = next(i for i, e in enumerate(events) if getattr(e, "request_id", "") == "b")
    other = [*events[:arrival], *idle, *events[arrival:second], *later]
    a, b = written(tmp_path / "a", events), written(tmp_path / "b", other)
    assert compared(a, b).is_same
    assert compared(b, a).is_same


def test_settings_that_one_trace_does_not_record(tmp_path):
    a = written(tmp_path / "a", work(model="/here/tiny"))
    found = compared(a, written(tmp_path / "b", work(model="tiny", retention=0)))
    assert found.is_same
    assert ["settings that only B recorded: retention"] == [
        line for line in found.not_judged if line.startswith("settings")
    ]


def test_dropped_events_are_no_pass(tmp_path):
    a, b = written(tmp_path / "a", work()), written(tmp_path / "b", work(), dropped=2)
    found = compared(a, b)
    assert (True, ["B"]) == (found.is_same, found.incomplete)
    assert "B: main-7: 2 events were dropped" in found.not_judged


def only_worker():
    return [TableRowChanged(1, 0, 0, 0, [1])]


def hybrid():
    both = [KVGroup("FullAttentionSpec", 4, ["l"]), KVGroup("SlidingWindowSpec", 4, ["m"], 4)]
    return [msgspec.structs.replace(engine(), groups=both), *work()[1:]]


@pytest.mark.parametrize(
    ("events", "why"),
    [
        (only_worker, "holds no step of a scheduler"),
        (lambda: [engine(), step(1, [], [])], "holds no request's arrival"),
        (hybrid, "A has the KV-cache groups FullAttentionSpec, B has FullAttentionSpec, SlidingW"),
        (
            lambda: [engine(), arrived(0, "z", 77), step(1, [0], [64])],
            "the prompts have 9, 9 … tokens in A and 77 … in B",
        ),
    ],
)
def test_traces_that_cannot_be_compared(tmp_path, events, why):
    a, b = written(tmp_path / "a", work()), written(tmp_path / "b", events())
    with pytest.raises(TraceError, match="cannot compare") as caught:
        diff(read_trace(a), read_trace(b))
    assert why in str(caught.value)
    assert 2 == main(["diff", str(a), str(b)])
