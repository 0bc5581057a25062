"""The part of a summary that compares workers with the manager: did kernels receive what it gave?"""

from __future__ import annotations

from collections.abc import Callable

from vllm_trace.events import SlotsMapped, TableRowChanged
from vllm_trace.state import NULL_BLOCK
from vllm_trace.summary.kernels import IN_FLIGHT
from vllm_trace.summary.model import WorkerCheck


class WorkerReading:
    """Compares tables and slots as the kernels received them with the manager's plan of the same step."""

    def __init__(self, check: WorkerCheck, name_of: Callable[[int], str]) -> None:
        self.check, self.name_of = check, name_of
        self.rows: dict[tuple[int, int, int], list[int]] = {}
        """(process, group, request) → the worker's table."""
        self.plans: dict[int, dict[int, list[list[int]]]] = {}
        """Step → request → the manager's table when the step was planned."""

    def plan(self, step: int, tables: dict[int, list[list[int]]]) -> None:
        """The manager's side of a step."""
        self.plans[step] = tables
        for old in [number for number in self.plans if number < step - IN_FLIGHT]:
            del self.plans[old]

    def row_changed(self, process: int, event: TableRowChanged) -> None:
        row = self.rows.setdefault((process, event.group, event.request), [])
        row[event.first :] = event.blocks

    def mapped(self, process: int, event: SlotsMapped) -> None:
        check = self.check
        plan = self.plans.get(event.step)
        if plan is None:
            check.num_unplanned += len(event.requests)
            return
        cursor = 0
        for request, query, length in zip(
            event.requests, event.query_lens, event.seq_lens, strict=True
        ):
            slots = event.slots[cursor : cursor + query]
            cursor += query
            check.num_rows += 1
            check.num_slots += len(slots)
            if check.first_difference:
                continue
            if request not in plan:
                said = "the worker ran it, the scheduler did not plan it"
            else:
                table = plan[request]
                mine = table[event.group] if len(table) > event.group else []
                row = self.rows.get((process, event.group, request), [])
                said = _difference(event, mine, row, range(length - query, length), slots)
            if said:
                who = f"step {event.step}, request {self.name_of(request)}"
                check.first_difference = f"{who}: {said}"


def _difference(
    event: SlotsMapped, mine: list[int], row: list[int], positions: range, slots: list[int]
) -> str:
    """How a worker's row and slots differ from the manager's table ``mine``; empty when they do not."""
    size = event.block_size
    ratio = size // event.kernel_block_size
    num_blocks = -(-positions.stop // size)
    theirs = [block // ratio for block in row[: num_blocks * ratio : ratio]]
    # Where a sliding window has passed the manager has the null block; a worker keeps what
    # it was told, and does not read it.
    if len(theirs) > len(mine) or any(
        block != other != NULL_BLOCK for block, other in zip(theirs, mine, strict=False)
    ):
        return f"the worker's table is {theirs}, the manager's {mine[: len(theirs)]}"
    for position, slot in zip(positions, slots, strict=True):
        block, offset = divmod(position, size)
        expected = mine[block] * size + offset if block < len(mine) else -1
        if slot != expected:
            return f"position {position} was written to slot {slot}, not {expected}"
    return ""
