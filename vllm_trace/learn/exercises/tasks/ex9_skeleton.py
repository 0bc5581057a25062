"""Exercise 9: find the injected fault.

ex9.vtrace lies beside this file. It was recorded from a real vLLM, and then one thing was changed:
somewhere a block is taken from the free queue although a request still holds it. Look at it first:

    vllm-trace show ex9.vtrace events --kind blocks

`vllm-trace learn check ex9` runs your function on this trace, on clean ones, and on others.
"""

from vllm_trace.events import Event


def find_fault(events: list[Event]) -> int | None:
    """The number (from 1) of the event that takes a block which is held, or None.

    What matters: blocks.taken (event.blocks, each gets its first owner), blocks.touched and
    blocks.freed (event.blocks, and event.ref_cnts as they are afterwards).
    """
    raise NotImplementedError("find_fault")
