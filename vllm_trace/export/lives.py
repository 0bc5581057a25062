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
from vllm_trace.export.arrays import NONE, Waiting, nullable, numbers, parts
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
    FIRST_STEP, SCHEDULED_NS, FIRST_OUTPUT_NS, LAST_STEP, NUM_STEPS, NUM_COMPUTED_TOKENS,
) = (
    PLACE[name]
    for name in ("first_step", "scheduled_ns", "first_output_ns", "last_step",
                 "num_steps", "num_computed_tokens")
)  # fmt: skip

MOST_HELD = 65_536
"""Rows that wait; above, those that are complete go out of their order."""

MOST_OUT = 65_536
"""Requests without an output yet, in steps whose results are out."""


NUMBER, PROCESS, STEP, NS, BEGIN, END, BEGIN_TOKENS, END_TOKENS = range(8)
"""What is told of a step that was scheduled or updated; ``BEGIN`` and ``END`` of its requests or outputs."""


def fold(
    scheduled, updated, requests, tokens, outputs, low, table, rows, first_row, out, state, answers
):  # fmt: skip
    """Take the steps that were scheduled and updated, in their order.

    ``table`` has the row of request ``low + i``. ``out`` is a ring of requests without an output
    whose results are out: process, step, event, place in the step, row (counted from the first of
    all; ``rows`` begins with ``first_row``); ``state`` its begin and end. Without ``answers``
    nothing that was updated has outputs.
    """
    num_steps, first_step, last_step = rows[NUM_STEPS], rows[FIRST_STEP], rows[LAST_STEP]
    scheduled_ns, num_computed = rows[SCHEDULED_NS], rows[NUM_COMPUTED_TOKENS]
    first_output_ns = rows[FIRST_OUTPUT_NS]
    op = update = 0
    while op < scheduled.shape[1] or update < updated.shape[1]:
        if update == updated.shape[1] or (
            op < scheduled.shape[1] and scheduled[NUMBER, op] < updated[NUMBER, update]
        ):
            number, process, step = (
                scheduled[NUMBER, op],
                scheduled[PROCESS, op],
                scheduled[STEP, op],
            )
            ns, begin, end = scheduled[NS, op], scheduled[BEGIN, op], scheduled[END, op]
            first, last = scheduled[BEGIN_TOKENS, op], scheduled[END_TOKENS, op]
            op += 1
            for i in range(end - begin):
                known = requests[begin + i] - low
                if known < 0 or known >= len(table) or table[known] < 0:
                    continue
                row = table[known]
                if num_steps[row] < 0:
                    num_steps[row] = 0
                    first_step[row] = last_step[row] = step
                    scheduled_ns[row] = ns
                num_steps[row] += 1
                first_step[row] = min(first_step[row], step)
                last_step[row] = max(last_step[row], step)
                scheduled_ns[row] = min(scheduled_ns[row], ns)
                if first + i < last:
                    computed = num_computed[row]
                    more = tokens[first + i]
                    num_computed[row] = more if computed == NONE else computed + more
                if answers and first_output_ns[row] == NONE:
                    place = state[1] % len(out)
                    out[place, 0], out[place, 1], out[place, 2] = process, step, number
                    out[place, 3], out[place, 4] = i, first_row + row
                    state[1] += 1
                    if state[1] - state[0] > len(out):
                        state[0] += 1
        else:
            process, step, ns = updated[PROCESS, update], updated[STEP, update], updated[NS, update]
            begin, end = updated[BEGIN, update], updated[END, update]
            update += 1
            # Those that stay move together, to the end of the ring.
            kept, latest = state[1], -1
            for at in range(state[1] - 1, state[0] - 1, -1):
                place = at % len(out)
                if out[place, 0] != process or out[place, 1] != step:
                    kept -= 1
                    out[kept % len(out)] = out[place]
                    continue
                planned, i, row = out[place, 2], out[place, 3], out[place, 4] - first_row
                # Of another step of that number, or of a row that is written.
                latest = max(latest, planned)
                if planned == latest and row >= 0 and i < end - begin and outputs[begin + i] > 0:
                    before = first_output_ns[row]
                    first_output_ns[row] = ns if before == NONE else min(before, ns)
            state[0] = kept


