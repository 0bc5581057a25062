"""Events to columns, a piece at a time: the same chunks as ``columns`` from a trace of one process.

The bytes of a piece become columns in one compiled pass (``unpack``), and Arrow's arrays are made
around those; no Python object is made for an event. Kinds that are rare and have shapes of their own
go the way of ``columns``.

Raises ``Unusual`` for bytes that a recorder does not write: ``columns`` then says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from vllm_trace.errors import TraceError
from vllm_trace.events import (
    AnyEvent,
    Event,
    StepScheduled,
    StepUpdated,
    tag_of,
)
from vllm_trace.export import columns
from vllm_trace.export import unpack as u
from vllm_trace.export.columns import MARKS, Chunk, own_columns
from vllm_trace.export.kept import Calls, count_kept, spell_out, spell_out_outputs
from vllm_trace.export.shapes import BY_TAG, SHAPED, Column, Shapes
from vllm_trace.export.tables import SCHEMAS, to_json
from vllm_trace.trace import time_of
from vllm_trace.tracefile import TraceFile

PIECE = 2 * 1024 * 1024
"""Bytes of batches that become columns at once."""

STEPS_KEPT = 8
"""Steps whose results may be out when the next is scheduled."""

SPARE = 1.25
"""Room for what a piece has, as much as one before it had; without it the piece is read twice."""

MOST_KNOWN = 10_000
"""Sampling parameters that are kept as JSON: most requests have those of another."""

IS_MARK = np.zeros(1 + max(BY_TAG), bool)
IS_MARK[[tag_of(cls) for cls in MARKS]] = True

_decode = msgspec.msgpack.Decoder(dict[str, Any]).decode
_decode_event = msgspec.msgpack.Decoder(AnyEvent).decode


class Unusual(Exception):
    """Bytes that a recorder does not write."""


def chunks(file: TraceFile, tokens: bool = False) -> Iterator[Chunk]:
    """The whole file in chunks, in the order of its events.

    Raises: ``Unusual``.
    """
    reading = _Reading(file, tokens)
    waiting: list[_Frame] = []
    for raw in _pieces(file, reading.shapes.defaults):
        frame = reading.take(raw)
        while waiting and frame.fill(waiting[0]):
            yield waiting.pop(0).done()
        waiting.append(frame)
    for frame in waiting:
        yield frame.done()


def _pieces(file: TraceFile, before: bytes) -> Iterator[bytes]:
    """Batches of several frames together, to ``PIECE``; a larger batch is one by itself."""
    held: list[bytes] = [before]
    size = 0
    for raw in file.frames():
        if size + len(raw) > PIECE and size:
            yield b"".join(held)
            held, size = [before], 0
        begin = position = 0
        while len(raw) - begin > PIECE and position + 4 <= len(raw):
            after = position + 4 + int.from_bytes(raw[position : position + 4], "little")
            if after - begin > PIECE and position > begin:
                yield before + raw[begin:position]
                begin = position
            position = after
        held.append(raw[begin:])
        size += len(raw) - begin
    held += [len(body).to_bytes(4, "little") + body for body in file.tail()]
    if len(held) > 1:
        yield b"".join(held)


@dataclass
class _Frame:
    """A piece's columns; steps and times may still be missing at its end."""

    number: int
    steps: np.ndarray
    has_step: np.ndarray
    times: np.ndarray
    has_time: np.ndarray
    rows: dict[type[Event], tuple[np.ndarray, dict[str, pa.Array]]] = field(default_factory=dict)
    """For each kind, which events of the piece they are, and their own columns."""
    num_kept: dict[type[Event], np.ndarray] = field(default_factory=dict)
    """The column of that name, where there is one: numbers that are not in the file are put in."""
    first_step: int | None = None
    """Of the first mark in the piece."""
    first_time: int | None = None
    num_uncounted: int = 0
    """Calls whose ``num_kept`` follows from a step that is not read yet."""

    def fill(self, before: _Frame) -> bool:
        """Give an earlier piece what it still waits for; whether it has all now."""
        for own, has, first in (
            (before.steps, before.has_step, self.first_step),
            (before.times, before.has_time, self.first_time),
        ):
            if first is not None:
                own[~has] = first
                has[:] = True
        whole = before.has_step.all() and before.has_time.all() and not before.num_uncounted
        return bool(whole) or (
            # ``columns`` lets an event wait for a chunk, and so must this.
            self.number - before.number > columns.CHUNK
        )

    def done(self) -> Chunk:
        made = {}
        no_step = None if self.has_step.all() else ~self.has_step
        no_time = None if self.has_time.all() else ~self.has_time
        for cls, (which, own) in self.rows.items():
            places = [
                pa.array(which + self.number),
                pa.array(np.zeros(len(which), np.int64)),
                pa.array(self.steps[which], mask=None if no_step is None else no_step[which]),
                pa.array(self.times[which], mask=None if no_time is None else no_time[which]),
            ]
            if "num_kept" in own:
                own["num_kept"] = pa.array(self.num_kept[cls])
            made[cls] = pa.RecordBatch.from_arrays([*places, *own.values()], schema=SCHEMAS[cls])
        return made


