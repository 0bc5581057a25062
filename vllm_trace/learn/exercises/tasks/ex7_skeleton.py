"""Exercise 7: V2's reduce. Merge partitions that know nothing of each other.

`vllm-trace learn check ex7` compares with one softmax over everything.
"""

import torch


def reduce(exp_sums: torch.Tensor, max_logits: torch.Tensor, tmp_out: torch.Tensor) -> torch.Tensor:
    """One softmax's output from those of its partitions.

    Partition p covered some of the keys: max_logits[p] is its largest logit, exp_sums[p] the sum of
    exp(logit - max_logits[p]), tmp_out[p] its weighted sum of values divided by exp_sums[p].
    exp_sums, max_logits: [num_partitions]; tmp_out: [num_partitions, head_dim]; result: [head_dim].
    An empty partition has maximum -inf and sum 0. Logits may be as large as 1000.
    """
    raise NotImplementedError("reduce")
