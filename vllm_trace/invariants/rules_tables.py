"""Rules of block tables: the manager's, and what the kernels of each worker received."""

from __future__ import annotations

from itertools import repeat
from operator import gt
from typing import Any

from vllm_trace.events import SlotsAllocated, SlotsMapped, StepScheduled, TableRowChanged
from vllm_trace.invariants.books import NULL_BLOCK, Books
from vllm_trace.invariants.registry import Violation, invariant
from vllm_trace.invariants.words import listed, many


@invariant(
    "table-covers",
    "A request's table covers exactly the tokens that it has KV for.",
    needs=("full", "known-groups"),
    releases=">=0.11",
    doc="After a schedule there is room for the step's tokens, and no block more than they and the"
    " lookahead need. In every group.",
    mutation="allocate_slots takes one block less, or one more",
    built_in=True,
)
class TableCovers:
    def step_scheduled(self, books: Books, event: StepScheduled) -> Violation | None:
        plan = books.plans.get(event.step)
        if plan is None:
            return None
        if any(map(gt, plan.end_list, map(books.capacity.get, plan.requests, repeat(0)))):
            for request, end in plan.ends.items():
                if end > books.capacity.get(request, 0):
                    return self._wrong(books, event, request, end, "too few")
        for request in () if books.speculates else plan.grown:
            if request in plan.ends and request in books.tables:
                end = plan.ends[request]
                wanted = min(end + books.num_lookahead, books.max_model_len)
                for row, size in zip(books.tables[request], books.block_sizes):
                    if len(row) > -(-wanted // size):
                        return self._wrong(books, event, request, end, "too many")
        return None

    def _wrong(
        self, books: Books, event: StepScheduled, request: int, end: int, what: str
    ) -> Violation:
        table = books.tables.get(request, [])
        sizes = ", ".join(
            f"{many(len(row), 'block')} of {size}" for row, size in zip(table, books.block_sizes)
        )
        return books.violation(
            f"{books.name(request)} has KV for {end} tokens after step {event.step} and "
            f"{sizes or 'no table'}: {what}",
            request=request,
            block=table[0][-1] if table and table[0] else None,
        )


@invariant(
    "tables-grow",
    "While a request runs, its table only grows at the end.",
    needs=("full", "known-groups"),
    releases=">=0.11",
    doc="A place in a table keeps its block from admission to free; where a sliding window passes,"
    " it becomes null.",
    mutation="a worker writes new blocks over the last one of a row",
    built_in=True,
)
class TablesGrow:
    def before_slots_allocated(self, books: Books, event: SlotsAllocated) -> Violation | None:
        table = books.tables.get(event.request)
        if table and any(event.hit_blocks) and any(table):
            return books.violation(
                f"{books.name(event.request)} runs with {many(len(table[0]), 'block')}, and gets "
                f"{listed(event.hit_blocks[0])} from the prefix cache in front",
                request=event.request,
            )
        return None

    def before_table_changed(self, books: Books, event: TableRowChanged) -> Violation | None:
        rows = books.rows_of(event.group)
        row = rows.rows.get(event.request)
        if not row or event.first >= len(row):
            return None
        plan = books.plans.get(event.step)
        life = books.planned_table(plan, event.request) if plan is not None else None
        if life is None or life is not rows.lives.get(event.request):
            return None  # preempted since: what it has now is another table
        if not event.blocks and books.speculates:
            return None
        for place, old in enumerate(row[event.first :]):
            new = event.blocks[place] if place < len(event.blocks) else None
            passed = event.group in books.windowed and NULL_BLOCK in (old, new)
            if new != old and not passed:
                where = event.first + place
                now = "nothing" if new is None else f"block {new}"
                return books.violation(
                    f"{books.name(event.request)}'s row had block {old} at position {where}, and has "
                    f"{now} there in step {event.step} (group {event.group})",
                    request=event.request,
                    block=old if new is None else new,
                )
        return None


@invariant(
    "worker-table",
    "A worker's table is the manager's table of the step that it executes.",
    needs=("full", "worker", "known-groups"),
    releases=">=0.11",
    doc="Compared by step number, so steps in flight are compared with what was planned for them;"
    " each worker by itself; kernel blocks with the part of the manager's block that they are.",
    mutation="two requests' rows are swapped in a worker",
    built_in=True,
)
class WorkerTable:
    def slots_mapped(self, books: Books, event: SlotsMapped) -> Violation | None:
        rows = books.rows_of(event.group)
        plan = books.plans.get(event.step)
        if plan is None or not (rows.fresh or plan.grown):
            return None
        for place, request in enumerate(event.requests):
            if request in rows.fresh or request in plan.grown:
                found = self._compare(books, event, plan, rows.rows.get(request, []), place)
                if found is not None:
                    return found
        return None

    def _compare(
        self, books: Books, event: SlotsMapped, plan: Any, row: list[int], place: int
    ) -> Violation | None:
        request, length = event.requests[place], event.seq_lens[place]
        table = books.planned_table(plan, request)
        if table is None:
            return None  # not planned: another rule's
        mine = table[event.group]
        ratio = max(1, event.block_size // event.kernel_block_size)
        if ratio > 1:
            mine = [
                block * ratio + part if block else NULL_BLOCK
                for block in mine
                for part in range(ratio)
            ]
        needed = -(-length // event.kernel_block_size)
        theirs = row[:needed]
        if theirs == mine[:needed]:
            return None
        windowed = event.group in books.windowed
        for index in range(needed):
            got = theirs[index] if index < len(theirs) else None
            own = mine[index] if index < len(mine) else None
            if got != own and not (windowed and own == NULL_BLOCK):
                if (
                    windowed
                    and got == NULL_BLOCK
                    and (index + 1) * event.kernel_block_size < length
                ):
                    continue  # a worker may null what the window has passed before the manager does
                block = own // ratio if own is not None else None
                return books.violation(
                    f"position {index} of {books.name(request)}'s row is "
                    f"{'missing' if got is None else got} in the worker and "
                    f"{'missing' if own is None else own} in the manager's table for step {event.step} "
                    f"(group {event.group})",
                    request=request,
                    block=block,
                    blocks=() if got is None else (got // ratio,),
                    step=event.step,
                )
        return None


@invariant(
    "slot-mapping",
    "slot = table[pos // bs] * bs + pos % bs, for every token of every step.",
    needs=("full", "worker", "known-groups"),
    releases=">=0.11",
    doc="With the table as the same kernel received it.",
    mutation="a worker shifts a slot by one",
    built_in=True,
)
class SlotMapping:
    def slots_mapped(self, books: Books, event: SlotsMapped) -> Violation | None:
        rows = books.rows_of(event.group).rows
        slots, size, cursor = event.slots, event.kernel_block_size, 0
        for request, query, length in zip(event.requests, event.query_lens, event.seq_lens):
            if query == 1:
                last = length - 1
                try:
                    if slots[cursor] == rows[request][last // size] * size + last % size:
                        cursor += 1
                        continue
                except LookupError:
                    pass  # said below
            found = self._check(books, event, rows.get(request, ()), request, query, length, cursor)
            if found is not None:
                return found
            cursor += query
        return None

    def _check(
        self, books: Books, event: SlotsMapped, row: Any, request: int, query: int, length: int,
        cursor: int,
    ) -> Violation | None:  # fmt: skip
        size, slots, first = event.kernel_block_size, event.slots, length - query
        wanted: list[int] = []
        for index in range(first // size, -(-length // size)):
            start, stop = max(first, index * size), min(length, (index + 1) * size)
            base = row[index] * size - index * size if index < len(row) else -1 << 40
            wanted.extend(range(base + start, base + stop))
        given = slots[cursor : cursor + query]
        if given == wanted:
            return None
        place = next((i for i, (a, b) in enumerate(zip(given, wanted)) if a != b), len(given))
        position = first + place
        block = row[position // size] if position // size < len(row) else None
        there = (
            f"{block} * {size} + {position % size} = {wanted[place]}"
            if block is not None
            else "none"
        )
        return books.violation(
            f"position {position} of {books.name(request)} goes to slot "
            f"{given[place] if place < len(given) else 'none'} in step {event.step}; by its table: {there} "
            f"(group {event.group})",
            request=request,
            block=None if block is None else block // max(1, event.block_size // size),
            step=event.step,
        )


@invariant(
    "positions-advance",
    "A step goes on where the request's last one ended, with the tokens planned for it.",
    needs=("full", "worker"),
    releases=">=0.11",
    doc="Sequence and query lengths in the worker are those of the plan; nobody planned is left out"
    " and nobody else runs.",
    mutation="a worker computes a token again",
    built_in=True,
)
class PositionsAdvance:
    def slots_mapped(self, books: Books, event: SlotsMapped) -> Violation | None:
        plan = books.plans.get(event.step)
        if plan is None:
            return None
        requests = event.requests
        if requests == plan.requests:
            if event.seq_lens == plan.end_list and event.query_lens == plan.event.num_tokens:
                return None
        elif (
            len(requests) == len(plan.requests)
            and [*map(plan.ends.get, requests)] == event.seq_lens
            and [*map(plan.counts.get, requests)] == event.query_lens
        ):
            return None
        for request, query, length in zip(requests, event.query_lens, event.seq_lens):
            end, count = plan.ends.get(request), plan.counts.get(request)
            if end is None:
                return books.violation(
                    f"{books.name(request)} runs in step {event.step} and was not planned for it",
                    request=request,
                    step=event.step,
                )
            fits = length <= end if books.speculates else length == end
            if not fits or query != count:
                return books.violation(
                    f"step {event.step} computes positions {length - query} to {length - 1} of "
                    f"{books.name(request)}; planned were {end - (count or 0)} to {end - 1}",
                    request=request,
                    step=event.step,
                )
        missing = [request for request in plan.ends if request not in requests]
        if not missing:
            return None
        return books.violation(
            f"{books.name(missing[0])} was planned for step {event.step} and does not run in it",
            request=missing[0],
            step=event.step,
        )


@invariant(
    "slots-distinct",
    "No two tokens of a step are written to one slot.",
    needs=("full", "worker"),
    releases=">=0.11",
    doc="Padding (slot -1) does not count.",
    mutation="two requests get the same row in a worker",
    built_in=True,
)
class SlotsDistinct:
    def slots_mapped(self, books: Books, event: SlotsMapped) -> Violation | None:
        slots = event.slots
        if len(set(slots)) == len(slots):
            return None
        writers: dict[int, int] = {}
        cursor = 0
        for request, query in zip(event.requests, event.query_lens):
            for slot in slots[cursor : cursor + query]:
                other = writers.setdefault(slot, request)
                if slot >= 0 and (other != request or slots.count(slot) > 1):
                    if other == request and slots[cursor : cursor + query].count(slot) == 1:
                        continue  # the second writer comes later
                    return books.violation(
                        f"{books.name(other)} and {books.name(request)} both write slot {slot} "
                        f"(block {slot // event.block_size}) in step {event.step}",
                        request=request,
                        requests=() if other == request else (other,),
                        block=slot // event.block_size,
                        step=event.step,
                    )
            cursor += query
        return None
