"""Paged memory without vLLM: pages, page tables, sequences, and the block manager that shares pages between them.

Follows: the seed nano-paged-attention (page, page table, sequence, block manager) and exercise 1 of the deep dive
(`SimpleBlockManager`).
Leaves out: eviction, scheduling, the K and V themselves; those are in `kv_cache_manager`, `scheduler` and `attention`.

Two beams of one prompt. Both point at the same pages; who writes first into a shared, half-full page gets a copy:

>>> manager = BlockManager(num_pages=4, page_size=2)
>>> parent = Sequence([5, 6, 7])
>>> manager.allocate(parent)
>>> child = manager.fork(parent)
>>> child.page_table == parent.page_table == [0, 1]
True
>>> manager.append(child, 9)          # copy page 1 to page 2, then write there
[(1, 2)]
>>> manager.append(parent, 8)         # page 1 is the parent's alone now
[]
>>> parent.page_table, child.page_table
([0, 1], [0, 2])
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field


@dataclass
class Page:
    """The unit of allocation: room for the K and V of `page_size` tokens. `ref_count` sequences use it."""

    page_id: int
    ref_count: int = 0
    # What a full page holds: the page before it and its own tokens. Equal content, equal page.
    content: tuple[int, tuple[int, ...]] | None = None


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One decoding request. Its page table makes scattered pages look like one row of memory: logical page i is
    `page_table[i]`, and the token at `position` is in page `position // page_size` at `position % page_size`."""

    token_ids: list[int]
    status: SequenceStatus = SequenceStatus.WAITING
    page_table: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the next token goes."""
        return len(self.token_ids)


class BlockManager:
    """Hands out pages, counts who uses them, and takes back those that nobody uses."""

    def __init__(self, num_pages: int, page_size: int):
        self.page_size = page_size
        self.pages = [Page(page_id) for page_id in range(num_pages)]
        self.free_pages = deque(range(num_pages))
        self.full_pages: dict[tuple, int] = {}  # content -> page, as long as somebody uses it

    def can_allocate(self, sequence: Sequence) -> bool:
        """Whether a prompt fits, shared pages or not."""
        return -(-len(sequence.token_ids) // self.page_size) <= len(self.free_pages)

    def allocate(self, sequence: Sequence) -> None:
        """Prefill: a page for each `page_size` tokens of the prompt. Full pages that begin like another's are shared.

        Raises: MemoryError when too few pages are free; then nothing has changed.
        """
        table: list[int] = []
        try:
            for start in range(0, len(sequence.token_ids), self.page_size):
                tokens = sequence.token_ids[start : start + self.page_size]
                table.append(self._page_for(table[-1] if table else -1, tokens))
        except MemoryError:
            self._release(table)
            raise
        sequence.page_table = table
        sequence.status = SequenceStatus.RUNNING

    def append(self, sequence: Sequence, token_id: int) -> list[tuple[int, int]]:
        """Decode: room for one token. Returns the copies (from, to) to make before K and V are written.

        Raises: MemoryError when a page is needed and none is free; then nothing has changed.
        """
        copies = []
        table, index = sequence.page_table, sequence.position // self.page_size
        if index == len(table):
            table.append(self._take())
        elif self.pages[table[index]].ref_count > 1:
            # Somebody else reads this page: what follows must not appear in it.
            shared, own = table[index], self._take()
            self.pages[shared].ref_count -= 1
            table[index] = own
            copies.append((shared, own))
        sequence.token_ids.append(token_id)
        if sequence.position % self.page_size == 0:
            self._publish(table, index, sequence.token_ids[index * self.page_size :])
        return copies

    def fork(self, parent: Sequence) -> Sequence:
        """A second sequence with the same past, as beam search needs it. No page is copied yet."""
        for page_id in parent.page_table:
            self.pages[page_id].ref_count += 1
        return Sequence(list(parent.token_ids), parent.status, list(parent.page_table))

    def free(self, sequence: Sequence) -> None:
        self._release(sequence.page_table)
        sequence.page_table = []
        sequence.status = SequenceStatus.FINISHED

    def _page_for(self, previous: int, tokens: Tokens[int]) -> int:
        content = (previous, tuple(tokens))
        if content in self.full_pages:
            page_id = self.full_pages[content]
            self.pages[page_id].ref_count += 1
            return page_id
        page_id = self._take()
        if len(tokens) == self.page_size:
            self._remember(page_id, content)
        return page_id

    def _publish(self, table: list[int], index: int, tokens: Tokens[int]) -> None:
        """A page became full: later prompts may share it, unless an equal page is known already."""
        content = (table[index - 1] if index else -1, tuple(tokens))
        if content not in self.full_pages:
            self._remember(table[index], content)

    def _remember(self, page_id: int, content: tuple) -> None:
        self.full_pages[content] = page_id
        self.pages[page_id].content = content

    def _take(self) -> int:
        if not self.free_pages:
            raise MemoryError("no free page")
        page_id = self.free_pages.popleft()
        self.pages[page_id].ref_count = 1
        return page_id

    def _release(self, table: Tokens[int]) -> None:
        # Last page first: while a page is known by its content, the page before it must be in use.
        for page_id in reversed(table):
            page = self.pages[page_id]
            page.ref_count -= 1
            if page.ref_count == 0:
                if page.content is not None:
                    del self.full_pages[page.content]
                    page.content = None
                self.free_pages.append(page_id)


class SimpleBlockManager:
    """The deep dive's first exercise: a list of free blocks and a table for each sequence.

    >>> manager = SimpleBlockManager(num_blocks=10, block_size=16)
    >>> first = manager.allocate(seq_id=1, num_blocks=3)
    >>> second = manager.allocate(seq_id=2, num_blocks=2)
    >>> manager.free(seq_id=1)
    >>> manager.allocate(seq_id=3, num_blocks=3) == first
    True
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.free_blocks = list(range(num_blocks))
        self.block_tables: dict[int, list[int]] = {}

    def allocate(self, seq_id: int, num_blocks: int) -> list[int]:
        """Raises: MemoryError when too few blocks are free."""
        if num_blocks > len(self.free_blocks):
            raise MemoryError(f"{num_blocks} blocks wanted, {len(self.free_blocks)} are free")
        blocks, self.free_blocks = self.free_blocks[:num_blocks], self.free_blocks[num_blocks:]
        self.block_tables.setdefault(seq_id, []).extend(blocks)
        return blocks

    def free(self, seq_id: int) -> None:
        """Freed blocks go to the front: they are reused while they are still warm."""
        self.free_blocks = self.block_tables.pop(seq_id) + self.free_blocks

    def get_block_table(self, seq_id: int) -> list[int]:
        return list(self.block_tables[seq_id])
