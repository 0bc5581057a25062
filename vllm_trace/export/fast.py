"""Events to columns, a frame at a time: the same chunks as ``columns`` from a trace of one process.

A frame becomes flat arrays of tokens (``tokenize``, compiled), and a column is picked out of them
for all events of a kind at once; no Python object is made for an event. Kinds that are rare and
have shapes of their own go the way of ``columns``.

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
    EVENT_TYPES,
    AnyEvent,
    AttentionCalled,
    Event,
    RequestArrived,
    RequestSeen,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.export import columns
from vllm_trace.export.columns import MARKS, Chunk, own_columns
from vllm_trace.export.kept import Calls, count_kept
from vllm_trace.export.tables import HASHES, SCHEMAS, TUPLES, to_json
from vllm_trace.export.tokenize import (
    BOOL,
    FLOAT,
    LIST,
    MAP,
    NIL,
    NUMBER,
    TEXT,
    pick,
    pick_lists,
    pick_texts,
    same_bytes,
    sum_bytes,
    tokenize,
    walk,
)
from vllm_trace.trace import time_of
from vllm_trace.tracefile import TraceFile

MISSING = 99
"""Sort of the token that stands for a field that is not in the file: it has its default."""

PIECE = 2 * 1024 * 1024
"""Bytes of batches that become tokens at once; a token takes 17 bytes."""

STEPS_KEPT = 8
"""Steps whose results may be out when the next is scheduled."""

BY_TAG: dict[int, type[Event]] = {cls.__struct_config__.tag: cls for cls in EVENT_TYPES}  # type: ignore[misc]

SHAPED = {
    cls: not any(n in TUPLES or n in ("groups", "settings") for n in cls.__struct_fields__)
    for cls in EVENT_TYPES
}
"""Kinds that can be picked out of tokens."""

MOST_KNOWN = 10_000
"""Sampling parameters that are kept as JSON: most requests have those of another."""

_decode = msgspec.msgpack.Decoder(dict[str, Any]).decode
_decode_event = msgspec.msgpack.Decoder(AnyEvent).decode


class Unusual(Exception):
    """Bytes that a recorder does not write."""


def chunks(file: TraceFile, names: dict[int, str], tokens: bool = False) -> Iterator[Chunk]:
    """The whole file in chunks, in the order of its events; ``names`` gets those of its requests.

    Raises: ``Unusual``.
    """
    reading = _Reading(file, names, tokens)
    waiting: list[_Frame] = []
    for raw in _pieces(file):
        frame = reading.take(raw)
        while waiting and frame.fill(waiting[0]):
            yield waiting.pop(0).done()
        waiting.append(frame)
    for frame in waiting:
        yield frame.done()


def _pieces(file: TraceFile) -> Iterator[bytes]:
    """Batches of several frames together, to ``PIECE``; a larger batch is one by itself."""
    held: list[bytes] = []
    size = 0
    for raw in file.frames():
        if size + len(raw) > PIECE and held:
            yield b"".join(held)
            held, size = [], 0
        begin = position = 0
        while len(raw) - begin > PIECE and position + 4 <= len(raw):
            after = position + 4 + int.from_bytes(raw[position : position + 4], "little")
            if after - begin > PIECE and position > begin:
                yield raw[begin:position]
                begin = position
            position = after
        held.append(raw[begin:])
        size += len(raw) - begin
    held += [len(body).to_bytes(4, "little") + body for body in file.tail()]
    if held:
        yield b"".join(held)


@dataclass
class _Frame:
    """A frame's columns; steps and times may still be missing at its end."""

    number: int
    rows: dict[type[Event], tuple[np.ndarray, dict[str, pa.Array]]]
    """For each kind, which events of the frame they are, and their own columns."""
    steps: np.ndarray
    has_step: np.ndarray
    times: np.ndarray
    has_time: np.ndarray
    num_kept: dict[type[Event], np.ndarray] = field(default_factory=dict)
    """The column of that name, where there is one: numbers that are not in the file are put in."""
    first_step: int | None = None
    """Of the first mark in the frame."""
    first_time: int | None = None
    num_uncounted: int = 0
    """Calls whose ``num_kept`` follows from a step that is not read yet."""

    def fill(self, before: _Frame) -> bool:
        """Give an earlier frame what it still waits for; whether it has all now."""
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
        for cls, (which, own) in self.rows.items():
            count = len(which)
            places = [
                pa.array(which + self.number),
                pa.array(np.zeros(count, np.int64)),
                pa.array(self.steps[which], mask=~self.has_step[which]),
                pa.array(self.times[which], mask=~self.has_time[which]),
            ]
            if "num_kept" in own:
                own["num_kept"] = pa.array(self.num_kept[cls])
            made[cls] = pa.record_batch([*places, *own.values()], schema=SCHEMAS[cls])
        return made


