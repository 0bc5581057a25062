"""Exercise 8: preemption.

`vllm-trace learn check ex8` compares with the decisions of a real vLLM's scheduler.
"""

from dataclasses import dataclass


@dataclass
class Running:
    """A request that decodes."""

    name: str
    num_tokens: int
    """Tokens whose K and V it has."""
    num_blocks: int


def schedule(running: list[Running], free: int, block_size: int) -> tuple[list[str], list[str]]:
    """Who computes one more token in this step, and who is preempted, each in the order it happened.

    Go through `running` from the oldest. A request needs a block more when its tokens and the new
    one do not fit those it has. While too few are free, the youngest running request is preempted
    and all its blocks are free; if that is the request itself, nobody after it is looked at.
    """
    raise NotImplementedError("schedule")
