"""The tables and slots that workers' kernels must have received."""

from __future__ import annotations

from typing import Any

from vllm_trace.events import SlotsMapped, StepScheduled, TableRowChanged
from vllm_trace.replay.facts import Fact
from vllm_trace.trace import Record


class Diverged(Exception):
    """Both sides differ: at which event, what was recorded, what ``mini`` did."""

    def __init__(self, number: int, recorded: Fact | None, mini: Fact | None) -> None:
        super().__init__(number)
        self.number, self.recorded, self.mini = number, recorded, mini


class WorkerTables:
    """The tables that workers must hold, and the comparison with those that kernels received."""

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.tables: dict[int, list[list[int]]] = {}
        self.rows: dict[tuple[int, int, int], list[int]] = {}
        self.planned: dict[int, dict[int, list[list[int]]]] = {}
        self.block_size = 0

    def admit(self, request: int, hits: Any) -> None:
        ids = [[block.block_id for block in group] for group in hits or ()]
        self.tables[request] = ids or [[] for _ in range(self.num_groups)]

    def grow(self, request: int, new: list[list[int]]) -> None:
        table = self.tables.setdefault(request, [[] for _ in range(self.num_groups)])
        for row, ids in zip(table, new, strict=False):
            row.extend(ids)

    def forget(self, request: int) -> None:
        self.tables.pop(request, None)

    def plan(self, event: StepScheduled, block_size: int) -> None:
        """Remember which tables this step was planned with: it may run when others are there."""
        self.block_size = block_size
        tables = self.tables
        self.planned[event.step] = {r: tables[r] for r in event.requests or () if r in tables}
        for old in [step for step in self.planned if step < event.step - 8]:
            del self.planned[old]

    def observe(self, record: Record) -> None:
        event = record.event
        if type(event) is TableRowChanged:
            row = self.rows.setdefault((record.process, event.group, event.request), [])
            row[event.first :] = event.blocks
        elif type(event) is SlotsMapped:
            self._compare(record, event)

    def _compare(self, record: Record, event: SlotsMapped) -> None:
        planned = self.planned.get(event.step)
        if planned is None:
            return
        size, ratio = event.block_size, event.block_size // event.kernel_block_size
        cursor = 0
        for request, query, length in zip(
            event.requests, event.query_lens, event.seq_lens, strict=True
        ):
            slots = event.slots[cursor : cursor + query]
            cursor += query
            if request not in planned:
                continue
            mine = planned[request][event.group]
            row = self.rows.get((record.process, event.group, request), [])
            theirs = [block // ratio for block in row[::ratio]] if ratio > 1 else row
            used = -(-length // size)
            if theirs[:used] != mine[:used]:
                raise Diverged(
                    record.number,
                    ("worker's table", request, theirs[:used]),
                    ("table", request, mine[:used]),
                )
            expected = [
                mine[position // size] * size + position % size
                for position in range(length - query, length)
            ]
            if slots != expected:
                raise Diverged(
                    record.number, ("slots", request, slots), ("slots", request, expected)
                )
