"""Several files read as one stream."""

import pytest
from helpers import configured, write_trace

from vllm_trace.errors import TraceError
from vllm_trace.events import (
    BackendSelected,
    BlocksTaken,
    RequestArrived,
    RequestFinished,
    RequestSeen,
    SlotsMapped,
    StepExecuted,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.trace import kinds, read_trace, time_of


def arrived(request, at_ns, name):
    return RequestArrived(request, at_ns, name, 8, 1, 0, 0.0, [], {})


def scheduled(step, at_ns, requests, **more):
    return StepScheduled(step, at_ns, 1, 1, 0, 5, 0, requests, [1] * len(requests), **more)


def executed(step, at_ns):
    return StepExecuted(step, at_ns, 1, at_ns, 1, 0, 1, 1, "eager")


def mapped(step, requests):
    ones = [1] * len(requests)
    return SlotsMapped(step, 0, 32, 32, requests, ones, ones, ones)


def told(folder):
    trace = read_trace(folder)
    return trace, [(record.process, record.event) for record in trace.records()]


def test_processes_are_merged_by_time(tmp_path):
    write_trace(
        tmp_path, "engine", 1,
        [[scheduled(1, 100, []), StepUpdated(1, 160, 1)], [scheduled(2, 200, []), StepUpdated(2, 260, 1)]],
    )  # fmt: skip
    write_trace(tmp_path, "worker", 2, [[executed(1, 110)], [executed(2, 210)]])
    write_trace(tmp_path, "worker", 3, [[executed(1, 120), executed(2, 220)]])
    trace, events = told(tmp_path)
    assert [
        (0, 100), (1, 110), (2, 120), (0, 160), (0, 200), (1, 210), (2, 220), (0, 260),
    ] == [(process, time_of(event)) for process, event in events]  # fmt: skip
    assert list(range(1, 9)) == [record.number for record in trace.records()]
    assert ["engine", "worker", "worker"] == [file.header["role"] for file in trace.files]


def test_facts_of_a_call_stay_before_the_call(tmp_path):
    """An event without a time takes that of the next one in its file."""
    write_trace(
        tmp_path, "engine", 1,
        [[scheduled(1, 100, []), BlocksTaken([7]), BlocksTaken([8]), scheduled(2, 300, [])]],
    )  # fmt: skip
    # The batch is known only when the forward began, yet stands before what ends later.
    write_trace(tmp_path, "worker", 2, [[mapped(1, []), executed(1, 150)]])
    _, events = told(tmp_path)
    assert ["step.scheduled", "slots.mapped", "step.executed", "blocks.taken", "blocks.taken",
            "step.scheduled"] == [event.kind for _, event in events]  # fmt: skip


def test_times_never_go_back_within_a_file(tmp_path):
    """``step.updated`` began before the finish that happened inside it."""
    write_trace(
        tmp_path, "engine", 1,
        [[scheduled(1, 100, []), RequestFinished(0, 180, "length", 1, 0), StepUpdated(1, 170, 20)]],
    )  # fmt: skip
    write_trace(tmp_path, "worker", 2, [[executed(1, 175)]])
    _, events = told(tmp_path)
    assert ["step.scheduled", "request.finished", "step.updated", "step.executed"] == [
        event.kind for _, event in events
    ]


def test_a_request_has_one_number_in_all_files(tmp_path):
    write_trace(
        tmp_path, "engine", 1,
        [[arrived(0, 10, "a"), arrived(1, 20, "b"),
          scheduled(1, 100, [0, 1], new=[0, 1]),
          scheduled(2, 200, [1], finished=[0], num_spec_tokens={1: 2})]],
    )  # fmt: skip
    # The worker met them the other way round.
    write_trace(
        tmp_path, "worker", 2,
        [[RequestSeen(0, "b"), RequestSeen(1, "a"), mapped(1, [0, 1]), executed(1, 110)],
         [mapped(2, [0]), executed(2, 210)]],
    )  # fmt: skip
    trace, events = told(tmp_path)
    assert {0: "a", 1: "b"} == trace.names
    assert [[1, 0], [1]] == [e.requests for _, e in events if isinstance(e, SlotsMapped)]
    first, second = [e for _, e in events if isinstance(e, StepScheduled)]
    assert ([0, 1], [0, 1]) == (first.requests, first.new)
    assert ([1], [0], {1: 2}) == (
        second.requests, second.finished,  second.num_spec_tokens,
    )  # fmt: skip


def test_a_name_that_comes_again_is_another_request(tmp_path):
    write_trace(
        tmp_path, "engine", 1,
        [[arrived(0, 10, "x"), scheduled(1, 100, [0])],
         [RequestFinished(0, 150, "length", 1, 0), arrived(1, 160, "x"), scheduled(2, 200, [1])]],
    )  # fmt: skip
    # A worker is not told of arrivals: to it the name has the number that it had.
    write_trace(
        tmp_path, "worker", 2,
        [[RequestSeen(0, "x"), mapped(1, [0]), executed(1, 110)], [mapped(2, [0]), executed(2, 210)]],
    )  # fmt: skip
    trace, events = told(tmp_path)
    assert {0: "x", 1: "x"} == trace.names
    assert [[0], [1]] == [e.requests for _, e in events if isinstance(e, SlotsMapped)]
    assert [[0], [1]] == [e.requests for _, e in events if isinstance(e, StepScheduled)]


def test_hosts_with_other_clocks_are_merged_by_the_time_of_day(tmp_path):
    """A monotonic clock counts from the boot of its host."""
    day = 1_700_000_000_000_000_000
    here = {"monotonic_ns": 1000, "unix_ns": day + 1000}
    there = {"monotonic_ns": 9_000_000, "unix_ns": day + 1000}
    write_trace(
        tmp_path, "engine", 1, [[scheduled(1, 1100, []), scheduled(2, 1300, [])]], clock=here
    )
    write_trace(
        tmp_path, "worker", 2, [[executed(1, 9_000_200), executed(2, 9_000_400)]],
        host="there", clock=there,
    )  # fmt: skip
    # A third process of the first host, whose clock was read at another moment, needs no correction.
    write_trace(
        tmp_path, "worker", 3, [[executed(1, 1250)]],
        clock={"monotonic_ns": 5000, "unix_ns": day + 4900},
    )  # fmt: skip
    _, events = told(tmp_path)
    assert [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2)] == [(p, e.step) for p, e in events]


