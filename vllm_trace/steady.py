"""Steps of level light that are like the one before: eight numbers each, until they become batches.

A step that packs its two events pays for that in code which no cache holds any more half a millisecond later.
Eight stores of a number do not: a run of steady steps stands as records in the tail's memory map, 64 bytes
each, and is made into batches all at once, before anything else is written. A record counts as soon as its step
is there, which goes in last; so it is as safe from ``kill -9`` as a batch is.

Layout of the area, numbers of 64 bits in the machine's order (which must be little-endian)::

    position in the tail at which the run begins, and 56 bytes of nothing
    record*: step, started, duration, running, waiting, free, update started, duration; a step of 0 ends them

When a run was stored as batches its records stay until the next one begins: ``batches_in_area`` leaves out
what lies before the end of the batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from struct import Struct, error

from vllm_trace.events import StepScheduled, StepUpdated, tag_of
from vllm_trace.packing import U32, U64

RECORD = Struct("<8Q")
MAX_RECORDS = 1024
AREA_SIZE = RECORD.size * (1 + MAX_RECORDS)

WORDS = 8
"""Numbers of a record; of the area, those before the first one."""

_SIZE = Struct("<I")
_BATCH = Struct(">4sIBQBQBIBIBI4sIBQBQ")
_CONSTANTS = (
    bytes([0x92, 0x98, tag_of(StepScheduled), U32]),
    bytes([0, 0x94, tag_of(StepUpdated), U32]),
)

STORED_SIZE = _SIZE.size + _BATCH.size
"""Bytes of a record's batch, the size before it included."""


def _stored(record: tuple[int, ...]) -> bytes:
    """The batch of a record, its size before it: a ``step.scheduled`` without composition, a ``step.updated``."""
    step, at, dur, running, waiting, free, updated, updated_dur = record
    scheduled, outcome = _CONSTANTS
    return _SIZE.pack(_BATCH.size) + _BATCH.pack(
        scheduled, step, U64, at, U64, dur, U32, running, U32, waiting, U32, free,
        outcome, step, U64, updated, U64, updated_dur,
    )  # fmt: skip


def _places() -> list[tuple[int, int]]:
    """For each byte of a batch that is a record's: its place in the batch, and in the record."""
    places = []
    for index, width in ((0, 4), (1, 8), (2, 8), (3, 4), (4, 4), (5, 4), (6, 8), (7, 8)):
        for byte in range(width):
            record = [0] * WORDS
            record[index] = 0xFF << 8 * byte
            changed = [n for n, value in enumerate(_stored(tuple(record))) if value != _EMPTY[n]]
            places += [(place, 8 * index + byte) for place in changed]
    return places


_EMPTY = _stored((0,) * WORDS)
_PLACES = _places()


class SteadyRun:
    """The steady steps that are going on; ``patches/step_probes.py`` writes the records in place."""

    __slots__ = ("at", "dirty", "end", "words")

    def __init__(self, area: memoryview | None = None) -> None:
        """Without an ``area`` there is never room for a step."""
        self.words = (area or memoryview(bytearray(2 * RECORD.size))).cast("l")
        self.at = WORDS
        """Index of the next record's first word."""
        self.end = 0
        """What ``at`` must be below for a record to be written; 0 when no run is going on."""
        self.dirty = len(self.words)
        """How many words may hold what is stored by now."""

    @property
    def num_events(self) -> int:
        """Of the steps that are in it: two each."""
        return 2 * (self.at // WORDS - 1)

    def begin(self, position: int, room: int) -> None:
        """Have the next records stand for batches at ``position``, of which ``room`` bytes are free."""
        self.clear()
        if sys.byteorder == "little" and self.words.itemsize == 8:
            self.words[0] = position
            num_records = min(len(self.words) // WORDS - 1, max(room, 0) // STORED_SIZE)
            self.end = WORDS + WORDS * num_records

    def clear(self) -> None:
        """Wipe what is stored."""
        self.end = 0
        data = self.words.cast("B")
        data[: 8 * self.dirty] = bytes(8 * self.dirty)
        data.release()
        self.at = self.dirty = WORDS

    def stored(self) -> bytes:
        """The run as batches, each with its size before it."""
        records = self.words[WORDS : self.at].tobytes()
        data = bytearray(_EMPTY * (self.at // WORDS - 1))
        for place, source in _PLACES:
            data[place::STORED_SIZE] = records[source :: RECORD.size]
        return bytes(data)

    def planned(self, step: int) -> tuple[int, ...]:
        """Of the step that is on its way: step, started, duration, running, waiting, free."""
        return (step, *self.words[self.at + 1 : self.at + 6])


def batches_in_area(area: bytes, end: int) -> Iterator[bytes]:
    """The batches of the run that stand in no batch yet, when those that do end at ``end``."""
    if len(area) < RECORD.size:
        return
    (position,) = Struct("<Q").unpack_from(area)
    num_stored, rest = divmod(end - position, STORED_SIZE)
    if not position or num_stored < 0 or rest:
        return
    for at in range(RECORD.size * (1 + num_stored), len(area) - RECORD.size + 1, RECORD.size):
        record = RECORD.unpack_from(area, at)
        if not record[0]:
            return
        try:
            yield _stored(record)[_SIZE.size :]
        except error:  # a number that no step has: damage
            return
