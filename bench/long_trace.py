"""A long trace of one engine's life, written by ``mini``'s scheduler: for figures of memory, not of truth.

The real scheduler would take half an hour for ten million events. What is read from such a trace and kept must
not grow with it; who is right is not the question here, as ``mini`` is on both sides.
"""

from __future__ import annotations

import random
from pathlib import Path

from vllm_trace import events as ev
from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, KVCacheManager
from vllm_trace.mini.request import Request
from vllm_trace.mini.rules import rules_for
from vllm_trace.mini.scheduler import Scheduler, SchedulerConfig
from vllm_trace.tracewriter import TraceWriter

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN, NUM_REQUESTS = 16, 96, 512, 6
RELEASE = "0.32.0"
MAKE = {
    "blocks.taken": lambda ids: ev.BlocksTaken(ids),
    "block.evicted": lambda block, hashes: ev.BlockEvicted(block, hashes),
    "blocks.touched": lambda ids, counts: ev.BlocksTouched(ids, counts),
    "blocks.freed": lambda ids, counts: ev.BlocksFreed(ids, counts),
    "request.freed": lambda request: ev.RequestFreed(request),
    "slots.refused": lambda r, new, hit, free, wanted: ev.SlotsRefused(
        r, new, hit, free, num_wanted_blocks=wanted
    ),
    "request.preempted": lambda r, lost, free: ev.RequestPreempted(r, lost, free),
    "request.finished": lambda r, reason, made, lost: ev.RequestFinished(r, 1, reason, made, lost),
    "blocks.cached": lambda r, group, first, ids, hashes: ev.BlocksCached(
        r, group, first, ids, hashes
    ),
}


class Writer:
    """``mini``'s facts as events of a trace."""

    def __init__(self, path: Path) -> None:
        self.batch: list[ev.Event] = []
        self.num_events = 0
        self.manager = KVCacheManager(
            NUM_BLOCKS,
            [FullAttentionSpec(BLOCK_SIZE)],
            MAX_MODEL_LEN,
            rules=rules_for(RELEASE),
            tell=self.hear,
        )
        config = SchedulerConfig(max_num_batched_tokens=256, max_num_seqs=NUM_REQUESTS)
        self.scheduler = Scheduler(self.manager, config, self.hear)
        self.hits: list[list[int]] = []
        self.grown: set[int] = set()
        header = {
            "schema": ev.SCHEMA_VERSION, "role": "main", "pid": 1, "host": "bench",
            "level": "full", "vllm": RELEASE, "hooks": [],
        }  # fmt: skip
        self.writer = TraceWriter(path, header)
        settings = {
            "enable_prefix_caching": True, "max_num_seqs": NUM_REQUESTS, "policy": "fcfs",
            "max_num_batched_tokens": 256, "max_num_scheduled_tokens": 256,
            "max_model_len": MAX_MODEL_LEN, "full_sequence_must_fit": True,
            "enable_chunked_prefill": True, "long_prefill_token_threshold": 0,
            "async_scheduling": False, "watermark_blocks": 0,
        }  # fmt: skip
        groups = [ev.KVGroup("FullAttentionSpec", BLOCK_SIZE, ["layer.0"])]
        self.batch.append(
            ev.EngineConfigured(1, BLOCK_SIZE, BLOCK_SIZE, NUM_BLOCKS, groups, settings)
        )

    def hear(self, fact: tuple) -> None:
        kind, *fields = fact
        request = fields[0]
        if kind in MAKE:
            self.batch.append(MAKE[kind](*fields))
        elif kind == "prefix.looked_up":
            self.hits = fields[3]
            self.batch.append(ev.PrefixLookedUp(*fields[:3], fields[3] or [[]], []))
        elif kind == "slots.allocated":
            _, new, hit, ids, free = fields
            self.grown.add(request)
            hits = self.hits if hit else []
            self.batch.append(ev.SlotsAllocated(request, new, hit, ids, hits, free))

    def arrive(self, request: int, rng: random.Random) -> None:
        num_tokens = rng.randrange(20, 200)
        prefix = [(rng.randrange(8) << 40) + i + 1 for i in range(4)] if rng.random() < 0.5 else []
        if prefix:
            prefix = [prefix[0] + i for i in range(4)]
        hashes = [*prefix, *((request + 1 << 8) + i for i in range(MAX_MODEL_LEN // BLOCK_SIZE))]
        full = hashes[: num_tokens // BLOCK_SIZE]
        max_tokens = rng.randrange(1, 60)
        arrived = ev.RequestArrived(
            request, 1, f"r-{request}", num_tokens, max_tokens, 0, 0.0, full, {}
        )
        self.batch.append(arrived)
        self.scheduler.add_request(
            Request(
                request,
                num_prompt_tokens=num_tokens,
                max_tokens=max_tokens,
                block_hashes=hashes,  # more than are full: only the full ones are used
            )
        )

    def step(self) -> None:
        self.grown.clear()
        output = self.scheduler.schedule()
        counts = output.num_scheduled_tokens
        silent = [request for request in counts if request not in self.grown]
        scheduler, number = self.scheduler, output.step
        event = ev.StepScheduled(
            number, number, 1, len(scheduler.running), len(scheduler.waiting),
            self.manager.block_pool.get_num_free_blocks(), len(silent), [*counts],
            [*counts.values()], output.scheduled_new_reqs, output.scheduled_resumed_reqs,
            sorted(output.preempted_req_ids), output.finished_req_ids,
        )  # fmt: skip
        if output.preempted_req_ids:
            event.kept = silent
        self.batch.append(event)
        sampled = {
            request: int(not scheduler.requests[request].is_prefill_chunk) for request in counts
        }
        scheduler.update_from_output(output, sampled)
        self.batch.append(ev.StepUpdated(number, number, 1, [*sampled.values()]))
        self.writer.write(self.batch)
        self.num_events += len(self.batch)
        self.batch = []


def write(path: Path, num_events: int, seed: int = 0) -> Path:
    """A trace of at least that many events."""
    rng = random.Random(seed)
    made = Writer(path)
    count = 0
    while made.num_events < num_events:
        while len(made.scheduler.requests) < NUM_REQUESTS:
            made.arrive(count, rng)
            count += 1
        made.step()
    made.writer.close({"dropped": 0, "failures": {}})
    return path
