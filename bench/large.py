"""A trace of many requests that all run in every step: what a report of a busy server has to cope with.

Made by hand, event by event, with what a scheduler and a worker would tell; no engine is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_trace.events import (
    SCHEMA_VERSION,
    AttentionCalled,
    AttentionPlanned,
    BlocksCached,
    BlocksTaken,
    EngineConfigured,
    Event,
    KVGroup,
    PrefixLookedUp,
    RequestArrived,
    SlotsAllocated,
    SlotsMapped,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
    TableRowChanged,
)
from vllm_trace.tracefile import SUFFIX
from vllm_trace.tracewriter import TraceWriter

BLOCK = 32
PROMPT = 64
STEP_NS = 20_000_000


def write(folder: Path, num_requests: int = 200, num_steps: int = 2000) -> Path:
    """Write the trace; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    header = {
        "schema": SCHEMA_VERSION, "role": "main", "pid": 1, "host": "here", "level": "full",
        "vllm": "0.32.0", "platform": "cpu",
    }  # fmt: skip
    path = folder / f"main-1{SUFFIX}"
    writer = TraceWriter(path, header)
    per_request = -(-(PROMPT + num_steps) // BLOCK)
    num_blocks = num_requests * per_request + 1
    writer.write([_engine(num_blocks, num_requests)])
    tables: list[list[int]] = [[] for _ in range(num_requests)]
    free = list(range(num_blocks - 1, 0, -1))
    for step in range(1, num_steps + 1):
        writer.write(_step(step, tables, free))
    writer.close({"dropped": 0, "failures": {}})
    return path


def _engine(num_blocks: int, num_requests: int) -> EngineConfigured:
    settings: dict[str, Any] = {
        "model": "made-by-hand", "dtype": "float32", "policy": "fcfs", "async_scheduling": False,
        "enable_prefix_caching": True, "max_num_seqs": num_requests,
        "max_num_batched_tokens": PROMPT * num_requests,
    }  # fmt: skip
    groups = [KVGroup("FullAttentionSpec", BLOCK, ["layers.0", "layers.1"])]
    return EngineConfigured(1, BLOCK, BLOCK, num_blocks, groups, settings)


def _hash(request: int, place: int) -> int:
    return (request * 1_000_003 + place + 1) * 0x9E3779B97F4A7C15 % (1 << 63)


def _step(step: int, tables: list[list[int]], free: list[int]) -> list[Event]:
    events: list[Event] = []
    rows: list[Event] = []
    at = step * STEP_NS
    everyone = list(range(len(tables)))
    length = PROMPT + step - 1
    given = PROMPT if step == 1 else 1
    for request, table in enumerate(tables):
        if step == 1:
            hashes = [_hash(request, place) for place in range(PROMPT // BLOCK)]
            name = f"cmpl-{request:032x}-0"
            events.append(
                RequestArrived(request, 1000, name, PROMPT, 4096, 0, 0.0, hashes, {"n": 1})
            )
            events.append(PrefixLookedUp(request, PROMPT, 0, [[]], []))
        first, wanted = len(table), -(-length // BLOCK)
        if wanted > first:
            new = [free.pop() for _ in range(wanted - first)]
            events.append(BlocksTaken(new))
            table += new
            events.append(SlotsAllocated(request, given, 0, [new], [], len(free)))
            rows.append(TableRowChanged(step, 0, request, first, new))
        if length % BLOCK == 0:
            place = length // BLOCK - 1
            hashes = [_hash(request, place)]
            events.append(BlocksCached(request, 0, place, [table[place]], hashes))
    tokens = [given] * len(tables)
    new_ones = everyone if step == 1 else []
    events.append(
        StepScheduled(
            step, at, 900_000, len(tables), 0, len(free), 0, everyone, tokens, new=new_ones
        )
    )
    slots = [
        table[place // BLOCK] * BLOCK + place % BLOCK
        for table in tables
        for place in range(length - given, length)
    ]
    lengths = [length] * len(tables)
    forward = 12_000_000 + step * 1000 % 3_000_000
    return [
        *events, *rows,
        SlotsMapped(step, 0, BLOCK, BLOCK, everyone, tokens, lengths, slots),
        AttentionPlanned(step, 0, "cpu_attention_with_kv_cache", "vec/whole", {"max_seq_len": length}),
        AttentionCalled(step, "cpu", [0, 1], [at + 2_000_000, at + 6_000_000], [forward // 5] * 2),
        StepExecuted(
            step, at + 1_000_000, forward + 900_000, at + 1_500_000, forward, 0, sum(tokens),
            sum(tokens), "eager",
        ),
        StepSampled(step, at + forward + 2_000_000, 300_000, 0),
        StepUpdated(step, at + forward + 2_500_000, 700_000, [1] * len(tables)),
    ]  # fmt: skip
