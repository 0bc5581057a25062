"""The attention of `mini.attention` in Triton: the same functions, the same arguments, on a GPU.

Follows: the learning plan's steps 5 to 11; what each module names.
Leaves out: checks of values, which would wait for the GPU: with a table entry, a length or a slot beyond the cache what
happens is undefined (the torch form refuses it by its index). `unsupported` says what can be asked before a launch.

With TRITON_INTERPRET=1 in the environment before Triton is imported they run on the CPU, slowly: for tests.
"""

from __future__ import annotations

from .cache import copy_blocks, reshape_and_cache, swap_blocks
from .paged import Plan, forward_decode, paged_attention_v1, paged_attention_v2, v1_plan, v2_plan
from .prefill import context_attention_fwd
from .support import interpreted, unsupported

__all__ = [
    "Plan",
    "context_attention_fwd",
    "copy_blocks",
    "forward_decode",
    "interpreted",
    "paged_attention_v1",
    "paged_attention_v2",
    "reshape_and_cache",
    "swap_blocks",
    "unsupported",
    "v1_plan",
    "v2_plan",
]