def test_the_header_is_that_of_the_scheduler(tmp_path):
    write_trace(tmp_path, "main", 1, [[BackendSelected("l", "B", "I", [], {})]], vllm="main's")
    write_trace(tmp_path, "worker", 3, [[executed(1, 10)]], vllm="worker's")
    assert "main's" == read_trace(tmp_path).header["vllm"]
    write_trace(tmp_path, "engine", 2, [[configured()]], vllm="engine's")
    assert "engine's" == read_trace(tmp_path).header["vllm"]


def test_one_light_file_makes_a_light_trace(tmp_path):
    write_trace(tmp_path, "engine", 1, [[configured()]])
    assert "full" == read_trace(tmp_path).level
    write_trace(tmp_path, "worker", 2, [[executed(1, 10)]], level="light")
    assert "light" == read_trace(tmp_path).level


def test_problems_are_told_in_sentences(tmp_path):
    hook = {"target": "a:B.c", "state": "missing", "without": "no c is known"}
    path = write_trace(tmp_path, "engine", 7, [[configured()]], hooks=[hook])
    trace = read_trace(tmp_path)
    list(trace.events())
    assert ["engine-7: a:B.c missing: no c is known"] == trace.problems
    path.write_bytes(path.read_bytes()[:-5])
    trace = read_trace(tmp_path)
    list(trace.events())
    assert trace.problems[0].startswith("engine-7: truncated (torn frame at byte ")


def test_where_a_trace_may_be(tmp_path):
    path = write_trace(tmp_path / "run" / "trace", "main", 1, [[configured()]])
    for given in (path, path.parent, path.parent.parent, str(path)):
        assert 1 == len(list(read_trace(given).events()))
    assert {"engine.configured": 1} == kinds(read_trace(path).records())


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "there is no file or folder "),
        ("folder", " holds no .vtrace file"),
        (b"", " is empty"),
        (b"PK\3\4 something else", " is not a vllm_trace file"),
        (b"VTRACE\r\n", " ends within its header"),
    ],
)
def test_what_is_no_trace(tmp_path, made, said):
    path = tmp_path / "given"
    if made == "folder":
        path.mkdir()
    elif made is not None:
        path.write_bytes(made)
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert said in str(error.value)
    assert error.value.hint or isinstance(made, bytes)
