"""Edited traces: events that are well formed each by itself, and make no sense together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec

from vllm_trace.events import AnyEvent
from vllm_trace.tracefile import TraceFile
from vllm_trace.tracewriter import TraceWriter

NUMBERS = (
    0, -1, 1, 2, 7, 10**6, -(2**31), 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63),
)  # fmt: skip
FLOATS = (0.0, -1.0, 1e308, float("inf"), float("nan"))
TEXTS = (
    "", "[/x]", ":smile:", "\x1b[31mred", "\x9b31m", "\u202eback", "a" * 5000, "\x00", "<script>",
    "../../x", "two\nlines", "é",
)  # fmt: skip

_decode = msgspec.msgpack.Decoder(list[AnyEvent]).decode
_encode = msgspec.msgpack.encode


def value(old: Any, random: random.Random) -> Any:
    """Another value of about the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return random.choice([*NUMBERS, old + 1, old - 1])
    if isinstance(old, float):
        return random.choice(FLOATS)
    if isinstance(old, str):
        return random.choice(TEXTS)
    if isinstance(old, list):
        place = random.randrange(len(old)) if old else 0
        within = [*old[:place], value(old[place], random), *old[place + 1 :]] if old else [7]
        return random.choice([[], old[:-1], old + old[:1], old[::-1], within])
    if isinstance(old, dict) and old:
        name = random.choice(sorted(old))
        rest = {key: each for key, each in old.items() if key != name}
        return rest if random.random() < 0.4 else rest | {name: value(old[name], random)}
    return old


def mutated(source: Path, target: Path, seed: int) -> list[str]:
    """Write the trace anew with one to five edits; says which they were."""
    rng = random.Random(seed)
    file = TraceFile(source)
    events = [msgspec.msgpack.decode(_encode(e)) for batch in file.batches() for e in batch]
    said = []
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(rng.choice([min(8, len(events)), len(events)]))
        kind = rng.random()
        if kind < 0.7:
            event = list(events[place])
            field = rng.randrange(1, len(event))
            event[field] = value(event[field], rng)
            try:
                _decode(_encode([event]))
            except msgspec.DecodeError:
                continue  # a reader refuses that one by itself
            said.append(f"event {place + 1}: {events[place]} -> {event}"[:300])
            events[place] = event
        elif kind < 0.8:
            said.append(f"without event {place + 1}")
            del events[place]
        elif kind < 0.9:
            said.append(f"event {place + 1} twice")
            events.insert(rng.randrange(len(events)), events[place])
        else:
            other = rng.randrange(len(events))
            said.append(f"events {place + 1} and {other + 1} in each other's place")
            events[place], events[other] = events[other], events[place]
    writer = TraceWriter(target, dict(file.header))
    writer.write_encoded(_encode(events), len(events))
    writer.close({"dropped": 0, "failures": {}})
    return said
