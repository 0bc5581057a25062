"""``diff``: two traces of the same work, on a real engine and edited."""

import json

import pytest
from recorded import compared, edited, find, needs_vllm, recorded

from vllm_trace.cli import main
from vllm_trace.diff.align import CLASSES
from vllm_trace.diff.tokens import ownership
from vllm_trace.diff.words import render
from vllm_trace.events import (
    AttentionPlanned,
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    EngineConfigured,
    PrefixLookedUp,
    RequestPreempted,
    SlotsAllocated,
    SlotsMapped,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
    TableRowChanged,
)
from vllm_trace.trace import read_trace


def preempt():
    return recorded("preempt", tokens=True)


# On a real engine -----------------------------------------------------------------------


@needs_vllm
def test_two_runs_of_the_same_scenario_do_not_differ():
    found = compared(preempt(), recorded("preempt"))
    assert found.is_same
    assert ("name", 3, {}, None) == (
        found.matched_by, found.num_requests, found.classes, found.divergence
    )  # fmt: skip
    assert found.num_compared > 500
    assert ["output tokens: B recorded no token ids (--tokens)"] == found.not_judged
    assert render(found).startswith("no difference in what was compared\n")


@needs_vllm
def test_a_trace_and_itself_with_tokens():
    found = compared(preempt(), preempt())
    assert found.is_same
    assert (180, [], []) == (found.num_equal_tokens, found.outputs, found.not_judged)
    assert "no difference" == render(found).splitlines()[0]


@needs_vllm
@pytest.mark.parametrize("swap", [False, True])
def test_full_and_light_are_compared_at_light(swap):
    sides = [preempt(), recorded("preempt", level="light")]
    found = compared(*(sides[::-1] if swap else sides))
    assert found.is_same
    assert found.notes[0].startswith("compared at level light")
    assert any(line.startswith("tables and slots of the kernels") for line in found.not_judged)
    assert found.num_compared > 100


@needs_vllm
def test_light_finds_a_difference_in_free_blocks(tmp_path):
    def edit(events):
        event = next(e for e in events if type(e) is StepScheduled and e.step == 6)
        event.num_free_blocks += 1

    other = edited(recorded("preempt", level="light"), tmp_path, edit)
    found = compared(preempt(), other)
    assert 6 == found.divergence.step


@needs_vllm
def test_a_larger_pool_is_told_first_and_shows_where_nobody_had_to_give_way():
    a, b = preempt(), recorded("preempt", num_gpu_blocks_override=10)
    found = compared(a, b)
    assert [("num_blocks", 9, 10)] == [(s.name, s.a, s.b) for s in found.settings]
    assert "configuration" == next(iter(found.classes))
    first = found.divergence
    number, _ = find(a, SlotsRefused)
    assert (number, "schedule", 6) == (first.a.event, first.kind, first.step)
    assert first.a.said.startswith("slots.refused request=r-2")
    assert "blocks.taken blocks=[9]" == first.b.said
    assert (0, 1) == (first.a.num_free_blocks, first.b.num_free_blocks)
    tables = {"r-0": [[1, 2, 7]], "r-1": [[3, 4, 8]], "r-2": [[5, 6]]}
    assert tables == first.a.tables == first.b.tables
    assert first.a.before[-1].split()[:3] == [str(number - 1), "slots.allocated", "request=r-1"]


@needs_vllm
def test_another_block_size_differs_at_the_first_blocks_taken():
    a, b = recorded("evict"), recorded("evict", block_size=64)
    found = compared(a, b)
    assert ("block_size", 32, 64) in [(s.name, s.a, s.b) for s in found.settings]
    number, _ = find(a, BlocksTaken)
    assert number == found.divergence.a.event
    assert ("blocks.taken blocks=[1, 2, 3, 4, 5, 6]", "blocks.taken blocks=[1, 2, 3]") == (
        found.divergence.a.said,
        found.divergence.b.said,
    )
    assert "hashes are left out: they stand for other block sizes" in found.notes


# One event edited -----------------------------------------------------------------------


def nth(events, kind, index=0, **fields):
    found = [
        e for e in events if type(e) is kind and all(getattr(e, k) == v for k, v in fields.items())
    ]
    return found[index]


def change_order(events):
    event = nth(events, BlocksFreed)
    event.blocks.reverse()
    return event


def change_eviction(events):
    event = nth(events, BlockEvicted)
    event.block = 4
    return event


def change_hash(events):
    event = nth(events, BlocksCached)
    event.hashes[0] ^= 1
    return event


def change_free(events):
    event = nth(events, SlotsAllocated, 1)
    event.num_free_blocks += 1
    return event


def change_table_size(events):
    event = nth(events, SlotsAllocated, 1)
    event.blocks[0].append(8)
    return event


def change_composition(events):
    event = nth(events, StepScheduled, step=5)
    event.requests, event.num_tokens = event.requests[:2], event.num_tokens[:2]
    return event


