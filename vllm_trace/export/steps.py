"""The table ``steps``: a row for each ``step.scheduled``, made as the events pass by.

What a worker or the engine tells of a step later is found by the step's number, after it (numbers
begin again with a second engine in one process). A row waits ``LATER`` events for it: what is held
in memory is those rows and not the trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

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
from vllm_trace.export.arrays import NONE, Waiting, nullable, numbers, parts, parts_of_map
from vllm_trace.export.columns import Chunk

LATER = 65_536
"""Events after which nothing more is heard of a step, or of a request that has finished."""

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


def count_tokens(
    of_requests, requests, of_tokens, tokens, of_new, new, of_resumed, resumed,
    of_spec, spec, num_spec, total, prefill,
):  # fmt: skip
    """Put in the tokens of each step, and those of requests that join or compute several: their prefill.

    ``of_…`` say where those of a step begin and end in the array after it; ``num_spec`` how many
    drafts each of ``spec`` has, which are no prefill. Written for numba.
    """
    for step in range(len(total)):
        begin, end = of_tokens[step], of_tokens[step + 1]
        every, several = 0, 0
        for count in tokens[begin:end]:
            every += count
            several += count * (count > 1)
        total[step], prefill[step] = every, several
        nobody_joins = of_new[step] == of_new[step + 1] and of_resumed[step] == of_resumed[step + 1]
        if nobody_joins and of_spec[step] == of_spec[step + 1]:
            continue
        first, last = of_requests[step], of_requests[step + 1]
        for i in range(min(end - begin, last - first)):
            count, request = tokens[begin + i], requests[first + i]
            computed = count
            for at in range(of_spec[step], of_spec[step + 1]):
                if spec[at] == request:
                    computed -= num_spec[at]
            joined = False
            if computed <= 1:
                for at in range(of_new[step], of_new[step + 1]):
                    joined |= new[at] == request
                for at in range(of_resumed[step], of_resumed[step + 1]):
                    joined |= resumed[at] == request
            if (computed > 1 or joined) != (count > 1):
                prefill[step] += count if count <= 1 else -count


class Steps:
    """Takes the chunks of a trace and gives the rows of ``steps``, in their order."""

    def __init__(self, count: Any = count_tokens) -> None:
        self._count_tokens = count
        self._waiting = Waiting(len(NAMES))
        """Steps that may still be told of; ``variant`` is a place in ``_variants``."""
        self._rows = self._waiting.rows
        self._before: dict[tuple[str, int], int] = {}
        """What happened in each process since its last step."""
        self._variants: list[frozenset[str]] = []
        self._places: dict[frozenset[str], int] = {}

    def take(self, chunk: Chunk) -> Iterator[pa.RecordBatch]:
        """The rows of which nothing more can come after this chunk."""
        planned = chunk.get(StepScheduled)
        made = None if planned is None else self._rows_of(planned)
        self._count_inside(chunk, made)
        self._rows = self._waiting.rows
        if len(self._waiting):
            self._tell(chunk)
        last = max(int(numbers(batch, "number")[-1]) for batch in chunk.values())
        done = int(np.searchsorted(self._rows[0], last - LATER))
        if done:
            yield self._batch(self._waiting.take(done))

    def end(self) -> Iterator[pa.RecordBatch]:
        """The rest."""
        yield self._batch(self._waiting.take(len(self._waiting)))

    def _rows_of(self, planned: pa.RecordBatch) -> np.ndarray:
        """What a ``step.scheduled`` itself says."""
        rows = self._waiting.add(planned.num_rows)
        for name in ("number", "process", "step", "at_ns", "num_running", "num_waiting",
                     "num_free_blocks"):  # fmt: skip
            rows[PLACE[name]] = numbers(planned, name)
        rows[PLACE["schedule_ns"]] = numbers(planned, "dur_ns")
        lists = {
            name: parts(planned[name]) for name in ("requests", "num_tokens", "new", "resumed")
        }
        for name, source in (
            ("num_requests", "requests"),
            ("num_new", "new"),
            ("num_resumed", "resumed"),
        ):
            rows[PLACE[name]] = np.diff(lists[source][0])
        for name in COUNTED:
            rows[PLACE[name]] = 0
        total, prefill = np.zeros((2, planned.num_rows), np.int64)
        self._count_tokens(
            *(each for pair in lists.values() for each in pair),
            *parts_of_map(planned["num_spec_tokens"]), total, prefill,
        )  # fmt: skip
        rows[PLACE["num_tokens"]] = total
        rows[PLACE["num_prefill_tokens"]] = prefill
        rows[PLACE["num_decode_tokens"]] = total - prefill
        return rows

    def _count_inside(self, chunk: Chunk, made: np.ndarray | None) -> None:
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
                    rows = np.flatnonzero(made[1] == process)
                if made is None or not len(rows):
                    self._before[name, process] = carried + len(at)
                    continue
                found = np.bincount(np.searchsorted(made[0, rows], at), minlength=len(rows) + 1)
                found[0] += carried
                made[PLACE[name], rows] += found[:-1]
                if found[-1]:
                    self._before[name, process] = int(found[-1])

    def _tell(self, chunk: Chunk) -> None:
        """Put in what is known of steps now."""
        rows = self._rows
        batch = chunk.get(StepUpdated)
        if batch is not None:
            who = numbers(batch, "process")
            for process in np.unique(who).tolist():
                of_process = np.flatnonzero(rows[1] == process)
                mine = np.flatnonzero(who == process)
                which, found = _of_steps(rows[:3, of_process], batch, mine)
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
                    np.maximum.at(rows[PLACE[name]], found, numbers(batch, source)[which])
        batch = chunk.get(AttentionPlanned)
        if batch is not None:
            which, found = _of_steps(rows, batch, np.arange(batch.num_rows))
            self._choose(batch["variant"], which, found)

    def _update(self, batch: pa.RecordBatch, which: np.ndarray, found: np.ndarray) -> None:
        rows, dur = self._rows, numbers(batch, "dur_ns")
        updated = numbers(batch, "at_ns") + dur
        rows[PLACE["update_ns"], found] = dur[which]
        rows[PLACE["wall_ns"], found] = updated[which] - rows[PLACE["at_ns"], found]
        sums = _sums(batch["num_output_tokens"])
        rows[PLACE["num_output_tokens"], found] = sums[which]

    def _choose(self, column: pa.Array, which: np.ndarray, found: np.ndarray) -> None:
        """Variants of a step in one text, in alphabetical order."""
        coded = column.dictionary_encode()
        own = np.array([self._variant({text}) for text in coded.dictionary.to_pylist()], np.int64)
        codes = own[coded.indices.to_numpy()[which]]
        held = self._rows[PLACE["variant"]]
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
        columns = [nullable(column) for column in rows]
        texts = [", ".join(sorted(texts)) for texts in self._variants]
        columns[-1] = pa.array(texts, pa.string()).take(columns[-1])
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _sums(column: pa.Array) -> np.ndarray:
    """The sum of each list; ``NONE`` for one that is empty or null."""
    offsets, flat = parts(column)
    made = np.full(len(column), NONE)
    some = np.diff(offsets) > 0
    if some.any():
        made[some] = np.add.reduceat(flat, offsets[:-1][some])
    return made


def _of_steps(
    rows: np.ndarray, batch: pa.RecordBatch, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which of these events have a step, and its row: the latest of that number before them."""
    if not rows.shape[1]:
        return which[:0], which[:0]
    steps, at = rows[PLACE["step"]], rows[0]
    wanted, number = numbers(batch, "step")[which], numbers(batch, "number")[which]
    if (steps[1:] > steps[:-1]).all():
        found = np.minimum(np.searchsorted(steps, wanted), len(steps) - 1)
        there = (steps[found] == wanted) & (at[found] <= number)
        return which[there], found[there]
    order = np.argsort(steps, kind="stable")
    steps = steps[order]
    unique, rank = np.unique(steps, return_inverse=True)
    of = np.searchsorted(unique, wanted)
    # A trace has fewer than 2**40 events, and fewer steps than 2**22 wait.
    found = np.searchsorted((rank << 40) + at[order], (of << 40) + number, "right") - 1
    there = (found >= 0) & (steps[found] == wanted)
    return which[there], order[found[there]]
