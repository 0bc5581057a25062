"""Attention over a cache that lies in blocks, in plain torch: write K and V to slots, read them through block tables.

Follows: vLLM 0.11.0, csrc/attention/ (V1, V2 and its reduce), csrc/cache_kernels.cu, vllm/attention/ops/paged_attn.py
(`forward_decode`, the V1/V2 rule) and prefix_prefill.py: the learning plan's steps 5 to 11; Kwon et al. 2023, section
4.
`mini.kernels` has the same functions in Triton.
Leaves out: block-sparse attention, heads that are spread over devices, speed beyond what clear code gives.

Shapes, the same in every function here:

    key, value                     [num_tokens, num_kv_heads, head_size]
    query, out                     [num_tokens, num_heads, head_size]; when decoding, one token for each sequence
    key_cache, value_cache         [num_blocks, block_size, num_kv_heads, head_size], or as `layout` says, see `layouts`
    block_tables                   [num_seqs, max_num_blocks]: row i names the blocks of sequence i, in order
    seq_lens                       [num_seqs]: tokens in the cache, those of this step included; 0 gives zeros
    slot_mapping                   [num_tokens]: block * block_size + offset; -1 for padding

The arithmetic is float32 whatever the caches hold. A float8 or int8 cache holds values divided by `k_scale` and
`v_scale`: numbers, or tensors of one element or of one for each KV head.

With grouped-query attention `num_heads // num_kv_heads` neighbouring query heads read one KV head.

What a token sees and how its logits are bent, in vLLM's order:

    logit = scale * query . key
    softcap > 0            logit = softcap * tanh(logit / softcap)
    alibi_slopes           logit + slope of the head * (position of the key - position of the query)
    sliding_window = W     only the token itself and the W - 1 before it; 0 or None: all before it

Two tokens, two heads, one block, by hand: equal keys weigh both values alike.

>>> cache = torch.zeros(2, 2, 1, 2), torch.zeros(2, 2, 1, 2)      # two blocks of two slots
>>> key, value = torch.ones(2, 1, 2), torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]])
>>> reshape_and_cache(key, value, *cache, torch.tensor([2, 3]))   # both slots of block 1
>>> table, length = torch.tensor([[1]]), torch.tensor([2])
>>> paged_attention_v1(torch.ones(1, 2, 2), *cache, table, length, scale=1.0).tolist()
[[[2.0, 2.0], [2.0, 2.0]]]
"""

from __future__ import annotations

import torch  # noqa: F401  (the example above)

from .cache import copy_blocks, reshape_and_cache, swap_blocks
from .decode import (
    MAX_V1_SEQ_LEN,
    PARTITION_SIZE,
    forward_decode,
    paged_attention_v1,
    paged_attention_v2,
    paged_attention_v2_reduce,
    use_v1,
)
from .layouts import from_kernel_layout, to_kernel_layout
from .prefill import context_attention_fwd
from .support import LAYOUTS, unsupported

__all__ = [
    "LAYOUTS",
    "MAX_V1_SEQ_LEN",
    "PARTITION_SIZE",
    "context_attention_fwd",
    "copy_blocks",
    "forward_decode",
    "from_kernel_layout",
    "paged_attention_v1",
    "paged_attention_v2",
    "paged_attention_v2_reduce",
    "reshape_and_cache",
    "swap_blocks",
    "to_kernel_layout",
    "unsupported",
    "use_v1",
]
