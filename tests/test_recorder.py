"""What probes hand over is written in their order, and nothing that goes wrong reaches the engine."""

import multiprocessing
import os
import time

import pytest
from fakes.files import files_of

from vllm_trace import recorder as module
from vllm_trace.events import (
    SCHEMA_VERSION,
    BlocksTaken,
    PrefixCacheReset,
    ProbeFailed,
    RequestFreed,
    RequestSeen,
)
from vllm_trace.options import Options
from vllm_trace.recorder import Recorder, process_role
from vllm_trace.tracefile import TraceFile


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "trace"


@pytest.fixture
def make(folder):
    """Makes recorders that are closed when the test ends."""
    made = []

    def make(**options):
        made.append(Recorder(Options(**{"dir": str(folder)} | options)))
        return made[-1]

    yield make
    for recorder in made:
        recorder.close()


def closed(recorder, folder):
    """Close, and return the events and the file."""
    recorder.close()
    ((events, file),) = files_of(folder).values()
    assert "" == file.truncated
    return events, file


# Names and numbers ------------------------------------------------------------------------


def test_requests_are_numbered_in_the_order_of_arrival(make):
    recorder = make()
    assert [0, 1, 2] == [recorder.arrive(name) for name in ("a", "b", "c")]
    assert [2, 0, 1] == recorder.numbers_of(["c", "a", "b"])


def test_a_name_that_is_used_again_is_another_request(make):
    recorder = make()
    assert [0, 1] == [recorder.arrive("a"), recorder.arrive("b")]
    assert 0 == recorder.retire("a")
    assert 2 == recorder.arrive("a")
    assert [2, 1] == recorder.numbers_of(["a", "b"])


def test_a_name_that_did_not_arrive_here_is_introduced_before_its_first_use(make, folder):
    recorder = make()
    recorder.append(RequestFreed(recorder.numbers["x"]))
    recorder.append(RequestFreed(recorder.numbers["x"]))
    recorder.defer(lambda rec: RequestFreed(rec.numbers["y"]))
    recorder.append(RequestFreed(recorder.numbers["x"]))
    events, _ = closed(recorder, folder)
    x, y = RequestSeen(0, "x"), RequestSeen(1, "y")
    assert [x, RequestFreed(0), RequestFreed(0), y, RequestFreed(1), RequestFreed(0)] == events


def test_a_finished_request_is_understood_for_some_time_and_then_forgotten(
    make, folder, monkeypatch
):
    monkeypatch.setattr(module, "FINISHED_KEPT", 3)
    recorder = make()
    for name in "abcd":
        recorder.arrive(name)
    for name in "abc":
        recorder.retire(name)
    assert [0, 1, 2] == recorder.numbers_of("abc"), "late events still find them"
    recorder.retire("d")
    assert [1, 2, 3] == recorder.numbers_of("bcd")
    recorder.append(RequestFreed(recorder.numbers["a"]))
    events, _ = closed(recorder, folder)
    assert [RequestSeen(4, "a"), RequestFreed(4)] == events


def test_a_request_that_came_back_under_a_finished_name_is_not_forgotten_with_it(make, monkeypatch):
    monkeypatch.setattr(module, "FINISHED_KEPT", 2)
    recorder = make()
    recorder.arrive("a")
    recorder.retire("a")
    again = recorder.arrive("a")
    for name in "bcd":
        recorder.arrive(name)
        recorder.retire(name)
    assert again == recorder.numbers["a"]


# Order ------------------------------------------------------------------------------------


def test_what_is_deferred_stands_where_it_was_captured(make, folder):
    def second(rec, name):
        rec.emit(RequestSeen(7, name))
        return RequestFreed(2)

    recorder = make()
    recorder.append(RequestFreed(1))
    recorder.defer(second, "emitted")
    recorder.append(RequestFreed(3))
    recorder.defer(lambda rec: None)
    recorder.append(RequestFreed(4))
    expected = [
        RequestFreed(1),
        RequestSeen(7, "emitted"),
        RequestFreed(2),
        RequestFreed(3),
        RequestFreed(4),
    ]
    assert expected == closed(recorder, folder)[0]


