"""The invariants as SQL: silent on golden traces, and each finds a fault that is put into one."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="not installed: pip install 'vllm-trace[export]'")
pytest.importorskip("duckdb", reason="not installed: pip install 'vllm-trace[export]'")

from invariants import changes as edits
from invariants.changes import first
from recorded import edited

from vllm_trace.export import export
from vllm_trace.invariants.registry import choose
from vllm_trace.trace import read_trace

GOLD = Path(__file__).parent.parent / "gold"
_path = GOLD.parent.parent / "bench" / "sql_invariants.py"  # bench/ is no package of the tests
_spec = importlib.util.spec_from_file_location("sql_invariants", _path)
sql_invariants = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sql_invariants)
RULES, run = sql_invariants.RULES, sql_invariants.run


def judged(path, folder):
    export(read_trace(path), "parquet", str(folder / "tables"))
    return run(folder / "tables")


def test_the_ids_are_those_of_check():
    known = {one.id for one in choose() if one.built_in}
    assert {"evict-head", "refusal-needed", "kv-events"} == known - RULES.keys()
    assert set() == RULES.keys() - known


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLD.glob("*.vtrace")))
def test_a_golden_trace_breaks_none(name, tmp_path):
    assert dict.fromkeys(RULES, 0) == judged(GOLD / f"{name}.vtrace", tmp_path)


def a_free_count_that_is_off_by_one(events):
    events[first(events, "step.scheduled")].num_free_blocks += 1
    return "blocks-conserved"


def a_block_given_back_twice(events):
    at = first(events, "blocks.freed")
    events[at].blocks = [*events[at].blocks, events[at].blocks[0]]
    events[at].ref_cnts = [*events[at].ref_cnts, -1]
    return "freed-once"


def given_back_from_the_head(events):
    at = first(events, "blocks.freed", lambda e: len(e.blocks) > 1)
    events[at].blocks = events[at].blocks[::-1]
    return "freed-tail-first"


def a_table_without_its_last_block(events):
    at = first(events, "slots.allocated", lambda e: len(e.blocks[0]) > 1)
    events[at].blocks = [events[at].blocks[0][:-1]]
    return "table-covers"


def a_table_with_one_block_too_many(events):
    at = first(events, "slots.allocated")
    events[at].blocks = [[*events[at].blocks[0], 77]]
    return "table-covers"


def one_slot_for_two_tokens(events):
    at = first(events, "slots.mapped", lambda e: len(e.slots) > 1)
    events[at].slots = [events[at].slots[0], *events[at].slots[:1], *events[at].slots[2:]]
    return "slots-distinct"


def a_reference_that_no_table_holds(events):
    at = first(events, "blocks.taken")
    events[at].blocks = [*events[at].blocks, 8]
    return "ref-counts"


def a_row_of_another_block(events):
    at = first(events, "table.changed", lambda e: len(e.blocks) > 1)
    events[at].blocks = [*events[at].blocks[:-1], 8]
    return "worker-table"


def a_hit_of_another_prefix(events):
    at = first(events, "request.arrived", lambda e: len(e.block_hashes) > 1)
    events[at].block_hashes[0] ^= 1
    return "hash-chain"


OWN = [
    (a_free_count_that_is_off_by_one, "preempt"),
    (a_block_given_back_twice, "preempt"),
    (given_back_from_the_head, "preempt"),
    (a_table_without_its_last_block, "preempt"),
    (a_table_with_one_block_too_many, "preempt"),
    (one_slot_for_two_tokens, "preempt"),
    (a_reference_that_no_table_holds, "preempt"),
    (a_row_of_another_block, "preempt"),
    (a_hit_of_another_prefix, "mixed"),
]
SHARED = [
    (edits.flip_variant, "preempt"),
    (edits.too_many_requests, "preempt"),
    (edits.longer_than_the_model, "preempt"),
    (edits.hash_of_another_place, "preempt"),
    (edits.hit_as_long_as_the_request, "prefix"),
    (edits.null_block_in_a_table, "preempt"),
    (edits.null_block_written, "preempt"),
    (edits.hits_in_front_of_a_running_request, "preempt"),
    (edits.a_request_nobody_planned, "preempt"),
    (edits.a_request_left_out, "preempt"),
    (edits.a_slot_too_few, "preempt"),
    (edits.a_slot_in_the_middle_of_a_prompt, "preempt"),
    (edits.a_free_is_lost, "preempt"),
    (edits.a_count_that_is_one_too_high, "preempt"),
    (edits.a_refusal_is_lost, "preempt"),
    (edits.a_block_taken_twice, "preempt"),
    (edits.a_stale_hash, "evict"),
    (edits.the_worker_is_told_of_one_block_less, "preempt"),
]


@pytest.mark.parametrize("edit, name", OWN + SHARED, ids=lambda one: getattr(one, "__name__", one))
def test_a_fault_is_found(edit, name, tmp_path):
    wanted = []

    def change(events):
        told = edit(events)
        wanted.append(told if isinstance(told, str) else told[1])

    broken = edited(GOLD / f"{name}.vtrace", tmp_path / "trace", change)
    assert judged(broken, tmp_path)[wanted[0]] > 0


def test_every_rule_has_a_fault():
    import inspect

    sources = "".join(inspect.getsource(edit) for edit, _ in OWN + SHARED)
    assert [] == [rule for rule in RULES if f'"{rule}"' not in sources]
