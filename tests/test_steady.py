"""A run of steady steps in the tail: read as the batches that it becomes, at any moment, once."""

import struct

import pytest
from fakes.files import HEADER, read, tail_of, taken, write_steady
from hypothesis import given
from hypothesis import strategies as st

from vllm_trace import growing, steady
from vllm_trace.events import BlocksTaken, StepScheduled, StepUpdated
from vllm_trace.growing import GrowingFile
from vllm_trace.steady import (
    AREA_SIZE,
    MAX_RECORDS,
    RECORD,
    STORED_SIZE,
    SteadyRun,
    batches_in_area,
)
from vllm_trace.tracefile import BATCHES, TAIL, decode_batch
from vllm_trace.tracewriter import TraceWriter, seal

u32, i64 = st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1)
RECORDS = st.tuples(st.integers(1, 2**32 - 1), i64, i64, u32, u32, u32, i64, i64)
LIGHT = HEADER | {"level": "light", "pid": 1 << 30}


def events_of(record):
    step, at, dur, running, waiting, free, updated, updated_dur = record
    return [
        StepScheduled(step, at, dur, running, waiting, free, 0, [], []),
        StepUpdated(step, updated, updated_dur),
    ]


def opened(path, tail_size=4096):
    writer = TraceWriter(path, LIGHT, tail_size=tail_size)
    writer.begin_steady_run()
    return writer


@given(st.lists(RECORDS, max_size=30))
def test_a_record_is_its_two_events(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("steady") / "main-1.vtrace"
    writer, expected = opened(path), []
    for record in records:
        assert write_steady(writer, record)
        expected += events_of(record)
        assert (expected, len(expected)) == (read(path)[0], writer.num_events)
    writer.flush_tail()
    assert expected == read(path)[0]
    writer.close({})
    events, file = read(path)
    assert (expected, len(expected)) == (events, file.footer["num_events"])


@given(st.lists(RECORDS, min_size=1, max_size=MAX_RECORDS))
def test_what_is_stored_is_what_is_read(records):
    """Made all at once, byte by byte, and one after the other, number by number."""
    area = bytearray(AREA_SIZE)
    run = SteadyRun(memoryview(area))
    run.begin(BATCHES, 1 << 20)
    for record in records:
        for index, value in enumerate(record):
            run.words[run.at + index] = value
        run.at += len(record)
    stored = run.stored()
    bodies = [*batches_in_area(bytes(area), BATCHES)]
    assert stored == b"".join(struct.pack("<I", len(body)) + body for body in bodies)
    assert [events_of(r)[1] for r in records] == [decode_batch(body)[1] for body in bodies]
    for number in range(len(records) + 1):  # so many are batches by now
        assert bodies[number:] == [*batches_in_area(bytes(area), BATCHES + number * STORED_SIZE)]


ACTIONS = st.lists(
    st.one_of(
        RECORDS,
        st.sampled_from(["begin", "write", "flush", "look", "huge"]),
    ),
    max_size=60,
)


@given(actions=ACTIONS, size=st.integers(300, 1200), ends=st.sampled_from(["closed", "killed"]))
def test_whatever_is_written_between(tmp_path_factory, actions, size, ends):
    """Every event once and in order, for one who looks now and then, and for one who comes later."""
    path = tmp_path_factory.mktemp("steady") / "main-1.vtrace"
    writer, expected = opened(path, size), []
    file, seen = GrowingFile(path), []
    for action in actions:
        if action == "begin":
            writer.begin_steady_run()
        elif action in ("write", "huge"):
            numbers = range(200) if action == "huge" else range(3)
            writer.write(taken(*numbers))
            expected += taken(*numbers)
        elif action == "flush":
            writer.flush_tail()
        elif action == "look":
            seen += [event for batch in file.new_batches() for event in batch]
            assert expected == seen
        elif write_steady(writer, action):
            expected += events_of(action)
        assert expected == read(path)[0]
        assert len(expected) == writer.num_events
    if ends == "closed":
        writer.close({})
    else:
        assert seal(path, "killed")
    seen += [event for batch in file.new_batches() for event in batch]
    assert expected == seen == read(path)[0]


def test_a_run_ends_where_the_tail_or_its_area_does(tmp_path):
    record = (1, 2, 3, 4, 5, 6, 7, 8)
    for size, most in ((TAIL.size + 4 + 3 * STORED_SIZE, 3), (1 << 20, MAX_RECORDS)):
        writer = opened(tmp_path / f"main-{size}.vtrace", size)
        assert most == sum(write_steady(writer, record) for _ in range(2 * MAX_RECORDS))
        writer.close({})
        assert 2 * most == len(read(writer.path)[0])


def test_a_step_that_was_cut_off_is_not_there(tmp_path):
    """Killed between the stores: the step's number goes in last."""
    path = tmp_path / "main-1.vtrace"
    writer = opened(path)
    write_steady(writer, (1, 2, 3, 4, 5, 6, 7, 8))
    run = writer.steady_run
    for index in range(1, 8):
        run.words[run.at + index] = 99
    assert [1] == [e.step for e in read(path)[0] if type(e) is StepScheduled]
    run.words[run.at] = 2
    assert [1, 2] == [e.step for e in read(path)[0] if type(e) is StepScheduled]


@pytest.mark.parametrize("stored", [False, True])
def test_killed_while_a_run_is_stored(tmp_path, monkeypatch, stored):
    """The batches are there and the records are still: each step counts once."""
    path = tmp_path / "main-1.vtrace"
    writer = opened(path)
    records = [(step, 2, 3, 4, 5, 6, 7, 8) for step in range(1, 6)]
    for record in records:
        write_steady(writer, record)
    if stored:
        monkeypatch.setattr(SteadyRun, "clear", lambda self: None)
    writer.write([BlocksTaken([7])] if stored else [])
    tail = tail_of(path).read_bytes()
    assert any(tail[TAIL.size : BATCHES])
    assert [e for r in records for e in events_of(r)] == read(path)[0][:10]
    assert 10 + stored == len(read(path)[0])


def test_a_run_that_was_exchanged_while_it_was_read(tmp_path, monkeypatch):
    """Of the area one page is of the old run and the next of the new one: none of it is believed."""
    path = tmp_path / "main-1.vtrace"
    writer = opened(path)
    write_steady(writer, (1, 2, 3, 4, 5, 6, 7, 8))
    follower, real = GrowingFile(path), growing.same_run

    def meanwhile(file, data):
        writer.write(taken(7))
        writer.begin_steady_run()
        for step in range(2, 5):
            write_steady(writer, (step, 2, 3, 4, 5, 6, 7, 8))
        return real(file, data)

    monkeypatch.setattr(growing, "same_run", meanwhile)
    seen = [event for batch in follower.new_batches() for event in batch]
    monkeypatch.setattr(growing, "same_run", real)
    assert [] == seen
    seen += [event for batch in follower.new_batches() for event in batch]
    assert read(path)[0] == seen
    assert [1, 2, 3, 4] == [e.step for e in seen if type(e) is StepScheduled]


@given(st.binary(max_size=4 * RECORD.size), st.integers(0, 4000))
def test_damage_is_no_error(area, end):
    for body in batches_in_area(area, end):
        assert STORED_SIZE == len(body) + 4


def test_no_room_where_numbers_lie_otherwise(tmp_path, monkeypatch):
    """The bytes of a record are taken as a little-endian machine leaves them."""
    monkeypatch.setattr(steady.sys, "byteorder", "big")
    assert not write_steady(opened(tmp_path / "main-1.vtrace"), (1, 2, 3, 4, 5, 6, 7, 8))
