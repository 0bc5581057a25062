"""The first place where a trace and ``mini`` differ: what, of which class, and how to see it again."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_trace.events import (
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    EngineConfigured,
    Event,
    to_dict,
)
from vllm_trace.mini.kv_cache_manager import KVCacheManager
from vllm_trace.mini.rules import Rules
from vllm_trace.state import NULL_BLOCK, KVState
from vllm_trace.trace import Record, Trace

CLASSES = ("order", "eviction", "hash", "off by one", "lost event", "configuration", "schedule")

OF_BLOCKS = ("blocks.taken", "slots.allocated", "blocks.freed", "blocks.touched")
"""Facts that are lists of block ids."""

STORY = 12
"""Events told before a divergence."""

LONG = {"sampling", "candidates", "settings", "request_id", "arrival_unix", "num_kept", "kept"}
"""Fields that a story leaves out."""


@dataclass
class PoolState:
    """The pool and the tables as one side has them after the call in which they differ."""

    free_list: list[int] = field(default_factory=list)
    """The free queue, the next to be handed out first."""
    tables: dict[str, list[list[int]]] = field(default_factory=dict)
    """Block tables by request name."""
    ref_cnts: dict[int, int] = field(default_factory=dict)
    """Of blocks with a count above zero."""


@dataclass
class Divergence:
    """Both sides of the first difference."""

    event: int
    """Number of the recorded event."""
    kind: str
    """One of ``CLASSES``."""
    recorded: str
    mini: str
    recorded_state: PoolState = field(default_factory=PoolState)
    """What the events add up to."""
    mini_state: PoolState = field(default_factory=PoolState)
    story: list[str] = field(default_factory=list)
    """The recorded events before it, oldest first."""
    script: str = ""
    """A program over ``mini`` that ends with what ``mini`` does here."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(
    difference: Any, manager: KVCacheManager, trace: Trace, process: int, last: int
) -> Divergence:
    """Put a difference into words, with the state of both sides; reads the trace up to it again.

    ``last`` is the number of the last event of ``process`` that ``mini`` has taken part in.
    """
    before: deque[Record] = deque(maxlen=STORY)
    recorded = _Recorded(manager.rules)
    for record in trace.records():
        if record.number > max(difference.number, last):
            break
        if record.number <= difference.number:
            before.append(record)
        if record.process == process:
            recorded.take(record.event)

    def name(request: Any) -> str:
        return trace.names.get(request, f"#{request}")

    return Divergence(
        event=difference.number,
        kind=classify(difference.recorded, difference.mini),
        recorded=_words(difference.recorded, trace),
        mini=_words(difference.mini, trace),
        recorded_state=recorded.state_by(name),
        mini_state=_state_of(manager, name),
        story=[_line(record, trace) for record in before],
        script=script(manager, difference),
    )


class _Recorded:
    """The recorded side's pool, added up from its own events."""

    def __init__(self, rules: Rules) -> None:
        self.unhashed_first = rules.unhashed_blocks_first
        self.kv = KVState()
        self.queue: OrderedDict[int, None] = OrderedDict()

    def take(self, event: Event) -> None:
        if type(event) is EngineConfigured:
            self.queue = OrderedDict.fromkeys(range(1, event.num_blocks))
        elif type(event) is BlocksTaken:
            for block in event.blocks:
                self.queue.pop(block, None)
        elif type(event) is BlocksTouched:
            for block, count in zip(event.blocks, event.ref_cnts):
                if count == 1:
                    self.queue.pop(block, None)
        elif type(event) is BlocksFreed:
            self._freed([b for b, n in zip(event.blocks, event.ref_cnts) if not n])
        self.kv.apply(event)

    def _freed(self, blocks: list[int]) -> None:
        blocks = [block for block in blocks if block != NULL_BLOCK]
        self.queue.update(dict.fromkeys(blocks))
        if self.unhashed_first:
            for block in reversed([block for block in blocks if block not in self.kv.hashes]):
                self.queue.move_to_end(block, last=False)

    def state_by(self, name: Any) -> PoolState:
        tables = {name(request): rows for request, rows in self.kv.tables.items()}
        return PoolState([*self.queue], tables, dict(self.kv.ref_cnts))


