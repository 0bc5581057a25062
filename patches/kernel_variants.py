"""Which variant of its kernel an attention backend chose for a step, and from what numbers.

Read from the attention metadata, which vLLM builds before the forward.
"""

from __future__ import annotations

import struct
from typing import Any

_CPU_ISA = {0: "amx", 1: "vec", 2: "vec16", 3: "neon", 4: "vxe", 5: "rvv", 6: "vsx"}


def plan_of(
    metadata: Any, splits: list[int] | None = None
) -> tuple[str, str, dict[str, int]] | None:
    """(kernel, variant, numbers) of one step's attention metadata; None where each call says it.

    ``splits``: of each row, where a plan on the device holds them.
    """
    name = type(metadata).__name__
    if name == "PagedMetadata":
        return None
    numbers = {
        field: int(value)
        for field in ("num_actual_tokens", "max_query_len", "max_seq_len")
        if isinstance(value := getattr(metadata, field, None), int)
    }
    reader = _READERS.get(name)
    if reader is None:
        return name.removesuffix("Metadata"), "", numbers
    kernel, variant, more = reader(metadata)
    if splits:
        variant = "1 split" if max(splits) == 1 else "splits"
        more |= {"min_splits": min(splits), "max_splits": max(splits)}
    return kernel, variant, numbers | more


def _cpu(metadata: Any) -> tuple[str, str, dict[str, int]]:
    """The CPU build's work plan: ``split-kv`` when a sequence's KV is divided among threads.

    ``scheduler_metadata`` is an int8 tensor over a C++ struct (csrc/cpu/cpu_attn_impl.hpp,
    0.20.2 to 0.33): from byte 64 seven int32 are instruction set, work items, reduction items,
    reduction splits, threads, effective threads, split threshold.
    """
    plan = getattr(metadata, "scheduler_metadata", None)
    if plan is None or plan.numel() < 92:
        return "cpu_attention_with_kv_cache", "", {}
    head = bytes(plan[64:92].numpy().tobytes())
    isa, items, reductions, splits, threads, effective, threshold = struct.unpack("<7i", head)
    variant = "split-kv" if splits > 0 else "whole"
    return (
        "cpu_attention_with_kv_cache",
        f"{_CPU_ISA.get(isa, isa)}/{variant}",
        {
            "work_items": items,
            "reduction_items": reductions,
            "reduction_splits": splits,
            "threads": threads,
            "effective_threads": effective,
            "split_threshold": threshold,
        },
    )


def _flash(metadata: Any) -> tuple[str, str, dict[str, int]]:
    splits = int(getattr(metadata, "max_num_splits", 0) or 0)
    ahead = getattr(metadata, "scheduler_metadata", None) is not None
    variant = "kernel-heuristic" if splits == 0 else f"splits<={splits}"
    return (
        "flash_attn_varlen_func",
        variant,
        {"max_num_splits": splits, "planned_ahead": int(ahead)},
    )


def splits_of_plan(
    plan: list[int], query_lens: list[int], *, num_rows: int, head_size: int, causal: bool
) -> list[int] | None:
    """Into how many parts FlashAttention 3 cuts the keys of each row, from the plan it made ahead of time.

    The plan is vectors of one number for each row, padded to four rows, and a semaphore: query length (times the query
    heads that share a KV head, when they are packed), then splits if any row has several, then, when causal, how many
    heads fit into L2. A single new token is not treated as causal unless the head size is above 64 and at most 128.
    None when the plan is not like that.

    Source: vllm-project/flash-attention, hopper/flash_api.cpp (vLLM 0.20.2); seen on an H200 for 36 batches, where the
    kernel that combines splits ran exactly when this says more than one.
    """
    padded = -(-num_rows // 4) * 4
    vectors, rest = divmod(len(plan) - 1, padded)
    rows = len(query_lens)
    packed = plan[0] // query_lens[0] if rows and query_lens[0] else 0
    if rest or packed < 1 or plan[:rows] != [packed * length for length in query_lens]:
        return None
    swizzled = causal and not (max(query_lens) == 1 and not 64 < head_size <= 128)
    if vectors == 1 + swizzled:
        return [1] * rows
    if vectors != 2 + swizzled:
        return None
    splits = plan[padded : padded + rows]
    return splits if all(1 <= count <= 256 for count in splits) else None


def _triton(metadata: Any) -> tuple[str, str, dict[str, int]]:
    """2D/3D by the rule of ``unified_attention`` (0.20.2 to 0.32)."""
    threshold = getattr(metadata, "seq_threshold_3D", None)
    num_seqs = int(metadata.seq_lens.shape[0])
    if threshold is None:
        return "unified_attention", "", {"num_seqs": num_seqs}
    segments = int(getattr(metadata, "num_par_softmax_segments", 0) or 0)
    three = metadata.max_query_len == 1 and num_seqs <= threshold
    numbers = {"num_seqs": num_seqs, "seq_threshold_3D": int(threshold), "segments": segments}
    return "unified_attention", "3D" if three else "2D", numbers


_READERS = {
    "CPUAttentionMetadata": _cpu,
    "FlashAttentionMetadata": _flash,
    "TritonAttentionMetadata": _triton,
}
