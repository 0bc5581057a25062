"""The table ``blocks``: a row for each time that a request had a block.

A tenancy begins with ``slots.allocated`` and ends with the ``blocks.freed`` of its request. Its row
is written when the next tenant is known, so what is held in memory is the pool and not the trace.
The loop over the events stands in ``holding``.
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
    Event,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
)
from vllm_trace.export import holding as h
from vllm_trace.export.arrays import numbers, parts, parts_of_lists
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

"""Name and meaning of what a row has after ``process``."""

NAMES = tuple(name for name, _ in COLUMNS)
TEXTS = {"how": HOW, "ended": ENDED, "next_how": HOW}
ALWAYS = ("process", "block", "group", "position", "how", "num_sharers", "from_event", "ended")
"""What no row is without."""

SCHEMA = pa.schema(
    pa.field(name, pa.string() if name in TEXTS else pa.int64(), nullable=name not in ALWAYS)
    for name in ("process", *NAMES)
)

KINDS: dict[type[Event], int] = {
    SlotsAllocated: h.ALLOCATED,
    SlotsRefused: h.REFUSED,
    BlocksFreed: h.FREED,
    RequestFreed: h.GAVE_BACK,
    RequestPreempted: h.PREEMPTED,
    RequestFinished: h.FINISHED,
    BlocksCached: h.GOT_HASH,
    BlockEvicted: h.LOST_HASH,
}
"""What concerns blocks, beside ``engine.configured``."""

WITH_TABLES = (h.ALLOCATED, h.GAVE_BACK)
"""Kinds that need the length of a request's table."""

TIMED = (SlotsAllocated, BlocksFreed)
"""Those of which the step and the time go into rows."""

OF_BLOCKS = (SlotsAllocated, BlocksFreed, BlocksCached, BlockEvicted)
"""Without one of these nobody has a block, as in a trace of level light."""

WIDEST = 1 << 22
"""Range of request numbers that are looked up in a table."""

MOST_BLOCKS = 1 << 24
"""A larger id is no block's: it bounds what a damaged trace can ask for."""


class Tenancies:
    """Takes the chunks of a trace and gives the rows of ``blocks``, as they are complete."""

    def __init__(self, fold: Any = h.fold) -> None:
        self._fold = fold
        self._pools: dict[int, _Pool] = {}

    def take(self, chunk: Chunk) -> Iterator[pa.RecordBatch]:
        """What is complete after this chunk."""
        if not any(cls in chunk for cls in OF_BLOCKS) and not any(
            len(pool.rows) for pool in self._pools.values()
        ):
            return
        for process, part in _by_process(chunk):
            pool = self._pools.get(process)
            if pool is None:
                pool = self._pools[process] = _Pool(process, self._fold)
            yield from pool.take(part)

    def end(self) -> Iterator[pa.RecordBatch]:
        """The rows that are still held, or had no next tenant."""
        for pool in self._pools.values():
            yield pool.end()


def _by_process(chunk: Chunk) -> Iterator[tuple[int, Chunk]]:
    """What concerns blocks, for each process."""
    mine = {cls: chunk[cls] for cls in (EngineConfigured, *KINDS) if cls in chunk}
    processes = {cls: numbers(batch, "process") for cls, batch in mine.items()}
    every = np.unique(np.concatenate([[p.min(), p.max()] for p in processes.values()] or [[]]))
    if len(every) < 2:
        yield from ((int(process), mine) for process in every)
        return
    every = np.unique(np.concatenate([*processes.values()]))
    for process in every.tolist():
        part = {
            cls: batch.filter(pa.array(processes[cls] == process)) for cls, batch in mine.items()
        }
        yield process, {cls: batch for cls, batch in part.items() if batch.num_rows}


