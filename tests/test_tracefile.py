"""What a reader makes of files that are cut off, damaged, or made to do harm."""

import json
import struct
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import msgspec
import pytest
import zstandard
from fakes.files import HEADER, read, tail_of, taken, write
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_trace.errors import TraceError
from vllm_trace.events import (
    SCHEMA_VERSION,
    BlocksFreed,
    EngineConfigured,
    KVGroup,
    RequestFreed,
    RequestSeen,
)
from vllm_trace.tracefile import MAGIC, MAX_RAW, TraceFile


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


SOME = [
    [*taken(*range(12)), BlocksFreed([7, 8], [0, 1]), RequestSeen(3, "req-é")] for _ in range(8)
]
EVENTS = [event for batch in SOME for event in batch]


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    path = tmp_path_factory.mktemp("closed") / "a.vtrace"
    write(path, SOME, tail_size=256)
    return path.read_bytes()


@pytest.fixture(scope="module")
def unclosed(tmp_path_factory):
    """The file and the tail of a process that was killed."""
    path = tmp_path_factory.mktemp("unclosed") / "a.vtrace"
    write(path, SOME, tail_size=256, close=False)
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


@given(st.integers(0, 255), st.integers(1, 255))
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
