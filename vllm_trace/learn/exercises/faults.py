"""Traces with one thing wrong in them: a block is taken that somebody holds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from vllm_trace.events import (
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    Event,
    SlotsAllocated,
    TableRowChanged,
)
from vllm_trace.learn import runs
from vllm_trace.trace import read_trace
from vllm_trace.tracewriter import TraceWriter


def clean(scenario: str) -> list[Event]:
    """The events of a shipped trace."""
    return list(read_trace(runs.shipped(scenario)).events())


def inject(events: list[Event], seed: int) -> tuple[list[Event], int]:
    """Change one block id into one that is held, wherever the taker's table says it; and where it was."""
    rng = random.Random(seed)
    held: set[int] = set()
    places: list[tuple[int, list[int]]] = []
    for index, seen in enumerate(events):
        if isinstance(seen, BlocksTaken):
            if held:
                places.append((index, sorted(held)))
            held |= set(seen.blocks)
        elif isinstance(seen, BlocksTouched | BlocksFreed):
            for block, count in zip(seen.blocks, seen.ref_cnts):
                (held.add if count else held.discard)(block)
    index, choices = rng.choice(places[len(places) // 4 :] or places)
    event: Any = events[index]
    place = rng.randrange(len(event.blocks))
    right, wrong = event.blocks[place], rng.choice(choices)
    for later in events[index : index + 40]:
        if isinstance(later, BlocksTaken) and later is event:
            later.blocks = [wrong if b == right else b for b in later.blocks]
        elif isinstance(later, SlotsAllocated):
            later.blocks = [[wrong if b == right else b for b in row] for row in later.blocks]
            break
    for later in events[index:]:
        if isinstance(later, TableRowChanged) and right in later.blocks:
            later.blocks = [wrong if b == right else b for b in later.blocks]
            break
    return events, index + 1


def write(path: Path, seed: int) -> Path:
    """The trace of exercise 9 for this reader."""
    source = read_trace(runs.shipped("batch"))
    events, _ = inject(list(source.events()), seed)
    if path.exists():
        path.unlink()
    writer = TraceWriter(path, dict(source.header))
    writer.write(events)
    writer.close({"dropped": 0, "failures": {}})
    return path
