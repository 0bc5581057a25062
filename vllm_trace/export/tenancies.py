"""The table ``blocks``: a row for each time that a request had a block.

A tenancy begins with ``slots.allocated`` and ends with the ``blocks.freed`` of its request. Its row
is written when the next tenant is known, so what is held in memory is the pool and not the trace.
The loop is written for numba (flat arrays, no objects) and runs without it too, more slowly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    EngineConfigured,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
)
from vllm_trace.export.columns import Chunk

HOW = ("new", "hit")
ENDED = ("held", "freed", "finished", "aborted", "preempted", "window")

COLUMNS = (
    ("block", "the physical block"),
    ("request", "who had it"),
    ("group", "KV-cache group"),
    ("position", "its place in the request's table"),
    ("how", "`new` from the free queue, or a prefix `hit`"),
    ("num_sharers", "others that had it already"),
    ("from_event", "`slots.allocated`"),
    ("from_step", "the step of that"),
    ("from_ns", "the time of that"),
    ("cached_event", "when it got a hash from this request; null: it never did"),
    ("to_event", "`blocks.freed`; null: held at the end"),
    ("to_step", "the step of that"),
    ("to_ns", "the time of that"),
    ("ended", "`finished`, `aborted`, `preempted`, `window` (a sliding window passed) or `held`"),
    ("evicted_event", "when it lost its hash after that; null: it did not before its next tenant"),
    ("next_event", "`slots.allocated` of the next tenant"),
    ("next_request", "who that was"),
    ("next_how", "`hit`: what it held was of use again"),
)
"""Name and meaning of what a row has after ``process``."""

NAMES = tuple(name for name, _ in COLUMNS)
TEXTS = {"how": HOW, "ended": ENDED, "next_how": HOW}
SCHEMA = pa.schema(
    [("process", pa.int64())]
    + [(name, pa.string() if name in TEXTS else pa.int64()) for name in NAMES]
)

(
    BLOCK, REQUEST, GROUP, POSITION, HOW_GOT, NUM_SHARERS, FROM_EVENT, FROM_STEP, FROM_NS, CACHED,
    TO_EVENT, TO_STEP, TO_NS, HOW_ENDED, EVICTED, NEXT_EVENT, NEXT_REQUEST, NEXT_HOW,
) = range(len(NAMES))  # fmt: skip

# What can happen, in the order in which it takes effect within one event.
STARTED_ANEW, FREED, CALLED, GOT_HITS, GOT_NEW, GAVE_BACK, FATE, GOT_HASH, LOST_HASH = range(9)

WIDEST = 1 << 22
"""Range of request numbers that are looked up in a table."""

OF_BLOCKS = (SlotsAllocated, BlocksFreed, BlocksCached, BlockEvicted)
"""Without one of these nobody has a block, as in a trace of level light."""

MOST_BLOCKS = 1 << 24
"""A larger id is no block's: it bounds what a damaged trace can ask for."""


