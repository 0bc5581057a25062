"""What the file leaves to the reader, for columns: ``num_kept``, lists that are as in the step before.

The same as ``whole.Completion``.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numba import njit

from vllm_trace.events import Event, SlotsAllocated, SlotsRefused

CALLS = (SlotsAllocated, SlotsRefused)
"""What ``allocate_slots`` answered."""


class Calls:
    """The calls of ``allocate_slots`` in a frame, in their order."""

    def __init__(
        self,
        rows: dict[type[Event], tuple[np.ndarray, dict[str, pa.Array]]],
        num_kept: dict[type[Event], np.ndarray],
    ) -> None:
        self._columns = [(cls, *rows[cls], num_kept[cls]) for cls in CALLS if cls in rows]
        none = [np.zeros(0, np.int64)]
        places = np.concatenate(none + [which for _, which, _, _ in self._columns])
        self._order = np.argsort(places)
        self.places = places[self._order]
        requests = [own["request"].to_numpy() for _, _, own, _ in self._columns]
        self.requests = np.concatenate(none + requests)[self._order]
        self.kept = np.concatenate(none + [kept for *_, kept in self._columns])[self._order]

    def of(self, call: int) -> tuple[type[Event], int]:
        """Kind and row of a call."""
        row = int(self._order[call])
        place = 0
        while row >= len(self._columns[place][1]):
            row -= len(self._columns[place][1])
            place += 1
        return self._columns[place][0], row

    def put_back(self, kept: np.ndarray) -> None:
        """Counts of the calls, into the columns that they are from."""
        unsorted = np.empty_like(kept)
        unsorted[self._order] = kept
        begin = 0
        for *_, column in self._columns:
            column[:] = unsorted[begin : begin + len(column)]
            begin += len(column)


@njit(cache=True)
def count_kept(places, calls, kept, steps, offsets, requests, of_steps):
    """Put in how many silent calls stood before each call that has -1, and in each step.

    ``places`` and ``steps`` are events' numbers; ``calls`` whose call it was; ``requests`` from
    ``offsets[i]`` to ``offsets[i + 1]`` are those of step ``i``. Returns the first call after all
    steps.

    Source: ``whole._count_kept``.
    """
    first = 0
    for step in range(len(steps)):
        last = first
        while last < len(places) and places[last] < steps[step]:
            last += 1
        if of_steps[step] < 0:
            begin, end = offsets[step], offsets[step + 1]
            placed = np.zeros(end - begin, np.bool_)
            others = np.zeros(last - first, np.bool_)
            told = 0
            for call in range(first, last):
                if kept[call] >= 0:
                    continue
                place = begin
                while place < end and requests[place] != calls[call]:
                    place += 1
                if place < end:
                    kept[call] = place - begin - told
                    placed[place - begin] = True
                    told += 1
                else:
                    others[call - first] = True
            of_steps[step] = end - begin - placed.sum()
            for call in range(first, last):
                if others[call - first]:
                    kept[call] = of_steps[step]
        first = last
    return first


@njit(cache=True)
def spell_out(lengths, items, last):
    """Lists of which -1 in ``lengths`` says "as the one before", the first as ``last``: offsets, items."""
    count, size = np.int64(0), np.int64(len(last))
    for i in range(len(lengths)):
        if lengths[i] >= 0:
            size = lengths[i]
        count += size
    offsets = np.empty(len(lengths) + 1, np.int32)
    made = np.empty(count, np.int64)
    offsets[0] = 0
    read, at, size = np.int64(0), np.int64(0), np.int64(len(last))
    before, of_last = np.int64(0), True
    for i in range(len(lengths)):
        if lengths[i] >= 0:
            size, before, of_last = lengths[i], read, False
            read += size
        for j in range(size):
            made[at + j] = last[j] if of_last else items[before + j]
        at += size
        offsets[i + 1] = at
    return offsets, made


@njit(cache=True)
def spell_out_outputs(lengths, items, events, steps, scheduled, of_steps, sizes, back):
    """Outputs of which -1 in ``lengths`` says "one each", where the step is one of the ``back`` before.

    ``events`` and ``steps`` are of the updates, ``scheduled`` (events), ``of_steps``, ``sizes`` of
    what was scheduled. Puts the lengths in and returns the items.
    """
    latest, count = 0, np.int64(0)
    told = np.empty(len(lengths), np.int64)
    for i in range(len(lengths)):
        while latest < len(scheduled) and scheduled[latest] < events[i]:
            latest += 1
        told[i] = lengths[i]
        if lengths[i] < 0:
            for place in range(latest - 1, max(latest - 1 - back, -1), -1):
                if of_steps[place] == steps[i]:
                    lengths[i] = sizes[place]
                    break
        if lengths[i] > 0:
            count += lengths[i]
    made = np.empty(count, np.int64)
    read, at = np.int64(0), np.int64(0)
    for i in range(len(lengths)):
        if told[i] >= 0:
            made[at : at + told[i]] = items[read : read + told[i]]
            read += told[i]
            at += told[i]
        else:
            for _ in range(lengths[i]):
                made[at] = 1
                at += 1
    return made