def change_tokens_of_a_step(events):
    event = nth(events, StepScheduled, step=1)
    event.num_tokens = [event.num_tokens[0] - 28, *event.num_tokens[1:]]
    return event


def change_output(events):
    event = nth(events, StepUpdated, 10)
    event.token_ids[0] = [event.token_ids[0][0] ^ 1]
    return event


def change_kernel(events):
    event = nth(events, AttentionPlanned, 10)
    event.variant += "-other"
    return event


def change_setting(events):
    event = nth(events, EngineConfigured)
    event.settings["max_num_seqs"] = 1
    return event


def change_slot(events):
    event = nth(events, SlotsMapped, 5)
    event.slots[0] += 1
    return event


@needs_vllm
@pytest.mark.parametrize(
    ("edit", "kind", "lane"),
    [
        (change_order, "order", "scheduler"),
        (change_eviction, "eviction", "scheduler"),
        (change_hash, "hash", "scheduler"),
        (change_free, "off by one", "scheduler"),
        (change_table_size, "off by one", "scheduler"),
        (change_composition, "schedule", "scheduler"),
        (change_tokens_of_a_step, "schedule", "scheduler"),
        (change_output, "output", "scheduler"),
        (change_kernel, "kernel", "worker"),
        (change_slot, "off by one", "worker"),
    ],
)
def test_each_class_is_found_at_its_event(tmp_path, edit, kind, lane):
    changed = []

    def keep(events):
        event = edit(events)
        changed.append(events.index(event) + 1)

    found = compared(preempt(), edited(preempt(), tmp_path, keep))
    first = found.divergence
    assert (kind, lane, changed[0], changed[0]) == (
        first.kind, first.lane, first.a.event, first.b.event
    )  # fmt: skip
    assert found.classes[kind] >= 1
    assert set(found.classes) <= set(CLASSES)
    assert first.a.said != first.b.said or kind == "output"


@needs_vllm
@pytest.mark.parametrize("kind", [BlocksFreed, BlocksTaken, RequestPreempted, PrefixLookedUp])
def test_a_lost_event_is_one_difference(tmp_path, kind):
    numbers = []

    def lose(events):
        numbers.append(events.index(nth(events, kind)) + 1)
        del events[numbers[0] - 1]

    found = compared(preempt(), edited(preempt(), tmp_path, lose))
    assert ("lost event", {"lost event": 1}) == (found.divergence.kind, found.classes)
    assert (numbers[0], numbers[0]) == (found.divergence.a.event, found.divergence.b.event)
    assert "" == found.divergence.b.said
    assert found.divergence.a.said.startswith(kind.kind)


@needs_vllm
def test_a_lost_end_of_a_step_is_one_difference(tmp_path):
    def lose(events):
        events.remove(nth(events, StepScheduled, step=20))

    found = compared(preempt(), edited(preempt(), tmp_path, lose))
    assert {"lost event": 1} == found.classes
    assert found.divergence.a.said.startswith("step.scheduled step=20")


@needs_vllm
def test_a_setting_alone(tmp_path):
    found = compared(preempt(), edited(preempt(), tmp_path, lambda e: [change_setting(e), e][1]))
    assert [("max_num_seqs", 256, 1)] == [(s.name, s.a, s.b) for s in found.settings]
    assert (None, {"configuration": 1}, False) == (found.divergence, found.classes, found.is_same)
    assert render(found).startswith("the same decisions in spite of 1 other setting\n")


