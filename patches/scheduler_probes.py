"""What is read of the scheduler: that it was made and stopped, and the requests that come and go.

A probe's body runs inside the hooked call: it makes its event there when the values are at
hand, and otherwise defers to the decoder that follows it, which runs at the end of the step.
What vLLM changes before then (a reference count, a hash, a queue's length) is read at once.
"""

from __future__ import annotations

import os
from typing import Any

from vllm_trace.events import (
    EngineConfigured,
    EngineStopped,
    KVGroup,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
)
from vllm_trace.hooks.table import probe
from vllm_trace.patches.block_probes import short_hash
from vllm_trace.recorder import Recorder

# The engine -----------------------------------------------------------------------------


@probe()
def scheduler_made(defer, ended, self):
    defer(engine_configured, self, ended)


def engine_configured(rec: Recorder, scheduler: Any, at_ns: int) -> EngineConfigured:
    rec.state["hashes_told"] = {}
    config = scheduler.vllm_config
    limits, cache, parallel = config.scheduler_config, config.cache_config, config.parallel_config
    manager = scheduler.kv_cache_manager
    rec.plans_first = parallel.distributed_executor_backend in ("mp", "ray")
    settings = {
        "model": model_name(str(config.model_config.model)),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": scheduler.max_model_len,
        "max_num_seqs": scheduler.max_num_running_reqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_num_scheduled_tokens": scheduler.max_num_scheduled_tokens,
        "long_prefill_token_threshold": limits.long_prefill_token_threshold,
        "long_prefill_token_threshold_adaptive": bool(
            getattr(limits, "long_prefill_token_threshold_adaptive", False)
        ),
        "enable_chunked_prefill": bool(limits.enable_chunked_prefill),
        "enable_prefix_caching": bool(manager.enable_caching),
        "prefix_caching_hash_algo": str(cache.prefix_caching_hash_algo),
        "policy": scheduler.policy.value,
        "async_scheduling": bool(limits.async_scheduling),
        "full_sequence_must_fit": bool(getattr(scheduler, "scheduler_reserve_full_isl", False)),
        "watermark_blocks": getattr(manager, "watermark_blocks", 0),
        "num_lookahead_tokens": scheduler.num_lookahead_tokens,
        "max_in_flight_tokens": getattr(config, "max_in_flight_tokens", None),
        "retention_interval": getattr(manager.coordinator, "retention_interval", None),
        "kv_cache_dtype": str(cache.cache_dtype),
        "kv_events": bool(manager.block_pool.enable_kv_cache_events),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_rank": parallel.data_parallel_rank,
        "num_query_heads": config.model_config.get_num_attention_heads(parallel),
        "num_kv_heads": config.model_config.get_num_kv_heads(parallel),
        "head_size": config.model_config.get_head_size(),
        "vllm_version": rec.notes.get("vllm", ""),
    }
    groups = [
        KVGroup(
            kind=type(group.kv_cache_spec).__name__,
            block_size=group.kv_cache_spec.block_size,
            layers=list(group.layer_names),
            sliding_window=getattr(group.kv_cache_spec, "sliding_window", None) or 0,
            page_size_bytes=group.kv_cache_spec.page_size_bytes,
        )
        for group in scheduler.kv_cache_config.kv_cache_groups
    ]
    return EngineConfigured(
        at_ns=at_ns,
        block_size=scheduler.block_size,
        hash_block_size=getattr(scheduler, "hash_block_size", None) or scheduler.block_size,
        num_blocks=manager.block_pool.num_gpu_blocks,
        groups=groups,
        settings=settings,
    )


def model_name(model: str) -> str:
    """A hub name as it is, of a local folder only its name: traces travel."""
    return os.path.basename(model.rstrip("/")) if os.path.isabs(model) else model


@probe(flush=True)
def engine_shut_down(append, recorder, ended):
    append(EngineStopped(ended))
    recorder.steady_of = None  # it may go


# Requests -------------------------------------------------------------------------------


@probe()
def add_request(defer, recorder, ended, request):
    number = recorder.arrive(request.request_id)
    defer(request_arrived, number, request, ended, len(request.block_hashes))


def request_arrived(
    rec: Recorder, number: int, request: Any, at_ns: int, num_hashes: int
) -> RequestArrived:
    rec.state.setdefault("hashes_told", {})[number] = num_hashes
    headers = request.trace_headers or {}
    tokens = request.prompt_token_ids if rec.options.tokens else None
    return RequestArrived(
        request=number,
        at_ns=at_ns,
        request_id=request.request_id,
        num_prompt_tokens=request.num_prompt_tokens,
        max_tokens=request.max_tokens,
        priority=request.priority,
        arrival_unix=request.arrival_time,
        block_hashes=[short_hash(h) for h in request.block_hashes[:num_hashes]],
        sampling=_sampling(request.sampling_params),
        lora=request.lora_request.lora_name if request.lora_request else None,
        salted=bool(request.cache_salt),
        traceparent=headers.get("traceparent"),
        token_ids=list(tokens) if tokens is not None else None,
    )


def _sampling(params: Any) -> dict[str, Any]:
    if params is None:
        return {}
    names = ("n", "temperature", "top_p", "top_k", "seed", "min_tokens", "ignore_eos")
    return {name: getattr(params, name, None) for name in names}


@probe()
def free_request(defer, recorder, ended, request):
    defer(request_finished, recorder.retire(request.request_id), request, ended)


def request_finished(rec: Recorder, number: int, request: Any, at_ns: int) -> RequestFinished:
    rec.state.get("hashes_told", {}).pop(number, None)
    return RequestFinished(
        request=number,
        at_ns=at_ns,
        reason=str(request.get_finished_reason()),
        num_output_tokens=request.num_output_tokens,
        num_preemptions=request.num_preemptions,
    )


def _computed_before(request):
    return request.num_computed_tokens


@probe(before=_computed_before)
def preempt_request(append, numbers, seen, self, request):
    free = self.kv_cache_manager.block_pool.get_num_free_blocks()
    append(RequestPreempted(numbers[request.request_id], seen, free))
