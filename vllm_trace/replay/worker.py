"""The tables and slots that workers' kernels must have received."""

from __future__ import annotations

from typing import Any

from vllm_trace.events import SlotsMapped, StepScheduled, TableRowChanged
from vllm_trace.replay.base import Diverged

PLANS_KEPT = 8
"""Steps that may be scheduled and not executed yet."""

Tables = dict[int, list[list[int]]]
"""Block ids by request and group, in logical order."""


class WorkerTables:
    """The tables that workers must hold, and the comparison with those that kernels received."""

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.tables: Tables = {}
        """Rows grow in place; another dictionary takes its place when somebody comes or goes."""
        self.rows: dict[tuple[int, int, int], list[int]] = {}
        """What kernels received, by process, group and request."""
        self.planned: dict[int, Tables] = {}
        """The tables that a step was planned with: it may run when others are there."""

    def admit(self, request: int, hits: Any) -> None:
        ids = [[block.block_id for block in group] for group in hits or ()]
        self.tables = self.tables | {request: ids or [[] for _ in range(self.num_groups)]}

    def grow(self, request: int, new: list[list[int]]) -> None:
        for row, ids in zip(self.tables[request], new):
            row.extend(ids)

    def forget(self, request: int) -> None:
        self.tables = self.tables.copy()
        self.tables.pop(request, None)

    def plan(self, event: StepScheduled) -> None:
        self.planned[event.step] = self.tables
        if len(self.planned) > PLANS_KEPT:
            del self.planned[next(iter(self.planned))]

    def row_changed(self, process: int, event: TableRowChanged) -> None:
        row = self.rows.setdefault((process, event.group, event.request), [])
        row[event.first :] = event.blocks

    def compare(self, process: int, event: SlotsMapped) -> None:
        """Every row and slot of a batch. Raises: ``Diverged``."""
        planned = self.planned.get(event.step)
        if planned is None:
            return
        size, ratio, group = (
            event.block_size,
            event.block_size // event.kernel_block_size,
            event.group,
        )
        cursor = 0
        for request, query, length in zip(
            event.requests, event.query_lens, event.seq_lens, strict=True
        ):
            slots = event.slots[cursor : cursor + query]
            cursor += query
            if request not in planned:
                continue
            mine = planned[request][group]
            row = self.rows.get((process, group, request), [])
            theirs = [block // ratio for block in row[::ratio]] if ratio > 1 else row
            used = -(-length // size)
            if theirs[:used] != mine[:used]:
                recorded = ("worker's table", request, theirs[:used])
                raise Diverged(recorded, ("table", request, mine[:used]), event)
            expected = [
                mine[position // size] * size + position % size
                for position in range(length - query, length)
            ]
            if slots != expected:
                raise Diverged(("slots", request, slots), ("slots", request, expected), event)
