"""What is read in a worker: the flattened batch, block tables, slots, kernels and backends.

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
    BackendSelected,
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


# The V2 runner --------------------------------------------------------------------------

# It runs on CUDA only, and gathers tables and slots by kernels, for all backends alike. The probes copy
# what was gathered, as they do for the V1 runner: to pinned memory, read when the device is past the step.
# Profiling, graph capture and warm-up go through `execute_model` too, but not through the runner's
# own `prepare_attn`.


@probe()
def execute_model_v2(defer, started, ended, self, scheduler_output, dummy_run):
    last = mark(self.input_buffers.input_ids)
    defer(step_executed_v2, self, scheduler_output, started, ended, dummy_run, last)


@probe()
def execute_model_v2_light(defer, started, ended, self, scheduler_output, dummy_run):
    defer(step_executed_v2, self, scheduler_output, started, ended, dummy_run, None)


def step_executed_v2(
    rec: Recorder, runner: Any, out: Any, started: int, ended: int, dummy_run: bool, last: Any
) -> StepExecuted | None:
    forward = rec.state.pop("forward_v2", {})
    calls = rec.state.pop("calls", ())
    marks = (forward.get("mark"), last)
    step = getattr(out, "vtrace_step", 0)
    if dummy_run or not step:
        give_back(marks)
        return None
    rec.rank = runner.vllm_config.parallel_config.rank
    rec.state["executed_step"] = step
    gone = [rec.retire(name) for name in out.finished_req_ids if name in rec.numbers]
    began = forward.get("started", 0)
    if began < started:
        give_back(marks)
        rec.state.setdefault("gone", []).extend(gone)
        return StepExecuted(step, started, ended - started, 0, 0, rec.rank, 0, 0, "none")
    event = StepExecuted(
        step,
        started,
        ended - started,
        began,
        ended - began,
        rec.rank,
        out.total_num_scheduled_tokens,
        forward.get("num_tokens_padded", 0),
        forward.get("mode", ""),
    )
    calls = [call for call in calls if call.started_ns >= started]
    names, groups = forward.get("batch") or ([], [])
    requests = rec.numbers_of(names)
    values: tuple[Any, ...] = (
        event,
        runner,
        requests,
        groups,
        forward.get("plans", ()),
        calls,
        marks,
        gone,
    )
    waited = [*marks, *(one for call in calls for one in call.marks)]
    if any(one is not None for one in waited):
        rec.defer_until(lambda wait: passed(waited, wait), step_finished_v2, *values)
        return None
    return step_finished_v2(rec, *values)


def step_finished_v2(
    rec: Recorder,
    event: StepExecuted,
    runner: Any,
    requests: list[int],
    groups: list[tuple[Any, ...]],
    plans: list[tuple[Any, ...]],
    calls: list[Call],
    marks: tuple[Any, Any],
    gone: list[int],
) -> StepExecuted:
    """The device is past the step: its tables and times can be read."""
    rec.state.setdefault("gone", []).extend(gone)
    query_lens: list[int] = []
    for group, (block_size, *copies, starts) in enumerate(groups):
        table, slots, lens = (as_array(copy) for copy in copies)
        query_lens = (starts[1:] - starts[:-1]).tolist()
        batch = (requests, query_lens, lens.tolist())
        _emit_rows(rec, event.step, group, requests, batch[2], table, block_size)
        sizes = (block_size, block_size)
        rec.emit(SlotsMapped(event.step, group, *sizes, *batch, slots.tolist()))
    rec.state["gone"] = []
    for group, layer, given, ahead in plans:
        splits = _splits(runner, layer, given, ahead, query_lens)
        plan = plan_of(given, splits)
        if plan is not None:
            rec.emit(AttentionPlanned(event.step, group, *plan))
    emit_calls(rec, event.step, calls, requests)
    first, last = marks
    if first is not None and last is not None:
        event.device_dur_ns = elapsed_ns(first, last)
    give_back(marks)
    return event


@probe()
def prepare_attn_v2(defer, ended, result, self, input_batch):
    batch = read_batch_v2(self.block_tables.block_sizes, input_batch, *result)
    defer(batch_prepared_v2, ended, input_batch.num_tokens_after_padding, batch)


@probe()
def prepare_attn_v2_light(defer, ended, input_batch):
    defer(batch_prepared_v2, ended, input_batch.num_tokens_after_padding, None)


def batch_prepared_v2(rec: Recorder, ended: int, num_tokens_padded: int, batch: Any) -> None:
    rec.state["forward_v2"] = {
        "started": ended,
        "num_tokens_padded": num_tokens_padded,
        "batch": batch,
    }


def read_batch_v2(
    block_sizes: list[int], batch: Any, tables: Any, slots: Any
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Copy what was gathered: for each KV group (block size, table, slots, sequence lengths, query starts).

    The ids are the manager's; a backend whose kernel takes smaller blocks has them computed from these.
    Leaves out: context parallelism over devices, where a block stands for more tokens.
    """
    num_rows = batch.num_reqs
    starts = batch.query_start_loc_np[: num_rows + 1].copy()
    longest = int(batch.seq_lens_cpu_upper_bound[:num_rows].max())
    lens = host_copy(batch.seq_lens[:num_rows])
    groups = []
    for group, (size, table) in enumerate(zip(block_sizes, tables, strict=True)):
        row_copies = host_copy(table[:num_rows, : -(-longest // size)])
        slot_copies = host_copy(slots[group, : batch.num_tokens])
        groups.append((size, row_copies, slot_copies, lens, starts))
    return list(batch.req_ids), groups


@probe()
def metadata_built_v2(
    defer, ended, result, input_batch, cudagraph_mode, kv_cache_config, slot_mappings, for_capture
):
    padded = input_batch.num_tokens_after_padding
    plans = [] if for_capture else _distinct_plans(result, kv_cache_config)
    # Last: what runs from here to the end of `execute_model` is the forward.
    defer(metadata_known_v2, ended, padded, cudagraph_mode, plans, mark(slot_mappings))


@probe()
def metadata_built_v2_light(defer, ended, input_batch, cudagraph_mode):
    padded = input_batch.num_tokens_after_padding
    defer(metadata_known_v2, ended, padded, cudagraph_mode, (), None)


def metadata_known_v2(
    rec: Recorder, ended: int, num_tokens_padded: int, mode: Any, plans: Any, first: Any
) -> None:
    """The forward starts next: it is launched between now and the return of ``execute_model``."""
    name = mode.name.lower()
    forward = rec.state.setdefault("forward_v2", {})
    give_back([forward.get("mark")])  # of a run that was no step
    forward |= {
        "started": ended,
        "num_tokens_padded": num_tokens_padded,
        "mode": "eager" if name == "none" else name,
        "plans": plans,
        "mark": first,
    }


@probe(flush=True)
def sample_tokens_v2(defer, started, ended):
    defer(step_sampled_v2, started, ended)


def step_sampled_v2(rec: Recorder, started: int, ended: int) -> StepSampled | None:
    step = rec.state.pop("executed_step", 0)
    return StepSampled(step, started, ended - started, rec.rank) if step else None


def _distinct_plans(by_layer: dict[str, Any], config: Any) -> list[tuple[Any, ...]]:
    """(group, a layer, metadata, plan) of each metadata object; layers of one group share one."""
    found: dict[int, tuple[Any, ...]] = {}
    for layer, given in by_layer.items():
        if id(given) not in found:
            groups = enumerate(config.kv_cache_groups)
            group = next((i for i, each in groups if layer in each.layer_names), 0)
            found[id(given)] = (group, layer, given, _plan_copy(given))
    return list(found.values())


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
            plan = _plan_copy(given)
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


def _plan_copy(given: Any) -> Any:
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
        _emit_rows(rec, step, group, requests, lens, table, kernel_block_size)
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
        splits = _splits(runner, layer, given, ahead, query_lens)
        plan = plan_of(given, splits)
        if plan is not None:
            rec.emit(AttentionPlanned(step, group, *plan))


def _splits(
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


def _emit_rows(
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


# Backends -------------------------------------------------------------------------------


@probe()
def attention_made(defer, self):
    # Now: a backend may ask vLLM's current configuration for its block sizes.
    defer(backend_selected, self, self.attn_backend.get_supported_kernel_block_sizes())


def backend_selected(rec: Recorder, layer: Any, sizes: Any) -> BackendSelected:
    backend = layer.attn_backend
    ours = getattr(backend, "trace_name", None)
    name = ours() if ours is not None else backend.get_name()
    candidates = list(rec.state.get("candidates", ()))
    if name not in [candidate[0] for candidate in candidates]:
        candidates.append((name, ""))
    return BackendSelected(
        layer=layer.layer_name,
        backend=name,
        impl=type(layer.impl).__name__,
        candidates=candidates,
        settings={
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "head_size": layer.head_size,
            "kv_cache_dtype": str(layer.kv_cache_dtype),
            "block_sizes": [_size_rule(size) for size in sizes],
        }
        | ({"asked_for": True} if rec.state.get("asked_for") else {}),
    )


def _size_rule(size: Any) -> str:
    """``16`` for a fixed kernel block size, ``multiple of 32`` for vLLM's ``MultipleOf``."""
    base = getattr(size, "base", None)
    return f"multiple of {base}" if base else str(size)


@probe()
def cpu_backend_chosen(defer, result, selected_backend):
    defer(cpu_candidates, selected_backend, result)


def cpu_candidates(rec: Recorder, asked: Any, path: str) -> None:
    """The CPU platform has one class for a layer; another one asked for is only logged."""
    name = getattr(asked, "name", None)
    rejected = f"Cannot use {name} backend on CPU."
    chosen = "CPU_MLA" if "mla" in path.lower() else "CPU_ATTN"
    rec.state["candidates"] = [(name, rejected)] if name and name != chosen else []


@probe()
def cuda_backend_chosen(defer, selected_backend):
    defer(cuda_backend_asked, selected_backend)


def cuda_backend_asked(rec: Recorder, asked: Any) -> None:
    """A backend that the user names is taken if it is valid: no other one is looked at."""
    rec.state["asked_for"] = asked is not None
    if asked is not None:
        rec.state["candidates"] = []


@probe()
def cuda_backends_ranked_0_20(defer, result):
    defer(cuda_candidates_0_20, result)


def cuda_candidates_0_20(
    rec: Recorder, result: tuple[list[tuple[Any, int]], dict[Any, tuple[int, list[str]]]]
) -> None:
    """0.20 gives pairs of backend and priority."""
    valid, invalid = result
    ranked = [(p, backend.name, "; ".join(reasons)) for backend, (p, reasons) in invalid.items()]
    for place, (backend, priority) in enumerate(sorted(valid, key=lambda pair: pair[1])):
        ranked.append((priority, backend.name, "" if place == 0 else "valid, of lower priority"))
    rec.state["candidates"] = [(name, why) for _, name, why in sorted(ranked)]


@probe()
def cuda_backends_ranked(defer, result):
    defer(cuda_candidates, result)


def cuda_candidates(rec: Recorder, result: tuple[list[Any], dict[Any, tuple[int, list[str]]]]):
    """Rejected ones with vLLM's reasons; valid ones that were outranked say so."""
    valid, invalid = result
    ranked = [(p, backend.name, "; ".join(reasons)) for backend, (p, reasons) in invalid.items()]
    for place, candidate in enumerate(sorted(valid, key=lambda c: c.priority)):
        why = "" if place == 0 else "valid, of lower priority"
        ranked.append((candidate.priority, candidate.backend.name, why))
    rec.state["candidates"] = [(name, why) for _, name, why in sorted(ranked)]
