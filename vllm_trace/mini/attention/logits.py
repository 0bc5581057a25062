"""What decode and prefill share: logits of some tokens over some keys, and the weighted sum of values.

Follows: vLLM 0.11.0, csrc/attention/attention_kernels.cuh (scale, ALiBi), prefix_prefill.py (sliding window);
vLLM 0.20.2, triton_unified_attention.py (the order: soft cap, then ALiBi).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bend:
    """What happens to logits between the dot product and the softmax."""

    scale: float
    alibi_slopes: Tensor | None = None  # [num_heads]
    sliding_window: int | None = 0
    softcap: float = 0.0
    causal: bool = True

    def first_key(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        return max(0, position + 1 - self.sliding_window) if self.sliding_window else 0

    def logits(self, query: Tensor, keys: Tensor, own: Tensor, start: int) -> Tensor:
        """Logits of queries at the positions `own` over keys at `start` and behind; -inf where a key is not seen.

        Shapes: `query [num_tokens, num_heads, head_size]`, `keys [num_keys, num_kv_heads, head_size]`, `own
        [num_tokens]`, returns `[num_heads, num_tokens, num_keys]`, float32.
        """
        num_tokens, num_heads, _ = query.shape
        num_kv_heads = keys.shape[1]
        # The query heads of a group are rows of one matrix: [kv heads, tokens * group, head size] @ keys.
        grouped = query.float().mul(self.scale).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
        found = grouped.flatten(1, 2) @ keys.permute(1, 2, 0)
        found = found.view(num_heads, num_tokens, len(keys))
        if self.softcap:
            found = self.softcap * torch.tanh(found / self.softcap)
        if self.alibi_slopes is None and not self.causal and not self.sliding_window:
            return found
        distance = torch.arange(start, start + len(keys), device=own.device) - own[:, None]
        if self.alibi_slopes is not None:
            found = found + self.alibi_slopes.to(found)[:, None, None] * distance
        if self.causal:
            found = found.masked_fill_(distance > 0, -torch.inf)
        if self.sliding_window:
            found = found.masked_fill_(distance <= -self.sliding_window, -torch.inf)
        return found


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Shapes: `weights [num_heads, num_tokens, num_keys]`, returns `[num_tokens, num_heads, head_size]`."""
    num_heads, num_tokens, num_keys = weights.shape
    grouped = weights.reshape(values.shape[1], -1, num_keys)
    return (grouped @ values.transpose(0, 1)).view(num_heads, num_tokens, -1).transpose(0, 1)
