"""Exercise 9, solved."""

from vllm_trace.events import Event


def find_fault(events: list[Event]) -> int | None:
    held: set[int] = set()
    for number, event in enumerate(events, 1):
        if event.kind == "blocks.taken":
            if held & set(event.blocks):
                return number
            held |= set(event.blocks)
        elif event.kind in ("blocks.touched", "blocks.freed"):
            for block, count in zip(event.blocks, event.ref_cnts):
                if count:
                    held.add(block)
                else:
                    held.discard(block)
    return None
