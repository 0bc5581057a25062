"""Checks of the exercises about blocks, tables and hashes. They need no torch."""

from __future__ import annotations

import random
from typing import Any

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    PrefixLookedUp,
    RequestArrived,
    RequestFreed,
    SlotsAllocated,
)
from vllm_trace.learn import book as books
from vllm_trace.learn import runs
from vllm_trace.learn.exercises.grader import Check, Desk, require
from vllm_trace.trace import read_trace

# Exercise 1 --------------------------------------------------------------------------------


def _deep_dive(module: Any, desk: Desk) -> None:
    manager = module.SimpleBlockManager(num_blocks=10, block_size=16)
    first = manager.allocate(seq_id=1, num_blocks=3)
    require(isinstance(first, list) and len(first) == 3, f"allocate(1, 3) returned {first!r}")
    second = list(manager.allocate(seq_id=2, num_blocks=2))
    first = list(first)
    manager.free(seq_id=1)
    third = manager.allocate(seq_id=3, num_blocks=3)
    require(
        list(third) == first,
        f"sequence 1 had {first} and was freed, sequence 3 got {third}: freed blocks were not reused",
        "Put freed blocks where allocate takes them from, and in their order.",
    )
    require(not set(second) & set(third), f"{third} and {second} have a block in common")


def _tables(module: Any, desk: Desk) -> None:
    manager = module.SimpleBlockManager(num_blocks=10, block_size=16)
    one = list(manager.allocate(1, 2))
    manager.allocate(2, 1)
    one += list(manager.allocate(1, 1))
    table = manager.get_block_table(1)
    require(
        list(table) == one,
        f"sequence 1 was given {one[:2]} and then {one[2:]}, its table is {table}",
        "A table grows at its end.",
    )
    table.append(99)
    require(
        manager.get_block_table(1) == one,
        "a caller changed the list that get_block_table returned, and the table changed with it",
        "Return a copy.",
    )


def _too_few(module: Any, desk: Desk) -> None:
    manager = module.SimpleBlockManager(num_blocks=4, block_size=16)
    manager.allocate(1, 3)
    try:
        got = manager.allocate(2, 2)
    except MemoryError:
        pass
    else:
        require(False, f"1 block was free, allocate(2, 2) returned {got!r}", "Raise MemoryError.")
    free = manager.get_num_free_blocks()
    require(
        free == 1,
        f"1 block was free before allocate failed, {free} after it",
        "All or none: look whether there are enough before you take the first.",
    )


def _conserved(module: Any, desk: Desk) -> None:
    rng = random.Random(desk.seed)
    manager = module.SimpleBlockManager(num_blocks=40, block_size=16)
    held: dict[int, list[int]] = {}
    for turn in range(400):
        free = 40 - sum(map(len, held.values()))
        if held and rng.random() < 0.4:
            manager.free(held_id := rng.choice(list(held)))
            del held[held_id]
        elif free:
            seq = rng.randrange(12)
            held.setdefault(seq, []).extend(
                manager.allocate(seq, rng.randrange(1, min(5, free) + 1))
            )
        used = [block for table in held.values() for block in table]
        twice = sorted({block for block in used if used.count(block) > 1})
        require(not twice, f"after {turn + 1} calls two sequences hold block {twice[:1]}")
        require(set(used) <= set(range(40)), f"there is no block {set(used) - set(range(40))}")
        count = manager.get_num_free_blocks()
        require(
            count + len(used) == 40,
            f"after {turn + 1} calls: free {count} + used {len(used)} != total 40",
        )


