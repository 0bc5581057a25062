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

    def rows(self, query: Tensor, num_kv_heads: int) -> Tensor:
        """Scaled queries as one matrix for each KV head: all that read the same keys are its rows.

        Shapes: `query [num_tokens, num_heads, head_size]`, returns `[num_kv_heads, group * num_tokens, head_size]`.
        """
        grouped = query.float().mul(self.scale).unflatten(1, (num_kv_heads, -1))
        return grouped.permute(1, 2, 0, 3).flatten(1, 2)

    def logits(self, rows: Tensor, keys: Tensor, own: Tensor, start: int) -> Tensor:
        """Logits of `rows`, queries at the positions `own`, over keys at `start` and behind; -inf where not seen.

        Shapes: `keys [num_keys, num_kv_heads, head_size]`, `own [num_tokens]`, returns
        `[num_kv_heads, group * num_tokens, num_keys]`, float32.
        """
        found = torch.bmm(rows, keys.permute(1, 2, 0))
        if self.softcap:
            found = self.softcap * torch.tanh(found / self.softcap)
        if self.alibi_slopes is None and not self.causal and not self.sliding_window:
            return found
        distance = torch.arange(start, start + len(keys), device=own.device) - own[:, None]
        by_head = found.view(
            -1, *distance.shape
        )  # [num_heads, num_tokens, num_keys], the same memory
        if self.alibi_slopes is not None:
            by_head += self.alibi_slopes.to(found)[:, None, None] * distance
        if self.causal:
            by_head.masked_fill_(distance > 0, -torch.inf)
        if self.sliding_window:
            by_head.masked_fill_(distance <= -self.sliding_window, -torch.inf)
        return found


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Shapes: `weights [num_kv_heads, rows, num_keys]`, `values [num_keys, num_kv_heads, head_size]`, returns
    `[num_kv_heads, rows, head_size]`.
    """
    return torch.bmm(weights, values.transpose(0, 1))


def add_weighted_sum(out: Tensor, weights: Tensor, values: Tensor) -> None:
    """The same, added to what `out` has."""
    out.baddbmm_(weights, values.transpose(0, 1))


def by_token(rows: Tensor, num_tokens: int) -> Tensor:
    """The way back from `Bend.rows`: `[num_tokens, num_heads, head_size]`."""
    return rows.reshape(-1, num_tokens, rows.shape[2]).transpose(0, 1)
