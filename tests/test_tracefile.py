"""What was written is what is read: whole, cut off at any point, damaged, or on a full disk."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import msgspec
import pytest
import zstandard
from fakes.events import as_read, batches
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_trace.errors import TraceError
from vllm_trace.events import (
    SCHEMA_VERSION,
    BlocksFreed,
    BlocksTaken,
    EngineConfigured,
    KVGroup,
    RequestFreed,
    RequestSeen,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
)
from vllm_trace.tracefile import MAGIC, MAX_RAW, TraceFile
from vllm_trace.tracewriter import TraceWriter

HEADER = {"schema": SCHEMA_VERSION, "role": "test", "pid": 1}
SMALL_TAIL = 1024


def write(path, some_batches, tail_size=SMALL_TAIL, close=True):
    writer = TraceWriter(path, HEADER, tail_size)
    for batch in some_batches:
        writer.write(batch)
    if close:
        writer.close({"dropped": writer.dropped})
    return writer


def taken(*numbers):
    return [BlocksTaken([number]) for number in numbers]


def read(path):
    file = TraceFile(path)
    return list(file.events()), file


def tail_of(path):
    return path.with_name(path.name + ".tail")


# Whole files ------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.booleans())
def test_silent_calls_are_counted_from_the_composition_when_they_were_not_noted(silent, refused):
    """A request of the step is silent or gets a block; who is refused is in no step and comes last."""
    counted, plain, num_silent = [], [], 0
    for request, is_silent in enumerate(silent):
        num_silent += is_silent
        if not is_silent:
            counted.append(SlotsAllocated(request, 1, 0, [[request + 7]], [], 99, num_silent))
            plain.append(SlotsAllocated(request, 1, 0, [[request + 7]], [], 99, -1))
    if refused:
        counted.append(SlotsRefused(50, 1, 0, 99, num_silent))
        plain.append(SlotsRefused(50, 1, 0, 99, -1))
    requests = [*range(len(silent))]
    for events, kept in (counted, num_silent), (plain, -1):
        events.append(StepScheduled(1, 5, 5, 9, 9, 9, kept, requests, [1] * len(requests)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "main-1.vtrace"
        write(path, [plain])
        assert counted == read(path)[0]


@given(batches, st.sampled_from([256, SMALL_TAIL, 1 << 16]), st.booleans())
def test_arbitrary_events_in_arbitrary_batches_are_read_as_they_were_written(
    some, tail_size, close
):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "main-1.vtrace"
        expected = as_read(some)  # before the write: a reader must not depend on our objects
        writer = write(path, some, tail_size, close)
        actual, file = read(path)
        assert expected == actual
        assert (len(expected), len(expected)) == (writer.num_events, file.num_events)
        assert HEADER == file.header
        assert ("", 0) == (file.truncated, file.dropped) if close else file.truncated


def test_batches_keep_their_bounds_and_the_file_can_be_read_again(tmp_path):
    path = tmp_path / "a.vtrace"
    some = [taken(1, 2), taken(3), taken(4, 5, 6)]
    write(path, some)
    file = TraceFile(path)
    assert some == list(file.batches())
    assert some == list(file.batches())
    assert 6 == file.num_events


def test_a_closed_file_stands_alone_and_counts_itself(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = write(path, [taken(*range(100)) for _ in range(20)])
    assert ["a.vtrace"] == os.listdir(tmp_path)
    file = TraceFile(path).finish()
    assert 2000 == file.num_events == file.footer["num_events"] == writer.num_events
    assert file.footer["num_frames"] > 1
    size = path.stat().st_size
    writer.close({})
    assert size == path.stat().st_size, "closing twice is closing once"


def test_a_batch_larger_than_the_tail_keeps_its_place(tmp_path):
    path = tmp_path / "a.vtrace"
    large = taken(*range(5000))
    some = [taken(-1), large, taken(-2), large, large, taken(-3)]
    write(path, some)
    assert some == list(TraceFile(path).batches())


def test_a_full_tail_becomes_a_frame_and_nothing_is_lost_in_between(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = TraceWriter(path, HEADER, SMALL_TAIL)
    sizes = [path.stat().st_size]
    for number in range(400):
        writer.write(taken(number))
        sizes.append(path.stat().st_size)
        if number % 97 == 0:
            assert taken(*range(number + 1)) == read(path)[0]
    assert len(set(sizes)) > 3, "no frame was written"
    writer.close({})
    assert taken(*range(400)) == read(path)[0]


def test_two_writers_do_not_share_a_file(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = write(path, [taken(1)], close=False)
    with pytest.raises(FileExistsError):
        TraceWriter(path, HEADER)
    writer.close({})
    assert taken(1) == read(path)[0]


# Without an end ---------------------------------------------------------------------------


def test_a_file_that_is_still_written_reads_up_to_the_last_write(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = TraceWriter(path, HEADER)
    seen = []
    for number in range(5):
        writer.write(taken(number))
        actual, file = read(path)
        seen.append(actual)
        assert "no footer" in file.truncated
        assert {} == file.footer
    assert [taken(*range(n + 1)) for n in range(5)] == seen
    writer.close({})
    assert "" == TraceFile(path).finish().truncated


CHILD = """
import sys
from pathlib import Path
from vllm_trace.events import BlocksTaken
from vllm_trace.tracewriter import TraceWriter
writer = TraceWriter(Path(sys.argv[1]), {"schema": 1}, tail_size=4096)
for number in range(10**9):
    writer.write([BlocksTaken([number]), BlocksTaken([-number])])
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("progress", [1, 60, 700, 3000])
def test_kill_9_loses_at_most_the_batch_that_was_being_written(tmp_path, progress):
    path = tmp_path / "a.vtrace"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(progress):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read().splitlines()
    assert -signal.SIGKILL == child.wait()
    reported = progress + len([line for line in rest if line])
    actual, file = read(path)
    every = [BlocksTaken([n * sign]) for n in range(reported + 1) for sign in (1, -1)]
    assert actual in (every[: 2 * reported], every[: 2 * reported + 2]), len(actual)
    assert "killed" in file.truncated