class _Reading:
    """What goes from piece to piece."""

    def __init__(self, file: TraceFile, tokens: bool) -> None:
        self.file, self.with_tokens = file, tokens
        self.shapes = Shapes(tokens)
        self.full = file.header.get("level") != "light"
        self.number = 1
        self.known: dict[bytes, str] = {}
        self.last = {name: np.empty(0, np.int64) for name in ("requests", "num_tokens")}
        self.uncounted: list[tuple[_Frame, type[Event], int, int]] = []
        """Calls of the step that is being scheduled that lack their count: row and request."""
        self.of_steps = np.zeros((2, 0), np.int64)
        """Step, number of requests of the last steps that were scheduled."""
        self.scheduled = np.zeros(0, np.int64)
        """Which events of this piece those were; -1 for one of an earlier piece."""
        self.kind_of_slot = np.array(self.shapes.kind_of_slot)
        self.used = np.zeros(len(self.kind_of_slot), np.int64)
        self.counts = np.zeros(len(self.shapes.kinds), np.int64)
        self.rare = np.zeros(len(self.shapes.kinds), np.int64)
        self.tags = np.empty(0, np.uint8)
        self._make_room()

    def take(self, raw: bytes) -> _Frame:
        self.of_steps = self.of_steps[:, -STEPS_KEPT:]
        self.scheduled = np.full(self.of_steps.shape[1], -1)
        self.raw, self.bytes = raw, np.frombuffer(raw, np.uint8)
        events = self._unpack()
        self.file.num_events += events
        frame = _Frame(
            self.number, self.steps[:events].copy(), self.has_step[:events].copy(),
            self.times[:events].copy(), self.has_time[:events].copy(),
        )  # fmt: skip
        self.number += events
        for tag in np.flatnonzero(self.counts).tolist():
            cls = BY_TAG[tag]
            which = self._slot(int(self.shapes.kinds[tag, 3]))
            if SHAPED[cls] and not self.rare[tag]:
                frame.rows[cls] = (which, self._shaped(cls, which, frame))
            else:
                frame.rows[cls] = (which, self._by_hand(cls, which, frame))
        self._count_kept(frame)
        step, some_step, time, some_time = u.spread(
            IS_MARK, self.tags[:events], frame.steps, frame.has_step, frame.times, frame.has_time
        )
        frame.first_step = int(step) if some_step else None
        frame.first_time = int(time) if some_time else None
        return frame

    def _unpack(self) -> int:
        """The bytes into ``cells``; returns how many events they are."""
        most = len(self.raw) // 2 + 1
        if most > len(self.tags):
            self.tags = np.empty(most, np.uint8)
            self.heads, self.ends = np.empty((2, most), np.int32)
            self.steps, self.times = np.empty((2, most), np.int64)
            self.has_step, self.has_time = np.empty((2, most), bool)
        while True:
            ended, count = u.unpack(
                self.bytes, len(self.shapes.defaults), self.shapes.kinds, self.shapes.fields,
                self.cells, self.begins, self.rooms, self.used, self.counts, self.rare,
                self.tags, self.heads, self.ends, self.steps, self.has_step, self.times, self.has_time,
            )  # fmt: skip
            own = self.kind_of_slot >= 0
            self.used[own] = self.counts[self.kind_of_slot[own]]
            if ended == u.FITS:
                return count
            if ended == u.UNUSUAL:
                raise Unusual(f"byte {count} of a piece")
            self._make_room()

    def _make_room(self) -> None:
        """As much as was used, and some more."""
        wanted = (self.used * SPARE).astype(np.int64) + 16
        self.rooms = np.maximum(wanted, getattr(self, "rooms", wanted))
        self.begins = np.cumsum(self.rooms) - self.rooms
        self.cells = np.empty(int(self.rooms.sum()), np.int64)

    def _slot(self, slot: int) -> np.ndarray:
        """A copy of what a slot has: ``cells`` are used again."""
        begin = self.begins[slot]
        return self.cells[begin : begin + self.used[slot]].copy()

    # A kind ----------------------------------------------------------------------------

    def _shaped(self, cls: type[Event], which: np.ndarray, frame: _Frame) -> dict[str, pa.Array]:
        """The own columns of all events of a kind."""
        made = {}
        for column in self.shapes.columns[cls]:
            if cls is StepScheduled and column.name in self.last:
                made[column.name] = self._spelled_out(column)
            elif cls is StepUpdated and column.name == "num_output_tokens" and self.full:
                made[column.name] = self._outputs(column, which, frame.steps[which])
            elif column.name == "num_kept":
                frame.num_kept[cls] = self._slot(column.slot)
                made[column.name] = pa.array(frame.num_kept[cls])
            else:
                made[column.name] = self._column(column, len(which))
        if cls is StepScheduled:
            sizes = np.diff(np.asarray(made["requests"].offsets))
            self.scheduled = np.concatenate([self.scheduled, which])
            self.of_steps = np.concatenate([self.of_steps, [frame.steps[which], sizes]], axis=1)
        return made

    def _by_hand(self, cls: type[Event], which: np.ndarray, frame: _Frame) -> dict[str, pa.Array]:
        """Decode each event and take its fields."""
        places = zip(self.heads[which].tolist(), self.ends[which].tolist())
        try:
            events = [_decode_event(self.raw[begin:end]) for begin, end in places]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Unusual(str(error)) from None
        for row, event in zip(which.tolist(), events):
            if (step := getattr(event, "step", None)) is not None:
                frame.steps[row], frame.has_step[row] = step, True
            if (at := time_of(event)) is not None:
                if not -(1 << 63) <= at < 1 << 63:
                    raise Unusual("a time")
                frame.times[row], frame.has_time[row] = at, True
        try:
            made = own_columns(cls, events, self.with_tokens)
        except TraceError as error:
            raise Unusual(str(error)) from None
        return dict(zip(list(SCHEMAS[cls].names)[4:], made))

    # Columns ---------------------------------------------------------------------------

    def _column(self, column: Column, count: int) -> pa.Array:
        """One field of all events of a kind."""
        what, slot = column.what, column.slot
        if what == u.OF_INT:
            return pa.array(self._slot(slot))
        if what == u.OF_INTS:
            return _lists(self._slot(slot), pa.array(self._slot(slot + 1)), column.type)
        if what == u.OF_HASHES:
            return _lists(
                self._slot(slot), pa.array(self._slot(slot + 1).view(np.uint64)), column.type
            )
        if what in (u.OF_LISTS, u.OF_LISTS_OF_HASHES):
            flat = self._slot(slot + 2)
            items = pa.array(flat.view(np.uint64) if what == u.OF_LISTS_OF_HASHES else flat)
            inner = _lists(self._slot(slot + 1), items, column.type.value_type)
            return _lists(self._slot(slot), inner, column.type)
        if what in (u.OF_INT_MAP, u.OF_TEXT_MAP):
            named = what == u.OF_TEXT_MAP
            keys = self._texts(slot + 1) if named else pa.array(self._slot(slot + 1))
            items = pa.array(self._slot(slot + 2 + named))
            return pa.MapArray.from_arrays(_offsets(self._slot(slot))[0], keys, items)
        if what == u.OF_TEXT:
            return self._texts(slot)
        if what == u.OF_BOOL:
            return pa.array(self._slot(slot) == 1)
        if what == u.OF_FLOAT:
            return pa.array(self._slot(slot).view(np.float64))
        if what == u.OF_JSON:
            return self._json(self._slot(slot), self._slot(slot + 1))
        if what == u.NOTHING:
            return pa.nulls(count, column.type)
        assert what == u.RARE, what
        if pa.types.is_string(column.type):
            return pa.repeat("{}", count)
        return _lists(np.zeros(count, np.int64), pa.array([], column.type.value_type), column.type)

    def _texts(self, slot: int) -> pa.Array:
        places, sizes = self._slot(slot), self._slot(slot + 1)
        offsets, num_null = _offsets(sizes)
        data = np.empty(int(offsets[-1].as_py()), np.uint8)
        u.gather_texts(places, sizes, self.bytes, data)
        valid = pa.array(sizes >= 0).buffers()[1] if num_null else None
        buffers = [valid, offsets.buffers()[1], pa.py_buffer(data)]
        made = pa.Array.from_buffers(pa.string(), len(sizes), buffers)
        try:
            made.validate(full=True)
        except pa.ArrowInvalid as error:
            raise Unusual(str(error)) from None
        return made

    def _json(self, begins: np.ndarray, ends: np.ndarray) -> pa.Array:
        """Maps of any shape; the same bytes are decoded once."""
        sums = np.empty(len(begins), np.uint64)
        u.sum_bytes(self.bytes, begins, ends, sums)
        _, firsts, which = np.unique(sums, return_index=True, return_inverse=True)
        if not u.same_bytes(self.bytes, begins, ends, firsts[which]):
            which = firsts = np.arange(len(begins))  # two of the same sum
        texts = []
        for begin, end in zip(begins[firsts].tolist(), ends[firsts].tolist()):
            raw = self.raw[begin:end]
            text = self.known.get(raw)
            if text is None:
                if len(self.known) > MOST_KNOWN:
                    self.known.clear()
                try:
                    text = self.known[raw] = to_json(_decode(raw))
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise Unusual(str(error)) from None
            texts.append(text)
        return pa.array(texts, pa.string()).take(pa.array(which))

    # What a recorder leaves out ---------------------------------------------------------

    def _spelled_out(self, column: Column) -> pa.Array:
        """None stands for the list of the step before."""
        offsets, flat = spell_out(
            self._slot(column.slot), self._slot(column.slot + 1), self.last[column.name]
        )
        self.last[column.name] = flat[offsets[-2] :].copy()
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=column.type)

    def _outputs(self, column: Column, which: np.ndarray, steps: np.ndarray) -> pa.Array:
        """None stands for one token each, where the step is known."""
        lengths = self._slot(column.slot)
        flat = spell_out_outputs(
            lengths, self._slot(column.slot + 1), which, steps,
            self.scheduled, self.of_steps[0], self.of_steps[1], STEPS_KEPT,
        )  # fmt: skip
        return _lists(lengths, pa.array(flat), column.type)

    def _count_kept(self, frame: _Frame) -> None:
        """Below 0, ``num_kept`` follows from the composition of the step, as in ``tracefile``."""
        carried, counts = self.uncounted, frame.num_kept
        if not carried and all(column.min() >= 0 for column in counts.values()):
            return
        calls = Calls(frame.rows, frame.num_kept)
        places = np.concatenate([np.full(len(carried), -1), calls.places])
        requests = np.concatenate([[call[3] for call in carried], calls.requests]).astype(np.int64)
        kept = np.concatenate([np.full(len(carried), -1), calls.kept])
        first = 0
        if StepScheduled in frame.rows:
            at, own = frame.rows[StepScheduled]
            lists = own["requests"]
            first = count_kept(
                places, requests, kept, at,
                np.asarray(lists.offsets), np.asarray(lists.values), counts[StepScheduled],
            )  # fmt: skip
            for (earlier, cls, row, _), value in zip(carried, kept.tolist()):
                earlier.num_kept[cls][row] = value
                earlier.num_uncounted -= 1
            calls.put_back(kept[len(carried) :])
            carried = []
        rest = np.flatnonzero(kept[first:] < 0)[len(carried) :] + first
        self.uncounted = carried + [
            (frame, *calls.of(call - len(kept) + len(calls.kept)), int(requests[call]))
            for call in rest.tolist()
        ]
        frame.num_uncounted = len(rest)


def _offsets(lengths: np.ndarray) -> tuple[pa.Array, int]:
    """Arrow's offsets of lists or texts; how many are null."""
    offsets = np.empty(len(lengths) + 1, np.int32)
    num_null = u.offsets_of(lengths, offsets)
    return pa.array(offsets), num_null


def _lists(lengths: np.ndarray, items: pa.Array, kind: pa.ListType) -> pa.Array:
    offsets, num_null = _offsets(lengths)
    mask = pa.array(lengths < 0) if num_null else None
    return pa.ListArray.from_arrays(offsets, items, type=kind, mask=mask)
