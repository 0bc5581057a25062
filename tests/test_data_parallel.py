"""Traces of two engines (data parallel), each with a worker in a process of its own."""

from pathlib import Path

import pytest
from helpers import write_trace

from vllm_trace import reports
from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    BackendSelected,
    RequestArrived,
    RequestSeen,
    SlotsMapped,
    StepExecuted,
    StepSampled,
    TableRowChanged,
)
from vllm_trace.invariants.checking import check
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace

GOLD = Path(__file__).parent / "gold" / "batch.vtrace"
OF_WORKERS = (
    AttentionCalled, AttentionPlanned, BackendSelected, SlotsMapped, StepExecuted, StepSampled, TableRowChanged,
)  # fmt: skip


def rank(folder, engine, worker, **of_worker):
    """The golden trace as an engine and its worker; names of requests are of this engine only."""
    source = read_trace(GOLD)
    header = {"vllm": source.header["vllm"], "level": "full"}
    own, others, seen = [], [], []
    for event in source.events():
        if isinstance(event, RequestArrived):
            event.request_id += f"-{engine}"
            seen.append(RequestSeen(event.request, event.request_id))
        (others if isinstance(event, OF_WORKERS) else own).append(event)
    write_trace(folder, "engine", engine, [own], **header)
    write_trace(folder, "worker", worker, [[*seen, *others]], **header | of_worker)


@pytest.fixture
def two(tmp_path):
    rank(tmp_path / "trace", 1, 11, parent=1)
    rank(tmp_path / "trace", 2, 12, parent=2)
    return tmp_path


def test_each_engine_has_the_worker_that_it_started(two):
    engines = read_trace(two).engines()
    assert [["engine-1", "worker-11"], ["engine-2", "worker-12"]] == [
        [file.path.stem for file in engine.files] for engine in engines
    ]
    alone = Summary.of(read_trace(GOLD))
    for summary in map(Summary.of, engines):
        assert (alone.steps, alone.worker) == (summary.steps, summary.worker)
        assert alone.kernels == summary.kernels
        assert [] == summary.problems


def test_all_invariants_are_judged_on_both(two):
    judged = check(read_trace(two)).judgements
    assert {"kv-events"} == {each.invariant.id for each in judged if each.status != "holds"}


def test_a_wrong_row_is_found_and_its_request_is_of_the_right_engine(two):
    path = two / "trace" / "worker-12.vtrace"
    worker = read_trace(path)
    events = list(worker.events())
    row = next(event for event in events if isinstance(event, TableRowChanged))
    row.blocks = [block + 1 for block in row.blocks]
    path.unlink()
    write_trace(path.parent, "worker", 12, [events], vllm=worker.header["vllm"], parent=2)
    found = {
        each.invariant.id: each for each in check(read_trace(two)).judgements if each.violation
    }
    assert "worker-table" in found
    assert f"{worker.names[row.request]}" in " ".join(found["worker-table"].story)


def test_a_worker_of_nobody_keeps_them_together_and_it_is_said(tmp_path):
    rank(tmp_path, 1, 11)
    rank(tmp_path, 2, 12)
    (trace,) = read_trace(tmp_path).engines()
    assert 4 == len(trace.files)
    assert "2 engines (data parallel)" in Summary.of(trace).problems[0]


def test_a_recording_counts_the_steps_of_both(two):
    alone = Summary.of(read_trace(GOLD))
    said = reports.describe_recording(reports.Run(two, ""))
    requests, steps = 2 * len(alone.requests), 2 * len(alone.steps)
    assert said.startswith(f"{requests} requests, {steps} steps of 2 engines, ")
