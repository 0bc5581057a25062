"""Exercise 7, solved."""

import torch
from torch import Tensor


def reduce(exp_sums: Tensor, max_logits: Tensor, tmp_out: Tensor) -> Tensor:
    rescaled = exp_sums * torch.exp(max_logits - max_logits.max())
    return (rescaled / rescaled.sum()) @ tmp_out