def _state_of(manager: KVCacheManager, name: Any) -> PoolState:
    pool = manager.block_pool
    tables = {name(request): [*manager.get_block_ids(request)] for request in manager.requests}
    counts = {b.block_id: b.ref_cnt for b in pool.blocks if b.ref_cnt > 0 and not b.is_null}
    return PoolState([block.block_id for block in pool.free_block_queue], tables, counts)


def classify(recorded: Any, mini: Any) -> str:
    """Which kind of difference it is; see ``CLASSES``."""
    if recorded is None or mini is None:
        return "lost event"
    if recorded[0] != mini[0]:
        both = {recorded[0], mini[0]}
        return "eviction" if "block.evicted" in both else "lost event"
    kind = recorded[0]
    if kind in ("prefix.looked_up", "blocks.cached"):
        return "hash"
    if kind == "block.evicted":
        return "eviction"
    theirs, ours = _ids(recorded), _ids(mini)
    if kind in OF_BLOCKS and theirs != ours:
        if sorted(theirs) == sorted(ours) or len(theirs) == len(ours):
            return "order"
        return "off by one"
    if isinstance(recorded[-1], int) and isinstance(mini[-1], int):
        return "off by one" if abs(recorded[-1] - mini[-1]) == 1 else "schedule"
    return "schedule"


def _ids(fact: Any) -> list[int]:
    """Every block id in a fact, however deep its lists."""
    found: list[int] = []
    for value in fact[1:]:
        if isinstance(value, list):
            found += [i for v in value for i in (v if isinstance(v, list) else [v])]
    return found


def _words(fact: Any, trace: Trace) -> str:
    if fact is None:
        return "nothing"
    kind, *values = fact
    if kind.startswith(("request.", "slots", "prefix.looked", "worker", "table", "blocks.cached")):
        if values and isinstance(values[0], int):
            values[0] = trace.names.get(values[0], values[0])
    return f"{kind} {' '.join(str(value) for value in values)}"


def _line(record: Record, trace: Trace) -> str:
    event: Event = record.event
    fields = to_dict(event)
    kind = fields.pop("kind")
    said = []
    for key, value in fields.items():
        if key in LONG or key.endswith("_ns") or value in (None, [], {}, ()):
            continue
        if key == "request":
            value = trace.names.get(value, value)
        if key.endswith("hashes"):
            value = [f"{one:016x}"[-6:] for one in value]  # enough to tell them apart
        said.append(f"{key}={value}".replace("'", ""))
    return f"event {record.number}: {kind} {' '.join(said)}"[:240]


def script(manager: KVCacheManager, difference: Any) -> str:
    """A program that puts ``mini``'s pool into this state and shows what it would do next."""
    pool = manager.block_pool
    queue = [block.block_id for block in pool.free_block_queue]
    hashes = {b.block_id: b.block_hash for b in pool.blocks if b.block_hash is not None}
    counts = {b.block_id: b.ref_cnt for b in pool.blocks if b.ref_cnt > 0}
    return f"""\
from vllm_trace.mini.block_pool import BlockPool
from vllm_trace.mini.rules import rules_for

pool = BlockPool({pool.num_gpu_blocks}, enable_caching={pool.enable_caching}, \
rules=rules_for({manager.rules.release!r}), tell=print)
# mini's state where the trace and mini differ (event {difference.number}).
queue = pool.free_block_queue
queue.popleft_n(queue.num_free_blocks)
for block_id, count in {counts!r}.items():
    pool.blocks[block_id].ref_cnt = count
for block_id, block_hash in {hashes!r}.items():
    pool.blocks[block_id].block_hash = block_hash
    pool.cached_block_hash_to_block[0].setdefault(block_hash, pool.blocks[block_id])
queue.append_n([pool.blocks[block_id] for block_id in {queue!r}])
print("recorded:", {_plain(difference.recorded)!r})
print("mini:    ", {_plain(difference.mini)!r})
print("next out:", [block.block_id for block in queue][:8])
"""


def _plain(fact: Any) -> str:
    return "nothing" if fact is None else " ".join(map(str, fact))
