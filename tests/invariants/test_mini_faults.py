"""``mini`` with a fault in it: the same invariant notices it, at the first event; without one nothing does."""

import pytest

pytest.importorskip("torch", reason="torch is not installed: mini's engine computes with it")

from vllm_trace.invariants import EventList, check
from vllm_trace.replay import MODES, replay
from vllm_trace.trace import read_trace
from vllm_trace.tracewriter import TraceWriter

from . import faults, make_doc, mini_faults
from .mini_faults import FAULTS, HEADER

#: The list that was asked for, each with the fault of the real engine that stands for it.
LIST = {
    "leak a block": "block-leaked",
    "free twice": "freed-twice",
    "skip a touch": "touch-skips-one",
    "wrong eviction order": "taken-from-the-tail",
    "stale hash hit": "stale-hit",
    "wrong slot": "slot-shifted",
    "table row swapped": "rows-swapped",
    "over-budget step": "over-budget",
    "preempt without need": "preempted-without-need",
    "lost free on abort": "abort-not-freed",
    "null block handed out": "null-block-taken",
}


def test_no_name_of_the_list_is_missing_on_either_side():
    real = {one.id: one.invariant for one in faults.FAULTS}
    assert set(LIST) == set(FAULTS)
    assert {name: real[id] for name, id in LIST.items()} == {
        name: fault.invariant for name, fault in FAULTS.items()
    }


@pytest.fixture(scope="module")
def sound():
    return mini_faults.run()


def test_without_a_fault_every_invariant_holds_and_every_event_is_consumed(sound, tmp_path):
    report = check(EventList(sound, HEADER, ()))
    assert [] == report.of("violated") + report.of("raised")
    assert {"kv-events", "kernel-variant"} == {j.invariant.id for j in report.of("unjudged")}
    kinds = {event.kind for event in sound}
    wanted = {"request.preempted", "block.evicted", "blocks.touched", "slots.refused"}
    assert wanted <= kinds, "the workload shows too little"
    path = tmp_path / "mini.vtrace"
    writer = TraceWriter(path, HEADER)
    writer.write(sound)
    writer.close({"dropped": 0, "failures": {}})
    for mode in MODES:
        result = replay(read_trace(path), mode)
        assert result.passed, (mode, result.divergence, result.not_judged)


@pytest.mark.plain
@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_in_mini_is_caught_by_its_invariant_at_the_first_event(name):
    fault = FAULTS[name]
    events, report, found = mini_faults.judge(fault)
    assert found is not None, report.text()
    assert events[found.event_number - 1].kind == fault.kind


@pytest.mark.plain
def test_the_table_of_the_document_is_current():
    held = make_doc.DOC.read_text()
    assert make_doc.fill(held, **{"mini-faults": mini_faults.table()}) == held, make_doc.AGAIN