def test_a_frame_that_was_written_before_its_tail_was_emptied_is_not_read_twice(tmp_path):
    """Killed between the two: the old tail is still there, of an older generation."""
    path = tmp_path / "a.vtrace"
    writer = TraceWriter(path, HEADER, SMALL_TAIL)
    old_size, number = path.stat().st_size, 0
    while path.stat().st_size == old_size:
        shutil.copy(tail_of(path), tmp_path / "before")
        writer.write(taken(number))
        number += 1
    shutil.copy(
        tmp_path / "before", tail_of(path)
    )  # the write that made the frame never came to its end
    actual, file = read(path)
    assert taken(*range(number - 1)) == actual
    assert file.truncated
    writer.close({})


def test_a_lost_tail_costs_what_was_in_it_and_no_more(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = write(path, [taken(n) for n in range(200)], close=False)
    tail_of(path).rename(tmp_path / "away")
    actual, file = read(path)
    assert taken(*range(len(actual))) == actual
    assert 0 < len(actual) < 200
    assert file.truncated
    (tmp_path / "away").rename(tail_of(path))
    writer.close({})


def test_a_tail_that_was_emptied_while_it_was_read_is_not_believed(tmp_path, monkeypatch):
    """The writer makes a frame between the last look at the file and the look at the tail."""
    path = tmp_path / "a.vtrace"
    writer = TraceWriter(path, HEADER, SMALL_TAIL)
    numbers = iter(range(10**6))
    writer.write(taken(next(numbers)))
    reads = []

    def read_tail(file, original=TraceFile._read_tail):
        size, data = path.stat().st_size, original(file)
        while len(reads) < 3 and path.stat().st_size == size:
            writer.write(taken(next(numbers)))
        reads.append(data)
        return data

    monkeypatch.setattr(TraceFile, "_read_tail", read_tail)
    actual, _ = read(path)
    assert taken(*range(next(numbers))) == actual
    assert 4 == len(reads)
    writer.close({})


def test_a_reader_beside_a_writer_sees_all_that_was_written_before_it_began(tmp_path):
    path = tmp_path / "a.vtrace"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        for _ in range(20):
            for _ in range(150):
                reported = int(child.stdout.readline())
            actual, file = read(path)
            every = [BlocksTaken([n * sign]) for n in range(len(actual)) for sign in (1, -1)]
            assert len(actual) > 2 * reported
            assert every[: len(actual)] == actual
            assert "no footer" in file.truncated or "torn" in file.truncated
    finally:
        child.kill()
        child.communicate()


def test_marks_of_a_whole_reading_outlive_one_that_was_broken_off(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = write(path, [taken(n) for n in range(200)], close=False)
    file = TraceFile(path)
    next(file.events())
    assert "" == file.truncated, "nothing is known before the first end"
    file.finish()
    next(file.events())
    assert "no footer" in file.truncated
    writer.close({"dropped": 3})
    file.finish()
    next(file.events())
    assert ("", 3, 200) == (file.truncated, file.dropped, file.footer["num_events"])


def test_a_batch_larger_than_a_reader_takes_is_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_trace.tracefile.MAX_RAW", 4000)
    path = tmp_path / "a.vtrace"
    write(path, [taken(1), taken(*range(2000)), taken(2)])
    actual, file = read(path)
    assert (taken(1, 2), 2000) == (actual, file.dropped)


@pytest.mark.parametrize("some", [[], [taken(*range(60))] * 4], ids=["no events", "frames"])
def test_a_file_cut_off_anywhere_is_read_as_far_as_it_goes(tmp_path, some):
    path = tmp_path / "a.vtrace"
    write(path, some, tail_size=256)
    whole = path.read_bytes()
    expected = [event for batch in some for event in batch]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        try:
            actual, file = read(path)
        except TraceError as error:
            assert str(path) in str(error)
            assert size < 200, "only a file without a whole header cannot be read at all"
        else:
            assert expected[: len(actual)] == actual
            assert file.truncated


# Damage -----------------------------------------------------------------------------------

SOME = [
    [*taken(*range(40)), BlocksFreed([7, 8], [0, 1]), RequestSeen(3, "req-é")] for _ in range(12)
]
EVENTS = [event for batch in SOME for event in batch]


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    path = tmp_path_factory.mktemp("closed") / "a.vtrace"
    write(path, SOME, tail_size=512)
    return path.read_bytes()


@pytest.fixture(scope="module")
def unclosed(tmp_path_factory):
    """The file and the tail of a process that was killed."""
    path = tmp_path_factory.mktemp("unclosed") / "a.vtrace"
    write(path, SOME, tail_size=512, close=False)
    return path.read_bytes(), tail_of(path).read_bytes()


def read_or_error(data, tail=None):
    """Events, or None for a ``TraceError``; anything else that is raised fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.vtrace"
        path.write_bytes(data)
        if tail is not None:
            tail_of(path).write_bytes(tail)
        events = []
        try:
            file = TraceFile(path)
            for event in file.events():
                events.append(event)
        except TraceError as error:
            assert str(path) in str(error)
            return events, None
        return events, file


def flipped(data, position, mask):
    position %= len(data)
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


@given(st.integers(0, 1 << 20), st.integers(1, 255))
def test_a_flipped_byte_is_named_or_ends_the_file_but_never_gives_a_wrong_event(closed, at, mask):
    events, _ = read_or_error(flipped(closed, at, mask))
    assert EVENTS[: len(events)] == events


def test_no_single_byte_of_the_file_can_be_wrong_unnoticed(closed):
    """Every byte, one at a time: an error, a file called truncated, or the very same events."""
    for at in range(len(closed)):
        for mask in (0x01, 0x03, 0x80):
            events, file = read_or_error(flipped(closed, at, mask))
            assert EVENTS[: len(events)] == events, at
            assert file is None or file.truncated or EVENTS == events, at


@given(st.integers(0, 511), st.integers(1, 255))
def test_a_flipped_byte_in_the_tail_costs_at_most_the_tail(unclosed, at, mask):
    data, tail = unclosed
    whole, _ = read_or_error(data)
    events, file = read_or_error(data, flipped(tail, at, mask))
    assert whole == events[: len(whole)]
    assert file is not None and file.truncated


@given(st.binary(max_size=400))
@example(b"VTRACE\r")
@example(MAGIC)
@example(MAGIC + b"H" + bytes(12))
@example(b"PK\x03\x04")
def test_arbitrary_bytes_are_a_trace_error(data):
    assert ([], None) == read_or_error(data)


@given(st.binary(max_size=400))
def test_arbitrary_bytes_after_a_good_header_are_an_error_or_an_end(data):
    head = MAGIC + frame(b"H", json.dumps(HEADER).encode())
    events, file = read_or_error(head + data)
    assert [] == events
    assert file is None or file.truncated


@given(st.binary(max_size=400))
def test_arbitrary_bytes_as_a_tail_are_no_error(unclosed, tail):
    data, _ = unclosed
    events, file = read_or_error(data, tail)
    assert EVENTS[: len(events)] == events
    assert file.truncated


def frame(kind, stored, raw_size=None, stored_size=None):
    """A frame as the module's docstring lays it out, its checksum right."""
    sizes = (raw_size if raw_size is not None else len(stored), stored_size or len(stored))
    return struct.pack("<cIII", kind, *sizes, zlib.crc32(stored)) + stored


def events_frame(*batches_of_bytes):
    raw = b"".join(struct.pack("<I", len(batch)) + batch for batch in batches_of_bytes)
    return frame(b"E", zstandard.compress(raw), raw_size=len(raw))


def trace(*frames, header=HEADER):
    return MAGIC + frame(b"H", json.dumps(header).encode()) + b"".join(frames)


def cases(named):
    return [pytest.param(value, id=name) for name, value in named.items()]


def error_of(tmp_path, data):
    path = tmp_path / "a.vtrace"
    path.write_bytes(data)
    with pytest.raises(TraceError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def test_an_empty_file_says_so(tmp_path):
    assert "FILE is empty" == error_of(tmp_path, b"")


def test_a_foreign_file_says_so(tmp_path):
    assert "FILE is not a vllm_trace file" == error_of(tmp_path, b'{"schema": 1}\n')


def test_a_newer_schema_is_refused_with_both_numbers(tmp_path):
    said = error_of(tmp_path, trace(header={"schema": SCHEMA_VERSION + 6}))
    assert (
        f"FILE has schema {SCHEMA_VERSION + 6}; this vllm_trace reads up to {SCHEMA_VERSION}"
        == said
    )


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"3",
        b'"schema"',
        b"{}",
        b'{"schema": null}',
        b'{"schema": "x"}',
        b'{"schema": 1e999}',
    ]
    + [b"{", b'{"schema": [1]}', b"\xff\xfe", b'{"schema": 1, "\xff": 1}', b"[" * 100_000],
    ids=lambda header: repr(header[:20]),
)
def test_an_unreadable_header_is_damage(tmp_path, header):
    assert "damaged" in error_of(tmp_path, MAGIC + frame(b"H", header))


@pytest.mark.parametrize(
    "footer", [b"", b"[]", b"{", b'{"dropped": "x"}', b"\xff", b'{"dropped": null}']
)
def test_an_unreadable_footer_is_damage(tmp_path, footer):
    assert "damaged" in error_of(tmp_path, trace(frame(b"F", footer)))


def pack(value):
    return msgspec.msgpack.encode(value)


@pytest.mark.parametrize(
    "batch",
    cases(
        {
            "nothing": b"",
            "not MessagePack": b"\xc1",
            "not a list": pack(7),
            "not events": pack([1, 2]),
            "a tag that nobody has": pack([[99, 1]]),
            "a tag that was given up": pack([[8, 1]]),
            "a field too few": pack([[13, 1]]),
            "a field of another type": pack([[10, "blocks"]]),
            "text that is not UTF-8": b"\x91\x93\x19\x01\xa1\xff",
            "a list that claims 4 billion items": b"\xdd\xff\xff\xff\xff",
            "bytes that claim 4 billion": b"\x91\x93\x19\x01\xdb\xff\xff\xff\xff",
            "lists in lists in lists": b"\x91\x97\x01\x00\x00\x00\x00\x90\x81\xa1x"
            + b"\x91" * 200_000,
            "more after the end": pack([[5, 1]]) + b"\x00",
        }
    ),
)
def test_a_batch_that_no_writer_of_ours_made_is_damage(tmp_path, batch):
    good = pack([RequestFreed(1)])
    path = tmp_path / "a.vtrace"
    path.write_bytes(trace(events_frame(good, batch)))
    events = []
    with pytest.raises(TraceError, match="is damaged after event 1"):
        events.extend(TraceFile(path).events())


@pytest.mark.parametrize(
    "wrong",
    [
        {"pid": "1"},
        {"pid": -1},
        {"pid": 1 << 70},
        {"role": None},
        {"level": 7},
        {"hooks": {}},
        {"hooks": [{"state": "missing"}]},
        {"hooks": [{"target": "a:b", "state": "missing", "without": []}]},
        {"clock": {"unix_ns": "now"}},
        {"torch": {}},
        {"copy_rate": "fast"},
    ],
    ids=str,
)
def test_a_header_of_wrong_types_is_damage(tmp_path, wrong):
    assert "FILE has an unreadable header: it was damaged" == error_of(
        tmp_path, trace(header=HEADER | wrong)
    )


@pytest.mark.parametrize(
    "wrong",
    [{"dropped": -5}, {"dropped": "3"}, {"failures": 5}, {"failures": {"a": "b"}}, {"ended": 7}],
    ids=str,
)
def test_a_footer_of_wrong_types_is_damage(tmp_path, wrong):
    data = trace(frame(b"F", json.dumps(wrong).encode()))
    assert "damaged" in error_of(tmp_path, data)
    file = TraceFile(tmp_path / "a.vtrace")
    with pytest.raises(TraceError):
        file.finish()
    assert {} == file.footer


@pytest.mark.parametrize(
    "event",
    [
        EngineConfigured(1, 0, 16, 9, [], {}),
        EngineConfigured(1, 16, 0, 9, [], {}),
        EngineConfigured(1, 16, 16, 0, [], {}),
        EngineConfigured(1, 16, 16, 1 << 40, [], {}),
        EngineConfigured(1, 16, 16, 9, [KVGroup("FullAttentionSpec", -16, [])], {}),
    ],
    ids=["no tokens", "no hashed tokens", "no blocks", "a trillion blocks", "a group below zero"],
)
def test_an_engine_of_an_impossible_size_is_damage(tmp_path, event):
    path = tmp_path / "a.vtrace"
    write(path, [[event]])
    with pytest.raises(TraceError, match="is damaged: an engine with"):
        read(path)


def test_a_batch_that_claims_more_bytes_than_the_frame_holds_is_damage(tmp_path):
    raw = struct.pack("<I", 4_000_000_000) + pack([RequestFreed(1)])
    assert "damaged" in error_of(tmp_path, trace(frame(b"E", zstandard.compress(raw))))


def test_a_torn_batch_size_is_damage(tmp_path):
    assert "damaged" in error_of(tmp_path, trace(frame(b"E", zstandard.compress(b"\x01\x00"))))


def test_a_frame_of_an_unknown_kind_is_named(tmp_path):
    assert "FILE has a frame of unknown kind b'X'" == error_of(tmp_path, trace(frame(b"X", b"")))


def test_frames_that_are_not_zstd_are_damage(tmp_path):
    assert "damaged" in error_of(tmp_path, trace(frame(b"E", b"not zstd at all")))


def peak_of(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def claiming(size):
    """A zstd stream whose header says that it holds so many bytes."""
    stream = zstandard.ZstdCompressor().compressobj(size=size)
    return stream.compress(bytes(1000)) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


@pytest.mark.parametrize(
    "hostile",
    cases(
        {
            "a frame that claims 4 GB": frame(b"E", b"x", stored_size=4_000_000_000),
            "events that claim 4 GB": frame(b"E", zstandard.compress(b"x"), raw_size=4_000_000_000),
            "a zstd bomb": frame(b"E", zstandard.compress(bytes(MAX_RAW + 1))),
            "a zstd stream that claims 40 GB": frame(b"E", claiming(40 << 30)),
            "a zstd stream that does not say": frame(
                b"E", zstandard.ZstdCompressor(write_content_size=False).compress(b"")
            ),
        }
    ),
)
def test_what_claims_too_much_is_refused_before_memory_is_taken(tmp_path, hostile):
    path = tmp_path / "a.vtrace"
    path.write_bytes(trace(hostile))

    def refused():
        with pytest.raises(TraceError, match="damaged"):
            read(path)

    assert peak_of(refused) < 8 << 20


def test_a_tail_of_gigabytes_is_not_read_into_memory(tmp_path):
    path = tmp_path / "a.vtrace"
    writer = write(path, [taken(1)], close=False)
    with open(tail_of(path), "r+b") as tail:
        tail.truncate(6 << 30)  # sparse: takes no disk
    seen = []
    assert peak_of(lambda: seen.extend(read(path)[0])) < 2 * MAX_RAW
    assert taken(1) == seen
    writer.close({})


# Full disks -------------------------------------------------------------------------------

FILLS_THE_DISK = """
import json, signal, sys
from pathlib import Path
from random import Random
from vllm_trace.events import BlocksTaken
from vllm_trace.tracefile import TraceFile
from vllm_trace.tracewriter import TraceWriter
limit = int(sys.argv[2])
if limit:
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
random, path = Random(0), Path(sys.argv[1]) / "main-1.vtrace"
writer = TraceWriter(path, {"schema": 1}, tail_size=1 << 16)
for number in range(200):
    writer.write([BlocksTaken([number, *(random.getrandbits(60) for _ in range(1000))])])
failure, dropped = writer.failure, writer.dropped
writer.close({"dropped": dropped})
file = TraceFile(path)
read = [event.blocks[0] for event in file.events()]
print(json.dumps([failure, dropped, writer.num_events, read, file.dropped, file.truncated]))
"""


def fill(folder, *, limit=0, before=()):
    command = [*before, sys.executable, "-c", FILLS_THE_DISK, str(folder), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr
    failure, dropped, num_events, events, read_dropped, truncated = json.loads(done.stdout)
    assert failure
    assert 0 < dropped < 200
    assert list(range(200 - dropped)) == events, (
        "what was written before the disk was full can be read"
    )
    assert (num_events, dropped) == (len(events), read_dropped)
    assert f"could not be written on: {failure}" == truncated
    return failure


def test_a_file_that_may_not_grow_is_read_up_to_there_and_says_what_was_dropped(tmp_path):
    assert "File too large" == fill(tmp_path, limit=600_000)


def test_a_full_disk_is_read_up_to_there_and_says_what_was_dropped(tmp_path):
    mounted = 'mount -t tmpfs -o size=512k tmpfs "$0" && exec "$@"'
    inside = ["unshare", "--mount", "sh", "-c", mounted, str(tmp_path)]
    if (
        not shutil.which("unshare")
        or subprocess.run([*inside, "true"], capture_output=True).returncode
    ):
        pytest.skip("a small disk of our own cannot be mounted here")
    assert "No space left on device" == fill(tmp_path, before=inside)
    assert [] == os.listdir(tmp_path), "the small disk was seen outside"


def test_a_disk_without_room_for_the_tail_is_an_error_at_the_start_and_leaves_nothing(tmp_path):
    code = FILLS_THE_DISK.replace("tail_size=1 << 16", "tail_size=1 << 20")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "600000"], capture_output=True, text=True
    )
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert [] == os.listdir(tmp_path)
