"""What is read in a worker: the flattened batch, block tables, slots and times.

The batch is copied while the model's forward context is set: the tables and slots are then the
ones that the kernels receive. Facts of one step wait in ``rec.state`` until ``execute_model``
returns, because only it knows the number of the step. On a GPU nothing here waits for the stream:
copies go to pinned memory and times come from events on the stream, and the step is decoded at
the first flush that finds the device past them.
"""

from __future__ import annotations

import sys
from typing import Any

from vllm_trace.device_clock import elapsed_ns, give_back, mark, passed
from vllm_trace.events import (
    AttentionPlanned,
    SlotsMapped,
    StepExecuted,
    StepSampled,
    TableRowChanged,
)
from vllm_trace.hooks.table import probe
from vllm_trace.patches.attention_probes import Call, emit_calls
from vllm_trace.patches.kernel_variants import plan_of, splits_of_plan
from vllm_trace.recorder import Recorder

# The step -------------------------------------------------------------------------------


@probe()
def execute_model(defer, started, ended, self, scheduler_output):
    defer(step_executed, self, scheduler_output, started, ended)


def step_executed(
    rec: Recorder, runner: Any, out: Any, started: int, ended: int
) -> StepExecuted | None:
    forward = rec.state.pop("forward", None)
    calls = rec.state.pop("calls", ())
    rec.rank = runner.vllm_config.parallel_config.rank
    step = getattr(out, "vtrace_step", 0)
    rec.state["executed_step"] = step
    gone = [rec.retire(name) for name in out.finished_req_ids if name in rec.numbers]
    if forward is None or forward["started"] < started:
        rec.state.setdefault("gone", []).extend(gone)
        return StepExecuted(step, started, ended - started, 0, 0, rec.rank, 0, 0, "none")
    event = StepExecuted(
        step,
        started,
        ended - started,
        forward["started"],
        forward["ended"] - forward["started"],
        rec.rank,
        out.total_num_scheduled_tokens,
        forward["num_tokens_padded"],
        forward["mode"],
    )
    calls = [call for call in calls if call.started_ns >= started]
    batch = forward["batch"]
    requests = rec.numbers_of(batch[0]) if batch is not None else []
    values = (event, runner, requests, batch[1] if batch else (), calls, forward["marks"], gone)
    marks = [*forward["marks"], *(one for call in calls for one in call.marks)]
    if any(one is not None for one in marks):
        rec.defer_until(lambda wait: passed(marks, wait), step_finished, *values)
        return None
    return step_finished(rec, *values)


def step_finished(
    rec: Recorder,
    event: StepExecuted,
    runner: Any,
    requests: list[int],
    entries: Any,
    calls: list[Call],
    marks: tuple[Any, ...],
    gone: list[int],
) -> StepExecuted:
    """The device is past the step: its tables and times can be read."""
    rec.state.setdefault("gone", []).extend(gone)
    _emit_batch(rec, event.step, runner, requests, entries)
    rec.state["gone"] = []
    emit_calls(rec, event.step, calls, requests)
    first, last, copied = marks
    if first is not None and last is not None:
        event.device_dur_ns = elapsed_ns(first, last)
    give_back((first, last, copied))
    return event


def _mark_before(input_ids, inputs_embeds):
    return mark(input_ids if input_ids is not None else inputs_embeds)


@probe(before=_mark_before)
def model_forward(defer, started, ended, seen, self, input_ids, inputs_embeds):
    last = mark(input_ids if input_ids is not None else inputs_embeds)
    batch = read_batch(self)
    copied = mark(input_ids if input_ids is not None else inputs_embeds)
    defer(forward_done, started, ended, *read_context(), batch, (seen, last, copied))


@probe()
def model_forward_light(defer, started, ended):
    defer(forward_done, started, ended, *read_context(), None)


def forward_done(
    rec: Recorder,
    started: int,
    ended: int,
    mode: str,
    num_tokens_padded: int,
    batch: Any,
    marks: tuple[Any, ...] = (None, None, None),
) -> None:
    rec.state["forward"] = {
        "started": started,
        "ended": ended,
        "mode": mode,
        "num_tokens_padded": num_tokens_padded,
        "batch": batch,
        "marks": marks,
    }


@probe(flush=True)
def sample_tokens(defer, started, ended):
    defer(step_sampled, started, ended)


def step_sampled(rec: Recorder, started: int, ended: int) -> StepSampled:
    return StepSampled(rec.state.get("executed_step", 0), started, ended - started, rec.rank)


# The batch ------------------------------------------------------------------------------


def read_context() -> tuple[str, int]:
    """How the forward runs and for how many tokens, from vLLM's forward context."""
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    mode = getattr(context.cudagraph_runtime_mode, "name", "NONE").lower()
    descriptor = context.batch_descriptor
    return ("eager" if mode == "none" else mode), getattr(descriptor, "num_tokens", 0)


