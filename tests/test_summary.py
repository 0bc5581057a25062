"""A trace in numbers, and whether workers received what the manager gave: on traces made by hand."""

import pytest
from helpers import configured, write_trace

from vllm_trace import render
from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    BackendSelected,
    BlockEvicted,
    BlocksTouched,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsMapped,
    SlotsRefused,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
    TableRowChanged,
)
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace


def arrived(request, num_prompt_tokens=40, name=""):
    name = name or f"r-{request}"
    return RequestArrived(request, 10 + request, name, num_prompt_tokens, 8, 0, 0.0, [], {})


def scheduled(step, requests, num_tokens, *, running=1, waiting=0, free=5, **more):
    at = 1000 * step
    return StepScheduled(step, at, 7, running, waiting, free, 0, requests, num_tokens, **more)


def updated(step):
    return StepUpdated(step, 1000 * step + 900, 30, None)


def executed(step, forward_dur_ns=200, rank=0):
    at = 1000 * step + 100
    return StepExecuted(step, at, 500, at + 50, forward_dur_ns, rank, 1, 1, "eager")


def mapped(step, requests, query_lens, seq_lens, slots, block_size=32, kernel_block_size=32):
    return SlotsMapped(
        step, 0, block_size, kernel_block_size, requests, query_lens, seq_lens, slots
    )


def summary_of(tmp_path, *events, **header):
    write_trace(tmp_path, "main", 1, [[configured(), *events]], **header)
    return Summary.of(read_trace(tmp_path))


FIRST = (
    arrived(0),
    SlotsAllocated(0, 40, 0, [[1, 2]], [], 6),
    scheduled(1, [0], [40], new=[0], free=6),
)
ROW = TableRowChanged(1, 0, 0, 0, [1, 2])
SLOTS = list(range(32, 72))


def test_steps_and_requests(tmp_path):
    told = summary_of(
        tmp_path,
        *FIRST, ROW, mapped(1, [0], [40], [40], SLOTS), executed(1), StepSampled(1, 1700, 40, 0),
        updated(1),
        arrived(1, 50),
        SlotsRefused(1, 50, 0, 1),
        scheduled(2, [0], [1], waiting=1),
        executed(2, 300), RequestFinished(0, 2950, "length", 2, 0), updated(2),
    )  # fmt: skip
    first, second = told.steps
    assert (7, 500, 200, 40, 30) == (
        first.schedule_ns, first.execute_ns, first.forward_ns, first.sample_ns, first.postprocess_ns,
    )  # fmt: skip
    assert (40, 0, 1, 0) == (
        first.num_prefill_tokens, first.num_decode_tokens, first.num_joined, first.num_left,
    )  # fmt: skip
    # It left in the step that finished it.
    assert (0, 1, 0, 1, 1) == (
        second.num_prefill_tokens, second.num_decode_tokens, second.num_joined, second.num_left,
        second.num_waiting,
    )  # fmt: skip
    life, other = told.requests
    assert ("r-0", 40, 2, 2, 1, "length", [[1, 2]], 41) == (
        life.name, life.num_prompt_tokens, life.num_output_tokens, life.num_steps, life.num_chunks,
        life.reason, life.table, life.max_context,
    )  # fmt: skip
    assert (1, "", []) == (other.num_refusals, other.reason, other.table)
    facts = told.facts()
    assert {
        "requests": 2, "finished": 1, "steps": 2, "refusals": 1, "join_steps": 0, "leave_steps": 1,
        "r-0.blocks": 2, "r-0.reason": "length", "worker_rows": 1, "worker_differences": 0,
    }.items() <= facts.items()  # fmt: skip


def test_a_preempted_request_has_its_longest_table_and_its_second_hits(tmp_path):
    told = summary_of(
        tmp_path,
        *FIRST, updated(1),
        RequestFreed(0), RequestPreempted(0, 40, 8),
        scheduled(2, [], []), updated(2),
        SlotsAllocated(0, 8, 32, [[3]], [[1]], 6),
        scheduled(3, [0], [8], resumed=[0]),
    )  # fmt: skip
    assert [0, 1, 0] == [step.num_preempted for step in told.steps]
    life = told.requests[0]
    assert (1, 0, 32) == (life.num_preemptions, life.num_hit_tokens, life.num_resume_hit_tokens)
    assert 1 == told.num_preemptions


