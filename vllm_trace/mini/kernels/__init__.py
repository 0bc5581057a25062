"""The attention of `mini.attention` in Triton: the same functions, the same arguments, on a GPU.

With TRITON_INTERPRET=1 in the environment before Triton is imported they run on the CPU, slowly: for tests.
"""

from __future__ import annotations

from .paged import paged_attention_v1, paged_attention_v2

__all__ = ["paged_attention_v1", "paged_attention_v2"]