class Lives:
    """Takes the chunks of a trace and gives the rows of ``requests``."""

    def __init__(self, fold: Any = fold, answers: bool = True) -> None:
        self._fold, self._answers = fold, answers
        self._waiting = Waiting(len(KINDS))
        """In the order in which their requests arrived."""
        self._rows = self._waiting.rows
        self._first_row = 0
        """How many rows went before them."""
        self._texts = {name: pa.array([], pa.string()) for name in NAMED}
        """Of the rows that wait."""
        self._reasons: dict[str, int] = {}
        """A number for each; ``reason`` in the rows."""
        self._low, self._table = 0, np.empty(0, np.int64)
        """The lowest request that waits, the row of it and the next; without ``_known``."""
        self._known: np.ndarray | None = None
        """Requests that wait, in order, where they are too far apart for a table."""
        self._out = np.empty((MOST_OUT, 5), np.int64)
        self._state = np.zeros(2, np.int64)

    def take(self, chunk: Chunk) -> Iterator[pa.RecordBatch]:
        """The rows of which nothing more can come after this chunk."""
        self._arrive(chunk.get(RequestArrived))
        if len(self._waiting):
            self._rows = self._waiting.rows
            self._look_up()
            self._schedule(chunk)
            self._tell(chunk)
        last = max(int(numbers(batch, "number")[-1]) for batch in chunk.values())
        yield from self._complete(last - LATER)

    def end(self) -> Iterator[pa.RecordBatch]:
        """The rest."""
        yield self._batch(self._waiting.take(len(self._waiting)), self._texts)

    def _arrive(self, batch: pa.RecordBatch | None) -> None:
        if batch is None:
            return
        rows = self._waiting.add(batch.num_rows)
        for name, source in (
            ("request", "request"), ("arrived_event", "number"), ("arrived_ns", "at_ns"),
            ("num_prompt_tokens", "num_prompt_tokens"), ("max_tokens", "max_tokens"),
            ("priority", "priority"),
        ):  # fmt: skip
            rows[PLACE[name]] = numbers(batch, source)
        rows[PLACE["salted"]] = np.asarray(batch["salted"].cast(pa.int64()))
        for name in ("num_refusals", "num_preemptions", "num_lost_tokens"):
            rows[PLACE[name]] = 0
        for name, source in NAMED.items():
            self._texts[name] = pa.concat_arrays([self._texts[name], batch[source]])

    def _look_up(self) -> None:
        """Make the table of requests: the last to arrive counts, where two have one number."""
        known = self._rows[PLACE["request"]]
        low, high = int(known.min()), int(known.max())
        if high - low < WIDEST:
            self._low, self._known = low, None
            self._table = np.full(high - low + 1, -1)
            self._table[known - low] = np.arange(len(known))
        else:
            self._low, self._table = 0, np.argsort(known, kind="stable")
            self._known = known[self._table]

    def _ranks(self, requests: np.ndarray) -> np.ndarray:
        """Requests as the table is asked for them."""
        if self._known is None:
            return requests
        at = np.maximum(np.searchsorted(self._known, requests, "right") - 1, 0)
        ranks = np.where(self._known[at] == requests, at, -1)
        ranks.flags.writeable = False
        return ranks

    def _schedule(self, chunk: Chunk) -> None:
        planned, updated = chunk.get(StepScheduled), chunk.get(StepUpdated)
        if planned is None and (updated is None or not self._answers):
            return
        scheduled, requests, tokens = _told(planned, "requests", "num_tokens")
        told, outputs, _ = _told(updated if self._answers else None, "num_output_tokens")
        if self._answers and updated is not None:
            told[NS] += numbers(updated, "dur_ns")
        self._fold(
            scheduled, told, self._ranks(requests), tokens, outputs, self._low, self._table,
            self._rows, self._first_row, self._out, self._state, self._answers,
        )  # fmt: skip

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
                    np.add.at(rows[PLACE[name]], found, more)
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
                rows[PLACE[name], found] = numbers(batch, source)[which]
            coded = batch["reason"].dictionary_encode()
            known = self._reasons
            own = [known.setdefault(text, len(known)) for text in coded.dictionary.to_pylist()]
            rows[PLACE["reason"], found] = np.array(own)[coded.indices.to_numpy()[which]]

    def _allocate(self, hits: np.ndarray, found: np.ndarray) -> None:
        """The first call is of the admission, later hits are of resumptions."""
        first, later = (
            self._rows[PLACE["num_hit_tokens"]],
            self._rows[PLACE["num_resume_hit_tokens"]],
        )
        new = np.flatnonzero(first[found] == NONE)
        begun, at = np.unique(found[new], return_index=True)
        first[begun] = hits[new[at]]
        later[begun] = 0
        # Nearly no call has hits, and none adds nothing.
        hits = hits.copy()
        hits[new[at]] = 0
        some = np.flatnonzero(hits)
        np.add.at(later, found[some], hits[some])

    def _find(self, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        """Which of these events name a request that waits, and its row."""
        at = self._ranks(numbers(batch, "request"))
        which = np.flatnonzero((at >= self._low) & (at < self._low + len(self._table)))
        found = self._table[at[which] - self._low]
        there = found >= 0
        return which[there], found[there]

    def _complete(self, until: int) -> Iterator[pa.RecordBatch]:
        ended = self._waiting.rows[PLACE["finished_event"]]
        ready = (ended != NONE) & (ended < until)
        done = len(ready) if ready.all() else int(ready.argmin())
        if done:
            yield self._batch(self._waiting.take(done), self._pass(slice(0, done)))
            self._first_row += done
        if len(ready) - done > MOST_HELD and ready[done:].any():
            yield self._out_of_order(ready[done:])

    def _out_of_order(self, ready: np.ndarray) -> pa.RecordBatch:
        """Those that are complete go before one that is not; the others keep their order."""
        rows = self._waiting.take(len(ready))
        gone = self._texts_of(np.flatnonzero(ready))
        self._texts = self._texts_of(np.flatnonzero(~ready))
        self._waiting.add(int(np.count_nonzero(~ready)))[:] = rows[:, ~ready]
        # The ring says their rows: those that go are before the first from now on.
        places = np.full(len(ready), -1)
        places[~ready] = np.arange(np.count_nonzero(~ready))
        own = self._out[:, 4] - self._first_row
        known = (own >= 0) & (own < len(ready))
        self._first_row += len(ready)
        self._out[known, 4] = self._first_row + places[own[known]]
        self._out[~known, 4] = -1
        return self._batch(np.ascontiguousarray(rows[:, ready]), gone)

    def _pass(self, gone: slice) -> dict[str, pa.Array]:
        """Texts of the first rows, which leave."""
        texts = {name: each[gone] for name, each in self._texts.items()}
        self._texts = {name: each[gone.stop :] for name, each in self._texts.items()}
        return texts

    def _texts_of(self, which: np.ndarray) -> dict[str, pa.Array]:
        return {name: each.take(pa.array(which)) for name, each in self._texts.items()}

    def _batch(self, rows: np.ndarray, texts: dict[str, pa.Array]) -> pa.RecordBatch:
        for name, source in SINCE_ARRIVAL.items():
            at = rows[PLACE[source]]
            rows[PLACE[name]] = np.where(at == NONE, NONE, at - rows[PLACE["arrived_ns"]])
        columns = {
            name: nullable(rows[place]) for name, place in PLACE.items() if name not in texts
        }
        columns |= texts
        columns["salted"] = columns["salted"].cast(pa.bool_())
        columns["reason"] = pa.array([*self._reasons], pa.string()).take(columns["reason"])
        return pa.RecordBatch.from_arrays([columns[name] for name in KINDS], schema=SCHEMA)


def _told(
    batch: pa.RecordBatch | None, first: str, second: str = ""
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ``fold`` is told of steps; the numbers in all lists of one field, and in those of another."""
    none = np.zeros(0, np.int64)
    none.flags.writeable = False
    if batch is None:
        return np.zeros((8, 0), np.int64), none, none
    told = np.zeros((8, batch.num_rows), np.int64)
    for place, name in ((NUMBER, "number"), (PROCESS, "process"), (STEP, "step"), (NS, "at_ns")):
        told[place] = numbers(batch, name)
    offsets, flat = parts(batch[first])
    told[BEGIN], told[END] = offsets[:-1], offsets[1:]
    if not second:
        return told, flat, none
    offsets, other = parts(batch[second])
    told[BEGIN_TOKENS], told[END_TOKENS] = offsets[:-1], offsets[1:]
    return told, flat, other
