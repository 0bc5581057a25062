"""Judging: golden traces as they are and with an event changed, and what cannot be judged."""

import copy
import json

import pytest
from helpers import run_cli

from invariants.changes import (
    BUILT_IN,
    GOLD,
    a_block_taken_twice,
    a_count_that_is_one_too_high,
    a_free_is_lost,
    a_refusal_is_lost,
    a_request_left_out,
    a_request_nobody_planned,
    a_slot_in_the_middle_of_a_prompt,
    a_slot_too_few,
    a_stale_hash,
    first,
    flip_variant,
    found,
    gold,
    hash_of_another_place,
    hit_as_long_as_the_request,
    hits_in_front_of_a_running_request,
    judged,
    longer_than_the_model,
    null_block_in_a_table,
    null_block_written,
    other_hash_at_the_next_lookup,
    paged_attention_of,
    row_shorter_than_before,
    the_worker_is_told_of_one_block_less,
    too_many_requests,
    triton_against_its_rule,
    v1_for_a_shorter_batch,
    v1_for_fewer_requests,
    v2_for_one_partition,
)
from vllm_trace.events import (
    BlocksFreed,
    EngineConfigured,
    PrefixCacheReset,
    SlotsMapped,
    StepExecuted,
    StepScheduled,
)
from vllm_trace.invariants import check, registry
from vllm_trace.invariants.checking import check_all
from vllm_trace.invariants.judgements import exit_code
from vllm_trace.invariants.registry import describe
from vllm_trace.trace import read_trace
from vllm_trace.tracewriter import TraceWriter


@pytest.mark.parametrize("path", sorted(GOLD.glob("*.vtrace")), ids=lambda path: path.stem)
def test_the_golden_traces_are_clean(path):
    report = check(read_trace(path), BUILT_IN)
    assert [] == report.violations
    assert "clean" == report.verdict


# One event changed --------------------------------------------------------------------


def test_a_kernel_for_some_rows_is_judged_by_those():
    header, events = gold("mixed")
    paged_attention_of(events, "V1")
    assert {} == found(judged(events, header))