def _like_vllm(module: Any, desk: Desk) -> None:
    trace = read_trace(runs.shipped("batch"))
    events = list(trace.records())
    made = books.read(trace)
    manager = module.SimpleBlockManager(made.config.num_blocks - 1, made.block_size)
    differs = ""
    for record in events:
        event = record.event
        if isinstance(event, SlotsAllocated) and event.blocks[0]:
            mine = manager.allocate(event.request, len(event.blocks[0]))
            ours = [block + 1 for block in mine]
            free = manager.get_num_free_blocks()
            require(
                free == event.num_free_blocks,
                f"event {record.number}: vLLM has {event.num_free_blocks} free blocks, you have {free}",
            )
            if not differs and ours != event.blocks[0]:
                differs = f"event {record.number}: you gave {ours}, vLLM gave {event.blocks[0]}"
        elif isinstance(event, RequestFreed):
            manager.free(event.request)
    left = made.config.num_blocks - 1 - manager.get_num_free_blocks()
    require(left == 0, f"at the end {left} blocks are still in use")
    if differs:
        desk.note(
            f"The counts are vLLM's. The ids need not be: {differs} (yours count from 1 here). vLLM takes "
            f"blocks back tail first and reuses those without a hash before the others."
        )


# Exercise 4 --------------------------------------------------------------------------------


def _by_hand(module: Any, desk: Desk) -> None:
    got = module.slot_of([7, 2], 5, 4)
    require(
        got == 9,
        f"position 5, blocks of 4, table [7, 2]: {got!r}, and it should be 9",
        "Position 5 is place 1 of logical block 1, which is physical block 2.",
    )
    for position, slot in ((0, 28), (3, 31), (4, 8), (7, 11)):
        got = module.slot_of([7, 2], position, 4)
        require(got == slot, f"position {position}, blocks of 4, table [7, 2]: {got!r}, not {slot}")


def _flat(module: Any, desk: Desk) -> None:
    rows = [([7, 2], 5, 1), ([1, 3], 2, 4), ([4], 0, 2)]
    wanted = [9, 6, 7, 12, 13, 16, 17]
    got = module.slots_of_step(rows, 4)
    require(list(got) == wanted, f"{rows}, blocks of 4: {got}, and it should be {wanted}")
    got = module.slots_of_step(rows, 4, 10)
    require(
        list(got) == [*wanted, -1, -1, -1],
        f"padded to 10: {got}",
        "Padding comes at the end; its slot is -1, so that nothing is written.",
    )


def _slots_of_vllm(module: Any, desk: Desk) -> None:
    for scenario in ("chunked", "prefix", "preempt"):
        made = books.read(read_trace(runs.shipped(scenario)))
        for step in made.steps:
            if step.mapped is None:
                continue
            rows = [
                (step.tables[r], length - query, query)
                for r, query, length in zip(
                    step.mapped.requests, step.mapped.query_lens, step.mapped.seq_lens
                )
            ]
            got = list(module.slots_of_step(rows, made.block_size, len(step.mapped.slots)))
            if got != step.mapped.slots:
                at = next(i for i, (a, b) in enumerate(zip(got, step.mapped.slots)) if a != b)
                require(
                    False,
                    f"trace {scenario}, step {step.number}, token {at}: you say slot {got[at]}, the "
                    f"kernel got {step.mapped.slots[at]}",
                )


# Exercise 5 --------------------------------------------------------------------------------


def _chain(module: Any, desk: Desk) -> None:
    tokens = [1, 2, 3, 4, 1, 2, 3, 4, 9]
    got = list(module.block_hashes(tokens, 4))
    require(len(got) == 2, f"9 tokens are 2 full blocks of 4; there are {len(got)} hashes",
            "Only full blocks have one.")  # fmt: skip
    require(got[0] != got[1], "two blocks with the same tokens have the same hash",
            "What came before belongs to it: hash the parent's hash with the tokens.")  # fmt: skip
    again = list(module.block_hashes([1, 2, 3, 4, 7, 7, 7, 7], 4))
    require(again[0] == got[0], "the same first block has another hash in another prompt")
    require(again[1] != got[1], "another second block has the same hash")
    other = list(module.block_hashes([5, 2, 3, 4, 1, 2, 3, 4], 4))
    require(other[1] != got[1], "after another first block the second one has the same hash")
    salted = list(module.block_hashes(tokens, 4, "tenant"))
    require(not set(salted) & set(got), "with another salt a hash is the same")
    require(list(module.block_hashes([1, 2], 4)) == [], "2 tokens have a hash, with blocks of 4")


