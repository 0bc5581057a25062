"""The faults of the list again, in ``mini``: its engine runs with one broken method, and tells what it does as events.

The workers' tables and slots are in it too: ``mini``'s engine computes attention with them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from vllm_trace import events as ev
from vllm_trace.checkpoints import checkpoint
from vllm_trace.mini.block_pool import BlockPool, FreeKVCacheBlockQueue
from vllm_trace.mini.block_table import BlockTable
from vllm_trace.mini.engine import LLMEngine, ModelRunner
from vllm_trace.mini.kv_cache_manager import KVCacheManager
from vllm_trace.mini.scheduler import Scheduler, SchedulerConfig

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN, BUDGET, MAX_NUM_SEQS = 16, 24, 256, 64, 4
RELEASE = "0.32.0"
HEADER = {
    "schema": ev.SCHEMA_VERSION, "role": "main", "pid": 1, "host": "test", "level": "full",
    "vllm": RELEASE, "hooks": [],
}  # fmt: skip
MOST_STEPS = 300
LOW_64 = (1 << 64) - 1


def short(block_hash) -> int:
    return int.from_bytes(block_hash, "big") & LOW_64


class Told:
    """An engine of ``mini`` and what it tells, as the events of a trace."""

    def __init__(self):
        self.events: list[ev.Event] = []
        config = SchedulerConfig(max_num_batched_tokens=BUDGET, max_num_seqs=MAX_NUM_SEQS)
        self.engine = LLMEngine(
            checkpoint("tiny-opt"), block_size=BLOCK_SIZE, num_gpu_blocks=NUM_BLOCKS,
            max_model_len=MAX_MODEL_LEN, scheduler_config=config, tell=self.hear,
        )  # fmt: skip
        self.scheduler = self.engine.scheduler
        self.manager = self.scheduler.kv_cache_manager
        self.hits: list[list[int]] = []
        self.hashes_told: dict[int, int] = {}
        self.grown: set[int] = set()
        self.rows: dict[int, list[int]] = {}
        settings = {
            "enable_prefix_caching": True, "max_num_seqs": MAX_NUM_SEQS, "policy": "fcfs",
            "max_num_batched_tokens": BUDGET, "max_num_scheduled_tokens": BUDGET,
            "max_model_len": MAX_MODEL_LEN, "full_sequence_must_fit": True,
            "enable_chunked_prefill": True, "long_prefill_token_threshold": 0,
            "async_scheduling": False, "watermark_blocks": 0, "num_lookahead_tokens": 0,
        }  # fmt: skip
        groups = [ev.KVGroup("FullAttentionSpec", BLOCK_SIZE, ["layer.0"])]
        self.events.append(
            ev.EngineConfigured(1, BLOCK_SIZE, BLOCK_SIZE, NUM_BLOCKS, groups, settings)
        )

    def hear(self, fact):
        kind, *fields = fact
        add, key = self.events.append, fields[0]
        if kind in ("blocks.taken", "blocks.touched", "blocks.freed", "request.freed"):
            add(ev.KINDS[kind](*fields))
        elif kind == "block.evicted":
            add(ev.BlockEvicted(key, [*map(short, fields[1])]))
        elif kind == "prefix.looked_up":
            self.hits = fields[3]
            add(ev.PrefixLookedUp(*fields[:3], self.hits or [[]], self.new_hashes(key)))
        elif kind == "blocks.cached":
            add(ev.BlocksCached(*fields[:4], [*map(short, fields[4])]))
        elif kind == "slots.allocated":
            self.grown.add(key)
            hits = self.hits if fields[2] else []
            add(ev.SlotsAllocated(key, fields[1], fields[2], fields[3] or [[]], hits, fields[4]))
        elif kind == "slots.refused":
            add(ev.SlotsRefused(*fields[:4], num_wanted_blocks=fields[4]))
        elif kind == "request.preempted":
            add(ev.RequestPreempted(*fields))
        elif kind == "request.finished":
            self.rows.pop(key, None)
            add(ev.RequestFinished(key, 1, *fields[1:]))
        elif kind == "batch.prepared":
            self.prepared(*fields)

    def new_hashes(self, key):
        """Those that no earlier event of the request carried."""
        known = self.hashes_told[key]
        made = [*map(short, self.scheduler.requests[key].block_hashes)]
        self.hashes_told[key] = len(made)
        return made[known:]

    def prepared(self, step, keys, counts, tables, slots):
        for key, table in zip(keys, tables):
            row = self.rows.get(key, [])
            same = next((i for i, (a, b) in enumerate(zip(row, table)) if a != b), len(row))
            if same < len(table):
                self.events.append(ev.TableRowChanged(step, 0, key, same, table[same:]))
            self.rows[key] = table
        # Planned tokens count as computed already.
        ends = [self.scheduler.requests[key].num_computed_tokens for key in keys]
        self.events += [
            ev.SlotsMapped(step, 0, BLOCK_SIZE, BLOCK_SIZE, keys, counts, ends, slots),
            ev.StepExecuted(step, step, 1, step, 1, 0, sum(counts), sum(counts), "eager"),
        ]

    def arrive(self, key, prompt, max_tokens):
        self.engine.add_request(key, prompt, max_tokens, ignore_eos=True)
        hashes = [*map(short, self.scheduler.requests[key].block_hashes)]
        self.hashes_told[key] = len(hashes)
        self.events.append(
            ev.RequestArrived(key, 1, f"r-{key}", len(prompt), max_tokens, 0, 0.0, hashes, {})
        )

    def step(self):
        """``LLMEngine.step`` with its two events around it."""
        self.grown.clear()
        scheduler, planned = self.scheduler, self.scheduler.schedule()
        counts, number = planned.num_scheduled_tokens, planned.step
        silent = [key for key in counts if key not in self.grown]
        free = self.manager.block_pool.get_num_free_blocks()
        self.events.append(
            ev.StepScheduled(
                number,
                number,
                1,
                len(scheduler.running),
                len(scheduler.waiting),
                free,
                len(silent),
                [*counts],
                [*counts.values()],
                planned.scheduled_new_reqs,
                planned.scheduled_resumed_reqs,
                sorted(planned.preempted_req_ids),
                planned.finished_req_ids,
                kept=silent if planned.preempted_req_ids else [],
            )
        )
        sampled = self.engine.runner.execute_model(planned, scheduler.requests)
        scheduler.update_from_output(planned, sampled)
        outputs = [len(sampled.get(key, ())) for key in counts]
        self.events.append(ev.StepUpdated(number, number, 1, outputs))


def run(faulty: bool = False) -> list[ev.Event]:
    """Requests that share prefixes, fill the pool and preempt each other; one of them is aborted."""
    told = Told()
    rng = random.Random(3)
    shared = [rng.randrange(5, 700) for _ in range(3 * BLOCK_SIZE)]
    seldom = [rng.randrange(5, 700) for _ in range(3 * BLOCK_SIZE)]
    for key in range(10):
        own = [rng.randrange(5, 700) for _ in range(rng.randrange(10, 70))]
        told.arrive(
            key, (shared if key % 2 else [] if key else seldom) + own, rng.randrange(20, 60)
        )
    told.arrive(10, seldom + [7], 4)  # long after the first one's blocks were taken by others
    try:
        while told.engine.has_unfinished_requests() and told.scheduler.current_step < MOST_STEPS:
            if told.scheduler.current_step == 30:
                told.scheduler.finish_requests([told.scheduler.running[0].request_id], "abort")
            told.step()
    except Exception:
        if not faulty:  # a faulty engine may end badly: what it told is what counts
            raise
    return told.events


@dataclass
class Fault:
    does: str
    owner: type
    method: str
    make: Callable
    """``make(original, once)`` gives the broken method; ``once()`` is True the first time."""
    invariant: str
    kind: str
    """Of the first event that breaks the invariant."""


def _leak(free, once):
    def faulty(self, request):
        held = self.requests.get(request.request_id)
        if held is not None and once():
            held.tables[0].pop()
        free(self, request)

    return faulty


def _free_twice(free, once):
    def faulty(self, request):
        held = self.requests.get(request.request_id)
        if held is not None and once():
            held.tables[0].insert(0, held.tables[0][0])
        free(self, request)

    return faulty


def _skip_a_touch(touch, once):
    def faulty(self, blocks):
        touch(self, blocks[:-1] if blocks and once() else blocks)

    return faulty


def _take_from_the_tail(popleft_n, once):
    def faulty(self, num_blocks):
        if (
            not num_blocks or len(self) == NUM_BLOCKS
        ):  # the null block is taken when the pool is made
            return popleft_n(self, num_blocks)
        taken = [*self][-num_blocks:]
        for block in taken:
            self.remove(block)
        return taken

    return faulty


def _keep_the_hash(evict, once):
    def faulty(self, blocks):
        blocks = [*blocks]
        before = [(block, block.block_hash) for block in blocks if block.block_hash is not None]
        evict(self, blocks)
        for block, block_hash in before:
            self.cached_block_hash_to_block[block.group_id].setdefault(block_hash, block)

    return faulty


def _shift_a_slot(compute_slot_mapping, once):
    def faulty(self, rows, positions, num_padded=0):
        slots = compute_slot_mapping(self, rows, positions, num_padded)
        if len(rows) > 2 and once():
            slots[0] += 1
        return slots

    return faulty


def _swap_rows(prepare_inputs, once):
    def faulty(self, scheduled, requests):
        if len(self.rows) > 1 and once():
            self.block_table.swap_row(0, 1)
        return prepare_inputs(self, scheduled, requests)

    return faulty


def _overspend(schedule_running, once):
    def faulty(self, output, token_budget, threshold):
        return schedule_running(self, output, token_budget + BUDGET, threshold)

    return faulty


def _preempt_anybody(schedule, once):
    def faulty(self):
        if len(self.running) > 2 and self.current_step > 4 and once():
            self._preempt_request(self.running.pop())
        return schedule(self)

    return faulty


def _forget_an_abort(finish, once):
    def faulty(self, request, reason):
        free = self.kv_cache_manager.free
        if reason == "abort":
            self.kv_cache_manager.free = lambda request: None
        try:
            finish(self, request, reason)
        finally:
            self.kv_cache_manager.free = free

    return faulty


def _hand_out_null(get_new_blocks, once):
    def faulty(self, num_blocks):
        if num_blocks == 1 and once():
            self.null_block.ref_cnt += 1
            self.tell(("blocks.taken", [0]))
            return [self.null_block]
        return get_new_blocks(self, num_blocks)

    return faulty


FAULTS = {
    "leak a block": Fault(
        "free forgets a request's last block",
        KVCacheManager, "free", _leak, "nothing-held", "request.freed",
    ),
    "free twice": Fault(
        "a request's first block is given back twice",
        KVCacheManager, "free", _free_twice, "freed-once", "blocks.freed",
    ),
    "skip a touch": Fault(
        "touch passes over the last block of a hit",
        BlockPool, "touch", _skip_a_touch, "ref-counts", "step.scheduled",
    ),
    "wrong eviction order": Fault(
        "the free queue gives blocks from its tail",
        FreeKVCacheBlockQueue, "popleft_n", _take_from_the_tail, "evict-head", "blocks.taken",
    ),
    "stale hash hit": Fault(
        "the prefix map still finds a block after its eviction",
        BlockPool, "_evict", _keep_the_hash, "hit-cached", "prefix.looked_up",
    ),
    "wrong slot": Fault(
        "the first token of a step goes one slot further",
        BlockTable, "compute_slot_mapping", _shift_a_slot, "slot-mapping", "slots.mapped",
    ),
    "table row swapped": Fault(
        "two requests' rows are swapped in the runner",
        ModelRunner, "_prepare_inputs", _swap_rows, "worker-table", "slots.mapped",
    ),
    "over-budget step": Fault(
        "the scheduler gives itself twice the tokens for a step",
        Scheduler, "_schedule_running", _overspend, "token-budget", "step.scheduled",
    ),
    "preempt without need": Fault(
        "the scheduler preempts a request although everybody fits",
        Scheduler, "schedule", _preempt_anybody, "preempt-needed", "request.preempted",
    ),
    "lost free on abort": Fault(
        "the blocks of an aborted request are not freed",
        Scheduler, "_finish", _forget_an_abort, "nothing-held", "request.finished",
    ),
    "null block handed out": Fault(
        "the pool hands out the null block",
        BlockPool, "get_new_blocks", _hand_out_null, "null-block", "blocks.taken",
    ),
}  # fmt: skip
"""By their names in the list of faults that the oracle must catch."""


def run_with(fault: Fault) -> list[ev.Event]:
    """The events of an engine with that fault in it."""
    struck = []

    def once():
        struck.append(True)
        return len(struck) == 1

    original = vars(fault.owner)[fault.method]
    setattr(fault.owner, fault.method, fault.make(original, once))
    try:
        return run(faulty=True)
    finally:
        setattr(fault.owner, fault.method, original)


def judge(fault: Fault):
    """(events, report, the violation of the invariant that is named for the fault)."""
    from vllm_trace.invariants import EventList, check

    events = run_with(fault)
    report = check(EventList(events, HEADER, ()))
    found = next((v for v in report.violations if v.invariant == fault.invariant), None)
    return events, report, found


def table() -> str:
    """The faults as a Markdown table."""
    lines = [
        "| fault | what is done to mini | caught by | at the first event |",
        "|---|---|---|---|",
    ]
    for name, fault in FAULTS.items():
        events, _, found = judge(fault)
        where = "**not caught**"
        if found is not None:
            where = f"`{events[found.event_number - 1].kind}` of step {found.step}"
        lines.append(f"| {name} | {fault.does} | `{fault.invariant}` | {where} |")
    return "\n".join(lines)
