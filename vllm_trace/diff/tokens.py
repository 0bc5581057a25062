"""Outputs that differ, and whether the tables are to blame: ``ownership`` looks for a block that
belonged to two, a kernel's table that was not the manager's, or a hit on somebody else's hash."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_trace.diff.facts import Number, Seen, fresh_reading
from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    EngineConfigured,
    Event,
    PrefixCacheReset,
    PrefixLookedUp,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsMapped,
    StepScheduled,
    StepUpdated,
    TableRowChanged,
)
from vllm_trace.explain.queue import PLAIN_GROUPS
from vllm_trace.state import KVState
from vllm_trace.trace import Trace

KEPT_STEPS = 8
"""Planned steps that are remembered until a worker has run them."""


# Outputs --------------------------------------------------------------------------------


@dataclass
class TokenDifference:
    """The first token in which the outputs of one request differ."""

    request: str
    position: int
    """Among its generated tokens, from 0."""
    token_a: int
    token_b: int
    event_a: int
    event_b: int
    step_a: int
    step_b: int
    batch_a: list[str] = field(default_factory=list)
    batch_b: list[str] = field(default_factory=list)
    """Who was in the step with it."""


@dataclass
class _Given:
    """Tokens of one request that the other side has not come to yet."""

    position: int = 0
    tokens: list[tuple[int, int, int, tuple[Any, ...]]] = field(default_factory=list)
    """(token, event, step, requests of the step)."""


def _outputs(trace: Trace, number: Number) -> Iterator[tuple[Any, int, int, int, tuple[Any, ...]]]:
    """(request, token, event, step, batch), in order."""
    batches: dict[tuple[int, int], tuple[Any, ...]] = {}
    for record in fresh_reading(trace).records():
        event = record.event
        if type(event) is StepScheduled:
            batches[record.process, event.step] = tuple(number(r) for r in event.requests or ())
        elif type(event) is StepUpdated and event.token_ids is not None:
            batch = batches.pop((record.process, event.step), ())
            for request, tokens in zip(batch, event.token_ids):
                for token in tokens:
                    yield request, token, record.number, event.step, batch


def compare_outputs(
    a: Trace, b: Trace, to_a: Number, name: Any
) -> tuple[list[TokenDifference], int]:
    """The first difference of each request (in the order of A), and how many tokens were equal.

    Only what one side is ahead of the other is kept.
    """
    found: dict[Any, TokenDifference] = {}
    ahead: tuple[dict[Any, _Given], dict[Any, _Given]] = ({}, {})
    streams = [_outputs(a, lambda request: request), _outputs(b, to_a)]
    num_equal, alive = 0, [True, True]
    while any(alive):
        for side in (0, 1):
            item = next(streams[side], None)
            if item is None:
                alive[side] = False
                continue
            request, *told = item
            if request in found:
                continue
            ahead[side].setdefault(request, _Given()).tokens.append(tuple(told))  # type: ignore[arg-type]
            num_equal += _match(request, ahead, found, name)
    return sorted(found.values(), key=lambda difference: difference.event_a), num_equal


def _match(request: Any, ahead: Any, found: dict[Any, TokenDifference], name: Any) -> int:
    left, right = ahead[0].get(request), ahead[1].get(request)
    if left is None or right is None:
        return 0
    equal = 0
    while left.tokens and right.tokens:
        token_a, event_a, step_a, batch_a = left.tokens.pop(0)
        token_b, event_b, step_b, batch_b = right.tokens.pop(0)
        if token_a != token_b:
            found[request] = TokenDifference(
                name(request), left.position, token_a, token_b, event_a, event_b, step_a, step_b,
                [name(r) for r in batch_a], [name(r) for r in batch_b],
            )  # fmt: skip
            ahead[0].pop(request)
            ahead[1].pop(request)
            break
        left.position += 1
        equal += 1
    return equal


# Ownership ------------------------------------------------------------------------------


@dataclass
class Breach:
    """The first event at which a block was not its owner's alone."""

    event: int
    kind: str
    """``two owners``, ``table`` or ``hash``."""
    text: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Scan:
    """The fold behind ``ownership``: one scheduler and its workers."""

    def __init__(self, names: dict[int, str], light: bool) -> None:
        self.names, self.light = names, light
        self.state = KVState()
        self.writers: dict[int, int] = {}
        """Block → the request that writes it, since it was taken."""
        self.hashes: dict[int, list[int]] = {}
        self.planned: dict[int, dict[int, list[list[int]]]] = {}
        self.rows: dict[tuple[int, int, int], tuple[int, list[int]]] = {}
        self.drafts = False
        """There were draft tokens: what was computed is not the sum of what was scheduled."""

    def name(self, request: int) -> str:
        return self.names.get(request, f"#{request}")

    def taken(self, number: int, event: BlocksTaken) -> Breach | None:
        for block in event.blocks:
            if self.state.ref_cnts.get(block):
                owners = [self.name(r) for r in self._owners(block)]
                who = f"{' and '.join(owners) or 'somebody'} held it"
                return Breach(number, "two owners", f"block {block} was handed out while {who}")
            self.writers.pop(block, None)
        return None

    def _owners(self, block: int) -> list[int]:
        return [r for r, rows in self.state.tables.items() if any(block in row for row in rows)]

    def arrived(self, number: int, event: RequestArrived) -> None:
        self.hashes[event.request] = list(event.block_hashes)

    def gone(self, number: int, event: RequestFinished) -> None:
        self.hashes.pop(event.request, None)
        for key in [key for key in self.rows if key[2] == event.request]:
            del self.rows[key]

    def looked_up(self, number: int, event: PrefixLookedUp) -> Breach | None:
        """Each block hit must be cached under the hash that the request has at that place."""
        hashes = self.hashes.setdefault(event.request, [])
        hashes += event.new_hashes
        config = self.state.config
        if config is None:
            return None
        sizes = [group.block_size for group in config.groups] or [config.block_size]
        for size, row in zip(sizes, event.blocks):
            for place, block in enumerate(row):
                at = (place + 1) * size // config.hash_block_size - 1
                known = self.state.hashes.get(block, [])
                if block and at < len(hashes) and hashes[at] not in known:
                    was = f"holds {known[0]:x}" if known else "holds no cached hash"
                    return Breach(
                        number, "hash",
                        f"{self.name(event.request)} hit block {block} at logical {place} for hash "
                        f"{hashes[at]:x}, but the block {was}",
                    )  # fmt: skip
        return None

    def scheduled(self, number: int, event: StepScheduled) -> Breach | None:
        """After the state took it in: who writes which block in this step."""
        config = self.state.config
        made: dict[int, list[list[int]]] = {}
        found = None
        for request, count in zip(event.requests or (), event.num_tokens or ()):
            table = self.state.tables.get(request, [])
            made[request] = [list(row) for row in table]
            self.drafts = self.drafts or bool(event.num_spec_tokens)
            if config is None or self.light or self.drafts or found:
                continue
            last = self.state.computed.get(request, count) - 1
            for group, row in zip(config.groups, table):
                if group.kind in PLAIN_GROUPS:
                    size = group.block_size
                    written = row[max(0, last - count + 1) // size : last // size + 1]
                    found = found or self._written(number, request, written)
        self.planned[event.step] = made
        self.planned.pop(event.step - KEPT_STEPS, None)
        return found

    def _written(self, number: int, request: int, blocks: list[int]) -> Breach | None:
        for block in blocks:
            writer = self.writers.setdefault(block, request)
            if block and writer != request:
                return Breach(
                    number, "two owners",
                    f"{self.name(request)} and {self.name(writer)} both write block {block}",
                )  # fmt: skip
        return None

    def worker(self, process: int, number: int, event: Event) -> Breach | None:
        if type(event) is SlotsMapped:
            return self.mapped(process, number, event)
        if type(event) is TableRowChanged:
            _, row = self.rows.get((process, event.group, event.request), (0, []))
            if event.first <= len(row):
                row = [*row[: event.first], *event.blocks]
                self.rows[process, event.group, event.request] = (number, row)
        return None

    def mapped(self, process: int, number: int, event: SlotsMapped) -> Breach | None:
        """Rows and slots that the kernel got, against the tables that were planned."""
        plan = self.planned.get(event.step)
        ratio = max(1, event.block_size // event.kernel_block_size)
        cursor = 0
        for request, query, length in zip(event.requests, event.query_lens, event.seq_lens):
            slots = event.slots[cursor : cursor + query]
            cursor += query
            if plan is None or len(plan.get(request, ())) <= event.group:
                continue
            mine = plan[request][event.group]
            at, row = self.rows.get((process, event.group, request), (number, []))
            needed = -(-length // event.block_size)
            theirs = [block // ratio for block in row[: needed * ratio : ratio]]
            if row and theirs != mine[: len(theirs)]:
                place = next(i for i, (x, y) in enumerate(zip(theirs, [*mine, -1])) if x != y)
                owners = [self.name(r) for r in self._owners(theirs[place]) if r != request]
                whose = f", a block of {' and '.join(owners)}" if owners else ""
                return Breach(
                    at, "table",
                    f"the kernel's table of {self.name(request)} has {theirs[place]} at logical "
                    f"{place}{whose}; the manager gave {mine[place] if place < len(mine) else 'none'}",
                )  # fmt: skip
            wrong = self._wrong_slot(slots, length - query, mine, event.block_size)
            if wrong:
                return Breach(number, "table", f"{self.name(request)} {wrong}")
        return None

    @staticmethod
    def _wrong_slot(slots: list[int], first: int, table: list[int], size: int) -> str:
        for position, slot in enumerate(slots, first):
            block = position // size
            right = table[block] * size + position % size if block < len(table) else -1
            if slot != right:
                return f"writes position {position} to slot {slot}, not {right}"
        return ""


def ownership(trace: Trace, names: dict[int, str]) -> Iterator[Breach]:
    """Every breach in a trace, in the order in which it shows."""
    scans: dict[int, _Scan] = {}
    light = trace.level == "light"
    home = 0
    for record in fresh_reading(trace).records():
        event: Any = record.event
        number, kind = record.number, type(event)
        if kind in (TableRowChanged, SlotsMapped):
            # A worker in a process of its own works for the scheduler that was seen last.
            scan = scans.get(record.process) or scans.get(home)
            breach = scan.worker(record.process, number, event) if scan else None
        elif kind in _SCHEDULER:
            home = record.process
            scan = scans.setdefault(home, _Scan(names, light))
            handler = _BEFORE.get(kind)
            breach = handler(scan, number, event) if handler else None
            scan.state.apply(event)
            if kind is StepScheduled:
                breach = scan.scheduled(number, event)
        else:
            continue
        if breach is not None:
            yield breach


_BEFORE: dict[type, Any] = {
    BlocksTaken: _Scan.taken,
    RequestArrived: _Scan.arrived,
    RequestFinished: _Scan.gone,
    PrefixLookedUp: _Scan.looked_up,
}
_SCHEDULER = {
    *_BEFORE, EngineConfigured, StepScheduled, RequestFreed, RequestPreempted, BlockEvicted,
    BlocksCached, BlocksFreed, BlocksTouched, PrefixCacheReset, SlotsAllocated,
}  # fmt: skip


def not_checked(trace: Trace, seen: Seen, which: str) -> list[str]:
    """What the verdict on tables could not look at in one trace."""
    said = [f"{which}: {problem}" for problem in trace.problems]
    if trace.level == "light":
        said.append(f"{which}: level light has no lookups, tables or writes")
    if not seen.num_tables:
        said.append(f"{which}: no worker's tables and slots are recorded")
    if seen.config is None:
        said.append(f"{which}: begins after the engine did, so its first owners are not known")
    return said
