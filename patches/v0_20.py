"""vLLM 0.20: the CUDA build, run on an H200, and its CPU rows.

It differs from 0.32 in this: ``get_computed_blocks`` returns two values; a block has one hash and is evicted in
``_maybe_evict_cached_block``; whether a waiting request fits as a whole is a call of its own,
``can_fit_full_sequence``, before ``allocate_slots``; ``get_valid_backends`` gives pairs; the CPU's ``forward`` also
writes K and V; the V1 runner is the default, with async scheduling on CUDA. What was read of each function is what
its probe reads.
"""

from __future__ import annotations

from dataclasses import replace

from vllm_trace.hooks.fingerprints import reviewed
from vllm_trace.hooks.table import Hook, HookTable
from vllm_trace.patches import backend_probes as c
from vllm_trace.patches import block_probes as b
from vllm_trace.patches import v0_32

_CUDA = "vllm.platforms.cuda:CudaPlatformBase"

_OTHERS = {
    "vllm.v1.core.block_pool:BlockPool._remove_cached_block_hashes": {
        "target": "vllm.v1.core.block_pool:BlockPool._maybe_evict_cached_block",
        "probe": b.maybe_evict_cached_block,
    },
    f"{_CUDA}.get_valid_backends": {
        "probe": c.cuda_backends_ranked_0_20,
        "light": c.cuda_backends_ranked_0_20,
    },
}
"""Rows of 0.32 that stand elsewhere here, or need another probe."""

HOOKS = (
    *(replace(hook, **_OTHERS.get(hook.target, {})) for hook in v0_32.HOOKS),
    Hook(
        f"{_CUDA}.get_attn_backend_cls",
        c.cuda_backend_chosen,
        light=c.cuda_backend_chosen,
        emits="backend.selected",
        platform="cuda",
        without="a backend that the user asked for looks like one that vLLM ranked first",
    ),
    Hook(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.can_fit_full_sequence",
        b.can_fit_full_sequence,
        emits="slots.refused",
        without="a waiting request that does not fit as a whole leaves no refusal",
    ),
)

# Printed by `python -m vllm_trace.hooks.fingerprints DIR`; read in the CUDA wheel of 0.20.2.
# vLLM 0.20.2
FINGERPRINTS = {
    "vllm.v1.core.sched.scheduler:Scheduler.__init__": "9f990eac91cf8161",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": "5886abb43aa7b8f6",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "515f62ac5194866c",
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": "127e300e1943c7b1",
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": "4cee6149b3d42e29",
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": "9b6737aacdafa6bd",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks": "b458ed208e1516c1",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": "b52df0b5e2172fe3",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.free": "232e0f2f46915dc0",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.take_events": "586b9e447ba85e59",
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": "949e34ac8c0a60d2",
    "vllm.v1.core.block_pool:BlockPool._maybe_evict_cached_block": "c6f4584788dcd6dd",
    "vllm.v1.core.block_pool:BlockPool.touch": "e4f2dc34b14aabfd",
    "vllm.v1.core.block_pool:BlockPool.cache_full_blocks": "35fc960b4f49f3d3",
    "vllm.v1.core.block_pool:BlockPool.free_blocks": "51397a5541283f0e",
    "vllm.v1.core.block_pool:BlockPool.reset_prefix_cache": "e0e12589b8e5cee3",
    "vllm.v1.engine.core:EngineCore.shutdown": "82a8151d6b7ecb90",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": "0ca16bf72d82fc85",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward": "78fc32f108e3badd",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": "70cae33e74783451",
    "vllm.model_executor.layers.attention.attention:Attention.__init__": "1f4ed0e3bef45de9",
    "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls": "957e9424a18edd81",
    "vllm.platforms.cuda:CudaPlatformBase.get_valid_backends": "3b4de08a42ec91ff",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": "42880c2425af8e8e",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward": "18ad7b51aa69a11f",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward": "6dde0a309198427a",
    "vllm.v1.attention.backends.flashinfer:FlashInferImpl.forward": "1a2435f350653056",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": "15b7ba26fea62fe6",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn": "3c61207ca8a04adf",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn": "cfef9af7b09edeba",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": "90688e4ebc6eca23",
    "vllm.platforms.cuda:CudaPlatformBase.get_attn_backend_cls": "5dc03a82fdc79ec9",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.can_fit_full_sequence": "ffdd45eb55f6208f",
}

TABLE = HookTable(vllm=">=0.20,<0.21", hooks=reviewed(HOOKS, FINGERPRINTS))