class _Reading:
    """What goes from frame to frame."""

    def __init__(self, file: TraceFile, names: dict[int, str], tokens: bool) -> None:
        self.file, self.names, self.with_tokens = file, names, tokens
        self.full = file.header.get("level") != "light"
        self.number = 1
        self.known: dict[bytes, str] = {}
        self.sorts = np.empty(0, np.int8)
        self.last = {n: pa.array([[]], pa.list_(pa.int64())) for n in ("requests", "num_tokens")}
        self.uncounted: list[tuple[_Frame, type[Event], int, int]] = []
        """Calls of the step that is being scheduled that lack their count: row and request."""
        self.of_steps = np.zeros((2, 0), np.int64)
        """Step, number of requests of the last steps that were scheduled."""
        self.scheduled = np.zeros(0, np.int64)
        """Which events of this frame those were; -1 for one of an earlier frame."""

    def take(self, raw: bytes) -> _Frame:
        self.of_steps = self.of_steps[:, -STEPS_KEPT:]
        self.scheduled = np.full(self.of_steps.shape[1], -1)
        self.raw, self.bytes = raw, np.frombuffer(raw, np.uint8)
        self._make_room(len(raw) + 1)
        starts, ends = self.starts, self.event_ends
        count, events = tokenize(
            self.bytes, self.sorts, self.values, self.nexts, self.places, starts, ends
        )
        if count < 0:
            raise Unusual(f"byte {events} of a frame")
        # One more token, for every field that is not there.
        self.nothing = count
        self.sorts[count], self.values[count] = MISSING, 0
        self.nexts[count], self.places[count] = count, len(raw)
        starts, self.ends = starts[:events], ends[:events]
        self.begins = self.places[starts]
        self.file.num_events += events
        tags, lengths = self.values[starts + 1], self.values[starts]
        if (self.sorts[starts + 1] != NUMBER).any():
            raise Unusual("a tag that is no number")
        frame = _Frame(
            self.number, {},
            np.zeros(events, np.int64), np.zeros(events, bool),
            np.zeros(events, np.int64), np.zeros(events, bool),
        )  # fmt: skip
        self.number += events
        marks = np.zeros(events, bool)
        for tag in np.unique(tags).tolist():
            cls = BY_TAG.get(tag)
            if cls is None:
                raise Unusual(f"tag {tag}")
            which = np.flatnonzero(tags == tag)
            own = self.shaped(cls, starts[which], lengths[which], which, frame)
            frame.rows[cls] = (which, own)
            if cls in MARKS:
                marks[which] = True
        self._count_kept(frame)
        self._spread(frame, marks)
        return frame

    def _make_room(self, room: int) -> None:
        """Arrays for so many tokens, used again for each piece: a page is touched once."""
        if room > len(self.sorts):
            self.sorts = np.empty(room, np.int8)
            self.values = np.empty(room, np.int64)
            self.nexts, self.places = np.empty((2, room), np.int32)
            self.starts, self.event_ends = np.empty((2, room // 2 + 1), np.int32)

    def _spread(self, frame: _Frame, marks: np.ndarray) -> None:
        """Times and steps go back to the events before them."""
        for own, has, sources in (
            (frame.steps, frame.has_step, marks & frame.has_step),
            (frame.times, frame.has_time, frame.has_time.copy()),
        ):
            count = len(own)
            source = np.where(sources, np.arange(count), count)
            source = np.minimum.accumulate(source[::-1])[::-1]
            reached = ~has & (source < count)
            own[reached] = own[source[reached]]
            has |= reached
            first = int(own[source[0]]) if count and source[0] < count else None
            if own is frame.steps:
                frame.first_step = first
            else:
                frame.first_time = first

    # A kind ----------------------------------------------------------------------------

    def shaped(
        self,
        cls: type[Event],
        heads: np.ndarray,
        lengths: np.ndarray,
        which: np.ndarray,
        frame: _Frame,
    ) -> dict[str, pa.Array]:
        """The own columns of all events of a kind; their steps and times go to the frame."""
        if not SHAPED[cls]:
            return self.by_hand(cls, which, frame)
        fields = cls.__struct_fields__
        defaults = cls.__struct_defaults__
        required = len(fields) - len(defaults)
        if lengths.min() - 1 < required:
            raise Unusual(f"a {cls.kind} with too few fields")
        tokens = np.empty((len(fields), len(heads)), np.int32)
        walk(heads, lengths, self.nexts, self.nothing, tokens)
        found = dict(zip(fields, tokens))
        self._place(cls, found, which, frame)
        types = {field.name: field.type for field in SCHEMAS[cls]}
        made = {}
        for place, name in enumerate(fields):
            default = defaults[place - required] if place >= required else None
            if name == "sampling":
                made[name] = self.json(found[name])
            elif name not in ("step", "at_ns"):
                made[name] = self.column(name, types[name], found[name], default)
        if cls is StepScheduled:
            self._spell_out(made, found, which)
        elif cls is StepUpdated and self.full:
            self._spell_out_outputs(made, found, which)
        elif cls is RequestSeen or cls is RequestArrived:
            pairs = zip(made["request"].to_pylist(), made["request_id"].to_pylist())
            self.names.update(pairs)
        if "num_kept" in made:
            frame.num_kept[cls] = np.array(made["num_kept"])
        return made

    def by_hand(self, cls: type[Event], which: np.ndarray, frame: _Frame) -> dict[str, pa.Array]:
        """Decode each event and take its fields."""
        try:
            events = [_decode_event(self.raw[a:b]) for a, b in self._bytes_of(which)]
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

    def _bytes_of(self, which: np.ndarray) -> Iterator[tuple[int, int]]:
        return zip(self.begins[which].tolist(), self.ends[which].tolist())

    def _place(
        self, cls: type[Event], found: dict[str, np.ndarray], which: np.ndarray, frame: _Frame
    ) -> None:
        if "step" in found:
            frame.steps[which], frame.has_step[which] = self.numbers(found["step"]), True
        if cls is AttentionCalled:
            heads = found["started_ns"]
            some = (self.sorts[heads] == LIST) & (self.values[heads] > 0)
            frame.times[which[some]] = self.numbers(heads[some] + 1)
            frame.has_time[which[some]] = True
        elif "started_ns" in found or "at_ns" in found:
            at = found["started_ns" if "started_ns" in found else "at_ns"]
            frame.times[which], frame.has_time[which] = self.numbers(at), True

    # Columns ---------------------------------------------------------------------------

    def column(self, name: str, kind: pa.DataType, at: np.ndarray, default: Any) -> pa.Array:
        """One field of all events of a kind; ``at`` are its tokens."""
        if name == "token_ids" and not self.with_tokens:
            return pa.nulls(len(at), kind)
        if pa.types.is_list(kind):
            inner = kind.value_type
            if pa.types.is_list(inner):
                return self.lists_of_lists(at, name in HASHES, default)
            return self.lists(at, name in HASHES, default)
        if pa.types.is_map(kind):
            return self.maps(at, kind)
        if pa.types.is_string(kind):
            return self.texts(at, default)
        if pa.types.is_boolean(kind):
            if (self.sorts[at] != BOOL).any():
                raise Unusual(name)
            return pa.array(self.values[at] == 1)
        if pa.types.is_floating(kind):
            if (self.sorts[at] != FLOAT).any():
                raise Unusual(name)
            return pa.array(self.values[at].view(np.float64))
        missing = self.sorts[at] == MISSING
        if missing.any():
            values = np.where(missing, default, self.numbers(at[~missing], spread=~missing))
            return pa.array(values.astype(np.int64))
        return pa.array(self.numbers(at))

    def numbers(
        self, at: np.ndarray, unsigned: bool = False, spread: np.ndarray | None = None
    ) -> np.ndarray:
        """Numbers that these tokens are; with ``spread``, at the places that it marks."""
        values = np.empty(len(at), np.int64)
        if not pick(at, self.sorts, self.values, unsigned, values):
            raise Unusual("a number")
        if unsigned:
            values = values.view(np.uint64)
        if spread is None:
            return values
        wide = np.zeros(len(spread), values.dtype)
        wide[spread] = values
        return wide

    def _lengths(
        self, at: np.ndarray, sort: int, default: Any = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(how many each list or map has, which are null or None when none is)."""
        sorts = self.sorts[at]
        good = sorts == sort
        if good.all():
            return self.values[at], None
        null = sorts == NIL
        if default is None:
            null |= sorts == MISSING
        if not (good | null | (sorts == MISSING)).all():
            raise Unusual("a list")
        return np.where(good, self.values[at], 0), null

    def lists(self, at: np.ndarray, unsigned: bool, default: Any) -> pa.Array:
        lengths, null = self._lengths(at, LIST, default)
        values = np.empty(int(lengths.sum()), np.int64)
        if not pick_lists(at, lengths, self.sorts, self.values, unsigned, values):
            raise Unusual("a list of numbers")
        values = pa.array(values.view(np.uint64) if unsigned else values)
        return pa.ListArray.from_arrays(_offsets(lengths), values, mask=_mask(null))

    def lists_of_lists(self, at: np.ndarray, unsigned: bool, default: Any) -> pa.Array:
        outer, null = self._lengths(at, LIST, default)
        present = outer > 0
        inside = _ranges(at[present] + 1, self.nexts[at[present]] - at[present] - 1)
        is_head = self.sorts[inside] == LIST
        lengths = self.values[inside[is_head]]
        if len(lengths) != outer.sum() or lengths.sum() != len(inside) - len(lengths):
            raise Unusual("a list of lists")
        flat = pa.array(self.numbers(inside[~is_head], unsigned))
        rows = pa.ListArray.from_arrays(_offsets(lengths), flat)
        return pa.ListArray.from_arrays(_offsets(outer), rows, mask=_mask(null))

    def maps(self, at: np.ndarray, kind: pa.MapType) -> pa.Array:
        lengths, _ = self._lengths(at, MAP)
        inside = _ranges(at + 1, 2 * lengths)
        keys = inside[0::2]
        named = pa.types.is_string(kind.key_type)
        made = self.texts(keys, None) if named else pa.array(self.numbers(keys))
        items = pa.array(self.numbers(inside[1::2]))
        return pa.MapArray.from_arrays(_offsets(lengths), made, items)

    def texts(self, at: np.ndarray, default: str | None) -> pa.Array:
        sorts, values = self.sorts[at], self.values[at]
        null = sorts == NIL
        if default is None:
            null |= sorts == MISSING
        elif (sorts == MISSING).any():
            some = sorts != MISSING
            rest = iter(self.texts(at[some], None).to_pylist())
            return pa.array([next(rest) if one else default for one in some], pa.string())
        if ((sorts != TEXT) & ~null).any():
            raise Unusual("a text")
        sizes = np.where(null, 0, values & 0xFFFFFFFF)
        data = np.empty(int(sizes.sum()), np.uint8)
        pick_texts(at, sizes, self.bytes, self.values, data)
        valid = pa.array(~null).buffers()[1] if null.any() else None
        buffers = [valid, _offsets(sizes).buffers()[1], pa.py_buffer(data)]
        made = pa.Array.from_buffers(pa.string(), len(at), buffers)
        try:
            made.validate(full=True)
        except pa.ArrowInvalid as error:
            raise Unusual(str(error)) from None
        return made

    def json(self, at: np.ndarray) -> pa.Array:
        """Maps of any shape; the same bytes are decoded once."""
        if (self.sorts[at] != MAP).any():
            raise Unusual("a map")
        begins, ends = self.places[at], self.places[self.nexts[at]]
        sums = np.empty(len(at), np.uint64)
        sum_bytes(self.bytes, begins, ends, sums)
        _, firsts, which = np.unique(sums, return_index=True, return_inverse=True)
        if not same_bytes(self.bytes, begins, ends, firsts[which]):
            which = firsts = np.arange(len(at))  # two of the same sum
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

    def _spell_out(
        self, made: dict[str, pa.Array], found: dict[str, np.ndarray], which: np.ndarray
    ) -> None:
        """None stands for the list of the step before."""
        for name, last in self.last.items():
            given = made[name]
            absent = self.sorts[found[name]]
            source = np.where(
                (absent == NIL) | (absent == MISSING), 0, np.arange(1, len(given) + 1)
            )
            if not source.all():
                source = np.maximum.accumulate(source)
                given = pa.concat_arrays([last, given]).take(pa.array(source))
                made[name] = given
            self.last[name] = given.slice(len(given) - 1)
        sizes = np.diff(np.asarray(made["requests"].offsets))
        steps = self.numbers(found["step"])
        self.scheduled = np.concatenate([self.scheduled, which])
        self.of_steps = np.concatenate([self.of_steps, [steps, sizes]], axis=1)

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

    def _spell_out_outputs(
        self, made: dict[str, pa.Array], found: dict[str, np.ndarray], which: np.ndarray
    ) -> None:
        """None stands for one token each, where the step is known."""
        sorts = self.sorts[found["num_output_tokens"]]
        absent = (sorts == NIL) | (sorts == MISSING)
        if not absent.any():
            return
        wanted = self.numbers(found["step"])
        latest = np.searchsorted(self.scheduled, which) - 1
        size = np.full(len(which), -1)
        for back in range(STEPS_KEPT):
            there = latest - back
            known = (there >= 0) & (size < 0)
            hit = known.copy()
            hit[known] = self.of_steps[0][there[known]] == wanted[known]
            size[hit] = self.of_steps[1][there[hit]]
        given = made["num_output_tokens"]
        own = np.diff(np.asarray(given.offsets))
        lengths = np.where(absent, np.maximum(size, 0), own)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.ones(offsets[-1], np.int64)
        told = ~absent
        flat[_ranges(offsets[:-1][told], own[told])] = np.asarray(given.flatten())
        made["num_output_tokens"] = pa.ListArray.from_arrays(
            pa.array(offsets.astype(np.int32)), pa.array(flat), mask=_mask(absent & (size < 0))
        )


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``begins[0], begins[0] + 1, …`` for each length, one after the other."""
    total = int(lengths.sum())
    shift = begins - (np.cumsum(lengths) - lengths)
    return np.repeat(shift, lengths) + np.arange(total)


def _offsets(lengths: np.ndarray) -> pa.Array:
    made = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=made[1:])
    return pa.array(made)


def _mask(null: np.ndarray | None) -> pa.Array | None:
    return pa.array(null) if null is not None and null.any() else None