def read_batch(runner: Any) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Copy what the kernels are about to get: one entry for each distinct metadata object.

    An entry is (first layer, metadata, plan, block table, slots, sequence lengths, query starts).
    """
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    metadata = context.attn_metadata
    names = list(runner.input_batch.req_ids)
    entries: dict[int, tuple[Any, ...]] = {}
    for by_layer in metadata if isinstance(metadata, list) else [metadata]:
        for layer, given in (by_layer or {}).items():
            if id(given) in entries or not hasattr(given, "block_table"):
                continue
            tensors = _parts(len(names), given, _slots(context, layer, given))
            plan = plan_copy(given)
            entries[id(given)] = (layer, given, plan, *(host_copy(t) for t in tensors))
    return names, list(entries.values())


def _parts(num_rows: int, given: Any, slots: Any) -> tuple[Any, Any, Any, Any]:
    """What is worth copying: on a GPU only the part that this step uses, not the whole buffer."""
    table, lens, starts = given.block_table, given.seq_lens, given.query_start_loc
    if table.is_cuda:
        table, lens, starts = table[:num_rows], lens[:num_rows], starts[: num_rows + 1]
        slots = slots[: given.num_actual_tokens]
    return table, slots, lens, starts


def _slots(context: Any, layer: str, given: Any) -> Any:
    slots = getattr(given, "slot_mapping", None)
    return slots if slots is not None else context.slot_mapping[layer]


def plan_copy(given: Any) -> Any:
    """A copy of FlashAttention 3's plan that was made ahead of time, or None; `splits_of_plan` reads it."""
    plan = getattr(given, "scheduler_metadata", None)
    return host_copy(plan) if plan is not None and plan.is_cuda else None


def host_copy(tensor: Any) -> Any:
    """A copy on the host: there when the call returns, or when the stream is past it."""
    if not tensor.is_cuda:
        return tensor.detach().cpu().numpy().copy()
    torch = sys.modules["torch"]
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor.detach(), non_blocking=True)


def as_array(copy: Any) -> Any:
    """A finished copy as a numpy array."""
    return copy.numpy() if hasattr(copy, "numpy") else copy


def _emit_batch(rec: Recorder, step: int, runner: Any, requests: list[int], entries: Any) -> None:
    for layer, given, ahead, *copies in entries:
        table, slots, seq_lens, starts = map(as_array, copies)
        group, block_size, kernel_block_size = _sizes(rec, runner, layer)
        lens = seq_lens[: len(requests)].tolist()
        emit_rows(rec, step, group, requests, lens, table, kernel_block_size)
        query_lens = (starts[1 : len(requests) + 1] - starts[: len(requests)]).tolist()
        rec.emit(
            SlotsMapped(
                step,
                group,
                block_size,
                kernel_block_size,
                requests,
                query_lens,
                lens,
                slots[: sum(query_lens)].tolist(),
            )
        )
        splits = splits_of_rows(runner, layer, given, ahead, query_lens)
        plan = plan_of(given, splits)
        if plan is not None:
            rec.emit(AttentionPlanned(step, group, *plan))


def splits_of_rows(
    runner: Any, layer: str, given: Any, ahead: Any, query_lens: list[int]
) -> list[int] | None:
    """Of each row, into how many parts a plan that was made on the device cuts it; None without one."""
    if ahead is None:
        return None
    one = runner.compilation_config.static_forward_context[layer]
    return splits_of_plan(
        as_array(ahead).tolist(),
        query_lens,
        num_rows=given.query_start_loc.shape[0] - 1,
        head_size=one.head_size,
        causal=given.causal or bool(one.sliding_window),
    )


def _sizes(rec: Recorder, runner: Any, layer: str) -> tuple[int, int, int]:
    """(group, tokens in a manager's block, tokens in a kernel's block) of a layer."""
    known = rec.state.setdefault(("sizes", id(runner)), {})
    if layer not in known:
        groups = runner.kv_cache_config.kv_cache_groups
        index = next(i for i, group in enumerate(groups) if layer in group.layer_names)
        block_size = groups[index].kv_cache_spec.block_size
        kernel = block_size
        sizes = getattr(runner, "_kernel_block_sizes", None)  # 0.20
        if sizes is not None and index < len(sizes):
            kernel = sizes[index]
        for attention_group in runner.attn_groups[index]:
            if layer in attention_group.layer_names:
                kernel = getattr(attention_group, "kernel_block_size", None) or kernel
        known[layer] = (index, block_size, kernel)
    return known[layer]


def emit_rows(
    rec: Recorder,
    step: int,
    group: int,
    requests: list[int],
    seq_lens: list[int],
    table: Any,
    kernel_block_size: int,
) -> None:
    """One event for each row that is not what the same request's row was in the last step."""
    last = rec.state.setdefault(("rows", group), {})
    now: dict[int, Any] = {}
    for index, request in enumerate(requests):
        length = -(-seq_lens[index] // kernel_block_size)
        row = table[index, :length]
        before = last.get(request)
        first = 0
        if before is not None:
            shared = min(len(before), length)
            same = before[:shared] == row[:shared]
            first = shared if same.all() else int(same.argmin())
        if before is None or first < length or length < len(before):
            rec.emit(TableRowChanged(step, group, request, first, row[first:].tolist()))
        now[request] = row
    # Requests that did not run in this step keep their row until they finish.
    for request in rec.state.get("gone", ()):
        last.pop(request, None)
    last.update(now)
    if len(last) > 4 * len(now) + 1024:
        rec.state[("rows", group)] = now
