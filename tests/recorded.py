"""Traces for the tests of ``explain`` and ``diff``: recorded once in this process, or by hand."""

from __future__ import annotations

import atexit
import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from vllm_trace.diff import Diff, diff
from vllm_trace.diff.words import render
from vllm_trace.events import (
    SCHEMA_VERSION,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    EngineConfigured,
    Event,
    KVGroup,
    PrefixLookedUp,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    SlotsAllocated,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.explain import Story, explain
from vllm_trace.trace import Trace, read_trace
from vllm_trace.tracefile import SUFFIX
from vllm_trace.tracewriter import TraceWriter

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: no engine to record"
)


@cache
def recorded(name: str, level: str = "full", tokens: bool = False, **engine_args: Any) -> Path:
    """The trace of a scenario, run on a real engine in this process, once for the same arguments."""
    from vllm_trace import hooks, runner, scenario
    from vllm_trace.options import Options

    folder = Path(tempfile.mkdtemp(prefix=f"vllm-trace-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    chosen = scenario.load(name)
    hooks.attach(Options(dir=str(folder), level=level, tokens=tokens))
    try:
        llm, _ = runner.start_engine(chosen, engine_args=engine_args)
        runner.run_workload(llm, chosen)
        runner.stop_engine(llm)
    finally:
        hooks.detach()
    return folder


def written(
    folder: Path, events: Sequence[Event], *, ended: str = "", dropped: int = 0, **header: Any
) -> Path:
    """A trace of one process with these events."""
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"schema": SCHEMA_VERSION, "role": "main", "pid": 7, "host": "here", "level": "full"}
    writer = TraceWriter(folder / f"main-7{SUFFIX}", usual | {"vllm": "0.32.0"} | header)
    writer.write(list(events))
    writer.close({"dropped": dropped, "failures": {}} | ({"ended": ended} if ended else {}))
    return folder


def edited(
    source: Path, folder: Path, edit: Callable[[list[Event]], list[Event] | None], **more: Any
) -> Path:
    """The trace with its events changed: ``edit`` gets the list, and returns another or none."""
    trace = read_trace(source)
    events = list(trace.events())
    changed = edit(events)
    return written(folder, events if changed is None else changed, **trace.header, **more)


def torn(source: Path, folder: Path) -> Path:
    """The first half of the trace's file, cut off within one of many frames."""
    trace, path = read_trace(source), folder / f"torn{SUFFIX}"
    writer = TraceWriter(path, trace.header, tail_size=16384)
    for batch in trace.files[0].batches():
        writer.write(batch)
    writer.close({})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def find(source: Path | Trace, kind: type[Event], **fields: Any) -> tuple[int, Any]:
    """(number, event) of the first event of that type with these values."""
    trace = read_trace(source) if isinstance(source, Path) else source
    for record in trace.records():
        event = record.event
        if type(event) is kind and all(getattr(event, k) == v for k, v in fields.items()):
            return record.number, event
    raise LookupError(f"no {kind.kind} with {fields}")


# By hand --------------------------------------------------------------------------------


def engine(num_blocks: int = 9, block_size: int = 4, groups: Any = None, **settings: Any) -> Event:
    usual = {
        "enable_prefix_caching": True,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_num_scheduled_tokens": 64,
        "max_model_len": 256,
        "full_sequence_must_fit": True,
    }
    groups = groups or [KVGroup("FullAttentionSpec", block_size, ["layers.0"])]
    return EngineConfigured(1, block_size, block_size, num_blocks, groups, usual | settings)


def arrived(request: int, name: str, tokens: int, hashes: Sequence[int] = (), **more: Any) -> Event:
    return RequestArrived(
        request, 2, name, tokens, 8, 0, 0.0, list(hashes), {"temperature": 0.0}, **more
    )


def looked_up(request: int, tokens: int, hit: int = 0, blocks: Any = ((),)) -> Event:
    return PrefixLookedUp(request, tokens, hit, [list(row) for row in blocks], [])


def admitted(
    request: int, tokens: int, blocks: Sequence[int], hashes: Sequence[int] = (), free: int = 0
) -> list[Event]:
    """Lookup without a hit, and the blocks for all tokens."""
    made: list[Event] = [looked_up(request, tokens), BlocksTaken(list(blocks))]
    if hashes:
        cached = list(blocks)[: len(hashes)]
        made.append(BlocksCached(request, 0, 0, cached, list(hashes)))
    return [*made, SlotsAllocated(request, tokens, 0, [list(blocks)], [], free)]


def step(
    number: int, requests: Sequence[int], tokens: Sequence[int], free: int = 0, **more: Any
) -> Event:
    waiting = more.pop("num_waiting", 0)
    return StepScheduled(
        number,
        number * 10,
        1,
        len(requests),
        waiting,
        free,
        0,
        list(requests),
        list(tokens),
        **more,
    )


def updated(number: int, tokens: Sequence[Sequence[int]]) -> Event:
    return StepUpdated(
        number, number * 10 + 5, 1, [len(row) for row in tokens], [list(row) for row in tokens]
    )


def ended(request: int, blocks: Sequence[int], reason: str = "length") -> list[Event]:
    tail_first = list(blocks)[::-1]
    return [
        BlocksFreed(tail_first, [0] * len(tail_first)),
        RequestFreed(request),
        RequestFinished(request, 9, reason, 1, 0),
    ]


# What is told of them ------------------------------------------------------------------


def story(folder: Path, name: str) -> Story:
    """The life of a request."""
    return explain(read_trace(folder), name)


def told(folder: Path, name: str) -> list[str]:
    """The sentences, without the numbers of events: they depend on what else is recorded."""
    return [re.sub(r"event \d+", "event N", line.text) for line in story(folder, name).lines]


def compared(a: Path, b: Path) -> Diff:
    """``diff`` of two traces, which can be shown in a terminal and as JSON."""
    found = diff(read_trace(a), read_trace(b))
    assert all(len(line) <= 80 for line in render(found).splitlines())
    json.dumps(found.to_dict())
    return found