def test_blocks_are_shared_when_two_hold_them_at_once(tmp_path):
    """One that is freed and handed out again stands in two tables, but never in both."""
    told = summary_of(
        tmp_path,
        *FIRST, RequestFreed(0), RequestFinished(0, 1500, "stop", 1, 0), BlockEvicted(1, [7]),
        arrived(1), SlotsAllocated(1, 40, 0, [[1, 2]], [], 6), scheduled(2, [1], [40], new=[1]),
    )  # fmt: skip
    assert 0 == told.facts()["shared_blocks"]
    assert 1 == told.facts()["evictions"]
    told = summary_of(
        tmp_path / "shared",
        *FIRST, arrived(1), BlocksTouched([1], [2]), SlotsAllocated(1, 8, 32, [[3]], [[1]], 6),
        scheduled(2, [0, 1], [1, 8], new=[1]),
    )  # fmt: skip
    assert 1 == told.facts()["shared_blocks"]


def test_kernels_are_counted_by_step_however_many_workers_ran_it(tmp_path):
    events = [
        BackendSelected("layers.0", "B", "I", [("B", "")], {}),
        AttentionPlanned(1, 0, "attend", "v2", {}),
        AttentionCalled(1, "Impl", [0, 1], [1150, 1160], [5, 6]),
        executed(1),
    ]
    write_trace(tmp_path, "engine", 1, [[configured(), *FIRST]])
    write_trace(tmp_path, "worker", 2, [events])
    write_trace(tmp_path, "worker", 3, [events])
    told = Summary.of(read_trace(tmp_path))
    (kernel,) = told.kernels
    assert ("attend", "v2", 1, 4, 22) == (
        kernel.kernel, kernel.variant, kernel.num_steps, kernel.num_calls, kernel.total_ns,
    )  # fmt: skip
    assert [["layers.0"]] == [backend["layers"] for backend in told.backends]
    assert 2 == told.num_workers


# What the kernels received ----------------------------------------------------------------


def test_equal_tables_and_slots(tmp_path):
    told = summary_of(tmp_path, *FIRST, ROW, mapped(1, [0], [40], [40], SLOTS), executed(1))
    assert (1, 40, 0, "") == (
        told.worker.num_rows, told.worker.num_slots, told.worker.num_unplanned,
        told.worker.first_difference,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "batch", "said"),
    [
        (TableRowChanged(1, 0, 0, 0, [1, 3]), mapped(1, [0], [40], [40], SLOTS),
         "step 1, request r-0: the worker's table is [1, 3], the manager's [1, 2]"),
        (TableRowChanged(1, 0, 0, 0, [1, 2, 3]), mapped(1, [0], [40], [70], SLOTS),
         "step 1, request r-0: the worker's table is [1, 2, 3], the manager's [1, 2]"),
        (ROW, mapped(1, [0], [40], [40], [*SLOTS[:39], 99]),
         "step 1, request r-0: position 39 was written to slot 99, not 71"),
        (ROW, mapped(1, [0, 1], [40, 1], [40, 1], [*SLOTS, 96]),
         "step 1, request #1: the worker ran it, the scheduler did not plan it"),
    ],
)  # fmt: skip
def test_a_difference_is_named(tmp_path, row, batch, said):
    told = summary_of(tmp_path, *FIRST, row, batch, executed(1))
    assert said == told.worker.first_difference
    assert 1 == told.facts()["worker_differences"]
    assert said in render.findings(told)


def test_a_step_whose_schedule_is_not_in_the_trace_is_not_called_equal(tmp_path):
    told = summary_of(tmp_path, *FIRST, ROW, mapped(9, [0], [40], [40], SLOTS), executed(9))
    assert (0, 1, "") == (
        told.worker.num_rows, told.worker.num_unplanned, told.worker.first_difference
    )  # fmt: skip
    assert "1 table rows of workers were not compared" in " ".join(render.findings(told))


