"""What a step was planned to be, and what the worker that executes it was told."""

from __future__ import annotations

from vllm_trace.events import StepScheduled

Table = list[list[int]]
"""Block ids in logical order, per group. One object lives from admission to free."""

PLANS_KEPT = 64
"""Steps that may be planned and not executed yet; older plans are forgotten."""


class Plan:
    """What a step was planned to be; a worker executes it now or later."""

    __slots__ = ("_counts", "_ends", "end_list", "event", "grown", "requests")

    def __init__(self, event: StepScheduled, ends: list[int], grown: set[int]) -> None:
        self.event = event
        self.requests = event.requests or []
        """In the order of scheduling."""
        self.end_list = ends
        """Tokens of each that have KV after the step."""
        self.grown = grown
        """Requests that got blocks for this step."""
        self._ends: dict[int, int] | None = None
        self._counts: dict[int, int] | None = None

    @property
    def ends(self) -> dict[int, int]:
        """``end_list`` by request."""
        if self._ends is None:
            self._ends = dict(zip(self.requests, self.end_list))
        return self._ends

    @property
    def counts(self) -> dict[int, int]:
        """Tokens to compute, by request."""
        if self._counts is None:
            self._counts = dict(zip(self.requests, self.event.num_tokens or ()))
        return self._counts


class WorkerRows:
    """The block table of one group as one worker's kernels received it."""

    __slots__ = ("changed", "fresh", "lives", "rows")

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.lives: dict[int, Table | None] = {}
        """The manager's table that a row was last told for: another object is another life."""
        self.changed: set[int] = set()
        self.fresh: set[int] = set()
        """Requests whose row changed between the last two ``slots.mapped``."""
