"""Attention of our own inside a live vLLM: decode by V1 or V2 as PagedAttention's rule says, prefill with context.

``paged`` uses the kernels of `mini`, ``paged:vllm`` vLLM's own ``paged_attention_v1/v2`` and ``reshape_and_cache``
where the installed release has them. `engine_args` has engines ask for it, `support` says beforehand what cannot be
done, `vllm_classes` is what vLLM loads, `paged` is the attention, `shadow` computes a call a second time and compares.

Nothing here imports torch or vLLM until it is asked to: the front door is also opened by readers of traces.
"""

from __future__ import annotations

import sys

CLASSES = {
    "paged": "vllm_trace.backend.vllm_classes.PagedBackend",
    "paged:vllm": "vllm_trace.backend.vllm_classes.PagedVllmBackend",
}
"""Choice → the class that vLLM is given."""

NAMES = {"mini": "PAGED", "vllm": "PAGED_VLLM"}
"""Engine under the backend → its name in a trace. (vLLM wants a name of its own list, where it is CUSTOM.)"""


def register_backend(choice: str) -> None:
    """Tell vLLM's registry in this process; every process that builds layers has to.

    On the CPU the platform has one class and asks no further, so its path is replaced. Elsewhere ours stands under
    CUSTOM, beside the others, and the engine argument ``attention_backend="CUSTOM"`` takes it.
    """
    if choice not in CLASSES and "vllm.v1.attention.backends.registry" not in sys.modules:
        return  # nothing was ever registered; before 0.20 there is no such registry
    from vllm_trace.backend.engine_args import stand_in

    stand_in(choice)
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    member = (
        AttentionBackendEnum.CPU_ATTN if current_platform.is_cpu() else AttentionBackendEnum.CUSTOM
    )
    if choice in CLASSES:
        register_backend(member, CLASSES[choice])
    elif member.is_overridden() and member.get_path() in CLASSES.values():
        member.clear_override()
    else:
        return
    # The class of an equal layer of an earlier engine in this process is remembered.
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()
