"""The table ``steps``: a row for each ``step.scheduled``, made as the events pass by.

What a worker or the engine tells of a step later is found by the step's number, after it (numbers
begin again with a second engine in one process). A row waits ``LATER`` events for it: what is held
in memory is those rows and not the trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vllm_trace.events import (
    AttentionPlanned,
    BlockEvicted,
    Event,
    RequestPreempted,
    SlotsRefused,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.export.columns import Chunk

LATER = 65_536
"""Events after which nothing more is heard of a step, or of a request that has finished."""

NONE = np.iinfo(np.int64).min
"""Stands for null in arrays of numbers."""

NAMES = (
    "number", "process", "step", "at_ns", "schedule_ns", "execute_ns", "forward_ns", "sample_ns",
    "update_ns", "wall_ns", "num_requests", "num_tokens", "num_prefill_tokens", "num_decode_tokens",
    "num_tokens_padded", "num_output_tokens", "num_running", "num_waiting", "num_free_blocks",
    "num_new", "num_resumed", "num_preempted", "num_refused", "num_evicted", "variant",
)  # fmt: skip

SCHEMA = pa.schema([(name, pa.string() if name == "variant" else pa.int64()) for name in NAMES])

PLACE = {name: place for place, name in enumerate(NAMES)}

COUNTED: dict[str, type[Event]] = {
    "num_preempted": RequestPreempted,
    "num_refused": SlotsRefused,
    "num_evicted": BlockEvicted,
}
"""What happens inside ``schedule`` stands before its event."""


def numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column; ``NONE`` for null."""
    column = batch[name]
    return (pc.fill_null(column, NONE) if column.null_count else column).to_numpy()


def nullable(values: np.ndarray) -> pa.Array:
    null = values == NONE
    return pa.array(values, mask=null if null.any() else None)


