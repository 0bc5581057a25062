"""A file read while it is written: every event once, in order, whatever the writer is at."""

import os
import threading

import pytest
from fakes.files import write_steady
from helpers import configured
from hypothesis import given
from hypothesis import strategies as st
from test_show import STORY, arrived, scheduled, updated

from vllm_trace import growing
from vllm_trace.errors import TraceError
from vllm_trace.events import SCHEMA_VERSION, BlocksTaken
from vllm_trace.growing import GrowingFile, GrowingTrace
from vllm_trace.trace import read_trace
from vllm_trace.tracefile import BATCHES, TAIL_SUFFIX, TraceFile
from vllm_trace.tracewriter import TraceWriter, seal

HEADER = {"schema": SCHEMA_VERSION, "role": "main", "pid": 1 << 30, "host": "here"}


def new(source):
    """What a file, or a trace, has that is new."""
    batches = source.new_batches()
    if isinstance(source, GrowingTrace):
        batches = (events for _, events in batches)
    return [event for batch in batches for event in batch]


ACTIONS = st.lists(
    st.one_of(
        st.integers(1, 40),  # a batch of so many blocks
        st.just("flush"),
        st.just("big"),
        st.just("look"),
        st.just("steps"),
        st.integers(41, 60),  # so many steady ones less 40
    ),
    max_size=60,
)


@given(actions=ACTIONS, ends=st.sampled_from(["closed", "killed", "open"]))
def test_every_event_once_and_in_order(tmp_path_factory, actions, ends):
    path = tmp_path_factory.mktemp("growing") / "main-1.vtrace"
    writer = TraceWriter(path, HEADER, tail_size=2048)
    file, told, number = GrowingFile(path), [], 0
    for action in actions:
        if action == "look":
            told += new(file)
        elif action == "flush":
            writer.flush_tail()
        elif action == "big":
            writer.write([BlocksTaken(list(range(1000, 2500)))])  # larger than the tail
        elif action == "steps":
            number += 1
            requests = [0] if number == 1 else None  # "as in the last step"
            writer.write([scheduled(number, requests, requests, 4), updated(number)])
        elif action > 40:
            writer.begin_steady_run()
            for _ in range(action - 40):
                number += write_steady(writer, (number + 1, 9, 3, 1, 0, 7, 13, 2))
        else:
            writer.write([BlocksTaken([block]) for block in range(action)])
    if ends == "closed":
        writer.close({})
    elif ends == "killed":
        told += new(file)
        assert seal(path, "killed")
    told += new(file)
    told += new(file)
    assert list(TraceFile(path).events()) == told
    assert (ends != "open") == file.ended
    writer.steady_run.words.release()
    for name in ("_tail", "_file"):
        getattr(writer, name).close()


def test_a_writer_that_is_never_still(tmp_path):
    """Another thread writes and empties a small tail all the time; nothing is lost or read torn."""
    path = tmp_path / "main-1.vtrace"
    writer = TraceWriter(path, HEADER, tail_size=1024)
    file, told = GrowingFile(path), []

    looks = 0

    def write():
        number = 0
        while looks < 50 or writer._num_frames < 10:
            writer.write([BlocksTaken([number, *range(number % 9)])])
            number += 1
        writer.close({})

    thread = threading.Thread(target=write)
    thread.start()
    while not file.ended:
        told += new(file)
        looks += 1
    thread.join()
    assert file.num_frames > 3
    assert list(range(len(told))) == [event.blocks[0] for event in told]


def test_a_tail_that_is_emptied_while_it_is_read(tmp_path, monkeypatch):
    """The writer has put it into a frame and is at zeroing it: what was read is half a batch."""
    path = tmp_path / "main-1.vtrace"
    writer = TraceWriter(path, HEADER)
    file = GrowingFile(path)
    writer.write([BlocksTaken(list(range(20_000)))])
    tail_path = path.with_name(path.name + TAIL_SUFFIX)
    head_of, after = growing.TAIL, []

    class Emptying:
        size = head_of.size

        @staticmethod
        def unpack(head):
            monkeypatch.setattr(growing, "TAIL", head_of)
            writer.flush_tail()
            with open(tail_path, "r+b") as tail:  # its zeros are there, its new head is not yet
                after.append(tail.read(head_of.size))
                tail.seek(0)
                tail.write(head)
            return head_of.unpack(head)

    monkeypatch.setattr(growing, "TAIL", Emptying)
    assert [] == new(file)
    with open(tail_path, "r+b") as tail:
        tail.write(*after)
    assert [BlocksTaken(list(range(20_000)))] == new(file)
    writer.write([BlocksTaken([7])])
    assert [BlocksTaken([7])] == new(file)
    writer.close({})


