"""What is packed by hand is read as the very event, for every value that fits."""

import tempfile
from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from vllm_trace import packing as p
from vllm_trace.events import (
    SCHEMA_VERSION,
    AnyEvent,
    BlocksCached,
    BlocksTaken,
    SlotsAllocated,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.tracefile import TraceFile
from vllm_trace.tracewriter import TraceWriter

decode = msgspec.msgpack.Decoder(AnyEvent).decode
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
kept = st.integers(-1, 2**15 - 1)


@given(u32)
def test_a_block_taken(block):
    assert BlocksTaken([block]) == decode(p.pack_taken(p.TAKEN, block))


@given(u32, st.integers(0, 127), u32, u32, u64)
def test_a_block_cached(request, group, first, block, block_hash):
    packed = p.pack_cached(
        p.CACHED,
        request,
        group,
        p.U32,
        first,
        p.ONE_ID,
        block,
        p.ONE_HASH,
        block_hash.to_bytes(8, "big"),
    )
    assert BlocksCached(request, group, first, [block], [block_hash]) == decode(packed)


@given(u32, u32, u32, u32, kept)
def test_a_block_allocated(request, tokens, block, free, kept):
    packed = p.pack_allocated(
        p.ALLOCATED, request, p.U32, tokens, p.NO_HIT, block, p.NO_HIT_BLOCKS, free, p.I16, kept
    )
    assert SlotsAllocated(request, tokens, 0, [[block]], [], free, kept) == decode(packed)


@given(u32, u32, u32, u32, kept)
def test_a_block_taken_and_allocated_in_one_piece(request, tokens, block, free, kept):
    allocated = (
        p.ALLOCATED, request, p.U32, tokens, p.NO_HIT, block, p.NO_HIT_BLOCKS, free, p.I16, kept
    )  # fmt: skip
    assert p.pack_taken(p.TAKEN, block) + p.pack_allocated(*allocated) == p.pack_taken_allocated(
        p.TAKEN, block, *allocated
    )


@given(u32, u64, u64, u32, u32, u32, kept)
def test_a_steady_step(step, started, dur, running, waiting, free, kept):
    packed = p.pack_scheduled(
        p.SCHEDULED, step, p.U64, started, p.U64, dur,
        p.U32, running, p.U32, waiting, p.U32, free, p.I16, kept,
    )  # fmt: skip
    assert StepScheduled(step, started, dur, running, waiting, free, kept) == decode(packed)


@given(u32, u64, u64)
def test_a_step_in_which_each_got_one_token(step, started, dur):
    packed = p.pack_updated(p.UPDATED, step, p.U64, started, p.U64, dur)
    assert StepUpdated(step, started, dur) == decode(packed)


@given(st.integers(0, 70_000))
def test_the_head_of_a_list(length):
    assert [None] * length == msgspec.msgpack.decode(p.list_head(length) + b"\xc0" * length)


numbers = st.integers(0, 2**33)
plans = st.tuples(numbers, u64, numbers, numbers, numbers, numbers, st.integers(-1, 200))


@given(
    st.lists(st.tuples(plans, u64, numbers, st.lists(u32, max_size=16)), max_size=12),
    st.integers(300, 900),
)
def test_a_step_written_in_one_piece_is_what_its_events_are(steps, tail_size):
    """Or it says that it does not fit, has changed nothing, and they are written as ever."""
    expected = []
    with tempfile.TemporaryDirectory() as folder:
        header = {"schema": SCHEMA_VERSION, "level": "light"}
        writer = TraceWriter(Path(folder) / "main-1.vtrace", header, tail_size=tail_size)
        for plan, started, dur, blocks in steps:
            before = [p.pack_taken(p.TAKEN, block) for block in blocks]
            written = writer.write_steady_step(plan, started, dur, before)
            events = [*(BlocksTaken([block]) for block in blocks)]
            events += [StepScheduled(*plan, [], []), StepUpdated(plan[0], started, dur)]
            if not written:
                writer.write(events)
            # A reader puts in what -1 stands for: nobody is in these steps.
            events[-2] = StepScheduled(*plan[:-1], max(plan[-1], 0), [], [])
            expected += events
        assert expected == [*TraceFile(writer.path).events()], "before it is closed"
        writer.close({"dropped": 0, "failures": {}})
        file = TraceFile(writer.path)
        assert expected == [*file.events()]
        assert (len(expected), "") == (file.footer["num_events"], file.truncated)