def parts(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of a column of lists: where each begins and ends, and the numbers in all of them."""
    offsets = np.asarray(column.offsets).astype(np.int64)
    return offsets - offsets[0], column.values.to_numpy()[offsets[0] : offsets[-1]]


class Steps:
    """Takes the chunks of a trace and gives the rows of ``steps``, in their order."""

    def __init__(self) -> None:
        self._rows = np.empty((0, len(NAMES)), np.int64)
        """Of the steps that may still be told of; ``variant`` is a place in ``_variants``."""
        self._before: dict[tuple[str, int], int] = {}
        """What happened in each process since its last step."""
        self._variants: list[frozenset[str]] = []
        self._places: dict[frozenset[str], int] = {}

    def take(self, chunk: Chunk) -> Iterator[pa.RecordBatch]:
        """The rows of which nothing more can come after this chunk."""
        planned = chunk.get(StepScheduled)
        made = None if planned is None else _rows_of(planned)
        self._count(chunk, made)
        if made is not None:
            self._rows = np.concatenate([self._rows, made])
        if len(self._rows):
            self._tell(chunk)
        last = max(int(numbers(batch, "number")[-1]) for batch in chunk.values())
        done = int(np.searchsorted(self._rows[:, 0], last - LATER))
        if done:
            yield self._batch(self._rows[:done])
            self._rows = self._rows[done:].copy()

    def end(self) -> Iterator[pa.RecordBatch]:
        """The rest."""
        yield self._batch(self._rows)

    def _count(self, chunk: Chunk, made: np.ndarray | None) -> None:
        """Add what happened to the next step of its process."""
        before, self._before = self._before, {}
        for name, cls in COUNTED.items():
            batch = chunk.get(cls)
            where = np.zeros((2, 0), np.int64)
            if batch is not None:
                where = np.stack([numbers(batch, "number"), numbers(batch, "process")])
            waiting = {process for what, process in before if what == name}
            for process in {*waiting, *np.unique(where[1]).tolist()}:
                at = where[0, where[1] == process]
                carried = before.get((name, process), 0)
                rows = np.zeros(0, np.int64)
                if made is not None:
                    rows = np.flatnonzero(made[:, 1] == process)
                if made is None or not len(rows):
                    self._before[name, process] = carried + len(at)
                    continue
                found = np.bincount(np.searchsorted(made[rows, 0], at), minlength=len(rows) + 1)
                found[0] += carried
                made[rows, PLACE[name]] += found[:-1]
                if found[-1]:
                    self._before[name, process] = int(found[-1])

    def _tell(self, chunk: Chunk) -> None:
        """Put in what is known of steps now."""
        rows = self._rows
        batch = chunk.get(StepUpdated)
        if batch is not None:
            who, processes = numbers(batch, "process"), np.unique(rows[:, 1])
            for process in processes.tolist():
                of_process = np.flatnonzero(rows[:, 1] == process)
                mine = np.flatnonzero(who == process)
                which, found = _of_steps(rows[of_process], batch, mine)
                self._update(batch, which, of_process[found])
        for cls, columns in (
            (StepExecuted, (("execute_ns", "dur_ns"), ("forward_ns", "forward_dur_ns"),
                            ("num_tokens_padded", "num_tokens_padded"))),
            (StepSampled, (("sample_ns", "dur_ns"),)),
        ):  # fmt: skip
            batch = chunk.get(cls)
            if batch is not None:
                which, found = _of_steps(rows, batch, np.arange(batch.num_rows))
                for name, source in columns:
                    np.maximum.at(rows[:, PLACE[name]], found, numbers(batch, source)[which])
        batch = chunk.get(AttentionPlanned)
        if batch is not None:
            which, found = _of_steps(rows, batch, np.arange(batch.num_rows))
            self._choose(batch["variant"], which, found)

    def _update(self, batch: pa.RecordBatch, which: np.ndarray, found: np.ndarray) -> None:
        rows, dur = self._rows, numbers(batch, "dur_ns")
        updated = numbers(batch, "at_ns") + dur
        rows[found, PLACE["update_ns"]] = dur[which]
        rows[found, PLACE["wall_ns"]] = updated[which] - rows[found, PLACE["at_ns"]]
        sums = _sums(batch["num_output_tokens"])
        rows[found, PLACE["num_output_tokens"]] = sums[which]

    def _choose(self, column: pa.Array, which: np.ndarray, found: np.ndarray) -> None:
        """Variants of a step in one text, in alphabetical order."""
        coded = column.dictionary_encode()
        own = np.array([self._variant({text}) for text in coded.dictionary.to_pylist()], np.int64)
        codes = own[coded.indices.to_numpy()[which]]
        held = self._rows[:, PLACE["variant"]]
        held[found] = np.where(held[found] == NONE, codes, held[found])
        for row, code in zip(*(a[held[found] != codes].tolist() for a in (found, codes))):
            held[row] = self._variant(self._variants[held[row]] | self._variants[code])

    def _variant(self, texts: Iterable[str]) -> int:
        key = frozenset(texts)
        place = self._places.setdefault(key, len(self._variants))
        if place == len(self._variants):
            self._variants.append(key)
        return place

    def _batch(self, rows: np.ndarray) -> pa.RecordBatch:
        columns = [nullable(column) for column in np.ascontiguousarray(rows.T)]
        texts = [", ".join(sorted(texts)) for texts in self._variants]
        columns[-1] = pa.array(texts, pa.string()).take(columns[-1])
        return pa.record_batch(columns, schema=SCHEMA)


def _rows_of(planned: pa.RecordBatch) -> np.ndarray:
    """What a ``step.scheduled`` itself says."""
    rows = np.full((planned.num_rows, len(NAMES)), NONE)

    def put(name: str, values: np.ndarray | int) -> None:
        rows[:, PLACE[name]] = values

    for name in ("number", "process", "step", "at_ns", "num_running", "num_waiting",
                 "num_free_blocks"):  # fmt: skip
        put(name, numbers(planned, name))
    put("schedule_ns", numbers(planned, "dur_ns"))
    sizes = {name: np.diff(np.asarray(planned[name].offsets)) for name in
             ("requests", "new", "resumed")}  # fmt: skip
    put("num_requests", sizes["requests"])
    put("num_new", sizes["new"])
    put("num_resumed", sizes["resumed"])
    for name in COUNTED:
        put(name, 0)
    total = _sums(planned["num_tokens"])
    total[total == NONE] = 0
    prefill = _prefill(planned)
    put("num_tokens", total)
    put("num_prefill_tokens", prefill)
    put("num_decode_tokens", total - prefill)
    return rows


def _sums(column: pa.Array) -> np.ndarray:
    """The sum of each list; ``NONE`` for one that is empty or null."""
    offsets, flat = parts(column)
    made = np.full(len(column), NONE)
    some = np.diff(offsets) > 0
    if some.any():
        made[some] = np.add.reduceat(flat, offsets[:-1][some])
    return made


def _prefill(planned: pa.RecordBatch) -> np.ndarray:
    """Tokens of requests that join, or compute several tokens: they are in their prefill."""
    offsets, tokens = parts(planned["num_tokens"])
    several = tokens.copy()
    of_spec = planned["num_spec_tokens"]
    if len(of_spec.keys):
        begins, keys = np.asarray(of_spec.offsets), of_spec.keys.to_numpy()
        at, which = _places(planned, np.diff(begins), keys[begins[0] : begins[-1]])
        several[at] -= of_spec.items.to_numpy()[begins[0] : begins[-1]][which]
    chosen = several > 1
    for name in ("new", "resumed"):
        begins, joined = parts(planned[name])
        if len(joined):
            chosen[_places(planned, np.diff(begins), joined)[0]] = True
    sums = np.concatenate([[0], np.cumsum(np.where(chosen, tokens, 0))])
    return sums[offsets[1:]] - sums[offsets[:-1]]


def _places(
    planned: pa.RecordBatch, counts: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where ``num_tokens`` of some requests stand, ``counts`` of them in each step, and of which."""
    offsets, requests = parts(planned["requests"])
    of_tokens, _ = parts(planned["num_tokens"])
    rows = np.repeat(np.arange(len(counts)), counts)
    sizes = np.minimum(np.diff(offsets), np.diff(of_tokens))[rows]
    which = np.repeat(np.arange(len(rows)), sizes)
    within = np.arange(len(which)) - (np.cumsum(sizes) - sizes)[which]
    same = requests[offsets[rows][which] + within] == wanted[which]
    return (of_tokens[rows][which] + within)[same], which[same]


def _of_steps(
    rows: np.ndarray, batch: pa.RecordBatch, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which of these events have a step, and its row: the latest of that number before them."""
    order = np.argsort(rows[:, PLACE["step"]], kind="stable")
    steps = rows[order, PLACE["step"]]
    unique, rank = np.unique(steps, return_inverse=True)
    wanted = numbers(batch, "step")[which]
    of = np.searchsorted(unique, wanted)
    # A trace has fewer than 2**40 events, and fewer steps than 2**22 wait.
    keys = (rank << 40) + rows[order, 0]
    found = np.searchsorted(keys, (of << 40) + numbers(batch, "number")[which], "right") - 1
    there = (found >= 0) & (steps[found] == wanted)
    return which[there], order[found[there]]
