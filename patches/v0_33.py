"""vLLM 0.33: the rows of 0.32; what differs in their functions was read and needs no other probe.

``get_computed_blocks`` has one more argument and returns the same three values;
``update_from_output`` caches the blocks of generated tokens itself; ``touch`` and ``free_blocks``
leave the null block's reference count alone; ``gather_block_tables`` of the V2 runner puts the null
block where a sliding window has moved on.
"""

from __future__ import annotations

from vllm_trace.hooks.fingerprints import reviewed
from vllm_trace.hooks.table import HookTable
from vllm_trace.patches import v0_32

FINGERPRINTS = v0_32.FINGERPRINTS | {
    "vllm.v1.core.sched.scheduler:Scheduler.__init__": "2afafaa0407c50e9",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": "235ee0c4fce5c2b6",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "db85c2ebefbc6a6c",
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": "9020fab230d6479e",
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": "618353078f66f64d",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks": "cd9cabe8b3f7e537",
    "vllm.v1.core.block_pool:BlockPool.touch": "6786ce1ee7311dd1",
    "vllm.v1.core.block_pool:BlockPool.cache_full_blocks": "a40d74f34d6b8bf3",
    "vllm.v1.core.block_pool:BlockPool.free_blocks": "19233d035e19a904",
    "vllm.model_executor.layers.attention.attention:Attention.__init__": "312d8140d0fecd24",
    "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls": "47eecaf48de20143",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward": "be24ee1bb150480c",
    "vllm.v1.attention.backends.flashinfer:FlashInferImpl.forward": "8ee24826f88306ed",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": "3c93a678f43f9e49",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn": "d10db614d678382d",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn": "ce7b2e234b135d05",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": "3510e0d8170364ee",
}

TABLE = HookTable(vllm=">=0.33,<0.34", hooks=reviewed(v0_32.HOOKS, FINGERPRINTS))
