"""What is read in a worker whose runner is vLLM's V2, as ``worker_probes`` reads it in the V1 runner.

It runs on CUDA only, and gathers tables and slots by kernels, for all backends alike. The probes copy what
was gathered: to pinned memory, read when the device is past the step. Profiling, graph capture and warm-up
go through ``execute_model`` too, but not through the runner's own ``prepare_attn``.
"""

from __future__ import annotations

from typing import Any

from vllm_trace.device_clock import elapsed_ns, give_back, mark, passed
from vllm_trace.events import AttentionPlanned, SlotsMapped, StepExecuted, StepSampled
from vllm_trace.hooks.table import probe
from vllm_trace.patches.attention_probes import Call, emit_calls
from vllm_trace.patches.kernel_variants import plan_of
from vllm_trace.patches.worker_probes import (
    as_array,
    emit_rows,
    host_copy,
    plan_copy,
    splits_of_rows,
)
from vllm_trace.recorder import Recorder


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
        emit_rows(rec, event.step, group, requests, batch[2], table, block_size)
        sizes = (block_size, block_size)
        rec.emit(SlotsMapped(event.step, group, *sizes, *batch, slots.tolist()))
    rec.state["gone"] = []
    for group, layer, given, ahead in plans:
        splits = splits_of_rows(runner, layer, given, ahead, query_lens)
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
            found[id(given)] = (group, layer, given, plan_copy(given))
    return list(found.values())