@pytest.mark.parametrize(
    "edit, name",
    [
        (flip_variant, "preempt"),
        (triton_against_its_rule, "preempt"),
        (v2_for_one_partition, "batch"),
        (v1_for_a_shorter_batch, "batch"),
        (v1_for_fewer_requests, "batch"),
        (too_many_requests, "preempt"),
        (longer_than_the_model, "preempt"),
        (hash_of_another_place, "preempt"),
        (other_hash_at_the_next_lookup, "preempt"),
        (hit_as_long_as_the_request, "boundary"),
        (null_block_in_a_table, "preempt"),
        (null_block_written, "preempt"),
        (row_shorter_than_before, "preempt"),
        (hits_in_front_of_a_running_request, "preempt"),
        (a_request_nobody_planned, "preempt"),
        (a_request_left_out, "preempt"),
        (a_slot_too_few, "preempt"),
        (a_slot_in_the_middle_of_a_prompt, "preempt"),
        (the_worker_is_told_of_one_block_less, "preempt"),
        (a_free_is_lost, "preempt"),
        (a_count_that_is_one_too_high, "preempt"),
        (a_refusal_is_lost, "preempt"),
        (a_block_taken_twice, "preempt"),
        (a_stale_hash, "evict"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_one_changed_event_is_found_where_it_stands(edit, name):
    header, events = gold(name)
    at, invariant = edit(events)
    report = judged(events, header)
    assert at + 1 == found(report).get(invariant), report.text()


def test_a_leak_at_the_end_is_found_when_nobody_is_left():
    """Two blocks appear from nowhere when everybody has finished."""
    header, events = gold("hello")
    last = first(events, "engine.stopped") if events[-1].kind == "engine.stopped" else len(events)
    taken = copy.copy(events[first(events, "blocks.taken")])
    taken.blocks = [1, 2]
    report = judged([*events[:last], taken], header, ["nothing-held"])
    assert {"nothing-held": last + 1} == found(report)
    assert "nobody is left" in report.violations[0].message


def test_reset_prefix_cache_may_preempt_everybody():
    header, events = gold("preempt")
    at, _ = a_refusal_is_lost(events)
    assert "preempt-needed" in found(judged(events, header))
    events.insert(at + 1, PrefixCacheReset(True))
    assert "preempt-needed" not in found(judged(events, header))


# Steps in flight, workers, block sizes ------------------------------------------------


def in_flight(events):
    """The same as if a step were planned before the one in front of it is executed."""
    made, held = [], []
    worker = {"table.changed", "slots.mapped", "attention.planned", "attention.called",
              "step.executed", "step.sampled"}  # fmt: skip
    for event in events:
        if event.kind in worker:
            held.append((1, event))
        elif event.kind == "step.scheduled":
            made += [(0, event), *held]
            held = []
        else:
            made.append((0, event))
    return made + held


@pytest.mark.parametrize("name", ["batch", "preempt", "mixed", "abort"])
def test_a_step_in_flight_is_compared_with_its_own_plan(name):
    header, events = gold(name)
    assert "clean" == judged(in_flight(events), header).verdict
    at = [i for i, (_, e) in enumerate(in_flight(events)) if e.kind == "slots.mapped"][8]
    shifted = in_flight(events)
    shifted[at][1].seq_lens[0] += 1
    assert at + 1 == found(judged(shifted, header))["positions-advance"]


def with_second_worker(events, edit=lambda event: None):
    made = []
    for event in events:
        made.append((0, event))
        if event.kind in {"table.changed", "slots.mapped", "attention.planned", "step.executed"}:
            again = copy.deepcopy(event)
            edit(again)
            made.append((2, again))
    return made


def test_each_worker_is_judged_by_itself():
    header, events = gold("preempt")
    events[first(events, "engine.configured")].settings["tensor_parallel_size"] = 2
    assert "clean" == judged(with_second_worker(events), header).verdict

    def edit(event):
        if event.kind == "table.changed":
            event.blocks = [block % 8 + 1 for block in event.blocks]

    report = judged(with_second_worker(events, edit), header)
    place = found(report)["worker-table"]
    assert 2 == with_second_worker(events, edit)[place - 1][0]


def test_a_missing_worker_is_said_and_no_pass():
    header, events = gold("preempt")
    events[first(events, "engine.configured")].settings["tensor_parallel_size"] = 2
    report = judged(events, header)
    assert ("incomplete", 2) == (report.verdict, report.exit_code)
    assert ["1 of 2 workers told of their steps"] == report.incomplete
    assert {"worker-table", "slot-mapping", "positions-advance", "slots-distinct"} <= {
        each.invariant.id for each in report.of("unjudged")
    }
    assert "blocks-conserved" in {each.invariant.id for each in report.of("holds")}


def test_kernel_blocks_are_parts_of_the_managers():
    """A manager's block of 32 is two of a kernel's 16."""
    header, events = gold("batch")
    for event in events:
        if event.kind == "slots.mapped":
            event.kernel_block_size = 16
        if event.kind == "table.changed":
            event.first *= 2
            event.blocks = [2 * block + part for block in event.blocks for part in (0, 1)]
    rows = {}
    for event in events:  # a kernel's row is as long as the sequence, in its own blocks
        if event.kind == "slots.mapped":
            rows[event.step] = dict(zip(event.requests, event.seq_lens))
    report = judged(events, header)
    assert {} == found(report)
    at = first(events, "table.changed")
    events[at].blocks[1] += 1
    assert "worker-table" in found(judged(events, header))


def test_a_runner_that_keeps_its_tables_on_the_device_is_not_judged_by_them():
    header, events = gold("preempt")
    events = [e for e in events if e.kind not in {"slots.mapped", "table.changed"}]
    report = judged(events, header)
    assert ("clean", 0) == (report.verdict, report.exit_code)
    assert "on the device" in next(
        e.reason for e in report.of("unjudged") if e.invariant.id == "slot-mapping"
    )


def test_an_engine_made_later_begins_afresh():
    header, events = gold("preempt")
    again = gold("preempt")[1]
    for event in again:
        if isinstance(event, StepScheduled | StepExecuted | SlotsMapped) or hasattr(event, "step"):
            event.step += 115
    assert "clean" == judged([*events, *again], header).verdict


# What cannot be judged ----------------------------------------------------------------


@pytest.mark.parametrize(
    "header, reason",
    [
        ({"vllm": "0.32.0", "level": "light"}, "the trace was recorded at level light"),
        ({"vllm": "0.40.0"}, "it is for vLLM >=0.11,<0.34; this is 0.40.0"),
        ({"vllm": "0.8.5"}, "it is for vLLM >=0.11; this is 0.8.5"),
        ({}, "it is for vLLM >=0.11; the trace does not say its release"),
    ],
)
def test_what_the_header_rules_out_is_not_judged_and_no_pass(header, reason):
    report = judged(gold("preempt")[1], header or {"role": "main"})
    assert ("incomplete", 2) == (report.verdict, report.exit_code)
    assert reason in report.incomplete
    assert reason in report.text(width=200)


def test_a_trace_that_began_after_its_engine_is_not_judged():
    header, events = gold("preempt")
    report = judged([e for e in events if not isinstance(e, EngineConfigured)], header)
    assert [] == report.of("holds") and "incomplete" == report.verdict
    assert "began after the engine" in report.incomplete[0]


def test_a_truncated_trace_is_no_pass_and_still_tells_what_it_found():
    header, events = gold("preempt")
    problems = ["main-1: truncated (no footer)"]
    cut = events[: len(events) // 2]
    report = judged(cut, header, problems=problems)
    assert ("incomplete", 2) == (report.verdict, report.exit_code)
    assert [] == report.of("holds")
    assert "This is not a pass:" in report.text()
    at, _ = null_block_written(cut)
    report = judged(cut, header, problems=problems)
    assert ("violated", at + 1) == (report.verdict, found(report)["null-block"])


def test_with_dropped_events_nothing_is_proved():
    header, events = gold("preempt")
    del events[first(events, "blocks.freed")]
    report = judged(events, header, problems=["main-1: 1 events were dropped"])
    assert ("incomplete", 2) == (report.verdict, report.exit_code)
    assert [] == report.violations and [] == report.of("holds")
    leak = next(e for e in report.of("unjudged") if e.invariant.id == "nothing-held")
    assert "1 events were dropped" in leak.reason and "looks wrong" in leak.reason


def test_groups_that_follow_other_rules_are_not_judged_by_these():
    header, events = gold("preempt")
    events[first(events, "engine.configured")].groups[0].kind = "MambaSpec"
    report = judged(events, header)
    assert "clean" == report.verdict
    assert "groups of kind MambaSpec follow other rules" == next(
        e.reason for e in report.of("unjudged") if e.invariant.id == "table-covers"
    )


def test_events_that_contradict_the_books_are_an_error_with_their_number(tmp_path):
    header, events = gold("preempt")
    at = first(events, "blocks.freed")
    events[at].ref_cnts = events[at].ref_cnts[:-1]
    writer = TraceWriter(tmp_path / "main-1.vtrace", header)
    writer.write(events)
    writer.close({"dropped": 0, "failures": {}})
    made = check_all([tmp_path, GOLD / "hello.vtrace", tmp_path / "absent"])
    assert ["unreadable", "clean", "unreadable"] == [one.to_dict()["verdict"] for one in made]
    assert f"event {at + 1} (blocks.freed) does not fit" in made[0].text()
    assert 2 == exit_code(made)


def test_what_came_first_stands_first():
    """Whatever the order of the rules: the later ones are often its consequence."""
    header, events = gold("preempt")
    at = first(events, "blocks.taken", lambda e: len(e.blocks) == 1)
    events[at].blocks[0] += 1
    report = judged(events, header)
    said = [line.split()[1:] for line in report.text().splitlines() if "VIOLATED" in line]
    numbers = [int(words[3].rstrip(",")) for words in said]
    assert ["evict-head", at + 1] == [said[0][0], numbers[0]]
    assert sorted(numbers) == numbers and len(numbers) > 2
    assert "it was never handed out" in " ".join(report.text().split())


# A user's own -------------------------------------------------------------------------


def test_a_rule_that_raises_is_named_and_the_others_go_on():
    def bad(books, event):
        return 1 // (event.num_free_blocks - 2)

    def good(books, event):
        if event.num_free_blocks == 2:
            yield "two blocks are free"

    also = [
        describe(bad, "bad", "Never divides by zero.", on="slots.allocated"),
        describe(good, "good", "Two are never free.", on="slots.allocated"),
    ]
    header, events = gold("preempt")
    report = judged(events, header, ["null-block"], also)
    (raised,) = report.of("raised")
    at = first(events, "slots.allocated", lambda e: e.num_free_blocks == 2) + 1
    assert "bad" == raised.invariant.id
    assert f"failed at event {at} (slots.allocated): ZeroDivisionError" in raised.reason
    assert {"good": at} == found(report)
    assert ["null-block"] == [each.invariant.id for each in report.of("holds")]
    assert ("violated", 1) == (report.verdict, report.exit_code)
    assert 2 == judged(events, header, ["null-block"], also[:1]).exit_code


def test_a_function_may_return_a_sentence_or_a_violation():
    def text(books, event):
        return "so it is"

    def whole(books, event):
        return books.violation("block one", block=1)

    also = [describe(rule, rule.__name__, "No.", on="blocks.taken") for rule in (text, whole)]
    header, events = gold("hello")
    report = judged(events, header, ["null-block"], also)
    at = first(events, "blocks.taken") + 1
    assert {"text": at, "whole": at} == found(report)
    assert [None, 1] == [v.block for v in report.violations]
    assert [1, 1] == [v.step for v in report.violations]


# The verb -----------------------------------------------------------------------------


def test_the_verb_says_it_in_words_json_and_exit_codes(tmp_path):
    header, events = gold("preempt")
    at, _ = null_block_written(events)
    writer = TraceWriter(tmp_path / "main-1.vtrace", header)
    writer.write(events)
    writer.close({"dropped": 0, "failures": {}})
    clean = run_cli("check", GOLD / "preempt.vtrace", cwd=tmp_path)
    assert (0, "") == (clean.returncode, clean.stderr)
    assert clean.stdout.endswith("21 invariants: 20 hold, 1 not judged\n")
    assert max(map(len, clean.stdout.splitlines()[1:])) <= 80
    both = run_cli("check", GOLD / "preempt.vtrace", tmp_path, "--json", cwd=tmp_path)
    assert 1 == both.returncode
    document = json.loads(both.stdout)
    assert 1 == document["schema"]
    assert ["clean", "violated"] == [one["verdict"] for one in document["traces"]]
    told = next(i for i in document["traces"][1]["invariants"] if i["id"] == "null-block")
    assert ("violated", at + 1, "r-0") == (told["status"], told["event"], told["request"])
    assert told["story"][-1].startswith(f"event {at + 1} ")


def test_the_verb_takes_ones_own_and_names_what_does_not_exist(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(
        "from vllm_trace.invariants import invariant\n"
        "@invariant('never-full', 'A block is always free.', on='slots.allocated')\n"
        "def never_full(books, event):\n"
        "    if not event.num_free_blocks: yield 'no block is free'\n"
    )
    trace = GOLD / "preempt.vtrace"
    done = run_cli("check", trace, "--load", own, "--only", "never-full", cwd=tmp_path)
    assert 1 == done.returncode
    assert "VIOLATED    never-full" in done.stdout and "no block is free" in done.stdout
    wrong = run_cli("check", trace, "--only", "nul-block", cwd=tmp_path)
    assert (2, "") == (wrong.returncode, wrong.stdout)
    assert "did you mean 'null-block'" in wrong.stderr
    listed = run_cli("check", "--list", "--json", cwd=tmp_path)
    assert BUILT_IN == [one["id"] for one in json.loads(listed.stdout)["invariants"]]
    assert 2 == run_cli("check", cwd=tmp_path).returncode


def test_what_is_over_is_forgotten():
    """The books of a long trace are as large as those of a short one."""
    from vllm_trace.invariants.books import HANDLERS, Books

    events = gold("mixed")[1]
    books = Books()
    books.begin(events[first(events, "engine.configured")], "0.32.0")
    for event in events:
        if type(event) in HANDLERS:
            HANDLERS[type(event)](books, event)
    for left in (books.tables, books.computed, books.block_hashes, books.told, books.capacity,
                 books.held, books.ref_cnts, books.unbalanced, books.freed):  # fmt: skip
        assert not left
    assert len(books.plans) <= 64
    assert max(map(len, (books.taken_at, books.evicted_at, books.hashes))) < books.num_blocks
    rows = books.rows[0, 0]
    assert max(map(len, (rows.rows, rows.lives, rows.changed))) <= 32
    assert isinstance(events[first(events, "blocks.freed")], BlocksFreed)
    assert registry.REGISTRY
