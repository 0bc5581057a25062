"""The pool and the tables as lists of changes: what a slider needs to show any step at once.

A *frame* is the pool after a step's schedule, as in ``show blocks``; one more stands for the end
of the trace. Between two frames only what changed is written down.
"""

from __future__ import annotations

from typing import Any

from vllm_trace.events import (
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    EngineConfigured,
    Event,
    PrefixCacheReset,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
)
from vllm_trace.state import NULL_BLOCK, KVState

FREE, CACHED = -2, -1
"""An owner that is no request; the numbers of ``show --json blocks``."""

_TABLES = (SlotsAllocated, RequestFreed, RequestPreempted, RequestFinished)
_POOL = (BlocksTaken, BlocksTouched, BlocksFreed)


class PoolChanges:
    """Fold of a trace into the changes of blocks and of tables.

    ``tables[request]`` is a list of ``[frame, event, group, first, blocks]``: from place ``first``
    on, the group's row is ``blocks``.
    """

    def __init__(self) -> None:
        self.state = KVState()
        self.num_blocks = 0
        self.hashes: dict[int, int] = {}
        """Hash → its place in the report's list of hashes."""
        self.tables: dict[int, list[list[Any]]] = {}
        self.starts: list[int] = []
        """Where each frame's changes begin in the columns below."""
        self.columns: dict[str, list[int]] = {
            name: [] for name in ("block", "owner", "count", "ref", "hash", "since", "cached")
        }
        self._rows: dict[int, list[list[int]]] = {}
        self._holders: dict[int, dict[int, int]] = {}
        """Block → request → the order in which the requests' tables were begun."""
        self._begun: dict[int, int] = {}
        self._since: dict[int, int] = {}
        """Block → event that last gave, shared or took it back."""
        self._cached: dict[int, int] = {}
        self._dirty: dict[int, None] = {}
        self._num_begun = 0

    def take(self, number: int, event: Event, frame: int) -> None:
        """One event; ``frame`` is the next to come."""
        kind = type(event)
        if kind is EngineConfigured:
            self._fresh(number, event, frame)  # type: ignore[arg-type]
            return
        self.state.apply(event)
        if kind in _POOL:
            for block in event.blocks:  # type: ignore[attr-defined]
                self._since[block] = number
                self._dirty[block] = None
        elif kind is BlocksCached:
            for block in event.blocks:  # type: ignore[attr-defined]
                self._cached[block] = number
                self._dirty[block] = None
        elif kind is BlockEvicted:
            self._cached[event.block] = number  # type: ignore[attr-defined]
            self._dirty[event.block] = None  # type: ignore[attr-defined]
        elif kind is PrefixCacheReset:
            self._dirty |= dict.fromkeys(self._cached)
        elif kind in _TABLES:
            self._table(number, event.request, frame)  # type: ignore[attr-defined]

    def _fresh(self, number: int, event: EngineConfigured, frame: int) -> None:
        """Block ids start afresh: what an engine before this one held is gone."""
        self.state.apply(event)
        for request in list(self._rows):
            self._table(number, request, frame)
        self.num_blocks = max(self.num_blocks, event.num_blocks)
        self._dirty |= dict.fromkeys([*self._since, *self._cached])
        self._since = dict.fromkeys(self._since, number)
        self._cached.clear()

    def _table(self, number: int, request: int, frame: int) -> None:
        old = self._rows.get(request, [])
        new = self.state.tables.get(request, [])
        if new and request not in self._begun:
            self._num_begun += 1
            self._begun[request] = self._num_begun
        changes: list[list[Any]] = []
        for group in range(max(len(old), len(new))):
            before = old[group] if group < len(old) else []
            after = new[group] if group < len(new) else []
            first = _first_difference(before, after)
            if first < max(len(before), len(after)):
                changes.append([frame, number, group, first, after[first:]])
                for block in before[first:]:
                    self._let_go(block, request)
        # Then only: a block that a sliding window gave back may be in another group's row by now.
        for _, _, _, _, blocks in changes:
            for block in blocks:
                self._hold(number, block, request)
        if changes:
            self.tables.setdefault(request, []).extend(changes)
        if new:
            self._rows[request] = [list(row) for row in new]
        else:
            self._rows.pop(request, None)
            self._begun.pop(request, None)

    def _hold(self, number: int, block: int, request: int) -> None:
        if block == NULL_BLOCK:
            return
        self._holders.setdefault(block, {})[request] = self._begun[request]
        self._since[block] = number
        self._dirty[block] = None

    def _let_go(self, block: int, request: int) -> None:
        holders = self._holders.get(block)
        if holders and holders.pop(request, None) is not None:
            self._dirty[block] = None
            if not holders:
                del self._holders[block]

    def close_frame(self) -> None:
        """Write down every block that is not what it was."""
        columns = self.columns
        self.starts.append(len(columns["block"]))
        for block in sorted(self._dirty):
            hashes = self.state.hashes.get(block, ())
            holders = self._holders.get(block, {})
            # As in `show blocks`: of several owners, the one whose table was begun last.
            owner = max(holders, key=holders.__getitem__, default=CACHED if hashes else FREE)
            columns["block"].append(block)
            columns["owner"].append(owner)
            columns["count"].append(len(holders))
            columns["ref"].append(self.state.ref_cnts.get(block, 0))
            columns["hash"].append(self.place_of(hashes[-1]) if hashes else -1)
            columns["since"].append(self._since.get(block, 0))
            columns["cached"].append(self._cached.get(block, 0) if hashes else 0)
        self._dirty.clear()

    def place_of(self, block_hash: int) -> int:
        """Where a hash stands in the report's list of them."""
        return self.hashes.setdefault(block_hash, len(self.hashes))

    def to_dict(self) -> dict[str, Any]:
        return {"num_blocks": self.num_blocks, "starts": self.starts} | self.columns


def _first_difference(before: list[int], after: list[int]) -> int:
    """Where two rows begin to differ; the length of the shorter when one begins the other."""
    short = min(len(before), len(after))
    if before[:short] == after[:short]:
        return short
    return next(i for i in range(short) if before[i] != after[i])
