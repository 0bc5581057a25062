"""The classes that vLLM loads: backend, metadata and its builder, implementation. Only vLLM imports this module.

Source: the contract of vllm/v1/attention/backend.py in 0.20.2 and 0.32.0; what only one of them asks is marked.
Leaves out: CUDA graphs of the attention itself (the choice of V1 or V2 is made on the host for each step, and a graph
would freeze it), so vLLM falls back to graphs of the pieces between.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_trace.backend import NAMES, calls
from vllm_trace.backend.calls import KernelCall
from vllm_trace.backend.paged import ENGINES, PagedEngine, Rows, Shape
from vllm_trace.backend.support import BLOCK_SIZES, HEAD_SIZES
from vllm_trace.decode_rule import DecodeChoice, choose
from vllm_trace.device_clock import mark


class PagedBackend(AttentionBackend):
    """`mini` under vLLM."""

    engine: ClassVar[str] = "mini"
    supported_dtypes: ClassVar = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]
    forward_includes_kv_cache_update: bool = False

    @classmethod
    def trace_name(cls) -> str:
        return NAMES[cls.engine]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        return list(BLOCK_SIZES[cls.engine])

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES[cls.engine])

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return cls.engine == "mini"

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """0.20: the memory of one layer."""
        return (2, num_blocks, block_size, num_kv_heads, head_size)

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """0.32: a token's K and V side by side in each head of a block."""
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return (KVCacheLayout.LBHNC,)

    @classmethod
    def get_impl_cls(cls) -> type[PagedImpl]:
        return PagedImpl if cls.engine == "mini" else PagedVllmImpl

    @staticmethod
    def get_builder_cls() -> type[PagedMetadataBuilder]:
        return PagedMetadataBuilder


class PagedVllmBackend(PagedBackend):
    """vLLM's own ops under vLLM."""

    engine: ClassVar[str] = "vllm"
    supported_dtypes: ClassVar = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class PagedMetadata:
    """One step, the same for all layers of a KV group. Names are those that every backend of vLLM uses."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Tensor
    max_seq_len: int
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    num_decodes: int
    """Rows before the first prefill; each has one token."""
    decode: Rows | None
    prefill: Rows | None
    choice: DecodeChoice | None
    causal: bool = True


class PagedMetadataBuilder(AttentionMetadataBuilder[PagedMetadata]):
    """Splits the batch (vLLM puts one-token rows first) and asks the rule, both on the host."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    supports_update_block_table: bool = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=False)
        self.num_heads = vllm_config.model_config.get_num_attention_heads(
            vllm_config.parallel_config
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> PagedMetadata:
        common = common_attn_metadata
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(common)
        table, lens, starts = common.block_table_tensor, common.seq_lens, common.query_start_loc
        decode = prefill = choice = None
        if num_decodes:
            longest = _longest(common, 0, num_decodes)
            choice = choose(longest, num_decodes, self.num_heads)
            decode = Rows(
                table[:num_decodes], lens[:num_decodes], starts[: num_decodes + 1], longest, 1
            )
        if num_prefills:
            rows = slice(num_decodes, num_decodes + num_prefills)
            prefill = Rows(
                table[rows],
                lens[rows],
                starts[num_decodes:] - num_decode_tokens if num_decodes else starts,
                _longest(common, num_decodes, num_decodes + num_prefills),
                common.max_query_len,
            )
        return PagedMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=starts,
            max_seq_len=common.max_seq_len,
            seq_lens=lens,
            block_table=table,
            slot_mapping=common.slot_mapping,
            num_decodes=num_decodes,
            decode=decode,
            prefill=prefill,
            choice=choice,
        )


def _longest(common: Any, first: int, end: int) -> int:
    """The longest context of some rows, without asking the device."""
    known = getattr(common, "seq_lens_cpu_upper_bound", None)
    if known is None and common.seq_lens.device.type == "cpu":
        known = common.seq_lens
    return int(known[first:end].max()) if known is not None else common.max_seq_len


class PagedImpl(AttentionImpl):
    """One layer's attention."""

    engine_name: ClassVar[str] = "mini"

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER or sinks is not None:
            what = "attention sinks" if sinks is not None else f"layers of type {attn_type}"
            raise NotImplementedError(f"paged attention has no {what}; --attention engine has")
        if self.engine_name == "vllm" and (sliding_window or logits_soft_cap):
            raise NotImplementedError(
                "paged_attention_v1/v2 of vLLM know no sliding window and no soft cap; "
                "--attention paged and --attention engine do"
            )
        self.num_heads, self.head_size = num_heads, head_size
        self.num_kv_heads, self.scale = num_kv_heads, float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        slopes = torch.tensor(alibi_slopes, dtype=torch.float32) if alibi_slopes else None
        self.shape = Shape(
            num_heads,
            num_kv_heads,
            head_size,
            self.scale,
            sliding_window or 0,
            logits_soft_cap or 0.0,
            slopes,
            kv_cache_dtype,
        )
        self._engine: PagedEngine | None = None

    def engine(self, device: torch.device) -> PagedEngine:
        if self._engine is None:
            self._engine = ENGINES[self.engine_name](device)
        return self._engine

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        num_tokens = slot_mapping.shape[0]  # key and value may be padded, for graphs
        engine = self.engine(key.device)
        engine.write(
            layer, self.shape, key[:num_tokens], value[:num_tokens], kv_cache, slot_mapping
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:
            return output.fill_(0)  # a profiling run
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("paged attention does not quantise its output")
        data, engine = attn_metadata, self.engine(query.device)
        made: list[KernelCall] = []
        split, end = data.num_decodes, data.num_actual_tokens
        if data.decode is not None:
            assert data.choice is not None
            choice = data.choice
            first, started = mark(query), time.monotonic_ns()
            engine.decode(
                layer, self.shape, choice.variant, query[:split], kv_cache, data.decode, output[:split]
            )  # fmt: skip
            made.append(
                KernelCall(
                    engine.kernel(choice.variant),
                    choice.variant,
                    choice.reason,
                    choice.numbers | self._sizes(kv_cache),
                    started,
                    time.monotonic_ns() - started,
                    (first, mark(query)),
                    (0, split),
                )
            )
        if data.prefill is not None:
            rows = data.prefill
            first, started = mark(query), time.monotonic_ns()
            engine.prefill(
                layer, self.shape, query[split:end], key[split:end], value[split:end], kv_cache,
                rows, output[split:end],
            )  # fmt: skip
            made.append(
                KernelCall(
                    engine.kernel("prefill"),
                    "prefill",
                    "more than one new token: not for the V1/V2 rule",
                    {
                        "max_seq_len": rows.max_seq_len,
                        "max_query_len": rows.max_query_len,
                        "num_seqs": len(rows.seq_lens),
                        "num_heads": self.num_heads,
                    }
                    | self._sizes(kv_cache),
                    started,
                    time.monotonic_ns() - started,
                    (first, mark(query)),
                    (split, split + len(rows.seq_lens)),
                )
            )
        if calls.observer is not None:
            calls.observer(self, layer, query, kv_cache, data, output, made)
        return output

    def _sizes(self, kv_cache: Tensor) -> dict[str, int]:
        return {
            "block_size": kv_cache.shape[2],  # of both layouts
            "head_size": self.head_size,
            "num_kv_heads": self.num_kv_heads,
        }


class PagedVllmImpl(PagedImpl):
    engine_name: ClassVar[str] = "vllm"
