"""A difference in words, with the state of both sides, the events before it and a program that shows it again."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from typing import Any

from vllm_trace.divergence import Divergence, PoolState, classify
from vllm_trace.events import (
    BackendSelected,
    BlocksCached,
    EngineConfigured,
    Event,
    PrefixCacheReset,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    StepUpdated,
    to_dict,
)
from vllm_trace.mini.kv_cache_manager import KVCacheManager
from vllm_trace.replay.again import CALL_ENDS, script
from vllm_trace.replay.recorded import Recorded
from vllm_trace.replay.segments import COMPARED_OF_WORKERS, ENDS, OF_WORKERS
from vllm_trace.trace import REQUEST_LISTS, Record, Trace

STORY = 12
"""Events told before a divergence."""

OUTSIDE = frozenset(
    {EngineConfigured, BackendSelected, RequestArrived, RequestFinished, PrefixCacheReset}
)
"""What happens between steps is no part of the next one."""

LONG = {"sampling", "candidates", "settings", "request_id", "arrival_unix", "num_kept", "kept"}
"""Fields that a story leaves out."""

LINE = 240
"""Characters of an event in a story."""


def describe(
    difference: Any, driver: Any, trace: Trace, process: int, last: int, whole_steps: bool
) -> Divergence:
    """Put a difference into words; reads the trace up to it again.

    ``last`` is the number of the last event of ``process`` that ``mini`` has taken part in. With
    ``whole_steps`` ``mini`` came to its calls by itself, and the step is what is shown again.
    """
    manager: KVCacheManager = driver.manager
    story: deque[Record] = deque(maxlen=STORY)
    before, end = Recorded(manager.rules), None
    call: list[Record] = []
    """The events of the call, or of the step, in which both differ."""
    boundaries = ENDS if whole_steps else CALL_ENDS
    last = max(difference.number, last)
    for record in trace.records():
        number, kind = record.number, type(record.event)
        if number > last and end is not None:
            break
        if number <= difference.number and (kind not in OF_WORKERS or kind in COMPARED_OF_WORKERS):
            story.append(record)
        if record.process != process:
            continue
        call.append(record)
        if end is not None:
            continue
        if kind in boundaries and number >= difference.number:
            end = record.event
        elif number < difference.number and kind in boundaries | OUTSIDE:
            for one in call:
                before.take(one.event)
            call.clear()
    after = deepcopy(before)
    for one in call:
        if one.number <= last:
            after.take(one.event)

    def name(request: Any) -> str:
        return trace.names.get(request, f"#{request}")

    told = next((one.event for one in call if one.number == difference.number), None)
    if type(told) is BlocksCached and type(end) in ENDS and not whole_steps:
        end = told  # in a call that left no event of its own
    if type(end) is StepUpdated:
        freed = (one.event for one in call if type(one.event) is RequestFreed)
        end = next(freed, end)
    settings = driver.settings | {"release": manager.rules.release}
    return Divergence(
        event=difference.number,
        kind=classify(difference.recorded, difference.mini),
        recorded=_words(difference.recorded, trace),
        mini=_words(difference.mini, trace),
        recorded_state=after.state_by(name),
        mini_state=_state_of(manager, name),
        story=[_line(record, trace) for record in story],
        script=script(before, end, difference, name, settings),
    )


def _state_of(manager: KVCacheManager, name: Any) -> PoolState:
    pool = manager.block_pool
    tables = {name(request): [*manager.get_block_ids(request)] for request in manager.requests}
    counts = {b.block_id: b.ref_cnt for b in pool.blocks if b.ref_cnt > 0 and not b.is_null}
    return PoolState([block.block_id for block in pool.free_block_queue], tables, counts)


def _words(fact: Any, trace: Trace) -> str:
    if fact is None:
        return "nothing"
    kind, *values = fact
    if kind.startswith(("request.", "slots", "prefix.looked", "worker", "table", "blocks.cached")):
        if values and isinstance(values[0], int):
            values[0] = trace.names.get(values[0], values[0])
    elif kind.endswith("requests") or kind == "preempted":
        values = [_named(value, trace) for value in values]
    return f"{kind} {' '.join(str(value) for value in values)}"


def _named(requests: Any, trace: Trace) -> str:
    """``[r-0, r-1]``."""
    return f"[{', '.join(trace.names.get(one, str(one)) for one in requests)}]"


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
        elif key in REQUEST_LISTS:
            value = _named(value, trace)
        if key.endswith("hashes"):
            value = [f"{one:016x}"[-6:] for one in value]  # enough to tell them apart
        said.append(f"{key}={value}".replace("'", ""))
    line = f"event {record.number}: {kind} {' '.join(said)}"
    return line if len(line) <= LINE else f"{line[: LINE - 2]} …"
