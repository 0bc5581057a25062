"""Exercise 4: block tables and slots.

`vllm-trace learn check ex4` compares with the slots that a real vLLM's kernels received.
"""


def slot_of(table: list[int], position: int, block_size: int) -> int:
    """Where the K and V of a position lie: block id times block size, plus the place in the block."""
    raise NotImplementedError("slot_of")


def slots_of_step(
    rows: list[tuple[list[int], int, int]], block_size: int, padded_to: int = 0
) -> list[int]:
    """The slot mapping of a flattened batch.

    rows: for each request in order (its table, tokens already computed, tokens of this step).
    Up to `padded_to` entries, the rest is -1.
    """
    raise NotImplementedError("slots_of_step")