def fold(ops, flat, rows, links, free, heads, cached, filled, given, closed, state, out):
    """Take what happened; write the rows that are complete to ``out`` and return how many.

    ``ops``: what, event, step, ns, request, its index, group, begin and end in ``flat``.
    ``rows`` are the open tenancies and those that wait for a next one, each in the chain of its
    block (``heads``, ``links``); ``free`` is a stack of unused ones. ``cached`` has per block who
    gave it a hash, and when; ``filled`` per request and group the length of the table; ``given``
    what was freed and not explained yet; ``closed`` the rows that the last ``request.freed`` ended.
    ``state``: sizes of ``free``, ``given``, ``closed``; this call of ``allocate_slots`` and the last.
    """
    num_out = 0
    for op in range(len(ops)):
        what, event, step, ns = ops[op, 0], ops[op, 1], ops[op, 2], ops[op, 3]
        request, index, group = ops[op, 4], ops[op, 5], ops[op, 6]
        begin, end = ops[op, 7], ops[op, 8]
        if what in (GOT_HITS, GOT_NEW):
            for i in range(begin, end):
                block = flat[i]
                position = filled[index, group]
                filled[index, group] += 1
                if block <= 0 or block >= len(heads):
                    continue
                how = 1 if what == GOT_HITS else 0
                sharers, before, row = 0, -1, heads[block]
                while row >= 0:
                    after = links[row]
                    if rows[row, TO_EVENT] < 0:
                        sharers += 1
                        before = row
                    else:
                        rows[row, NEXT_EVENT] = event
                        rows[row, NEXT_REQUEST] = request
                        rows[row, NEXT_HOW] = how
                        out[num_out] = rows[row]
                        num_out += 1
                        if before < 0:
                            heads[block] = after
                        else:
                            links[before] = after
                        free[state[0]] = row
                        state[0] += 1
                    row = after
                state[0] -= 1
                row = free[state[0]]
                rows[row] = -1
                rows[row, BLOCK] = block
                rows[row, REQUEST] = request
                rows[row, GROUP] = group
                rows[row, POSITION] = position
                rows[row, HOW_GOT] = how
                rows[row, NUM_SHARERS] = sharers
                rows[row, FROM_EVENT] = event
                rows[row, FROM_STEP] = step
                rows[row, FROM_NS] = ns
                rows[row, HOW_ENDED] = 0
                # Within the call, hashes come before the table is told.
                if how == 0 and cached[block, 0] == request and cached[block, 1] > state[4]:
                    rows[row, CACHED] = cached[block, 1]
                links[row] = heads[block]
                heads[block] = row
        elif what == FREED:
            for i in range(begin, end):
                if state[1] < len(given):
                    given[state[1], 0] = flat[i]
                    given[state[1], 1] = event
                    given[state[1], 2] = step
                    given[state[1], 3] = ns
                    state[1] += 1
        elif what in (CALLED, GAVE_BACK):
            state[2] = 0
            for i in range(state[1]):
                block = given[i, 0]
                if block <= 0 or block >= len(heads):
                    continue
                row = heads[block]
                while row >= 0:
                    if rows[row, TO_EVENT] < 0 and rows[row, REQUEST] == request:
                        rows[row, TO_EVENT] = given[i, 1]
                        rows[row, TO_STEP] = given[i, 2]
                        rows[row, TO_NS] = given[i, 3]
                        rows[row, HOW_ENDED] = 5 if what == CALLED else 1
                        if what == GAVE_BACK:
                            closed[state[2]] = row
                            state[2] += 1
                        break
                    row = links[row]
            state[1] = 0
            if what == CALLED:
                state[4] = state[3]
                state[3] = event
            else:
                filled[index, :] = 0
        elif what == FATE:
            for i in range(state[2]):
                row = closed[i]
                if rows[row, REQUEST] == request and rows[row, HOW_ENDED] == 1:
                    rows[row, HOW_ENDED] = begin
            state[2] = 0
        elif what == GOT_HASH:
            for i in range(begin, end):
                block = flat[i]
                if block <= 0 or block >= len(heads):
                    continue
                cached[block, 0] = request
                cached[block, 1] = event
                row = heads[block]
                while row >= 0:
                    if (
                        rows[row, REQUEST] == request
                        and rows[row, TO_EVENT] < 0
                        and rows[row, CACHED] < 0
                    ):
                        rows[row, CACHED] = event
                    row = links[row]
        elif what == LOST_HASH:
            block = flat[begin]
            row = heads[block] if 0 < block < len(heads) else -1
            while row >= 0:
                if rows[row, TO_EVENT] >= 0 and rows[row, EVICTED] < 0:
                    rows[row, EVICTED] = event
                row = links[row]
    return num_out


class Tenancies:
    """Takes the chunks of a trace and gives the rows of ``blocks``, as they are complete."""

    def __init__(self, fold: Any = fold) -> None:
        self._fold = fold
        self._pools: dict[int, _Pool] = {}

    def take(self, chunk: Chunk) -> Iterator[pa.RecordBatch]:
        """What is complete after this chunk."""
        if not any(cls in chunk for cls in OF_BLOCKS) and not any(
            len(pool.rows) for pool in self._pools.values()
        ):
            return
        for process, ops, flat in _operations(chunk):
            pool = self._pools.get(process)
            if pool is None:
                pool = self._pools[process] = _Pool(process, self._fold)
            yield pool.take(ops, flat)

    def end(self) -> Iterator[pa.RecordBatch]:
        """The rows that are still held, or had no next tenant."""
        for pool in self._pools.values():
            yield pool.end()


