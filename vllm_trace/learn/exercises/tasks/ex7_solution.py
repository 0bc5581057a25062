"""Exercise 7, solved."""

import torch


def reduce(exp_sums: torch.Tensor, max_logits: torch.Tensor, tmp_out: torch.Tensor) -> torch.Tensor:
    rescaled = exp_sums * torch.exp(max_logits - max_logits.max())
    return (rescaled / rescaled.sum()) @ tmp_out