def _hit(module: Any, desk: Desk) -> None:
    hashes = ["a", "b", "c", "d"]
    cases = [
        ({"a", "b"}, 18, 8, "two of four are cached"),
        ({"b", "c"}, 18, 0, "the first is not cached, so nothing is"),
        ({"a", "c"}, 18, 4, "behind the first miss everything is computed"),
        (
            {"a", "b", "c", "d"},
            16,
            12,
            "the whole prompt is cached: its last block is computed anyway",
        ),
        ({"a", "b", "c", "d"}, 17, 16, "all full blocks are cached, one token is left"),
        (set(), 18, 0, "nothing is cached"),
    ]
    for cached, length, wanted, why in cases:
        got = module.num_hit_tokens(hashes, cached, length, 4)
        require(
            got == wanted,
            f"hashes {hashes}, cached {sorted(cached)}, {length} tokens, blocks of 4: {got!r}, and it "
            f"should be {wanted}",
            why,
        )


def _hits_of_vllm(module: Any, desk: Desk) -> None:
    for scenario in ("evict", "boundary", "mixed"):
        trace = read_trace(runs.shipped(scenario))
        made = books.read(read_trace(runs.shipped(scenario)))
        hashes: dict[int, list[int]] = {}
        under: dict[int, list[int]] = {}
        for record in trace.records():
            event = record.event
            if isinstance(event, RequestArrived):
                hashes[event.request] = list(event.block_hashes)
            elif isinstance(event, BlocksCached):
                for block, block_hash in zip(event.blocks, event.hashes):
                    under.setdefault(block, []).append(block_hash)
            elif isinstance(event, BlockEvicted):
                under.pop(event.block, None)
            elif isinstance(event, PrefixLookedUp):
                hashes[event.request] += event.new_hashes
                cached = {one for row in under.values() for one in row}
                got = module.num_hit_tokens(
                    hashes[event.request], cached, event.num_tokens, made.block_size
                )
                require(
                    got == event.num_hit_tokens,
                    f"trace {scenario}, event {record.number}: a request of {event.num_tokens} tokens "
                    f"hit {event.num_hit_tokens} in vLLM, and {got} with you",
                )


# Exercise 6 --------------------------------------------------------------------------------