def test_a_look_reads_only_what_is_new(tmp_path, monkeypatch):
    path = tmp_path / "main-1.vtrace"
    writer = TraceWriter(path, HEADER)
    for number in range(3000):
        writer.write([BlocksTaken(list(range(200)))])
        if number % 500 == 0:
            writer.flush_tail()
    file = GrowingFile(path)
    assert 3000 == len(new(file))
    decoded = []
    monkeypatch.setattr(growing, "decode_batch", lambda body: decoded.append(len(body)) or [])
    frames = []
    monkeypatch.setattr(growing, "unzip", lambda *args: frames.append(args))
    assert [] == new(file)
    writer.write([BlocksTaken([7])])
    new(file)
    assert ([], 1) == (frames, len(decoded))  # one batch, and no frame
    writer.close({})


def test_files_that_come_later_and_one_that_is_begun_anew(tmp_path):
    trace = GrowingTrace(tmp_path)
    assert [] == new(trace)
    assert f"no .vtrace file in {tmp_path} yet" == trace.problem
    assert not trace.ended and not trace.is_written
    (tmp_path / "trace").mkdir()
    first = TraceWriter(tmp_path / "trace/engine-1.vtrace", HEADER)
    first.write(list(STORY[:3]))
    assert list(STORY[:3]) == new(trace)
    second = TraceWriter(tmp_path / "trace/worker-2.vtrace", HEADER | {"role": "worker"})
    second.write([updated(1)])
    assert [updated(1)] == new(trace)
    first.close({})
    second.close({})
    assert [] == new(trace) and trace.ended
    os.rename(tmp_path / "trace/engine-1.vtrace", tmp_path / "old")
    again = TraceWriter(tmp_path / "trace/engine-1.vtrace", HEADER)
    again.write([configured(), arrived(0, "x")])
    assert [configured(), arrived(0, "x")] == new(trace)
    assert not trace.ended
    os.remove(tmp_path / "trace/worker-2.vtrace")
    assert [] == new(trace)
    assert [again.path] == [file.path for file in trace.files]
    assert [
        f"{first.path} was begun anew while it was read",
        f"{second.path} was removed while it was read",
    ] == trace.problems
    again.close({})


def test_files_are_read_in_the_order_of_time(tmp_path):
    """What one process did while another waited stands before what that did then."""
    trace = GrowingTrace(tmp_path)
    writers = [TraceWriter(tmp_path / f"{name}-1.vtrace", HEADER) for name in ("a", "b")]
    for number in range(6):
        event = updated(number)
        event.started_ns = number * 1000
        writers[number % 2].write([event])
    assert [*range(6)] == [event.step for event in new(trace)]
    for writer in writers:
        writer.close({})


def test_of_a_followed_trace_the_same_is_missing_as_of_a_finished_one(tmp_path):
    lost = {"target": "vllm.x:Y.z", "state": "missing", "without": "steps have no end"}
    writer = TraceWriter(tmp_path / "main-1.vtrace", HEADER | {"hooks": [lost]})
    followed = GrowingTrace(tmp_path)
    assert [] == new(followed)
    assert ["vllm.x:Y.z missing: steps have no end"] == [
        said.partition(": ")[2] for said in followed.problems
    ]
    writer.close({"dropped": 2, "failures": {"vllm.x:Y.w": 3}})
    assert [] == new(followed)
    trace = read_trace(tmp_path)
    assert [] == list(trace.records())
    assert trace.problems == followed.problems
    assert 3 == len(trace.problems)


def test_a_damaged_file_ends_and_the_others_go_on(tmp_path):
    first = TraceWriter(tmp_path / "engine-1.vtrace", HEADER)
    second = TraceWriter(tmp_path / "worker-2.vtrace", HEADER)
    (tmp_path / "foreign.vtrace").write_bytes(b"no trace")
    trace = GrowingTrace(tmp_path)
    first.write([BlocksTaken([1])])
    assert [BlocksTaken([1])] == new(trace)
    assert "" == trace.problem
    with open(first.path, "ab") as file:
        file.write(b"E" + b"\xff" * 100)
    second.write([BlocksTaken([2])])
    assert [BlocksTaken([2])] == new(trace)
    assert "damaged" in trace.problem
    foreign, damaged = trace.problems
    assert "foreign.vtrace" in foreign and trace.problem == damaged
    second.close({})
    assert [] == new(trace)
    first.close({})


def test_damage_is_an_error_and_no_hang(tmp_path):
    path = tmp_path / "main-1.vtrace"
    writer = TraceWriter(path, HEADER)
    file = GrowingFile(path)
    writer.write([BlocksTaken([1])])
    tail = path.with_name(path.name + TAIL_SUFFIX)
    data = bytearray(tail.read_bytes())
    data[BATCHES + 4] = 0xC1  # no MessagePack begins like this
    tail.write_bytes(data)
    with pytest.raises(TraceError, match="unreadable tail"):
        new(file)
    os.truncate(path, 4)
    with pytest.raises(TraceError):
        GrowingFile(path)
