"""The compiled reader reads what the plain one reads, or leaves it to that."""

import tempfile
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("pyarrow", reason="not installed: pip install 'vllm-trace[export]'")
pytest.importorskip("duckdb", reason="not installed: pip install 'vllm-trace[export]'")
pytest.importorskip(
    "numba", reason="numba is not installed: there is no compiled reader to compare"
)

from fakes.events import batches as any_batches
from helpers import write_trace
from hypothesis import given
from hypothesis import strategies as st
from recorded import arrived, ended, engine, looked_up, written

from export.exporting import GOLD, NAMES, both, whole
from vllm_trace.errors import TraceError
from vllm_trace.events import (
    AttentionCalled,
    BlocksFreed,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.export import (
    columns,
    compiled,
    fast,
    tables,
)
from vllm_trace.trace import read_trace
from vllm_trace.tracefile import SUFFIX, TAIL_SUFFIX, TraceFile, decode_batch
from vllm_trace.tracewriter import TraceWriter, _frame


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_reader_reads_the_same(name):
    slow, quick = both(GOLD / f"{name}.vtrace")
    assert slow == quick


def test_it_reads_on_over_pieces_and_chunks(tmp_path, monkeypatch):
    """Steps, sizes and repeated lists go from one piece to the next, and from chunk to chunk."""
    monkeypatch.setattr(fast, "PIECE", 500)
    monkeypatch.setattr(columns, "CHUNK", 200)
    for name in ("mixed", "preempt"):
        slow, quick = both(GOLD / f"{name}.vtrace")
        assert slow == quick


def fitting(value, name=""):
    """The same with every number brought into the width of its column."""
    if isinstance(value, bool | str | float) or value is None:
        return value
    if isinstance(value, int):
        return value % 2**64 if name in tables.HASHES else (value + 2**63) % 2**64 - 2**63
    if isinstance(value, list):
        return [fitting(one, name) for one in value]
    if isinstance(value, tuple):  # of kv_events.taken: what, hashes
        return tuple(fitting(one, "hashes") for one in value)
    if isinstance(value, dict):
        return {fitting(k): fitting(v) for k, v in value.items()}
    for each in value.__struct_fields__:
        setattr(value, each, fitting(getattr(value, each), each))
    return value


@given(any_batches, st.sampled_from(["full", "light"]), st.booleans(), st.integers(0, 5))
def test_it_reads_the_same_from_any_events_or_leaves_them_to_the_other(
    batches, level, killed, as_they_are
):
    batches = batches if not as_they_are else fitting(batches)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"main-1{SUFFIX}"
        writer = TraceWriter(path, {"schema": 1, "role": "main", "pid": 0, "level": level})
        for batch in batches:
            writer.write(batch)
        if not killed:
            writer.close({"dropped": 0})
        try:
            quick = read_trace(path)
            found = whole(fast.chunks(quick.files[0], True))
        except fast.Unusual:
            return
        slow = read_trace(path)
        try:
            wanted = whole(columns.chunks(slow, True))
        except TraceError:  # a number that no column holds: both must refuse
            raise AssertionError("the compiled reader took what the other refuses") from None
        assert repr(wanted) == repr(found)
        assert slow.problems == quick.problems


# What a recorder leaves to the reader ---------------------------------------------------------


def on_disk(path):
    """The events as they are in the file, with nothing put back."""
    file = TraceFile(path)
    for raw in file.frames():
        position = 0
        while position < len(raw):
            size = int.from_bytes(raw[position : position + 4], "little")
            yield from decode_batch(raw[position + 4 : position + 4 + size])
            position += 4 + size


@pytest.mark.parametrize("piece", [2000, fast.PIECE])
@pytest.mark.parametrize("level", ["full", "light"])
def test_a_fresh_trace_of_the_real_scheduler_reads_the_same(level, piece, fresh, monkeypatch):
    """Steps that are as the last one, calls that only the step's composition can place."""
    told = list(on_disk(fresh[level]))
    told_steps = [event for event in told if type(event) is StepScheduled]
    assert any(step.requests is None for step in told_steps)
    if level == "full":
        assert any(step.num_kept < 0 for step in told_steps)
        assert any(type(event) is SlotsAllocated and event.num_kept < 0 for event in told)
    monkeypatch.setattr(fast, "PIECE", piece)
    slow, quick = both(fresh[level])
    assert slow == quick
    assert all(row["num_kept"] >= 0 for row in quick[0][StepScheduled])


@given(st.data())
def test_silent_calls_are_counted_as_by_the_plain_reader(data):
    """Any calls before any steps; a step in a piece of its own, or in one with its calls."""
    number = st.integers(0, 4)
    call = st.builds(SlotsAllocated, number, st.just(1), st.just(0), st.just([[1]]), st.just([[]]),
                     st.just(3), st.sampled_from([-1, 0, 2]))  # fmt: skip
    refused = st.builds(SlotsRefused, number, st.just(1), st.just(0), st.just(3), st.just(-1))
    asked = st.lists(number, unique=True).map(lambda requests: (requests, [1] * len(requests)))
    same = st.just((None, None))
    batches = []
    for count in range(1, data.draw(st.integers(1, 5)) + 1):
        requests, num_tokens = data.draw(asked | same)
        kept = data.draw(st.sampled_from([-1, -1, 3]))
        events = data.draw(st.lists(call | refused, max_size=5))
        events.append(StepScheduled(count, count, 1, 1, 1, 1, kept, requests, num_tokens))
        if data.draw(st.booleans()):
            batches += [[event] for event in events]
        else:
            batches.append(events)
    batches.append(data.draw(st.lists(call, max_size=3)) + [StepUpdated(1, 99, 1)])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        path = write_trace(Path(folder), "main", 1, batches)
        patched.setattr(fast, "PIECE", data.draw(st.sampled_from([1, 60, 10_000])))
        slow, quick = both(path)
        assert slow == quick


def test_unusual_bytes_are_read_on_by_the_other(tmp_path, monkeypatch):
    """A number of half the width, which no recorder writes and msgspec takes."""
    usual = [looked_up(0, 4), *ended(0, [1])]
    bodies = [msgspec.msgpack.encode([event]) for event in usual]
    odd = msgspec.msgpack.encode([arrived(1, "odd", 4)])
    bodies.insert(2, odd.replace(b"\xcb" + bytes(8), b"\xca" + bytes(4), 1))
    trace = written(tmp_path / "trace", [])
    path = next(trace.glob("*.vtrace"))
    raw = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    data = path.read_bytes()
    footer = data.index(b"F", len(data) - 80)
    import zstandard

    frame = _frame(b"E", raw, zstandard.ZstdCompressor().compress)
    path.write_bytes(data[:footer] + frame + data[footer:])
    monkeypatch.setattr(fast, "PIECE", 10)
    quick, slow = read_trace(trace), read_trace(trace)
    with pytest.raises(fast.Unusual):
        whole(fast.chunks(quick.files[0]))
    assert whole(columns.chunks(slow)) == whole(compiled.chunks(quick))


def test_the_tail_of_a_killed_process_is_in_it(tmp_path):
    (tmp_path / "trace").mkdir()
    writer = TraceWriter(tmp_path / "trace" / f"main-1{SUFFIX}", {"schema": 1, "role": "main"})
    writer.write([engine(), arrived(0, "a", 4)])
    assert (tmp_path / "trace" / f"main-1{SUFFIX}{TAIL_SUFFIX}").exists()
    slow, quick = both(tmp_path / "trace")
    assert slow == quick and 2 == sum(map(len, quick[0].values()))
    assert "truncated" in quick[1][0]


@given(st.data())
def test_what_is_not_in_the_file_is_what_an_older_recorder_meant(data):
    """Fields at the end that have a default may be missing, of any kind and any number of them."""
    batches = []
    for batch in fitting(data.draw(any_batches)):
        bodies = [msgspec.msgpack.decode(msgspec.msgpack.encode(event)) for event in batch]
        for event, body in zip(batch, bodies):
            optional = len(type(event).__struct_defaults__)
            del body[len(body) - data.draw(st.integers(0, optional)) :]
        batches.append(msgspec.msgpack.encode(bodies))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"main-1{SUFFIX}"
        writer = TraceWriter(path, {"schema": 1, "role": "main", "pid": 0})
        for body in batches:
            writer.write_encoded(body, len(msgspec.msgpack.decode(body)))
        writer.close({"dropped": 0})
        try:
            slow, quick = both(path)
        except (fast.Unusual, TraceError):  # a number that no column holds
            return
        assert repr(slow[0]) == repr(quick[0])  # nan is not itself
        assert slow[1:] == quick[1:]


def test_a_call_within_the_tolerance_and_one_beyond_it_are_whole(tmp_path):
    """Most calls have nothing of a shadow; a piece in which one has is decoded event by event."""
    plain = AttentionCalled(1, "k", [0], [5], [2])
    beyond = AttentionCalled(2, "k", [0], [6], [2], "cuda", [(0.5, 0.25, 3, 4)], 0.1, {"a": [1]})
    path = write_trace(tmp_path, "worker", 1, [[plain] * 3, [plain, beyond]])
    for piece in (10, fast.PIECE):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(fast, "PIECE", piece)
            slow, quick = both(path)
        assert slow == quick
    told = quick[0][AttentionCalled]
    assert ["{}"] * 4 + ['{"a":[1]}'] == [row["beyond"] for row in told]
    assert [] == told[0]["worst"] and 4 == told[4]["worst"][0]["position"]


def test_room_grows_with_what_a_piece_holds(tmp_path):
    """Each list longer than all before it: every piece is read twice."""
    lists = [BlocksFreed([*range(1, 4**i)], [0] * (4**i - 1)) for i in range(1, 8)]
    path = write_trace(tmp_path, "main", 1, [[one] for one in lists])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fast, "PIECE", 1)
        slow, quick = both(path)
    assert slow == quick
    assert [4**i - 1 for i in range(1, 8)] == [len(row["blocks"]) for row in quick[0][BlocksFreed]]
