"""Exercise 8, solved."""

from dataclasses import dataclass


@dataclass
class Running:
    name: str
    num_tokens: int
    num_blocks: int


def schedule(running: list[Running], free: int, block_size: int) -> tuple[list[str], list[str]]:
    left, scheduled, preempted = list(running), [], []
    index = 0
    while index < len(left):
        request = left[index]
        need = -(-(request.num_tokens + 1) // block_size) - request.num_blocks
        while need > free:
            victim = left.pop()
            preempted.append(victim.name)
            free += victim.num_blocks
            if victim is request:
                return scheduled, preempted
        free -= max(0, need)
        scheduled.append(request.name)
        index += 1
    return scheduled, preempted
