"""Rules of the pool: every block is free or held, and counted right."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    PrefixLookedUp,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsMapped,
    SlotsRefused,
    StepScheduled,
)
from vllm_trace.invariants.books import NULL_BLOCK, Books
from vllm_trace.invariants.registry import Violation, invariant
from vllm_trace.invariants.words import listed, many


@invariant(
    "blocks-conserved",
    "Free blocks, used blocks and the null block add up to the pool.",
    needs=("full",),
    releases=">=0.11",
    doc="Compares each free count that vLLM states with the references that its events add up to.",
    mutation="a block whose last reference is given back does not get into the free queue",
    built_in=True,
)
class BlocksConserved:
    def slots_allocated(self, books: Books, event: SlotsAllocated) -> Violation | None:
        if event.num_free_blocks + len(books.ref_cnts) + 1 != books.num_blocks:
            return self._unequal(books, event.num_free_blocks, books.step + 1)
        return None

    def slots_refused(self, books: Books, event: SlotsRefused) -> Violation | None:
        if event.num_free_blocks + len(books.ref_cnts) + 1 != books.num_blocks:
            return self._unequal(books, event.num_free_blocks, books.step + 1)
        return None

    def request_preempted(self, books: Books, event: RequestPreempted) -> Violation | None:
        if event.num_free_blocks + len(books.ref_cnts) + 1 != books.num_blocks:
            return self._unequal(books, event.num_free_blocks, books.step + 1)
        return None

    def step_scheduled(self, books: Books, event: StepScheduled) -> Violation | None:
        if event.num_free_blocks + len(books.ref_cnts) + 1 != books.num_blocks:
            return self._unequal(books, event.num_free_blocks, event.step)
        return None

    def _unequal(self, books: Books, free: int, step: int) -> Violation:
        return books.violation(
            f"free {free} + used {books.num_used} + null 1 != total {books.num_blocks} "
            f"at step {step}, after {books.last_pool_event}",
            step=step,
        )


@invariant(
    "single-owner",
    "No block has two owners without a reference count that says so.",
    needs=("full", "known-groups"),
    releases=">=0.11",
    doc="A block is handed out only when nobody holds it, and stands in no more places of tables"
    " than it counts references.",
    mutation="hit blocks are put into a table without being touched",
    built_in=True,
)
class SingleOwner:
    def before_blocks_taken(self, books: Books, event: BlocksTaken) -> Violation | None:
        blocks = event.blocks
        if len(blocks) == 1 and blocks[0] not in books.ref_cnts:
            return None
        if books.ref_cnts.keys().isdisjoint(blocks):
            return None
        block = next(b for b in event.blocks if b in books.ref_cnts)
        owners = books.holders(block)
        who = listed(map(books.name, owners)) or "nobody's table has it"
        return books.violation(
            f"block {block} is handed out although it counts "
            f"{many(books.ref_cnts[block], 'reference')}: {who}",
            block=block,
            requests=owners,
        )

    def slots_allocated(self, books: Books, event: SlotsAllocated) -> Violation | None:
        held, refs = books.held, books.ref_cnts
        for rows in (event.hit_blocks, event.blocks):
            for row in rows:
                for block in row:
                    if held.get(block, 0) > refs.get(block, 0):
                        return self._too_many(books, event, block)
        return None

    def _too_many(self, books: Books, event: SlotsAllocated, block: int) -> Violation:
        owners = books.holders(block)
        return books.violation(
            f"block {block} is in the table of {listed(map(books.name, owners))} "
            f"({many(books.held[block], 'place')}), and counts "
            f"{many(books.ref_cnts.get(block, 0), 'reference')}",
            request=event.request,
            block=block,
            requests=[owner for owner in owners if owner != event.request],
        )


@invariant(
    "ref-counts",
    "A block's reference count is the number of tables that hold it.",
    needs=("full", "known-groups"),
    releases=">=0.11",
    doc="Each count that vLLM states after a touch or a free is one more or less than before; at"
    " the end of a schedule every block counts as many references as tables hold it.",
    mutation="touch passes over a block",
    built_in=True,
)
class RefCounts:
    def before_blocks_touched(self, books: Books, event: BlocksTouched) -> Violation | None:
        return self._counts(books, event, 1, "touched")

    def before_blocks_freed(self, books: Books, event: BlocksFreed) -> Violation | None:
        return self._counts(books, event, -1, "freed")

    def _counts(self, books: Books, event: Any, sign: int, what: str) -> Violation | None:
        refs = books.ref_cnts
        for block, count in zip(event.blocks, event.ref_cnts):
            if count != refs.get(block, 0) + sign and block != NULL_BLOCK:
                expected = refs.get(block, 0) + sign * [*event.blocks].count(block)
                if count != expected:
                    return books.violation(
                        f"block {block} counts {many(count, 'reference')} after being {what}; "
                        f"it counted {refs.get(block, 0)} before",
                        block=block,
                        requests=books.holders(block),
                    )
        return None

    def step_scheduled(self, books: Books, event: StepScheduled) -> Violation | None:
        if not books.unbalanced:
            return None
        block = min(books.unbalanced)
        owners = books.holders(block)
        return books.violation(
            f"block {block} counts {many(books.ref_cnts.get(block, 0), 'reference')} and is in "
            f"{many(books.held.get(block, 0), 'place')} of tables ({listed(map(books.name, owners)) or 'nobody'}); "
            f"it was {_handed_out(books, block)}",
            block=block,
            requests=owners,
        )


def _handed_out(books: Books, block: int) -> str:
    if block not in books.taken_at:
        return "never handed out"
    number, step = books.taken_at[block]
    return f"handed out at event {number} (step {step})"


@invariant(
    "freed-once",
    "A block is given back as often as it was taken, and not once more.",
    needs=("full",),
    releases=">=0.11",
    doc="A free of a block that counts no reference is a double free.",
    mutation="a request's block is given back twice",
    built_in=True,
)
class FreedOnce:
    def before_blocks_freed(self, books: Books, event: BlocksFreed) -> Violation | None:
        refs = books.ref_cnts
        if len(set(event.blocks)) == len(event.blocks) and refs.keys() >= set(event.blocks):
            return None
        for block, times in Counter(event.blocks).items():
            if block != NULL_BLOCK and times > refs.get(block, 0):
                return books.violation(
                    f"block {block} is given back {many(times, 'time')} and counted "
                    f"{many(refs.get(block, 0), 'reference')}",
                    block=block,
                    requests=books.holders(block),
                )
        return None


@invariant(
    "freed-tail-first",
    "A request's blocks are given back from the tail of its table to the head.",
    needs=("full", "known-groups"),
    releases=">=0.11,<0.34",
    doc="The end of a prefix is then evicted before its beginning. Per KV-cache group.",
    mutation="free gives the blocks back from the head",
    built_in=True,
)
class FreedTailFirst:
    def before_request_freed(self, books: Books, event: RequestFreed) -> Violation | None:
        freed = [block for _, each in books.freed for block in each.blocks if block]
        table = books.tables.get(event.request, ())
        wanted = [block for row in table for block in reversed(row) if block]
        if freed == wanted or sorted(freed) != sorted(wanted):
            return None  # a block too many or too few is another rule's
        number, first = books.freed[0]
        block = next(one for one, other in zip(freed, wanted) if one != other)
        return books.violation(
            f"{books.name(event.request)} gave back {listed(first.blocks)}; its table ends with "
            f"{listed([*reversed(wanted)][-8:])}, so {listed(wanted)} was expected",
            request=event.request,
            block=block,
            number=number,
        )


@invariant(
    "nothing-held",
    "Nothing is held after finish, abort or preemption.",
    needs=("full", "known-groups"),
    releases=">=0.11",
    doc="Names the holder, its blocks and their age. Frees that a KV connector puts off look like"
    " leaks: connectors are not recorded.",
    mutation="free forgets a block; an abort does not free",
    built_in=True,
)
class NothingHeld:
    def before_request_freed(self, books: Books, event: RequestFreed) -> Violation | None:
        table = books.tables.get(event.request)
        if not table:
            return None
        freed = {block for _, each in books.freed for block in each.blocks}
        kept = [block for row in table for block in row if block and block not in freed]
        return self._leak(books, event.request, kept, "was freed and") if kept else None

    def before_request_finished(self, books: Books, event: RequestFinished) -> Violation | None:
        if event.request not in books.tables:
            return None
        return self._still(books, event.request, f"finished ({event.reason}) and")

    def before_request_preempted(self, books: Books, event: RequestPreempted) -> Violation | None:
        if event.request not in books.tables:
            return None
        return self._still(books, event.request, "was preempted and")

    def end(self, books: Books) -> Violation | None:
        if books.computed or not books.ref_cnts:
            return None
        return self._leak(books, None, sorted(books.ref_cnts), "nobody is left, and the pool")

    def _still(self, books: Books, request: int, what: str) -> Violation | None:
        held = [block for row in books.tables[request] for block in row if block]
        return self._leak(books, request, held, what) if held else None

    def _leak(self, books: Books, request: int | None, blocks: list[int], what: str) -> Violation:
        number, step = books.taken_at.get(blocks[0], (0, 0))
        age = max(0, books.now - step)
        who = what if request is None else f"{books.name(request)} {what}"
        return books.violation(
            f"{who} still holds {'block' if len(blocks) == 1 else 'blocks'} {listed(blocks)}: "
            f"block {blocks[0]} was handed out at event {number}, {many(age, 'step')} ago",
            request=request,
            block=blocks[0],
            blocks=blocks[1:8],
        )


@invariant(
    "null-block",
    "The null block is never handed out, cached, hit or written.",
    needs=("full",),
    releases=">=0.11",
    doc="Block 0 stands in tables where a sliding window has passed, and nowhere else.",
    mutation="the pool hands block 0 out",
    built_in=True,
)
class NullBlock:
    def before_blocks_taken(self, books: Books, event: BlocksTaken) -> Violation | None:
        return self._is_null(books, "handed out") if NULL_BLOCK in event.blocks else None

    def before_blocks_cached(self, books: Books, event: BlocksCached) -> Violation | None:
        if NULL_BLOCK in event.blocks:
            return self._is_null(books, "given a hash", event.request)
        return None

    def before_block_evicted(self, books: Books, event: BlockEvicted) -> Violation | None:
        return self._is_null(books, "evicted") if event.block == NULL_BLOCK else None

    def before_prefix_looked_up(self, books: Books, event: PrefixLookedUp) -> Violation | None:
        for group, row in enumerate(event.blocks):
            if NULL_BLOCK in row and group not in books.windowed and not books.unknown_kinds:
                return self._is_null(books, "hit", event.request)
        return None

    def before_slots_allocated(self, books: Books, event: SlotsAllocated) -> Violation | None:
        for row in event.blocks:
            if NULL_BLOCK in row and not books.unknown_kinds:
                return self._is_null(books, "given", event.request)
        return None

    def slots_mapped(self, books: Books, event: SlotsMapped) -> Violation | None:
        slots, size = event.slots, event.block_size
        if not slots or min(slots) >= size:
            return None
        cursor = 0
        for request, query in zip(event.requests, event.query_lens):
            for slot in slots[cursor : cursor + query]:
                if 0 <= slot < size:
                    return self._is_null(books, f"written (slot {slot})", request, event.step)
            cursor += query
        return None

    def _is_null(
        self, books: Books, what: str, request: int | None = None, step: int | None = None
    ) -> Violation:
        whose = "" if request is None else f" for {books.name(request)}"
        return books.violation(
            f"the null block is {what}{whose}", request=request, block=NULL_BLOCK, step=step
        )