class _Memory:
    """Carries out what a manager decides, and knows what each sequence must read."""

    def __init__(self, manager: Any, num_blocks: int, block_size: int) -> None:
        self.manager, self.num_blocks, self.size = manager, num_blocks, block_size
        self.cells: dict[int, int] = {}
        self.wanted: dict[int, list[int]] = {}
        self.next = 0

    def allocate(self, seq: int, count: int) -> None:
        self.manager.allocate(seq, count)
        self.wanted[seq] = []
        for _ in range(count):
            self._write(seq)

    def fork(self, parent: int, child: int) -> None:
        self.manager.fork(parent, child)
        self.wanted[child] = list(self.wanted[parent])

    def append(self, seq: int) -> list[tuple[int, int]]:
        copies = [(int(a), int(b)) for a, b in self.manager.append(seq)]
        for source, target in copies:
            for place in range(self.size):
                self.cells[target * self.size + place] = self.cells.get(
                    source * self.size + place, -1
                )
        self._write(seq)
        return copies

    def free(self, seq: int) -> None:
        self.manager.free(seq)
        del self.wanted[seq]

    def _write(self, seq: int) -> None:
        position = len(self.wanted[seq])
        table = self.manager.get_block_table(seq)
        require(
            position // self.size < len(table),
            f"sequence {seq} writes position {position}, its table {table} has no block for it",
        )
        block = table[position // self.size]
        require(0 <= block < self.num_blocks, f"the table of {seq} has block {block}")
        self.next += 1
        self.cells[block * self.size + position % self.size] = self.next
        self.wanted[seq].append(self.next)

    def look(self, what: str) -> None:
        used = set()
        for seq, wanted in self.wanted.items():
            table = self.manager.get_block_table(seq)
            used |= set(table)
            for position, value in enumerate(wanted):
                slot = table[position // self.size] * self.size + position % self.size
                require(
                    self.cells.get(slot) == value,
                    f"{what}: sequence {seq} does not read its own token at position {position} any more",
                    "Somebody wrote into a block that it shares: copy first, then write.",
                )
        free = self.manager.get_num_free_blocks()
        require(
            free + len(used) == self.num_blocks,
            f"{what}: {free} free + {len(used)} in tables != {self.num_blocks}",
            "A block is free when the last table lets go of it, and not before.",
        )


def _fork(module: Any, desk: Desk) -> None:
    memory = _Memory(module.ForkingBlockManager(8, 4), 8, 4)
    memory.allocate(1, 6)
    memory.fork(1, 2)
    same = memory.manager.get_block_table(1) == memory.manager.get_block_table(2)
    require(same, "after fork the tables differ")
    free = memory.manager.get_num_free_blocks()
    require(
        free == 6, f"6 tokens in blocks of 4, then a fork: {free} free of 8", "A fork takes none."
    )
    copies = memory.append(2)
    require(len(copies) == 1, f"the child wrote into the shared last block, with copies {copies}",
            "The block is shared: one copy.")  # fmt: skip
    memory.look("after the child's token")
    copies = memory.append(1)
    require(not copies, f"the parent is alone with its last block now, and made copies {copies}",
            "Who is alone writes in place.")  # fmt: skip
    memory.look("after the parent's token")


def _full(module: Any, desk: Desk) -> None:
    memory = _Memory(module.ForkingBlockManager(4, 4), 4, 4)
    memory.allocate(1, 8)
    memory.fork(1, 2)
    copies = memory.append(1)
    require(not copies, f"the last block was full, and there were copies {copies}",
            "A full block is only read: take a new one.")  # fmt: skip
    memory.append(2)
    memory.look("after both got a new block")
    memory.free(1)
    memory.look("after the parent was freed")
    memory.append(2)
    memory.fork(2, 3)
    before = memory.manager.get_block_table(3)
    try:
        memory.append(3)
        memory.append(2)
        memory.fork(3, 4)
        memory.append(4)
        memory.look("with the pool full")
    except MemoryError:
        require(
            memory.manager.get_block_table(3)[:2] == before[:2], "a failed append changed a table"
        )


def _random_forks(module: Any, desk: Desk) -> None:
    rng = random.Random(desk.seed)
    memory = _Memory(module.ForkingBlockManager(30, 4), 30, 4)
    number = 0
    for turn in range(300):
        what, alive = rng.random(), list(memory.wanted)
        try:
            if not alive or what < 0.15:
                number += 1
                memory.allocate(number, rng.randrange(1, 9))
            elif what < 0.3:
                number += 1
                memory.fork(rng.choice(alive), number)
            elif what < 0.45:
                memory.free(rng.choice(alive))
            else:
                memory.append(rng.choice(alive))
        except MemoryError:
            need = memory.manager.get_num_free_blocks()
            require(need < 2, f"after {turn + 1} calls: MemoryError with {need} blocks free")
            memory.free(rng.choice(alive))
        memory.look(f"after {turn + 1} calls")


CHECKS: dict[str, list[Check]] = {
    "ex1": [
        ("the deep dive's assertion: freed blocks are reused", _deep_dive),
        ("tables grow and are the manager's own", _tables),
        ("all or none", _too_few),
        ("no block is lost and none given twice, 400 random calls", _conserved),
        ("as many free blocks as a real BlockPool, call by call", _like_vllm),
    ],
    "ex4": [
        ("one position, by hand", _by_hand),
        ("a flattened batch, by hand", _flat),
        ("the slots that real kernels received", _slots_of_vllm),
    ],
    "ex5": [
        ("hashes are chained", _chain),
        ("hits, by hand", _hit),
        ("the hits of a real prefix cache", _hits_of_vllm),
    ],
    "ex6": [
        ("a fork copies nothing, a write copies once", _fork),
        ("full blocks are never copied; a full pool", _full),
        ("300 random calls", _random_forks),
    ],
}