@needs_vllm
def test_the_same_run_with_all_blocks_renamed(tmp_path):
    """A one-to-one renaming is no divergence, and is told as what it is."""
    top = 8
    new = {0: 0} | {block: top + 1 - block for block in range(1, top + 1)}

    def rename(events):
        for event in events:
            if isinstance(event, SlotsMapped):
                event.slots = [new[s // 32] * 32 + s % 32 for s in event.slots]
            elif isinstance(event, BlockEvicted):
                event.block = new[event.block]
            elif isinstance(event, SlotsAllocated | PrefixLookedUp):
                event.blocks = [[new[b] for b in row] for row in event.blocks]
                if isinstance(event, SlotsAllocated):
                    event.hit_blocks = [[new[b] for b in row] for row in event.hit_blocks]
            elif hasattr(event, "blocks") and not isinstance(event, StepScheduled):
                event.blocks = [new[b] for b in event.blocks]

    found = compared(preempt(), edited(preempt(), tmp_path, rename))
    assert found.divergence is None
    number, _ = find(preempt(), BlocksTaken)
    assert number == min(one.a.event for one in found.renamed)
    assert not found.is_same
    assert render(found).startswith(
        f"the same decisions, about other blocks from event {number} of A on\n"
    )


@needs_vllm
def test_another_hash_seed(tmp_path):
    def rehash(events):
        for event in events:
            for name in ("block_hashes", "new_hashes", "hashes"):
                if hasattr(event, name):
                    setattr(event, name, [h ^ 0xABCDEF for h in getattr(event, name)])

    found = compared(preempt(), edited(preempt(), tmp_path, rehash))
    assert found.divergence is None
    assert ["hash"] == [one.kind for one in found.renamed]
    assert {"hash": 1} == found.classes


@needs_vllm
def test_a_truncated_side_is_no_pass_and_no_difference(tmp_path, capsys):
    cut = edited(preempt(), tmp_path, lambda events: events[:400], ended="killed")
    found = compared(preempt(), cut)
    assert (True, ["B"], None) == (found.is_same, found.incomplete, found.divergence)
    assert any(
        line.startswith("scheduler: B is truncated; the other one") for line in found.not_judged
    )
    assert render(found).startswith("no difference as far as they go: B incomplete\n")
    assert 2 == main(["diff", str(preempt()), str(cut)])
    assert capsys.readouterr().out.startswith("no difference as far as they go")


# Outputs --------------------------------------------------------------------------------


def flip(events, index):
    """From this step on request r-0 gets other tokens."""
    for event in [e for e in events if type(e) is StepUpdated][index:]:
        event.token_ids = [[t ^ 1 for t in event.token_ids[0]], *event.token_ids[1:]]


@needs_vllm
def test_other_tokens_with_clean_tables(tmp_path):
    found = compared(preempt(), edited(preempt(), tmp_path, lambda events: flip(events, 20)))
    first = found.outputs[0]
    assert ("r-0", 20, 21, 21) == (first.request, first.position, first.step_a, first.step_b)
    assert first.token_a ^ 1 == first.token_b
    assert ["r-0", "r-1"] == first.batch_a == first.batch_b
    assert "tables clean" == found.verdict.kind
    assert (
        "tables clean: numerics of the batch; both computed it in step 21, in the same batch"
        == found.verdict.text
    )
    assert ["the contents of the KV cache are not recorded"] == found.verdict.not_checked


@needs_vllm
def test_other_tokens_after_two_rows_were_swapped(tmp_path):
    numbers = []

    def swap(events):
        rows = [e for e in events if type(e) is TableRowChanged and e.step == 6]
        rows[0].blocks, rows[1].blocks = rows[1].blocks, rows[0].blocks
        numbers.append(events.index(rows[0]) + 1)
        flip(events, 20)

    found = compared(preempt(), edited(preempt(), tmp_path, swap))
    assert ("ownership breach", "B", numbers[0]) == (
        found.verdict.kind, found.verdict.trace, found.verdict.event
    )  # fmt: skip
    assert (
        f"ownership breach at event {numbers[0]} of B: the kernel's table of r-0 has 8 at logical "
        "2, a block of r-1; the manager gave 7" == found.verdict.text
    )
    assert "worker" == found.divergence.lane


@needs_vllm
def test_a_breach_after_the_first_other_token_is_not_its_cause(tmp_path):
    def edit(events):
        flip(events, 2)
        nth(events, TableRowChanged, step=6).blocks[0] = 5

    found = compared(preempt(), edited(preempt(), tmp_path, edit))
    assert "tables clean" == found.verdict.kind
    assert any("B has an ownership breach after it, at event" in note for note in found.notes)


@needs_vllm
def test_two_owners_and_a_wrong_hash_are_breaches(tmp_path):
    def steal(events):
        nth(events, BlocksTaken, 3).blocks[0] = 1

    def mistake(events):
        nth(events, PrefixLookedUp, 3).blocks[0][0] = 3

    assert [] == list(ownership(read_trace(preempt()), {0: "r-0", 1: "r-1", 2: "r-2"}))
    for name, edit, words in (
        ("steal", steal, "block 1 was handed out while r-0 held it"),
        ("mistake", mistake, "r-2 hit block 3 at logical 0 for hash "),
    ):
        folder = edited(preempt(), tmp_path / name, edit)
        first = next(ownership(read_trace(folder), {0: "r-0", 1: "r-1", 2: "r-2"}))
        assert words in first.text


@needs_vllm
@pytest.mark.parametrize("name", ["preempt", "evict", "prefix", "abort", "batch", "mixed"])
def test_real_traces_have_no_breach(name):
    trace = read_trace(recorded(name, tokens=name == "preempt"))
    assert [] == list(ownership(trace, {}))


@needs_vllm
def test_verb(capsys):
    assert 0 == main(["diff", str(preempt()), str(preempt())])
    assert 1 == main(
        ["diff", str(preempt()), str(recorded("preempt", num_gpu_blocks_override=10)), "--json"]
    )
    out = capsys.readouterr().out
    document = json.loads(out[out.index("{") :])
    assert (1, False) == (document["schema"], document["same"])
    assert {"kind", "lane", "step", "a", "b", "note"} == set(document["divergence"])
    assert 2 == main(["diff", str(preempt()), str(recorded("evict"))])
    assert "cannot compare: no request of A is in B" in capsys.readouterr().err
