"""The real vLLM beside mini: what both are built from, and one comparison of everything a manager holds.

`vllm` is imported only by the fixtures that need it; a test that asks for one is skipped without it.
"""

import json
import os

import pytest
from hypothesis import HealthCheck, settings

NUM_EXAMPLES = int(os.environ.get("VTRACE_HYPOTHESIS_EXAMPLES", "60"))


def hypothesis_settings(examples=NUM_EXAMPLES):
    """So many examples; VTRACE_HYPOTHESIS_EXAMPLES asks for more of them."""
    return settings(max_examples=examples, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="session")
def real():
    """The names of the installed vLLM that parity tests use, as one namespace."""
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed: nothing to compare mini with")
    return RealVllm(vllm.__version__)


class RealVllm:
    def __init__(self, version):
        import torch
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            SlidingWindowSpec,
        )
        from vllm.v1.request import Request, RequestStatus

        from vllm_trace.mini.rules import rules_for

        self.rules = rules_for(version)
        self.sha256 = sha256
        kv_cache_utils.init_none_hash(sha256)
        self.none_hash = kv_cache_utils.NONE_HASH
        self.KVCacheManager = KVCacheManager
        self.RequestStatus = RequestStatus
        self._full, self._window = FullAttentionSpec, SlidingWindowSpec
        self._config, self._group = KVCacheConfig, KVCacheGroupSpec
        self._request, self._params, self._hasher = (
            Request,
            SamplingParams,
            kv_cache_utils.get_request_block_hasher,
        )
        self._dtype = torch.float32

    def kv_cache_config(self, num_blocks, groups, retention_interval=None):
        """vLLM's configuration for the same groups as mini's specs."""
        common = dict(num_kv_heads=1, head_size=1, dtype=self._dtype)
        specs = [
            self._window(block_size=group.block_size, sliding_window=group.sliding_window, **common)
            if hasattr(group, "sliding_window")
            else self._full(block_size=group.block_size, **common)
            for group in groups
        ]
        return self._config(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[self._group([f"layer{i}"], spec) for i, spec in enumerate(specs)],
            prefix_cache_retention_interval=retention_interval,
        )

    def manager(self, num_blocks, groups, *, max_model_len, retention_interval=None, **kwargs):
        block_size = groups[0].block_size
        return self.KVCacheManager(
            self.kv_cache_config(num_blocks, groups, retention_interval),
            max_model_len=max_model_len,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            **kwargs,
        )

    def request(
        self,
        request_id,
        prompt,
        block_size,
        max_tokens=16,
        arrival_time=0.0,
        priority=0,
        stop_token_ids=(),
        **more,
    ):
        params = self._params(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            stop_token_ids=list(stop_token_ids),
        )
        return self._request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            arrival_time=arrival_time,
            priority=priority,
            block_hasher=self._hasher(block_size, self.sha256),
            **more,
        )

    def vllm_config(
        self,
        folder,
        *,
        block_size,
        num_blocks,
        max_model_len,
        enable_prefix_caching=True,
        **scheduler,
    ):
        """A VllmConfig around a tiny OPT configuration, without weights."""
        from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig

        config = dict(
            model_type="opt", architectures=["OPTForCausalLM"], vocab_size=128, hidden_size=64, num_hidden_layers=2,
            num_attention_heads=2, ffn_dim=128, max_position_embeddings=4096, word_embed_proj_dim=64,
            do_layer_norm_before=True, torch_dtype="float32", bos_token_id=2, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        asynchronous = scheduler.pop("async_scheduling", False)
        vllm_config = VllmConfig(
            device_config=DeviceConfig(device="cpu"),
            model_config=ModelConfig(
                model=str(folder),
                skip_tokenizer_init=True,
                dtype="float32",
                seed=0,
                max_model_len=max_model_len,
            ),
            scheduler_config=SchedulerConfig(
                max_model_len=max_model_len, is_encoder_decoder=False, **scheduler
            ),
            cache_config=CacheConfig(
                block_size=block_size, enable_prefix_caching=enable_prefix_caching
            ),
        )
        vllm_config.cache_config.num_gpu_blocks = num_blocks
        # The CPU platform turns async scheduling off; the scheduler alone, without a model, can still do it.
        vllm_config.scheduler_config.async_scheduling = asynchronous
        return vllm_config

    def scheduler(self, vllm_config, groups, num_blocks, retention_interval=None):
        """The real scheduler of a configuration, without a model."""
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.structured_output import StructuredOutputManager

        asynchronous = vllm_config.scheduler_config.async_scheduling
        return (AsyncScheduler if asynchronous else Scheduler)(
            vllm_config,
            self.kv_cache_config(num_blocks, groups, retention_interval),
            StructuredOutputManager(vllm_config),
            block_size=groups[0].block_size,
        )

    @staticmethod
    def outcome(planned, tokens):
        """What a model runner returns for a planned step: ``tokens`` of each request that sampled some."""
        from vllm.v1.outputs import ModelRunnerOutput

        order = list(planned.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=order,
            req_id_to_index={name: i for i, name in enumerate(order)},
            sampled_token_ids=[list(tokens.get(name, [])) for name in order],
        )


def state_of_real(manager):
    """Everything that decides what a real manager does next."""
    pool = manager.block_pool
    cached = {}
    for key, found in pool.cached_block_hash_to_block._cache.items():
        ids = list(found) if isinstance(found, dict) else [found.block_id]
        cached[key[:-4], int.from_bytes(key[-4:], "big")] = ids
    return {
        "free": [block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
        "num_free": pool.get_num_free_blocks(),
        "ref_cnt": [block.ref_cnt for block in pool.blocks],
        "hashed": {
            block.block_id: (block.block_hash[:-4], int.from_bytes(block.block_hash[-4:], "big"))
            for block in pool.blocks
            if block.block_hash is not None
        },
        "cached": cached,
    }


def state_of_mini(manager):
    """The same of mini's manager."""
    pool = manager.block_pool
    cached = {}
    for group_id, found in enumerate(pool.cached_block_hash_to_block):
        for block_hash, block in found.items():
            waiting = found.duplicates.get(block_hash, [])
            cached[block_hash, group_id] = [block.block_id, *(other.block_id for other in waiting)]
    return {
        "free": [block.block_id for block in pool.free_block_queue],
        "num_free": pool.get_num_free_blocks(),
        "ref_cnt": [block.ref_cnt for block in pool.blocks],
        "hashed": {
            b.block_id: (b.block_hash, b.group_id) for b in pool.blocks if b.block_hash is not None
        },
        "cached": cached,
    }
