"""The table ``requests``: a row for each ``request.arrived``, made as the events pass by.

A row waits ``LATER`` events after the end of its request, for a step whose results were out then,
and until those that arrived before are written, unless too many wait: what is held in memory is
the requests that live and not the trace. The loop is written for numba, as that of ``holding``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from vllm_trace.events import (
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.export.arrays import NONE, nullable, numbers, parts
from vllm_trace.export.columns import Chunk
from vllm_trace.export.steps import LATER
from vllm_trace.export.tenancies import WIDEST

KINDS: dict[str, pa.DataType] = {
    name: pa.int64()
    for name in (
        "request", "name", "arrived_event", "arrived_ns", "num_prompt_tokens", "max_tokens",
        "priority", "lora", "salted", "first_step", "scheduled_ns", "queued_ns", "first_output_ns",
        "first_token_ns", "last_step", "num_steps", "num_computed_tokens", "num_hit_tokens",
        "num_resume_hit_tokens", "num_refusals", "num_preemptions", "num_lost_tokens",
        "finished_event", "finished_ns", "total_ns", "reason", "num_output_tokens",
    )
}  # fmt: skip
KINDS |= {name: pa.string() for name in ("name", "lora", "reason")} | {"salted": pa.bool_()}
SCHEMA = pa.schema(list(KINDS.items()))
NAMED = {"name": "request_id", "lora": "lora"}
"""Texts of ``request.arrived``."""
PLACE = {name: place for place, name in enumerate(KINDS)}
SINCE_ARRIVAL = {
    "queued_ns": "scheduled_ns",
    "first_token_ns": "first_output_ns",
    "total_ns": "finished_ns",
}

(
    ARRIVED_EVENT, FIRST_STEP, SCHEDULED_NS, FIRST_OUTPUT_NS, LAST_STEP, NUM_STEPS,
    NUM_COMPUTED_TOKENS,
) = (
    PLACE[name]
    for name in ("arrived_event", "first_step", "scheduled_ns", "first_output_ns", "last_step",
                 "num_steps", "num_computed_tokens")
)  # fmt: skip

MOST_HELD = 65_536
"""Rows that wait; above, those that are complete go out of their order."""

MOST_OUT = 65_536
"""Requests without an output yet, in steps whose results are out."""


def fold(ops, requests, tokens, outputs, low, table, rows, out, state, answers):
    """Take the steps that were scheduled (``ops`` 0) and updated (1), in their order.

    ``ops``: what, process, step, ns, begin and end of its requests (or outputs), begin and end of
    its tokens, event. ``table`` has the row of request ``low + i``. ``out`` is a ring of requests without
    an output whose results are out: process, step, event, place in the step, row; ``state`` its
    begin and end. Without ``answers`` no operation has outputs.
    """
    for op in range(len(ops)):
        what, process, step, ns = ops[op, 0], ops[op, 1], ops[op, 2], ops[op, 3]
        begin, end = ops[op, 4], ops[op, 5]
        if what == 0:
            first, last = ops[op, 6], ops[op, 7]
            for i in range(end - begin):
                known = requests[begin + i] - low
                if known < 0 or known >= len(table) or table[known] < 0:
                    continue
                row = table[known]
                if rows[row, NUM_STEPS] < 0:
                    rows[row, NUM_STEPS] = 0
                    rows[row, FIRST_STEP] = step
                    rows[row, SCHEDULED_NS] = ns
                    rows[row, LAST_STEP] = step
                rows[row, NUM_STEPS] += 1
                rows[row, FIRST_STEP] = min(rows[row, FIRST_STEP], step)
                rows[row, LAST_STEP] = max(rows[row, LAST_STEP], step)
                rows[row, SCHEDULED_NS] = min(rows[row, SCHEDULED_NS], ns)
                if first + i < last:
                    if rows[row, NUM_COMPUTED_TOKENS] == NONE:
                        rows[row, NUM_COMPUTED_TOKENS] = 0
                    rows[row, NUM_COMPUTED_TOKENS] += tokens[first + i]
                if answers and rows[row, FIRST_OUTPUT_NS] == NONE:
                    place = state[1] % len(out)
                    out[place, 0] = process
                    out[place, 1] = step
                    out[place, 2] = ops[op, 8]
                    out[place, 3] = i
                    out[place, 4] = row
                    state[1] += 1
                    if state[1] - state[0] > len(out):
                        state[0] += 1
        else:
            # Those that stay move together, to the end of the ring.
            kept, latest = state[1], -1
            for at in range(state[1] - 1, state[0] - 1, -1):
                place = at % len(out)
                if out[place, 0] == process and out[place, 1] == step:
                    planned, i, row = out[place, 2], out[place, 3], out[place, 4]
                    # Of another step of that number, or of who had the row before.
                    latest = max(latest, planned)
                    if planned < latest or planned < rows[row, ARRIVED_EVENT]:
                        continue
                    if i < end - begin and outputs[begin + i] > 0:
                        if rows[row, FIRST_OUTPUT_NS] == NONE or rows[row, FIRST_OUTPUT_NS] > ns:
                            rows[row, FIRST_OUTPUT_NS] = ns
                else:
                    kept -= 1
                    out[kept % len(out)] = out[place]
            state[0] = kept


class Lives:
    """Takes the chunks of a trace and gives the rows of ``requests``."""

    def __init__(self, fold: Any = fold, answers: bool = True) -> None:
        self._fold, self._answers = fold, answers
        self._rows = np.empty((0, len(KINDS)), np.int64)
        self._texts = {name: pa.array([], pa.string()) for name in NAMED}
        """Of the rows, where ``name`` in them says."""
        self._reasons: dict[str, int] = {}
        """A number for each; ``reason`` in the rows."""
        self._free: list[int] = []
        self._order = np.empty(0, np.int64)
        """Rows in the order in which their requests arrived."""
        self._out = np.empty((MOST_OUT, 5), np.int64)
        self._state = np.zeros(2, np.int64)

    def take(self, chunk: Chunk) -> Iterator[pa.RecordBatch]:
        """The rows of which nothing more can come after this chunk."""
        self._arrive(chunk.get(RequestArrived))
        self._schedule(chunk)
        self._tell(chunk)
        last = max(int(numbers(batch, "number")[-1]) for batch in chunk.values())
        yield from self._complete(last - LATER)

    def end(self) -> Iterator[pa.RecordBatch]:
        """The rest."""
        yield self._batch(self._order)

    def _arrive(self, batch: pa.RecordBatch | None) -> None:
        if batch is None:
            return
        lacking = batch.num_rows - len(self._free)
        if lacking > 0:
            more = max(lacking, 64)
            self._free += range(len(self._rows), len(self._rows) + more)
            self._rows = np.concatenate([self._rows, np.full((more, len(KINDS)), NONE)])
        rows = self._free[-batch.num_rows :]
        del self._free[-batch.num_rows :]
        self._rows[rows] = NONE
        for name, source in (
            ("request", "request"), ("arrived_event", "number"), ("arrived_ns", "at_ns"),
            ("num_prompt_tokens", "num_prompt_tokens"), ("max_tokens", "max_tokens"),
            ("priority", "priority"),
        ):  # fmt: skip
            self._rows[rows, PLACE[name]] = numbers(batch, source)
        self._rows[rows, PLACE["salted"]] = np.asarray(batch["salted"].cast(pa.int64()))
        for name in ("num_refusals", "num_preemptions", "num_lost_tokens"):
            self._rows[rows, PLACE[name]] = 0
        begin = len(self._texts["name"])
        self._rows[rows, PLACE["name"]] = np.arange(begin, begin + len(rows))
        for name, source in NAMED.items():
            self._texts[name] = pa.concat_arrays([self._texts[name], batch[source]])
        self._order = np.concatenate([self._order, rows])

    def _schedule(self, chunk: Chunk) -> None:
        planned, updated = chunk.get(StepScheduled), chunk.get(StepUpdated)
        made, lists = [], [np.zeros(0, np.int64)] * 3
        if planned is not None:
            ops = self._operations(planned, 0)
            lists[0] = _spread(ops, planned["requests"], 4)
            lists[1] = _spread(ops, planned["num_tokens"], 6)
            made.append((numbers(planned, "number"), ops))
        if updated is not None:
            ops = self._operations(updated, 1)
            ops[:, 3] += numbers(updated, "dur_ns")
            lists[2] = _spread(ops, updated["num_output_tokens"], 4)
            made.append((numbers(updated, "number"), ops))
        if not made or not len(self._order):
            return
        order = np.argsort(np.concatenate([at for at, _ in made]), kind="stable")
        low, table, lists[0] = self._table(lists[0])
        every = np.concatenate([ops for _, ops in made])[order]
        self._fold(
            every, *lists, low, table, self._rows, self._out, self._state,
            self._answers,
        )  # fmt: skip

    def _operations(self, batch: pa.RecordBatch, what: int) -> np.ndarray:
        ops = np.zeros((batch.num_rows, 9), np.int64)
        ops[:, 0] = what
        for place, name in ((1, "process"), (2, "step"), (3, "at_ns"), (8, "number")):
            ops[:, place] = numbers(batch, name)
        return ops

    def _table(self, requests: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """The lowest request that lives, the rows of it and the next, the requests."""
        rows = self._order
        if not len(rows):
            return 0, rows, requests
        known = self._rows[rows, PLACE["request"]]
        low, high = int(known.min()), int(known.max())
        if high - low < WIDEST:
            table = np.full(high - low + 1, -1)
            table[known - low] = rows
            return low, table, requests
        order = np.argsort(known, kind="stable")
        at = np.maximum(np.searchsorted(known[order], requests, "right") - 1, 0)
        return 0, rows[order], np.where(known[order][at] == requests, at, -1)

    def _tell(self, chunk: Chunk) -> None:
        """What happened to requests one by one."""
        rows = self._rows
        for cls, counts in (
            (SlotsRefused, (("num_refusals", ""),)),
            (RequestPreempted, (("num_preemptions", ""), ("num_lost_tokens", "num_computed_tokens"))),
        ):  # fmt: skip
            batch = chunk.get(cls)
            if batch is not None:
                which, found = self._find(batch)
                for name, source in counts:
                    more = numbers(batch, source)[which] if source else 1
                    np.add.at(rows[:, PLACE[name]], found, more)
        batch = chunk.get(SlotsAllocated)
        if batch is not None:
            which, found = self._find(batch)
            self._allocate(numbers(batch, "num_hit_tokens")[which], found)
        batch = chunk.get(RequestFinished)
        if batch is not None:
            which, found = self._find(batch)
            for name, source in (
                ("finished_event", "number"), ("finished_ns", "at_ns"),
                ("num_output_tokens", "num_output_tokens"),
            ):  # fmt: skip
                rows[found, PLACE[name]] = numbers(batch, source)[which]
            coded = batch["reason"].dictionary_encode()
            known = self._reasons
            own = [known.setdefault(text, len(known)) for text in coded.dictionary.to_pylist()]
            rows[found, PLACE["reason"]] = np.array(own)[coded.indices.to_numpy()[which]]

    def _allocate(self, hits: np.ndarray, found: np.ndarray) -> None:
        """The first call is of the admission, later hits are of resumptions."""
        rows, first, later = self._rows, PLACE["num_hit_tokens"], PLACE["num_resume_hit_tokens"]
        begun, at = np.unique(found, return_index=True)
        new = rows[begun, first] == NONE
        rows[begun[new], first] = hits[at[new]]
        rows[begun[new], later] = 0
        rest = np.ones(len(found), bool)
        rest[at[new]] = False
        np.add.at(rows[:, later], found[rest], hits[rest])

    def _find(self, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        """Which of these events name a request that lives, and its row."""
        low, table, requests = self._table(numbers(batch, "request"))
        which = np.flatnonzero((requests >= low) & (requests < low + len(table)))
        found = table[requests[which] - low]
        there = found >= 0
        return which[there], found[there]

    def _complete(self, until: int) -> Iterator[pa.RecordBatch]:
        ended = self._rows[self._order, PLACE["finished_event"]]
        ready = (ended != NONE) & (ended < until)
        in_order = np.logical_and.accumulate(ready)
        if len(ready) - np.count_nonzero(in_order) <= MOST_HELD:
            ready = in_order
        if ready.any():
            gone, self._order = self._order[ready], self._order[~ready]
            yield self._batch(gone)
            self._free += gone.tolist()
        if len(self._texts["name"]) > 2 * len(self._order) + 1024:
            kept = pa.array(self._rows[self._order, PLACE["name"]])
            self._texts = {name: texts.take(kept) for name, texts in self._texts.items()}
            self._rows[self._order, PLACE["name"]] = np.arange(len(kept))

    def _batch(self, order: np.ndarray) -> pa.RecordBatch:
        rows = np.ascontiguousarray(self._rows[order].T)
        for name, source in SINCE_ARRIVAL.items():
            at = rows[PLACE[source]]
            rows[PLACE[name]] = np.where(at == NONE, NONE, at - rows[PLACE["arrived_ns"]])
        places = pa.array(rows[PLACE["name"]])
        columns = {name: nullable(rows[place]) for name, place in PLACE.items()}
        columns |= {name: texts.take(places) for name, texts in self._texts.items()}
        columns["salted"] = columns["salted"].cast(pa.bool_())
        columns["reason"] = pa.array([*self._reasons], pa.string()).take(columns["reason"])
        return pa.RecordBatch.from_arrays([*columns.values()], schema=SCHEMA)


def _spread(ops: np.ndarray, column: pa.Array, place: int) -> np.ndarray:
    """Put begin and end of each list at ``place``; the numbers in all of them."""
    offsets, flat = parts(column)
    ops[:, place], ops[:, place + 1] = offsets[:-1], offsets[1:]
    return flat
