"""The first place where a trace and ``mini`` differ: what, of which class, and how to see it again."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_trace.events import Event, to_dict
from vllm_trace.mini.kv_cache_manager import KVCacheManager
from vllm_trace.trace import Record, Trace

CLASSES = ("order", "eviction", "hash", "off by one", "lost event", "configuration", "schedule")

STORY = 12
"""Events told before a divergence."""


@dataclass
class Divergence:
    """Both sides of the first difference."""

    event: int
    """Number of the recorded event."""
    kind: str
    """One of ``CLASSES``."""
    recorded: str
    mini: str
    free_list: list[int] = field(default_factory=list)
    """``mini``'s free queue, the next to be handed out first."""
    tables: dict[str, list[list[int]]] = field(default_factory=dict)
    """``mini``'s block tables by request name."""
    ref_cnts: dict[int, int] = field(default_factory=dict)
    story: list[str] = field(default_factory=list)
    """The recorded events before it, oldest first."""
    script: str = ""
    """A program over ``mini`` that ends with what ``mini`` does here."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(difference: Any, manager: KVCacheManager, trace: Trace) -> Divergence:
    """Put a difference into words, with ``mini``'s state as it is now; reads the trace up to it again."""
    pool = manager.block_pool
    names: dict[Any, str] = trace.names
    before: deque[Record] = deque(maxlen=STORY)
    for record in trace.records():
        if record.number > difference.number:
            break
        before.append(record)
    return Divergence(
        event=difference.number,
        kind=classify(difference.recorded, difference.mini),
        recorded=_words(difference.recorded, trace),
        mini=_words(difference.mini, trace),
        free_list=[block.block_id for block in pool.free_block_queue],
        tables={
            names.get(request, f"#{request}"): [
                [block.block_id for block in row] for row in manager.get_blocks(request)
            ]
            for request in manager.requests
        },
        ref_cnts={block.block_id: block.ref_cnt for block in pool.blocks if block.ref_cnt > 0},
        story=[_line(record, trace) for record in before],
        script=script(manager, difference),
    )


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
    if kind in ("blocks.taken", "slots.allocated", "blocks.freed", "blocks.touched"):
        theirs, ours = _ids(recorded), _ids(mini)
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
    if "request" in fields:
        fields["request"] = trace.names.get(fields["request"], fields["request"])
    shown = {k: v for k, v in fields.items() if v not in (None, [], {}, ()) and "ns" not in k}
    text = " ".join(f"{key}={value}" for key, value in shown.items())
    return f"event {record.number}: {kind} {text}"[:240]


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
