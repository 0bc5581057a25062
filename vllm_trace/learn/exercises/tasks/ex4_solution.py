"""Exercise 4, solved."""


def slot_of(table: list[int], position: int, block_size: int) -> int:
    return table[position // block_size] * block_size + position % block_size


def slots_of_step(
    rows: list[tuple[list[int], int, int]], block_size: int, padded_to: int = 0
) -> list[int]:
    slots = [
        slot_of(table, position, block_size)
        for table, computed, new in rows
        for position in range(computed, computed + new)
    ]
    return slots + [-1] * (padded_to - len(slots))