def test_a_decoder_sees_values_as_they_were_given_and_runs_when_the_step_ends(make, folder):
    recorder, ran = make(), []
    blocks = [1, 2]
    recorder.defer(
        lambda rec, *values: ran.append(values) or BlocksTaken(list(values[0])), blocks, "b"
    )
    assert [] == ran
    recorder.flush()
    recorder.flush()
    assert [([1, 2], "b")] == ran
    assert [BlocksTaken([1, 2])] == closed(recorder, folder)[0]


def test_each_flush_is_one_batch_and_an_empty_one_is_none(make, folder):
    recorder = make()
    for size in (1, 0, 3):
        for number in range(size):
            recorder.append(RequestFreed(number))
        recorder.flush()
    recorder.close()
    (path,) = folder.glob("*.vtrace")
    assert [1, 3] == [len(batch) for batch in TraceFile(path).batches()]


def test_a_process_whose_steps_never_end_is_flushed_all_the_same(make, folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_PENDING", 10)
    recorder = make()
    for number in range(50):
        recorder.defer(lambda rec, n: RequestFreed(n), number)
        assert len(recorder.pending) <= 11
    assert [RequestFreed(n) for n in range(50)] == closed(recorder, folder)[0]


# Files ------------------------------------------------------------------------------------


def test_no_event_no_file(make, folder):
    make().close()
    assert not folder.exists()


def test_the_header_says_what_wrote_it(make, folder):
    recorder = make(level="light", tokens=True)
    recorder.notes = {"vllm": "0.32.0", "hooks": []}
    recorder.append(PrefixCacheReset(True))
    before = time.monotonic_ns()
    _, file = closed(recorder, folder)
    header = file.header
    assert (SCHEMA_VERSION, "light", True, "0.32.0") == (
        header["schema"],
        header["level"],
        header["tokens"],
        header["vllm"],
    )
    assert ("main", os.getpid()) == (header["role"], header["pid"])
    assert f"main-{os.getpid()}.vtrace" == file.path.name
    assert before <= header["clock"]["monotonic_ns"] <= time.monotonic_ns()


def test_closing_twice_is_closing_once_and_later_events_go_nowhere(make, folder):
    recorder = make()
    recorder.append(RequestFreed(1))
    events, _ = closed(recorder, folder)
    recorder.append(RequestFreed(2))
    recorder.defer(lambda rec: RequestFreed(3))
    recorder.flush()
    recorder.close()
    assert [RequestFreed(1)] == events == closed(recorder, folder)[0]
    assert [] == recorder.pending, "a detached recorder does not grow"


def test_events_after_close_do_not_make_a_file(make, folder):
    recorder = make()
    recorder.close()
    recorder.append(RequestFreed(2))
    recorder.flush()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("MainProcess", "main"),
        ("EngineCore", "engine"),
        ("EngineCore_DP1", "engine"),
        ("VllmWorker-0", "worker"),
        ("Worker_TP1", "worker"),
        ("Process-3", "main"),
    ],
)
def test_a_process_has_the_role_that_vllm_gave_it(monkeypatch, name, role):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {})
    monkeypatch.setattr(multiprocessing.current_process(), "_name", name)
    assert role == process_role()


# What goes wrong --------------------------------------------------------------------------


def fails(rec, number):
    raise ValueError(f"no {number}")


def test_a_decoder_that_raises_is_counted_named_once_and_costs_only_its_own_event(
    make, folder, capfd
):
    recorder = make()
    for number in range(3):
        recorder.append(RequestFreed(number))
        recorder.defer(fails, number)
    recorder.append(RequestFreed(9))
    events, file = closed(recorder, folder)
    freed = [event for event in events if isinstance(event, RequestFreed)]
    assert [RequestFreed(n) for n in (0, 1, 2, 9)] == freed
    assert [ProbeFailed("fails", "ValueError: no 0")] == [
        e for e in events if isinstance(e, ProbeFailed)
    ]
    assert {"fails": 3} == file.footer["failures"]
    said = capfd.readouterr()
    assert "" == said.out
    assert (
        "vllm-trace: the probe of fails failed (ValueError: no 0); the engine is not affected\n"
        == said.err
    )


def test_a_probe_that_keeps_failing_is_taken_off_once_and_that_is_said(make, capfd):
    recorder, off = make(failures=3), []
    recorder.on_failures = off.append
    for number in range(8):
        recorder.probe_failed("pkg:Class.method", ValueError(number))
    recorder.probe_failed("another", KeyError("k"))
    assert ["pkg:Class.method"] == off
    assert {"pkg:Class.method": 8, "another": 1} == recorder.failures
    said = capfd.readouterr().err.splitlines()
    assert [
        "vllm-trace: the probe of pkg:Class.method failed (ValueError: 0); the engine is not affected",
        "vllm-trace: the probe of pkg:Class.method failed 3 times and is taken off",
        "vllm-trace: the probe of another failed (KeyError: 'k'); the engine is not affected",
    ] == said


