"""Ctrl-C at any line of the recorder and the writer: an event is in the file once, or counted as dropped."""

import contextlib
import linecache
import sys
from functools import partial
from itertools import count

import pytest
from fakes.files import files_of, read, write_steady

from vllm_trace import recorder as module
from vllm_trace import steady as steady_run
from vllm_trace import tracewriter
from vllm_trace.events import RequestFreed, StepScheduled
from vllm_trace.options import Options
from vllm_trace.recorder import Recorder
from vllm_trace.tracewriter import TraceWriter

WATCHED = {module.__file__, tracewriter.__file__, steady_run.__file__}


class Interrupts:
    """Raises ``KeyboardInterrupt`` at one line of all that run inside."""

    def __init__(self, at):
        self.left = at
        self.came = ""

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in WATCHED:
            return None
        # A handler does not cover the word ``try`` of a block within its own; no signal comes there.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and line.strip() != "try:":
            self.left -= 1
            if self.left == 0:
                self.came = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    @contextlib.contextmanager
    def inside(self):
        before = sys.gettrace()
        if not self.came:
            sys.settrace(self)
        try:
            yield
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)


def at_each_line():
    """Interrupts at the first line that runs inside, at the second, …, and last some that never come."""
    for at in count(1):
        interrupts = Interrupts(at)
        yield at, interrupts
        if not interrupts.came:
            return


def number_of(event):
    return event.step if type(event) is StepScheduled else event.request


def in_order(events, sent, came):
    """Each at most once, in the order in which they were handed over. Returns how many are missing."""
    told = [*map(number_of, events)]
    assert sorted(set(told)) == told, came
    assert set(told) <= set(range(sent)), came
    return sent - len(told)


def work(recorder, folder, interrupts):
    """Steps of plain and deferred events, steady ones, and a batch larger than the tail."""
    sent = 0
    for step, size in enumerate((2, 1, 14, 2, 50, 3)):
        for number in range(sent, sent + size):
            if number % 3:
                recorder.append(RequestFreed(number))
            else:
                recorder.defer(lambda rec, n: RequestFreed(n), number)
        sent += size
        if step % 2:
            recorder.planned = (sent, 1, 1, 1, 0, 5)
            recorder.planned_at, recorder.planned_of = len(recorder.pending), object()
            sent += 1
        with interrupts.inside():
            recorder.flush()
        for events, _ in files_of(folder).values():  # as one sees it who looks on
            in_order(events, sent, interrupts.came)
    with interrupts.inside():
        recorder.close()
    recorder.close()
    return sent


@pytest.fixture
def small_tails(monkeypatch):
    monkeypatch.setattr(module, "TraceWriter", partial(TraceWriter, tail_size=256))


def test_an_interrupt_at_any_line_of_a_flush_loses_nothing_uncounted(tmp_path, small_tails):
    places = set()
    for at, interrupts in at_each_line():
        folder = tmp_path / str(at)
        sent = work(Recorder(Options(dir=str(folder))), folder, interrupts)
        name = interrupts.came.partition(":")[0]
        places.add(name)
        if name in ("__init__", "_open", "_open_tail", "_header") and not files_of(folder):
            continue  # before there was a file: then there is none, and that is said
        ((events, file),) = files_of(folder).values()
        lost = in_order(events, sent, interrupts.came)
        # Of the event in hand it may not be known whether it was handed on.
        assert lost <= file.dropped <= lost + 1, interrupts.came
        assert "" == file.truncated, interrupts.came
        assert len(events) == file.footer["num_events"], interrupts.came
    assert {
        "flush",
        "_decode",
        "_write_frame",
        "_begin_tail",
        "spell_out_planned",
        "close",
    } <= places


def behind(writer):
    """What stands behind the last batch: of one that was cut off nothing may, for a shorter one may come."""
    return writer._tail[writer._used :]


def steady(writer, step):
    return writer.write_steady_step((step, 1, 1, 1, 0, 5, 0), 2, 1, [])


def test_an_interrupt_in_a_steady_step_leaves_all_of_it_or_nothing(tmp_path):
    for at, interrupts in at_each_line():
        path = tmp_path / f"main-{at}.vtrace"
        writer = TraceWriter(path, {"schema": 1}, tail_size=256)
        done = []
        for step in range(8):
            before = writer.num_events
            with interrupts.inside():
                steady(writer, step) or writer.write(
                    [StepScheduled(step, 1, 1, 1, 0, 5, 0, [], [])]
                )
            if writer.num_events > before:
                done.append(step)
            assert not any(behind(writer)), interrupts.came
            writer.write([RequestFreed(step)])
        writer.close({})
        events, file = read(path)
        assert done == [event.step for event in events if type(event) is StepScheduled]
        assert 8 == sum(type(event) is RequestFreed for event in events)
        assert len(events) == file.num_events == writer.num_events
    assert at > 50


def test_an_interrupt_in_a_steady_run_loses_no_step(tmp_path):
    """Whatever line of beginning, storing or wiping it is: each step is read once, before and after."""
    places = set()
    for at, interrupts in at_each_line():
        path = tmp_path / f"main-{at}.vtrace"
        writer = TraceWriter(path, {"schema": 1}, tail_size=512)
        written = []
        for step in range(1, 20):
            if write_steady(writer, (step, 1, 1, 1, 0, 5, 2, 1)):
                written.append(step)
            else:
                with interrupts.inside():
                    writer.flush_tail() if step % 3 else writer.write([RequestFreed(step)])
                with interrupts.inside():
                    writer.begin_steady_run()
            assert written == steps_of(read(path)[0]), interrupts.came
        with interrupts.inside():
            writer.close({})
        writer.close({})
        events, file = read(path)
        assert written == steps_of(events), interrupts.came
        assert len(events) == file.footer["num_events"] == file.num_events
        places.add(interrupts.came.partition(":")[0])
    assert {"begin", "clear", "stored", "_store_steady_run", "_begin_tail", "close"} <= places


def steps_of(events):
    return [event.step for event in events if type(event) is StepScheduled]


def test_a_steady_step_that_does_not_fit_leaves_nothing_behind(tmp_path):
    """Too long a step for 32 bits: what was packed of it by then is not the head of a next batch."""
    writer = TraceWriter(tmp_path / "main-1.vtrace", {"schema": 1}, tail_size=256)
    assert not writer.write_steady_step((7, 1, 1 << 32, 1, 0, 5, 0), 2, 1, [])
    assert not any(behind(writer))
    writer.close({})