class _Pool:
    """The blocks of one process."""

    def __init__(self, process: int, fold: Any) -> None:
        self.process, self.fold = process, fold
        self.forget()

    def forget(self) -> None:
        """Begin with nothing held: block ids start afresh."""
        self.rows = np.empty((0, len(NAMES)), np.int64)
        self.links = np.empty(0, np.int64)
        self.free = np.empty(0, np.int64)
        self.heads = np.empty(0, np.int64)
        self.cached = np.empty((0, 2), np.int64)
        self.filled = np.zeros((0, 1), np.int64)
        self.given = np.empty((0, 4), np.int64)
        self.closed = np.empty(0, np.int64)
        self.state = np.array([0, 0, 0, -1, -1], np.int64)
        self.live = np.empty((2, 0), np.int64)
        """Requests that live, and the index of each in ``filled``."""
        self.spare = np.empty(0, np.int64)
        """Indices of those that have finished."""

    def take(self, ops: np.ndarray, flat: np.ndarray) -> pa.RecordBatch:
        made = []
        anew = np.flatnonzero(ops[:, 0] == STARTED_ANEW)
        for part in np.split(ops, anew):
            if len(part) and part[0, 0] == STARTED_ANEW:
                made.append(self._left())
                self.forget()
                part = part[1:]
            if len(part):
                made.append(self._run(part, flat))
        return self._batch(np.concatenate(made))

    def end(self) -> pa.RecordBatch:
        return self._batch(self._left())

    def _run(self, ops: np.ndarray, flat: np.ndarray) -> np.ndarray:
        self._number_requests(ops)
        starts = ops[(ops[:, 0] == GOT_HITS) | (ops[:, 0] == GOT_NEW)]
        most = int((starts[:, 8] - starts[:, 7]).sum())
        highest = int(flat.max(initial=0, where=flat < MOST_BLOCKS))
        self._make_room(most, highest, int(starts[:, 6].max(initial=0)), len(flat))
        out = np.empty((most + len(self.rows), len(NAMES)), np.int64)
        count = self.fold(
            ops, flat, self.rows, self.links, self.free, self.heads, self.cached, self.filled,
            self.given, self.closed, self.state, out,
        )  # fmt: skip
        over = np.isin(self.live[0], ops[(ops[:, 0] == FATE) & (ops[:, 7] != 4), 4])
        gone, self.live = self.live[1, over], self.live[:, ~over]
        self.filled[gone] = 0
        self.spare = np.concatenate([self.spare, gone])
        return out[:count]

    def _number_requests(self, ops: np.ndarray) -> None:
        """An index for each request that is named; those of finished ones are used again."""
        requests, (live, indices) = ops[:, 4], self.live
        low, size = int(requests.min()), int(requests.max()) - int(requests.min()) + 1
        if size > WIDEST:
            every, ranks = np.unique(np.concatenate([live, requests]), return_inverse=True)
            live, requests = ranks[: len(live)], ranks[len(live) :]
            low, size = 0, len(every)
        else:
            every = None
        table = np.full(size, -1)
        inside = (live >= low) & (live < low + size)
        table[live[inside] - low] = indices[inside]
        named = np.zeros(size, bool)
        named[requests - low] = True
        new = np.flatnonzero(named & (table < 0))
        used = len(self.spare) + len(live)
        more = np.arange(used, used + max(len(new) - len(self.spare), 0))
        spare = np.concatenate([self.spare, more])
        table[new], self.spare = spare[: len(new)], spare[len(new) :]
        ops[:, 5] = table[requests - low]
        begun = new + low if every is None else every[new]
        self.live = np.concatenate([self.live, [begun, table[new]]], axis=1)

    def _make_room(self, starts: int, highest: int, group: int, size: int) -> None:
        lacking = starts - int(self.state[0])
        if lacking > 0:
            old = len(self.rows)
            self.rows = np.concatenate([self.rows, np.full((lacking, len(NAMES)), -1)])
            self.links = np.concatenate([self.links, np.full(lacking, -1)])
            free = np.empty(old + lacking, np.int64)
            free[: self.state[0]] = self.free[: self.state[0]]
            free[self.state[0] : self.state[0] + lacking] = np.arange(old, old + lacking)
            self.free = free
            self.state[0] += lacking
            self.closed = _grown(self.closed, old + lacking)
        self.heads = _grown(self.heads, highest + 1)
        self.cached = _grown(self.cached, highest + 1)
        self.given = _grown(self.given, int(self.state[1]) + size)
        wide = max(group + 1, self.filled.shape[1])
        count = len(self.spare) + self.live.shape[1]
        filled = np.zeros((max(count, len(self.filled)), wide), np.int64)
        filled[: len(self.filled), : self.filled.shape[1]] = self.filled
        self.filled = filled

    def _left(self) -> np.ndarray:
        """All that is not written yet, in the order in which it began."""
        used = np.ones(len(self.rows), bool)
        used[self.free[: self.state[0]]] = False
        left = self.rows[used]
        return left[np.argsort(left[:, FROM_EVENT], kind="stable")]

    def _batch(self, rows: np.ndarray) -> pa.RecordBatch:
        columns = [pa.array(np.full(len(rows), self.process))]
        for name, values in zip(NAMES, np.ascontiguousarray(rows.T)):
            null = values < 0
            if name in TEXTS:
                codes = pa.array(values.astype(np.int8), mask=null)
                words = pa.DictionaryArray.from_arrays(codes, pa.array(TEXTS[name]))
                columns.append(words.cast(pa.string()))
            else:
                columns.append(pa.array(values, mask=null if null.any() else None))
        return pa.record_batch(columns, schema=SCHEMA)


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    if size <= len(array):
        return array
    more = np.full((size - len(array), *array.shape[1:]), -1, array.dtype)
    return np.concatenate([array, more])


