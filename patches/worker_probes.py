"""What is read in a worker: the flattened batch, block tables, slots, kernels and backends.

The batch is copied while the model's forward context is set: the tables and slots are then the
ones that the kernels receive. Facts of one step wait in ``rec.state`` until ``execute_model``
returns, because only it knows the number of the step.
"""

from __future__ import annotations

import re
from typing import Any

from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    BackendSelected,
    SlotsMapped,
    StepExecuted,
    StepSampled,
    TableRowChanged,
)
from vllm_trace.hooks.table import probe
from vllm_trace.patches.kernel_variants import plan_of
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
    rec.state["gone"] = [rec.retire(name) for name in out.finished_req_ids if name in rec.numbers]
    if forward is None or forward["started"] < started:
        return StepExecuted(step, started, ended - started, 0, 0, rec.rank, 0, 0, "none")
    if forward["batch"] is not None:
        _emit_batch(rec, step, runner, forward["batch"])
    _emit_calls(rec, step, [call for call in calls if call[2] >= started])
    return StepExecuted(
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


@probe()
def model_forward(defer, started, ended, self):
    defer(forward_done, started, ended, *read_context(), read_batch(self))


@probe()
def model_forward_light(defer, started, ended):
    defer(forward_done, started, ended, *read_context(), None)


def forward_done(
    rec: Recorder, started: int, ended: int, mode: str, num_tokens_padded: int, batch: Any
) -> None:
    rec.state["forward"] = {
        "started": started,
        "ended": ended,
        "mode": mode,
        "num_tokens_padded": num_tokens_padded,
        "batch": batch,
    }


@probe(flush=True)
def sample_tokens(defer, started, ended):
    defer(step_sampled, started, ended)


def step_sampled(rec: Recorder, started: int, ended: int) -> StepSampled:
    return StepSampled(rec.state.get("executed_step", 0), started, ended - started, rec.rank)


# The V2 runner --------------------------------------------------------------------------

# It runs on CUDA only, and gathers tables and slots on the device. Reading them here would wait
# for the stream, so these probes keep to what the host has: names, counts, mode and plan.


@probe()
def execute_model_v2(defer, started, ended, self, scheduler_output, dummy_run):
    defer(step_executed_v2, self, scheduler_output, started, ended, dummy_run)


def step_executed_v2(
    rec: Recorder, runner: Any, out: Any, started: int, ended: int, dummy_run: bool
) -> StepExecuted | None:
    forward = rec.state.pop("forward_v2", {})
    calls = rec.state.pop("calls", ())
    step = getattr(out, "vtrace_step", 0)
    # Profiling, graph capture and warm-up go through this method too, without a scheduler.
    if dummy_run or not step:
        return None
    rec.rank = runner.vllm_config.parallel_config.rank
    rec.state["executed_step"] = step
    began = forward.get("started", 0)
    if began < started:
        return StepExecuted(step, started, ended - started, 0, 0, rec.rank, 0, 0, "none")
    for group, given in forward.get("metadata", ()):
        rec.emit(AttentionPlanned(step, group, *plan_of(given)))
    _emit_calls(rec, step, [call for call in calls if call[2] >= started])
    return StepExecuted(
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


@probe()
def prepare_attn_v2(defer, ended, input_batch):
    defer(batch_prepared_v2, ended, input_batch.num_tokens_after_padding)


def batch_prepared_v2(rec: Recorder, ended: int, num_tokens_padded: int) -> None:
    rec.state["forward_v2"] = {"started": ended, "num_tokens_padded": num_tokens_padded}


@probe()
def metadata_built_v2(defer, ended, result, input_batch, cudagraph_mode, kv_cache_config):
    padded = input_batch.num_tokens_after_padding
    defer(metadata_known_v2, ended, padded, cudagraph_mode, result, kv_cache_config)


@probe()
def metadata_built_v2_light(defer, ended, input_batch, cudagraph_mode):
    padded = input_batch.num_tokens_after_padding
    defer(metadata_known_v2, ended, padded, cudagraph_mode, None, None)


def metadata_known_v2(
    rec: Recorder, ended: int, num_tokens_padded: int, mode: Any, by_layer: Any, config: Any
) -> None:
    """The forward starts next: it is launched between now and the return of ``execute_model``."""
    name = mode.name.lower()
    rec.state["forward_v2"] = {
        "started": ended,
        "num_tokens_padded": num_tokens_padded,
        "mode": "eager" if name == "none" else name,
        "metadata": _distinct_metadata(by_layer or {}, config),
    }


@probe(flush=True)
def sample_tokens_v2(defer, started, ended):
    defer(step_sampled_v2, started, ended)


def step_sampled_v2(rec: Recorder, started: int, ended: int) -> StepSampled | None:
    step = rec.state.pop("executed_step", 0)
    return StepSampled(step, started, ended - started, rec.rank) if step else None


def _distinct_metadata(by_layer: dict[str, Any], config: Any) -> list[tuple[int, Any]]:
    """(group, metadata) of each metadata object; layers of one group share one."""
    found: dict[int, tuple[int, Any]] = {}
    for layer, given in by_layer.items():
        if id(given) not in found:
            groups = enumerate(config.kv_cache_groups)
            group = next((i for i, each in groups if layer in each.layer_names), 0)
            found[id(given)] = (group, given)
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

    An entry is (first layer, metadata, block table, slots, sequence lengths, query starts).
    """
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    metadata = context.attn_metadata
    entries: dict[int, tuple[Any, ...]] = {}
    for by_layer in metadata if isinstance(metadata, list) else [metadata]:
        for layer, given in (by_layer or {}).items():
            if id(given) in entries or not hasattr(given, "block_table"):
                continue
            slots = _slots(context, layer, given)
            tensors = (given.block_table, slots, given.seq_lens, given.query_start_loc)
            entries[id(given)] = (layer, given, *(host_copy(t) for t in tensors))
    return list(runner.input_batch.req_ids), list(entries.values())


def _slots(context: Any, layer: str, given: Any) -> Any:
    slots = getattr(given, "slot_mapping", None)
    return slots if slots is not None else context.slot_mapping[layer]


def host_copy(tensor: Any) -> Any:
    """A numpy copy. On a GPU this waits for the stream; a device trace uses pinned copies."""
    return tensor.detach().cpu().numpy().copy()


def _emit_batch(rec: Recorder, step: int, runner: Any, batch: Any) -> None:
    names, entries = batch
    requests = rec.numbers_of(names)
    for layer, given, table, slots, seq_lens, starts in entries:
        group, block_size, kernel_block_size = _sizes(rec, runner, layer)
        lens = seq_lens[: len(names)].tolist()
        _emit_rows(rec, step, group, requests, lens, table, kernel_block_size)
        query_lens = (starts[1 : len(names) + 1] - starts[: len(names)]).tolist()
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
        kernel, variant, numbers = plan_of(given)
        rec.emit(AttentionPlanned(step, group, kernel, variant, numbers))


def _sizes(rec: Recorder, runner: Any, layer: str) -> tuple[int, int, int]:
    """(group, tokens in a manager's block, tokens in a kernel's block) of a layer."""
    known = rec.state.setdefault(("sizes", id(runner)), {})
    if layer not in known:
        groups = runner.kv_cache_config.kv_cache_groups
        index = next(i for i, group in enumerate(groups) if layer in group.layer_names)
        block_size = groups[index].kv_cache_spec.block_size
        kernel = block_size
        for attention_group in runner.attn_groups[index]:
            if layer in attention_group.layer_names:
                kernel = getattr(attention_group, "kernel_block_size", None) or block_size
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


# Attention ------------------------------------------------------------------------------


@probe()
def attention_forward(defer, started, ended, self, layer, attn_metadata):
    if attn_metadata is not None:
        defer(attention_called, type(self), layer, started, ended)


def attention_called(rec: Recorder, impl: type, layer: Any, started: int, ended: int) -> None:
    rec.state.setdefault("calls", []).append((impl.__name__, layer, started, ended - started))


def _emit_calls(rec: Recorder, step: int, calls: list[tuple[str, Any, int, int]]) -> None:
    by_impl: dict[str, list[tuple[str, Any, int, int]]] = {}
    for call in calls:
        by_impl.setdefault(call[0], []).append(call)
    for impl, some in by_impl.items():
        layers = [layer_index(getattr(call[1], "layer_name", "")) for call in some]
        rec.emit(AttentionCalled(step, impl, layers, [c[2] for c in some], [c[3] for c in some]))


def layer_index(name: str) -> int:
    """The layer's number in the model: 3 for ``model.layers.3.self_attn.attn``; -1 if none."""
    match = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(match[1]) if match else -1


# Backends -------------------------------------------------------------------------------


@probe()
def attention_made(defer, self):
    defer(backend_selected, self)


def backend_selected(rec: Recorder, layer: Any) -> BackendSelected:
    backend = layer.attn_backend
    name = backend.get_name()
    candidates = list(rec.state.get("candidates", ()))
    if name not in [candidate[0] for candidate in candidates]:
        candidates.append((name, ""))
    sizes = getattr(backend, "get_supported_kernel_block_sizes", tuple)()
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
        },
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