def test_a_resumed_request_is_compared_with_its_table_of_now(tmp_path):
    """Not with the longer one that it had before it was preempted."""
    told = summary_of(
        tmp_path,
        arrived(0, 90), SlotsAllocated(0, 90, 0, [[1, 2, 3]], [], 5), scheduled(1, [0], [90], new=[0]),
        RequestFreed(0), RequestPreempted(0, 90, 8), scheduled(2, [], []),
        SlotsAllocated(0, 40, 0, [[5, 6]], [], 6), scheduled(3, [0], [40], resumed=[0]),
        TableRowChanged(3, 0, 0, 0, [5, 6]), mapped(3, [0], [40], [40], list(range(160, 200))),
        executed(3),
    )  # fmt: skip
    assert ("", 1) == (told.worker.first_difference, told.worker.num_rows)
    assert [[1, 2, 3]] == told.requests[0].table


def test_smaller_blocks_of_the_kernel(tmp_path):
    """The kernel's ids count blocks of 16: block 1 of the manager is its 2 and 3."""
    row = TableRowChanged(1, 0, 0, 0, [2, 3, 4, 5])
    told = summary_of(
        tmp_path, *FIRST, row, mapped(1, [0], [40], [40], SLOTS, kernel_block_size=16), executed(1)
    )
    assert "" == told.worker.first_difference


def test_a_window_that_passed_is_not_compared(tmp_path):
    """The manager has the null block there; the worker keeps what it was told."""
    from vllm_trace.events import BlocksFreed

    told = summary_of(
        tmp_path,
        *FIRST, ROW, mapped(1, [0], [40], [40], SLOTS), executed(1),
        BlocksFreed([1], [0]), SlotsAllocated(0, 30, 0, [[4]], [], 6), scheduled(2, [0], [30]),
        TableRowChanged(2, 0, 0, 2, [4]),
        mapped(2, [0], [30], [70], [*range(72, 96), *range(128, 134)]), executed(2),
    )  # fmt: skip
    assert "" == told.worker.first_difference
    assert 2 == told.worker.num_rows


def test_a_light_trace_does_not_say_that_nothing_hit(tmp_path):
    told = summary_of(
        tmp_path,
        arrived(0), scheduled(1, [0], [8], new=[0]), updated(1),
        scheduled(2, [0], [1]), updated(2),
        level="light",
    )  # fmt: skip
    said = " ".join(render.findings(told))
    assert "hits and evictions are not recorded at level light" in said
    assert "no request hit" not in said and "no blocks were held" not in said
    # 32 of 40 tokens were a hit that is not in the trace: the second step is a decode all the same.
    assert [(8, 0), (0, 1)] == [(s.num_prefill_tokens, s.num_decode_tokens) for s in told.steps]


# Words and columns ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ns", "said"),
    [
        (0, "0 ns"), (999, "999 ns"), (1000, "1.00 µs"), (48_040, "48.0 µs"), (999_400, "999 µs"),
        (999_600, "1.00 ms"), (1_530_000, "1.53 ms"), (152_000_000, "152 ms"), (3.2e9, "3.20 s"),
    ],
)  # fmt: skip
def test_durations_have_three_digits(ns, said):
    assert said == render.duration(ns)


def test_tables_are_folded():
    assert "0→1–3 3→9" == render.mapping([[1, 2, 3, 9]])
    assert "0→1 | 0→4–5" == render.mapping([[1], [4, 5]])
    assert "0→· 1→· 2→7–8" == render.mapping([[0, 0, 7, 8]])
    assert "0→9 1→7 2→5 3→3 4→1 … 9→2" == render.mapping([[9, 7, 5, 3, 1, 8, 6, 4, 0, 2]])
    assert "1–5 9 12" == render.ids([1, 2, 3, 4, 5, 9, 12])


def test_long_names_lose_their_middle():
    assert "short" == render.short_name("short")
    name = render.short_name("cmpl-5d70e5a52e5c4b1e9a7d-0-b2c81d3e")
    assert 22 == len(name)
    assert name.startswith("cmpl-5d70e") and name.endswith("-0-b2c81d3e")


def test_the_middle_of_a_long_table_is_left_out():
    assert [0, 1, 2, 3, None, 9] == render.shorten(range(10), 6)
    assert [*range(6)] == render.shorten(range(6), 6)