def _operations(chunk: Chunk) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each process of the chunk (process, its operations in order, the block ids in them)."""
    parts: list[np.ndarray] = []
    flats: list[np.ndarray] = []
    size = 0

    def add(cls: Any, what: int, column: str = "", fate: Any = None) -> None:
        nonlocal size
        batch = chunk.get(cls)
        if batch is None:
            return
        rows = np.arange(batch.num_rows)
        begins = ends = np.full(len(rows), size)
        groups = np.zeros(len(rows), np.int64)
        if fate is not None:
            begins = np.broadcast_to(fate(batch), rows.shape)
        elif column and pa.types.is_int64(batch[column].type):
            flats.append(batch[column].to_numpy())
            begins = size + rows
            ends = begins + 1
        elif column:
            lists = batch[column]
            if pa.types.is_list(lists.type.value_type):
                outer = np.asarray(lists.offsets)
                rows = np.repeat(rows, np.diff(outer))
                first = outer[0]
                groups = np.arange(len(rows)) - (outer[:-1] - first)[rows]
                lists = lists.values.slice(first, len(rows))
            offsets = np.asarray(lists.offsets).astype(np.int64)
            flats.append(lists.values.to_numpy()[offsets[0] : offsets[-1]])
            begins, ends = size + offsets[:-1] - offsets[0], size + offsets[1:] - offsets[0]
        if flats and column:
            size += len(flats[-1])
        made = np.empty((len(rows), 10), np.int64)
        made[:, 0] = what
        for place, name in (
            (1, "number"),
            (2, "step"),
            (3, "at_ns"),
            (4, "request"),
            (9, "process"),
        ):
            if name in batch.schema.names:
                made[:, place] = _numbers(batch[name])[rows]
            else:
                made[:, place] = -1
        made[:, 6], made[:, 7], made[:, 8] = groups, begins, ends
        parts.append(made)

    add(EngineConfigured, STARTED_ANEW)
    add(BlocksFreed, FREED, "blocks")
    add(SlotsAllocated, CALLED)
    add(SlotsRefused, CALLED)
    add(SlotsAllocated, GOT_HITS, "hit_blocks")
    add(SlotsAllocated, GOT_NEW, "blocks")
    add(RequestFreed, GAVE_BACK)
    add(RequestPreempted, FATE, fate=lambda batch: 4)
    add(RequestFinished, FATE, fate=_fate)
    add(BlocksCached, GOT_HASH, "blocks")
    add(BlockEvicted, LOST_HASH, "block")
    if not parts:
        return
    ops = np.concatenate(parts)
    flat = np.concatenate(flats) if flats else np.empty(0, np.int64)
    ops = ops[np.argsort(ops[:, 1], kind="stable")]
    if (ops[:, 9] == ops[0, 9]).all():
        yield int(ops[0, 9]), ops, flat
        return
    for process in np.unique(ops[:, 9]).tolist():
        yield process, np.ascontiguousarray(ops[ops[:, 9] == process]), flat


def _fate(batch: pa.RecordBatch) -> np.ndarray:
    return np.where(np.asarray(pc.equal(batch["reason"], "abort")), 3, 2)


def _numbers(column: pa.Array) -> np.ndarray:
    return (pc.fill_null(column, -1) if column.null_count else column).to_numpy()
