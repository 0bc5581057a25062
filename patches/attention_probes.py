"""What is read of attention calls: which kernel, which variant and why, how long, and what the shadow found.

A call is noted where it is made and told at the end of its step, when the number of the step and the times of the
device are known.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from vllm_trace.device_clock import elapsed_ns, give_back, mark
from vllm_trace.events import AttentionCalled, AttentionPlanned
from vllm_trace.hooks.table import probe
from vllm_trace.recorder import Recorder


class Call(NamedTuple):
    """One attention call, or one kernel of it."""

    kernel: str
    layer: Any
    started_ns: int
    dur_ns: int
    marks: tuple[Any, Any] = (None, None)
    found: Any = None
    """What the shadow computed for the whole batch (``vllm_trace.backend.shadow.Found``)."""
    rows: tuple[int, int] = (0, 1 << 30)
    """Rows of the batch that this kernel computed: first and last-but-one."""
    plan: Any = None
    """(variant, numbers, reason), where the call itself chose."""


@probe()
def attention_forward(
    defer, recorder, started, ended, self, layer, query, kv_cache, attn_metadata, output
):
    if attn_metadata is not None:
        if recorder.shadow is None:
            defer(attention_called, type(self), layer, started, ended)
        else:
            found = recorder.shadow(self, layer, query, kv_cache, attn_metadata, output)
            defer(attention_called, type(self), layer, started, ended, (None, None), found)


def _mark_query(query):
    return mark(query)


@probe(before=_mark_query)
def attention_forward_on_device(
    defer, recorder, started, ended, seen, self, layer, query, kv_cache, attn_metadata, output
):
    if attn_metadata is not None:
        marks = (seen, mark(query))
        if recorder.shadow is None:
            defer(attention_called, type(self), layer, started, ended, marks)
        else:
            found = recorder.shadow(self, layer, query, kv_cache, attn_metadata, output)
            defer(attention_called, type(self), layer, started, ended, marks, found)


def attention_called(
    rec: Recorder,
    impl: type,
    layer: Any,
    started: int,
    ended: int,
    marks: tuple[Any, Any] = (None, None),
    found: Any = None,
) -> None:
    call = Call(impl.__name__, layer, started, ended - started, marks, found)
    rec.state.setdefault("calls", []).append(call)


def paged_forward(rec: Recorder, *forward: Any) -> None:
    """What our own backend did in one forward (``vllm_trace.backend.calls.Observer``)."""
    *seen, made = forward
    found = rec.shadow(*seen) if rec.shadow is not None else None
    rec.defer(paged_called, seen[1], made, found)


def paged_called(rec: Recorder, layer: Any, made: list[Any], found: Any) -> None:
    for one in made:
        plan = (one.variant, one.numbers, one.reason)
        call = Call(one.kernel, layer, one.started_ns, one.dur_ns, one.marks, found, one.rows, plan)
        rec.state.setdefault("calls", []).append(call)


def emit_calls(rec: Recorder, step: int, calls: list[Call], requests: list[int]) -> None:
    by_kernel: dict[str, list[Call]] = {}
    for call in calls:
        by_kernel.setdefault(call.kernel, []).append(call)
    for kernel, some in by_kernel.items():
        layers = [layer_index(getattr(call.layer, "layer_name", "")) for call in some]
        _emit_choices(rec, step, some, layers)
        event = AttentionCalled(step, kernel, layers, [c.started_ns for c in some], [])
        on_device = all(call.marks[0] is not None for call in some)
        event.clock = "cuda" if on_device else "host"
        event.dur_ns = [elapsed_ns(*c.marks) if on_device else c.dur_ns for c in some]
        if some[0].found is not None:
            _add_errors(event, some, requests)
        rec.emit(event)
        for call in some:
            give_back(call.marks)


def _emit_choices(rec: Recorder, step: int, calls: list[Call], layers: list[int]) -> None:
    """Calls that chose for themselves: one event for all layers that chose alike."""
    alike: list[tuple[Any, list[int]]] = []
    for call, layer in zip(calls, layers, strict=True):
        if call.plan is None:
            continue
        if alike and alike[-1][0] == call.plan:
            alike[-1][1].append(layer)
        else:
            alike.append((call.plan, [layer]))
    for (variant, numbers, reason), some in alike:
        rec.emit(AttentionPlanned(step, 0, calls[0].kernel, variant, numbers, some, reason))


def _add_errors(event: AttentionCalled, calls: list[Call], requests: list[int]) -> None:
    """What the shadow found: of each layer the row with the largest relative error."""
    event.tolerance = calls[0].found.tolerance
    for call in calls:
        first, end = call.rows
        worst = max(call.found.rows[first:end], key=lambda row: row.relative, default=None)
        if worst is not None:
            request = requests[worst.row] if worst.row < len(requests) else -1
            event.worst.append((worst.absolute, worst.relative, request, worst.position))
        beyond = call.found.beyond
        if beyond and first <= beyond["row"] < end:
            row = beyond["row"]
            request = requests[row] if row < len(requests) else -1
            layer = layer_index(getattr(call.layer, "layer_name", ""))
            event.beyond = beyond | {"request": request, "layer": layer}


def layer_index(name: str) -> int:
    """The layer's number in the model: 3 for ``model.layers.3.self_attn.attn``; -1 if none."""
    match = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(match[1]) if match else -1
