"""A trace read once for lessons: steps with their tables, allocations, frees and the free queue.

Only the first KV group is looked at; the scenarios of the lessons have one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_trace.decode_rule import PARTITION_SIZE, choose
from vllm_trace.errors import TraceError
from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    BackendSelected,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    EngineConfigured,
    Event,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    SlotsAllocated,
    SlotsMapped,
    SlotsRefused,
    StepExecuted,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.mini.rules import rules_for
from vllm_trace.state import KVState
from vllm_trace.trace import Trace

ELEMENT_SIZES = {"float32": 4, "float16": 2, "half": 2, "bfloat16": 2, "float": 4}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass
class Token:
    """One token of a flattened batch."""

    place: int
    request: int
    position: int
    slot: int


@dataclass
class StepSeen:
    """One engine step."""

    number: int
    event: int
    scheduled: StepScheduled
    tables: dict[int, list[int]]
    """Of the scheduled requests, as the schedule left them."""
    before: dict[int, int]
    """Tokens of each scheduled request that were computed before."""
    mapped: SlotsMapped | None = None
    planned: AttentionPlanned | None = None
    called: AttentionCalled | None = None
    executed: StepExecuted | None = None
    updated: StepUpdated | None = None

    @property
    def counts(self) -> dict[int, int]:
        return dict(zip(self.scheduled.requests or (), self.scheduled.num_tokens or ()))

    @property
    def num_tokens(self) -> int:
        return sum(self.scheduled.num_tokens or ())

    @property
    def max_seq_len(self) -> int:
        return max((self.before[r] + n for r, n in self.counts.items()), default=0)

    def tokens(self) -> list[Token]:
        """The flattened batch as the kernel got it. Empty when no worker was traced."""
        made: list[Token] = []
        if self.mapped is None:
            return made
        slots = iter(self.mapped.slots)
        rows = zip(self.mapped.requests, self.mapped.query_lens, self.mapped.seq_lens)
        for request, query, length in rows:
            for position in range(length - query, length):
                made.append(Token(len(made), request, position, next(slots)))
        return made


@dataclass
class Allocation:
    """``allocate_slots`` that gave something."""

    event: int
    request: int
    new: list[int]
    hits: list[int]
    table: list[int]
    num_tokens: int
    """Tokens that the table must hold now."""
    free: int


@dataclass
class Refused:
    """``allocate_slots`` that returned None."""

    event: int
    request: int
    held: int
    """Blocks of its table then."""
    num_tokens: int
    """Tokens that it needed room for."""
    free: int


@dataclass
class Freed:
    """Blocks that lost an owner."""

    event: int
    blocks: list[int]
    ref_cnts: list[int]
    hashed: list[bool]
    queue_before: list[int]
    queue_after: list[int]


@dataclass
class Book:
    """Everything that a lesson asks of a trace."""

    config: EngineConfigured
    header: dict
    names: dict[int, str]
    backends: list[BackendSelected] = field(default_factory=list)
    steps: list[StepSeen] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)
    freed: list[Freed] = field(default_factory=list)
    arrived: dict[int, RequestArrived] = field(default_factory=dict)
    finished: dict[int, RequestFinished] = field(default_factory=dict)
    preempted: list[tuple[int, RequestPreempted]] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    touched: list[tuple[int, BlocksTouched]] = field(default_factory=list)

    @property
    def block_size(self) -> int:
        return self.config.block_size

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self.config.groups)

    @property
    def element_size(self) -> int:
        """Bytes of one element of the cache."""
        kept = str(self.config.settings.get("kv_cache_dtype", "auto"))
        if kept.startswith(("fp8", "int8")):
            return 1
        dtype = str(self.config.settings["dtype"]).removeprefix("torch.")
        return ELEMENT_SIZES.get(kept, ELEMENT_SIZES.get(dtype, 2))

    @property
    def num_heads(self) -> int:
        return int(self.config.settings["num_query_heads"])

    @property
    def num_kv_heads(self) -> int:
        return int(self.config.settings["num_kv_heads"])

    @property
    def head_size(self) -> int:
        return int(self.config.settings["head_size"])

    @property
    def page_bytes(self) -> int:
        """Of one block in one layer, K and V together."""
        stated = self.config.groups[0].page_size_bytes
        return stated or (
            2 * self.block_size * self.num_kv_heads * self.head_size * self.element_size
        )

    def name(self, request: int) -> str:
        return self.names.get(request, f"#{request}")

    def numbers_of_rule(self, step: StepSeen) -> tuple[int, int, int]:
        """(longest sequence, sequences x heads, partitions) of a step: what the V1/V2 rule looks at."""
        longest = step.max_seq_len
        return longest, len(step.counts) * self.num_heads, max(1, cdiv(longest, PARTITION_SIZE))

    def is_v1(self, step: StepSeen) -> bool:
        """The rule of ``PagedAttention.forward_decode``, 0.8.5 to 0.11.2."""
        return choose(step.max_seq_len, len(step.counts), self.num_heads).variant == "V1"

    def is_decode(self, step: StepSeen) -> bool:
        """Nobody computes more than one token, and nobody its prompt."""
        return all(
            n == 1 and step.before[r] >= self.arrived[r].num_prompt_tokens
            for r, n in step.counts.items()
            if r in self.arrived
        )

    def paged_kernel(self, step: StepSeen) -> str:
        """``V1`` or ``V2`` when the engine itself ran one of them, else empty."""
        plan = step.planned
        if plan is None:
            return ""
        said = f"{plan.kernel} {plan.variant}".lower()
        for variant in ("v1", "v2"):
            if f"paged_attention_{variant}" in said or plan.variant.lower() == variant:
                return variant.upper()
        return ""

    def chosen(self, step: StepSeen) -> str:
        """V1 or V2: what ran, or what the rule would have chosen."""
        return self.paged_kernel(step) or ("V1" if self.is_v1(step) else "V2")


def read(trace: Trace) -> Book:
    """Fold a trace into a book.

    Raises: ``TraceError`` when it has no engine or no step, or was recorded at level ``light``.
    """
    if trace.level == "light":
        raise TraceError("a lesson needs a trace of level full", hint="vllm-trace learn run STEP")
    reading = _Reading(trace)
    for record in trace.records():
        reading.take(record.number, record.event)
    if reading.book is None or not reading.book.steps:
        raise TraceError("the trace holds no step of an engine")
    reading.book.names = dict(trace.names)
    return reading.book


class _Reading:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.book: Book | None = None
        self.state = KVState()
        self.queue: list[int] = []
        self.by_step: dict[int, StepSeen] = {}
        self.early: list[BackendSelected] = []
        self.unhashed_first = True

    def take(self, number: int, event: Event) -> None:
        if isinstance(event, BackendSelected):
            (self.book.backends if self.book else self.early).append(event)
        if isinstance(event, BlocksFreed) and self.book:
            self._freed(number, event, self.state.hashes)
        self.state.apply(event)
        if isinstance(event, EngineConfigured):
            self.book = Book(event, self.trace.header, {}, backends=self.early)
            self.queue = list(range(1, event.num_blocks))
            self.unhashed_first = _unhashed_first(str(event.settings.get("vllm_version", "")))
        if self.book is None:
            return
        self._take(number, event)

    def _take(self, number: int, event: Event) -> None:
        book = self.book
        assert book is not None
        if isinstance(event, RequestArrived):
            book.arrived[event.request] = event
        elif isinstance(event, RequestFinished):
            book.finished[event.request] = event
        elif isinstance(event, RequestPreempted):
            book.preempted.append((number, event))
        elif isinstance(event, SlotsRefused):
            held = self.state.tables.get(event.request, [[]])[0]
            before = self.state.computed.get(event.request, 0) or event.num_hit_tokens
            tokens = before + event.num_new_tokens
            book.refused.append(
                Refused(number, event.request, len(held), tokens, event.num_free_blocks)
            )
        elif isinstance(event, BlocksTaken):
            gone = set(event.blocks)
            self.queue = [block for block in self.queue if block not in gone]
        elif isinstance(event, BlocksTouched):
            book.touched.append((number, event))
            gone = {b for b, count in zip(event.blocks, event.ref_cnts) if count == 1}
            self.queue = [block for block in self.queue if block not in gone]
        elif isinstance(event, SlotsAllocated):
            table = list(self.state.tables[event.request][0])
            hits = event.hit_blocks[0] if event.hit_blocks else []
            tokens = self.state.computed.get(event.request, 0) + event.num_new_tokens
            new = event.blocks[0] if event.blocks else []
            book.allocations.append(
                Allocation(
                    number,
                    event.request,
                    list(new),
                    list(hits),
                    table,
                    tokens,
                    event.num_free_blocks,
                )
            )
        elif isinstance(event, StepScheduled) and event.requests:
            self._step(number, event)
        else:
            self._worker(event)

    def _step(self, number: int, event: StepScheduled) -> None:
        tables = {r: list(self.state.tables.get(r, [[]])[0]) for r in event.requests or ()}
        computed = {
            r: self.state.computed.get(r, 0) - n
            for r, n in zip(event.requests or (), event.num_tokens or ())
        }
        seen = StepSeen(event.step, number, event, tables, computed)
        self.by_step[event.step] = seen
        assert self.book is not None
        self.book.steps.append(seen)

    def _worker(self, event: Event) -> None:
        seen = self.by_step.get(getattr(event, "step", -1))
        if seen is None:
            return
        if isinstance(event, SlotsMapped) and event.group == 0:
            seen.mapped = event
        elif isinstance(event, AttentionPlanned) and event.group == 0:
            # A step with both has a plan for its prompts too; the choice is about who decodes.
            if seen.planned is None or seen.planned.variant not in ("V1", "V2"):
                seen.planned = event
        elif isinstance(event, AttentionCalled):
            seen.called = event
        elif isinstance(event, StepExecuted):
            seen.executed = event
        elif isinstance(event, StepUpdated):
            seen.updated = event

    def _freed(self, number: int, event: BlocksFreed, hashes: dict[int, list[int]]) -> None:
        hashed = [bool(hashes.get(block)) for block in event.blocks]
        gone = [b for b, count in zip(event.blocks, event.ref_cnts) if count == 0]
        first: list[int] = []
        last = gone
        if self.unhashed_first:
            first = [block for block in gone if not hashes.get(block)]
            last = [block for block in gone if hashes.get(block)]
        before = list(self.queue)
        self.queue = first + before + last
        assert self.book is not None
        self.book.freed.append(
            Freed(
                number, list(event.blocks), list(event.ref_cnts), hashed, before, list(self.queue)
            )
        )


def _unhashed_first(release: str) -> bool:
    """Whether that release reuses blocks without a hash first; one that nobody compared is taken for a new one."""
    try:
        return rules_for(release).unhashed_blocks_first
    except ValueError:
        return True