class _Told:
    """What happened in a part of a trace, as ``holding.fold`` takes it."""

    def __init__(self, part: Chunk) -> None:
        batches = [(KINDS[cls], cls, batch) for cls, batch in part.items()]
        events = [numbers(batch, "number") for _, _, batch in batches]
        self.number = min(int(each[0]) for each in events)
        self.what = np.zeros(max(int(each[-1]) for each in events) - self.number + 1, np.int8)
        self.told = np.full((8, sum(map(len, events))), -1)
        self.at = np.zeros(len(KINDS) + 1, np.int64)
        self.flats: list[np.ndarray] = []
        self.groups: list[np.ndarray] = [np.zeros((2, 0), np.int64)]
        self._size = self._num_groups = self.num_new = self.widest = 0
        self.of: dict[int, np.ndarray] = {}
        """What is told of the events of a kind, in their order: a part of ``told``."""
        begin = 0
        for (kind, cls, batch), each in zip(batches, events):
            self.what[each - self.number] = kind
            self.at[kind] = begin
            self.of[kind] = self.told[:, begin : begin + len(each)]
            self._tell(cls, batch, self.of[kind])
            begin += len(each)
        self.flat = np.concatenate([np.zeros(0, np.int64), *self.flats])
        self.all_groups = np.concatenate(self.groups, axis=1)

    def _tell(self, cls: type[Event], batch: pa.RecordBatch, told: np.ndarray) -> None:
        if cls in TIMED:
            told[h.STEP] = numbers(batch, "step")
            told[h.NS] = numbers(batch, "at_ns")
        if "request" in batch.schema.names:
            told[h.WHO] = numbers(batch, "request")
        if cls is SlotsAllocated:
            told[h.BEGIN], told[h.END] = self._add_groups(batch["blocks"])
            told[h.HIT_BEGIN], told[h.HIT_END] = self._add_groups(batch["hit_blocks"])
        elif cls is BlockEvicted:
            told[h.BEGIN] = self._size + np.arange(batch.num_rows)
            self._add(numbers(batch, "block"))
        elif cls is RequestFinished:
            aborted = np.asarray(pc.equal(batch["reason"], "abort"))
            told[h.BEGIN] = np.where(aborted, ENDED.index("aborted"), ENDED.index("finished"))
        elif "blocks" in batch.schema.names:
            offsets, flat = parts(batch["blocks"])
            told[h.BEGIN] = offsets[:-1] + self._size
            told[h.END] = offsets[1:] + self._size
            self._add(flat)

    def _add(self, flat: np.ndarray) -> None:
        self.flats.append(flat)
        self._size += len(flat)

    def _add_groups(self, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        outer, inner, flat = parts_of_lists(column)
        self.groups.append(np.stack([inner[:-1], inner[1:]]) + self._size)
        outer = outer + self._num_groups
        self._num_groups += len(inner) - 1
        self.widest = max(self.widest, int(np.diff(outer).max(initial=1)))
        self.num_new += len(flat)
        self._add(flat)
        return outer[:-1], outer[1:]


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

    def take(self, part: Chunk) -> Iterator[pa.RecordBatch]:
        """The rows that are complete; a new engine begins with nothing held."""
        part = dict(part)
        anew = part.pop(EngineConfigured, None)
        for number in [] if anew is None else numbers(anew, "number").tolist():
            before = {
                cls: int(numbers(batch, "number").searchsorted(number))
                for cls, batch in part.items()
            }
            yield from self._run({cls: part[cls][:end] for cls, end in before.items() if end})
            yield self.end()
            self.forget()
            part = {cls: part[cls][end:] for cls, end in before.items() if end < part[cls].num_rows}
        yield from self._run(part)

    def end(self) -> pa.RecordBatch:
        """All that is not written yet, in the order in which it began."""
        used = np.ones(len(self.rows), bool)
        used[self.free[: self.state[0]]] = False
        left = self.rows[used]
        left = left[np.argsort(left[:, h.FROM_EVENT], kind="stable")]
        return self._batch(np.ascontiguousarray(left.T))

    def _run(self, part: Chunk) -> Iterator[pa.RecordBatch]:
        if not part:
            return
        told = _Told(part)
        self._number_requests([told.of[kind] for kind in WITH_TABLES if kind in told.of])
        highest = int(told.flat.max(initial=0, where=told.flat < MOST_BLOCKS))
        self._make_room(told.num_new, highest, told.widest, len(told.flat))
        out = np.empty((len(NAMES), told.num_new + len(self.rows)), np.int64)
        count = self.fold(
            told.what, told.number, told.told, told.at, told.all_groups, told.flat,
            self.rows, self.links, self.free, self.heads, self.cached, self.filled,
            self.given, self.closed, self.state, out,
        )  # fmt: skip
        if h.FINISHED in told.of:
            over = np.isin(self.live[0], told.of[h.FINISHED][h.WHO])
            gone, self.live = self.live[1, over], self.live[:, ~over]
            self.filled[gone] = 0
            self.spare = np.concatenate([self.spare, gone])
        # Arrow keeps the whole array as long as it has a part of it.
        yield self._batch(out[:, :count] if 2 * count > out.shape[1] else out[:, :count].copy())

    def _number_requests(self, told: list[np.ndarray]) -> None:
        """An index for each request that is named; those of finished ones are used again."""
        if not told:
            return
        requests, (live, indices) = np.concatenate([part[h.WHO] for part in told]), self.live
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
        begun = new + low if every is None else every[new]
        self.live = np.concatenate([self.live, [begun, table[new]]], axis=1)
        begin = 0
        for part in told:
            part[h.INDEX] = table[requests[begin : begin + part.shape[1]] - low]
            begin += part.shape[1]

    def _make_room(self, starts: int, highest: int, groups: int, size: int) -> None:
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
        wide = max(groups, self.filled.shape[1])
        count = len(self.spare) + self.live.shape[1]
        filled = np.zeros((max(count, len(self.filled)), wide), np.int64)
        filled[: len(self.filled), : self.filled.shape[1]] = self.filled
        self.filled = filled

    def _batch(self, rows: np.ndarray) -> pa.RecordBatch:
        columns = [pa.array(np.full(rows.shape[1], self.process))]
        for name, values in zip(NAMES, rows):
            null = values < 0 if values.min(initial=0) < 0 else None
            if name in TEXTS:
                codes = pa.array(values.astype(np.int8), mask=null)
                words = pa.DictionaryArray.from_arrays(codes, pa.array(TEXTS[name]))
                columns.append(words.cast(pa.string()))
            else:
                columns.append(pa.array(values, mask=null))
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    if size <= len(array):
        return array
    more = np.full((size - len(array), *array.shape[1:]), -1, array.dtype)
    return np.concatenate([array, more])
