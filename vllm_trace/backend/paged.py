"""The attention of the backend, without vLLM's classes: two engines that write K and V, decode and prefill.

Follows: vLLM 0.11.0, vllm/attention/ops/paged_attn.py: ``write_to_paged_cache``, ``forward_decode``,
``forward_prefix``.
Leaves out: attention sinks, encoder layers, quantised queries and outputs.

Shapes, in both engines:

    query, output   [num_tokens, num_heads, head_size]; when decoding, one token for each sequence
    key, value      [num_tokens, num_kv_heads, head_size]
    kv_cache        as vLLM allocated it for one layer, see `split_cache`
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_trace.mini import attention as mini_attention

FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
"""vLLM's names of cache types that are stored as bytes."""


@dataclass(frozen=True)
class Shape:
    """What a layer's attention is made of, the same in every call."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int = 0
    """Tokens that one sees, itself included; 0: all."""
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    kv_cache_dtype: str = "auto"

    def extras(self) -> dict[str, Any]:
        """Keywords of a `mini` kernel, only those that say something."""
        told = {
            "sliding_window": self.sliding_window,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
        }
        return {name: value for name, value in told.items() if value is not None and value != 0}


def split_cache(kv_cache: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """K and V as [num_blocks, block_size, num_kv_heads, head_size], over the memory that vLLM gave.

    vLLM 0.20: (2, blocks, block_size, heads, head_size). 0.32: (blocks, heads, block_size, 2 * head_size), where we
    keep K in the first half of each token's row and V in the second.
    """
    if kv_cache.dim() == 5:
        key_cache, value_cache = kv_cache.unbind(0)
    else:
        both = kv_cache.transpose(1, 2)
        key_cache, value_cache = both[..., : shape.head_size], both[..., shape.head_size :]
    stored = FLOAT8.get(shape.kv_cache_dtype)
    if stored is not None:
        return key_cache.view(stored), value_cache.view(stored)
    return key_cache, value_cache


class PagedEngine(Protocol):
    """What stands under the backend."""

    name: str

    def kernel(self, variant: str) -> str:
        """Full name of the kernel that computes a variant."""

    def write(
        self, layer: Any, shape: Shape, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
    ) -> None:
        """``reshape_and_cache``."""

    def decode(
        self,
        layer: Any,
        shape: Shape,
        variant: str,
        query: Tensor,
        kv_cache: Tensor,
        rows: Rows,
        out: Tensor,
    ) -> None:
        """``paged_attention_v1`` or ``_v2`` into ``out``."""

    def prefill(
        self, layer: Any, shape: Shape, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        rows: Rows, out: Tensor,
    ) -> None:  # fmt: skip
        """``context_attention_fwd`` into ``out``."""


@dataclass
class Rows:
    """A part of the batch: all that decode, or all that prefill."""

    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_seq_len: int
    max_query_len: int


class MiniEngine:
    """Our kernels: plain torch on the CPU, Triton on CUDA."""

    name = "mini"

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.modules: list[ModuleType] = [mini_attention]
        if self.on_device:
            from vllm_trace.mini import kernels

            self.modules.insert(0, kernels)

    def _module(self, function: str) -> ModuleType:
        return next(module for module in self.modules if hasattr(module, function))

    def kernel(self, variant: str) -> str:
        names = {"V1": "paged_attention_v1", "V2": "paged_attention_v2"}
        function = names.get(variant, "context_attention_fwd")
        module = "mini" if self._module(function) is mini_attention else "mini.kernels"
        return f"{module}.{function}"

    def _call(self, function: str, layer: Any, shape: Shape, *given: Any, **more: Any) -> None:
        """Call a kernel of ours; the scales of an 8-bit cache go between what is given and the keywords."""
        # On a device the float of a scale would have to be fetched.
        scales = (
            (layer._k_scale, layer._v_scale)
            if self.on_device
            else (layer._k_scale_float, layer._v_scale_float)
        )
        getattr(self._module(function), function)(*given, *scales, **more)

    def write(
        self, layer: Any, shape: Shape, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
    ) -> None:
        caches = split_cache(kv_cache, shape)
        # On a device looking at the slots would wait for the stream.
        self._call(
            "reshape_and_cache", layer, shape, key, value, *caches, slots,
            validate=not self.on_device,
        )  # fmt: skip

    def decode(
        self,
        layer: Any,
        shape: Shape,
        variant: str,
        query: Tensor,
        kv_cache: Tensor,
        rows: Rows,
        out: Tensor,
    ) -> None:
        name = "paged_attention_v1" if variant == "V1" else "paged_attention_v2"
        self._call(
            name, layer, shape, query, *split_cache(kv_cache, shape), rows.block_table, rows.seq_lens, shape.scale,
            out=out, max_seq_len=rows.max_seq_len, validate=not self.on_device, **shape.extras(),
        )  # fmt: skip

    def prefill(
        self, layer: Any, shape: Shape, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        rows: Rows, out: Tensor,
    ) -> None:  # fmt: skip
        self._call(
            "context_attention_fwd", layer, shape, query, *split_cache(kv_cache, shape), rows.block_table,
            rows.query_start_loc, rows.seq_lens, shape.scale,
            out=out, max_query_len=rows.max_query_len, validate=not self.on_device, **shape.extras(),
        )  # fmt: skip


class VllmEngine:
    """The installed vLLM's own ops, over the layout that they want: K with 16 bytes of a head side by side.

    Its prefill is ``context_attention_fwd`` of vllm/v1/attention/ops/prefix_prefill.py, the Triton kernel that stood
    beside these ops.
    """

    name = "vllm"

    def __init__(self, device: torch.device) -> None:
        from vllm import _custom_ops
        from vllm.v1.attention.ops.prefix_prefill import context_attention_fwd

        self.ops: Any = _custom_ops
        self.context_attention_fwd = context_attention_fwd

    def kernel(self, variant: str) -> str:
        names = {"V1": "paged_attention_v1", "V2": "paged_attention_v2"}
        return f"vllm.{names.get(variant, 'context_attention_fwd')}"

    @staticmethod
    def split(kv_cache: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """K [blocks, heads, head_size / x, block_size, x] and V [blocks, heads, head_size, block_size]."""
        x = 16 // kv_cache.element_size()
        _, num_blocks, block_size, num_heads, head_size = kv_cache.shape
        key_cache = kv_cache[0].view(num_blocks, num_heads, head_size // x, block_size, x)
        return key_cache, kv_cache[1].view(num_blocks, num_heads, head_size, block_size)

    def write(
        self, layer: Any, shape: Shape, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
    ) -> None:
        self.ops.reshape_and_cache(
            key,
            value,
            *self.split(kv_cache, shape),
            slots,
            shape.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )

    def decode(
        self,
        layer: Any,
        shape: Shape,
        variant: str,
        query: Tensor,
        kv_cache: Tensor,
        rows: Rows,
        out: Tensor,
    ) -> None:
        key_cache, value_cache = self.split(kv_cache, shape)
        common = (
            query,
            key_cache,
            value_cache,
            shape.num_kv_heads,
            shape.scale,
            rows.block_table,
            rows.seq_lens,
            value_cache.shape[3],
            rows.max_seq_len,
            shape.alibi_slopes,
            shape.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )
        if variant == "V1":
            self.ops.paged_attention_v1(out, *common)
            return
        num_seqs, num_heads, head_size = query.shape
        num_partitions = -(-rows.max_seq_len // mini_attention.PARTITION_SIZE)
        sums = query.new_empty((num_seqs, num_heads, num_partitions), dtype=torch.float32)
        tmp_out = query.new_empty((num_seqs, num_heads, num_partitions, head_size))
        self.ops.paged_attention_v2(out, sums, torch.empty_like(sums), tmp_out, *common)

    def prefill(
        self, layer: Any, shape: Shape, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        rows: Rows, out: Tensor,
    ) -> None:  # fmt: skip
        key_cache, value_cache = self.split(kv_cache, shape)
        self.context_attention_fwd(
            q=query,
            k=key,
            v=value,
            o=out,
            kv_cache_dtype=shape.kv_cache_dtype,
            k_cache=key_cache,
            v_cache=value_cache,
            b_loc=rows.block_table,
            b_start_loc=rows.query_start_loc,
            b_seq_len=rows.seq_lens,
            max_seq_len=rows.max_seq_len,
            max_input_len=rows.max_query_len,
            k_scale=layer._k_scale,
            v_scale=layer._v_scale,
            alibi_slopes=shape.alibi_slopes,
            sliding_window=shape.sliding_window,
            sm_scale=shape.scale,
        )


ENGINES: dict[str, type[MiniEngine] | type[VllmEngine]] = {"mini": MiniEngine, "vllm": VllmEngine}