@pytest.mark.parametrize(
    "wrong",
    [RequestFreed("é\ud800"), RequestFreed(2**70), object()],
    ids=["text", "number", "object"],
)
def test_a_batch_that_cannot_be_encoded_is_counted_as_dropped_and_the_next_is_written(
    make, folder, capfd, wrong
):
    recorder = make()
    recorder.append(RequestFreed(1))
    recorder.flush()
    for event in (RequestFreed(2), wrong, RequestFreed(3)):
        recorder.append(event)
    recorder.flush()
    recorder.append(RequestFreed(4))
    events, file = closed(recorder, folder)
    kept = [event.request for event in events if isinstance(event, RequestFreed)]
    assert [1, 4] == [kept[0], kept[-1]]
    assert 5 == len(kept) + file.dropped, "what is not in the trace is counted"
    assert file.dropped >= 1
    assert [1] == list(file.footer["failures"].values())
    assert 1 == capfd.readouterr().err.count("vllm-trace: ")


@pytest.mark.parametrize("where", ["a file", "under a file", "not a place for files"])
def test_a_folder_that_cannot_be_had_is_said_once_and_the_engine_goes_on_untraced(
    tmp_path, make, capfd, where
):
    (tmp_path / "file").write_text("")
    folder = {
        "a file": tmp_path / "file",
        "under a file": tmp_path / "file" / "trace",
        "not a place for files": "/proc/vtrace",
    }[where]
    recorder = make(dir=str(folder))
    for number in range(5):
        recorder.append(RequestFreed(number))
        recorder.defer(fails, number)
        recorder.flush()
    recorder.close()
    said = [line for line in capfd.readouterr().err.splitlines() if "no trace" in line]
    assert 1 == len(said)
    assert said[0].startswith("vllm-trace: no trace: [Errno ")
    assert str(folder) in said[0]
    assert said[0].endswith("; the engine goes on untraced")
    assert [] == recorder.pending
    assert "" == (tmp_path / "file").read_text()


# A device that is behind -------------------------------------------------------------------


class Device:
    """Ready when it is told to be; asked to wait only by closing."""

    def __init__(self):
        self.over, self.waited = False, False

    def ready(self, wait):
        self.waited |= wait
        return self.over or wait


def free(rec, number):
    return RequestFreed(number)


def later(recorder, device, number):
    recorder.defer(lambda rec: rec.defer_until(device.ready, free, number))


def test_what_waits_for_a_device_is_written_at_the_first_flush_that_finds_it_done(make, folder):
    recorder, first, second = make(), Device(), Device()
    later(recorder, first, 1)
    later(recorder, second, 2)
    recorder.append(BlocksTaken([1]))
    recorder.flush()
    second.over = True  # the one before it is not: the order is kept
    recorder.append(BlocksTaken([2]))
    recorder.flush()
    first.over = True
    recorder.defer(lambda rec: BlocksTaken([3]))
    recorder.flush()
    assert not first.waited and not second.waited
    events, _ = closed(recorder, folder)
    wanted = [
        BlocksTaken([1]),
        BlocksTaken([2]),
        BlocksTaken([3]),
        RequestFreed(1),
        RequestFreed(2),
    ]
    assert wanted == events


def test_closing_waits_for_the_device(make, folder):
    recorder, device = make(), Device()
    later(recorder, device, 7)
    recorder.flush()
    events, _ = closed(recorder, folder)
    assert device.waited
    assert [RequestFreed(7)] == events


def test_a_decoder_that_fails_after_the_wait_does_not_hold_up_the_next(make, folder):
    recorder, device = make(), Device()
    device.over = True

    def fails(rec):
        raise ValueError("lost")

    recorder.defer(lambda rec: rec.defer_until(device.ready, fails))
    later(recorder, device, 5)
    events, file = closed(recorder, folder)
    assert [ProbeFailed("fails", "ValueError: lost"), RequestFreed(5)] == events
    assert {"fails": 1} == file.footer["failures"]
