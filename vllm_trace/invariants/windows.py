"""Whose block it was that a sliding window left behind: the trace says which, and not always whose."""

from __future__ import annotations

from collections.abc import Callable, Iterable

NULL_BLOCK = 0

Row = list[int]


class PassedBlocks:
    """Blocks that windows gave back, and the rows they left.

    The call that gave them back may have left no event, and requests with a common prefix share them. So an owner
    is chosen whose window is that far. If it was another one, that shows later, when a row goes on where
    it should not stand yet; then the two change places. How often a block is held is right at any time.
    """

    def __init__(self) -> None:
        self.left: dict[int, list[tuple[int, int, int]]] = {}
        """(owner, group, place) that a block was taken out of."""

    def take_out(
        self,
        blocks: Row,
        rows: Iterable[tuple[int, int, Row]],
        is_passed: Callable[[int, int, int], bool],
    ) -> list[int]:
        """Put nulls where the blocks stood, and return those that were found.

        ``rows`` are (owner, group, row), the likeliest first; ``is_passed(owner, group, place)``.
        """
        rows = list(rows)
        found = self._choose(blocks, rows, is_passed)
        if found is None:
            return []
        owner, group, row, place = found
        for index in range(place):
            if row[index]:
                self._change_places(owner, group, index, rows)
        for index, block in enumerate(blocks, place):
            if not row[index]:
                self._take_back(block, (owner, group, index), row, rows)
        row[place : place + len(blocks)] = [NULL_BLOCK] * len(blocks)
        for index, block in enumerate(blocks, place):
            self.left.setdefault(block, []).append((owner, group, index))
        return blocks

    def _choose(
        self,
        blocks: Row,
        rows: list[tuple[int, int, Row]],
        is_passed: Callable[[int, int, int], bool],
    ) -> tuple[int, int, Row, int] | None:
        best, best_score = None, -1
        for owner, group, row in rows:
            if blocks[-1] not in row:
                continue
            place = row.index(blocks[-1]) - len(blocks) + 1
            there = row[max(0, place) : place + len(blocks)]
            if place < 0 or any(
                has not in (block, NULL_BLOCK) for has, block in zip(there, blocks)
            ):
                continue
            end = place + len(blocks)
            if not is_passed(owner, group, end - 1):
                continue
            # A call gives back all that the window has passed, and nothing of it stood there before.
            exact = end == len(row) or not is_passed(owner, group, end)
            score = 4 * exact + 2 * (there == blocks) + (not any(row[:place]))
            if score > best_score:
                best, best_score = (owner, group, row, place), score
        return best

    def settle_row(
        self, owner: int, group: int, row: Row, given: Row, rows: list[tuple[int, int, Row]]
    ) -> None:
        """A request ends and gives ``given`` back, in the order of its row: was that what it held?"""
        held = [block for block in row if block]
        if held == given:
            return
        for index, block in enumerate(row):
            if block and block not in given:
                self._change_places(owner, group, index, rows)
        for block in given:
            for one in self.left.get(block, ()):
                if one[:2] == (owner, group) and block not in row:
                    self._take_back(block, one, row, rows)
                    break

    def _change_places(
        self, owner: int, group: int, index: int, rows: list[tuple[int, int, Row]]
    ) -> None:
        """The owner left this block before; whoever was thought to have left it still has it."""
        mine = next(row for who, which, row in rows if (who, which) == (owner, group))
        block = mine[index]
        for one in self.left.get(block, ()):
            for who, which, row in rows:
                if (who, which) == one[:2] and who != owner and row[one[2]] == NULL_BLOCK:
                    row[one[2]], mine[index] = block, NULL_BLOCK
                    self.left[block].remove(one)
                    self.left[block].append((owner, group, index))
                    return

    def _take_back(
        self, block: int, one: tuple[int, int, int], mine: Row, rows: list[tuple[int, int, Row]]
    ) -> None:
        for who, which, row in rows:
            if who != one[0] and block in row:
                place = row.index(block)
                row[place], mine[one[2]] = NULL_BLOCK, block
                if one in self.left.get(block, ()):
                    self.left[block].remove(one)
                self.left.setdefault(block, []).append((who, which, place))
                return

    def forget(self, blocks: Iterable[int]) -> None:
        """Handed out anew: whoever left them, it is over."""
        for block in blocks:
            self.left.pop(block, None)
