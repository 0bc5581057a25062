"""Between Arrow's columns and NumPy's arrays: numbers, nulls, lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NONE = np.iinfo(np.int64).min
"""Stands for null in arrays of numbers."""


def numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column; ``NONE`` for null."""
    column = batch[name]
    return (pc.fill_null(column, NONE) if column.null_count else column).to_numpy()


def nullable(values: np.ndarray, none: int = NONE) -> pa.Array:
    """The other way; ``none`` is not above any number."""
    if not len(values) or values.min() > none:
        return pa.array(values)
    valid = values > none
    if not valid.any():
        return pa.nulls(len(values), pa.int64())
    bits = pa.py_buffer(np.packbits(valid, bitorder="little"))
    return pa.Array.from_buffers(pa.int64(), len(values), [bits, pa.py_buffer(values)])


def parts(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of a column of lists: where each begins and ends, and the numbers in all of them."""
    offsets = np.asarray(column.offsets).astype(np.int64)
    return offsets - offsets[0], _unwritable(column.values, offsets)


def parts_of_lists(column: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a column of lists of lists: where each begins and ends among the inner ones, and ``parts`` of those."""
    offsets = np.asarray(column.offsets).astype(np.int64)
    return offsets - offsets[0], *parts(column.values[offsets[0] : offsets[-1]])


def parts_of_map(column: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of maps from numbers to numbers: offsets, keys, values."""
    offsets = np.asarray(column.offsets).astype(np.int64)
    return (
        offsets - offsets[0],
        _unwritable(column.keys, offsets),
        _unwritable(column.items, offsets),
    )


def _unwritable(values: pa.Array, offsets: np.ndarray) -> np.ndarray:
    """Arrow's own memory; marked always, as numba compiles a function again for what may be written to."""
    flat = values.to_numpy()[int(offsets[0]) : int(offsets[-1])]
    flat.flags.writeable = False
    return flat


class Waiting:
    """Columns of numbers whose rows come at the end and go from the front; those that wait can be written to."""

    def __init__(self, num_columns: int) -> None:
        self._room = np.empty((num_columns, 0), np.int64)
        self._begin = self._end = 0

    def __len__(self) -> int:
        return self._end - self._begin

    @property
    def rows(self) -> np.ndarray:
        """All that wait, a column after the other."""
        return self._room[:, self._begin : self._end]

    def add(self, count: int) -> np.ndarray:
        """Room for so many rows more, with ``NONE`` in them."""
        if self._end + count > self._room.shape[1]:
            room = self._room
            if 4 * (len(self) + count) > 3 * room.shape[1]:
                room = np.empty((len(room), 2 * (len(self) + count)), np.int64)
            room[:, : len(self)] = self.rows
            self._room, self._begin, self._end = room, 0, len(self)
        self._end += count
        added = self._room[:, self._end - count : self._end]
        added[:] = NONE
        return added

    def take(self, count: int) -> np.ndarray:
        """A copy of the first rows, which wait no more."""
        taken = self.rows[:, :count].copy()
        self._begin += count
        return taken
