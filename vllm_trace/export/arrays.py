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
    return pa.array(values, mask=values == none)


def parts(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of a column of lists: where each begins and ends, and the numbers in all of them."""
    offsets = np.asarray(column.offsets).astype(np.int64)
    return offsets - offsets[0], column.values.to_numpy()[offsets[0] : offsets[-1]]


def parts_of_lists(column: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a column of lists of lists: where each begins and ends among the inner ones, and ``parts`` of those."""
    offsets = np.asarray(column.offsets).astype(np.int64)
    return offsets - offsets[0], *parts(column.values[offsets[0] : offsets[-1]])


def own_parts(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """``parts`` in memory of its own: numba compiles a function once for what may be written to."""
    offsets, flat = parts(column)
    return offsets, flat.copy()


def own_parts_of_map(column: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of maps from numbers to numbers: offsets, keys, values."""
    offsets = np.asarray(column.offsets).astype(np.int64)
    inside = slice(int(offsets[0]), int(offsets[-1]))
    return (
        offsets - offsets[0],
        column.keys.to_numpy()[inside].copy(),
        column.items.to_numpy()[inside].copy(),
    )
