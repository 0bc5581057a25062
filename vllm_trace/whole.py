"""What a step's events leave out because it can be told from the others, put back as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_trace.errors import TraceError
from vllm_trace.events import (
    EngineConfigured,
    Event,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
)

MAX_BLOCKS = 1 << 24
"""A pool that claims more is damage too: 16 times what the largest devices hold of the smallest models."""


class Completion:
    """Makes the batches of one process whole, one after the other."""

    def __init__(self, path: Path, level: str) -> None:
        self.path = path
        self._full = level != "light"
        self._requests: list[int] = []
        self._num_tokens: list[int] = []
        self._sizes: dict[int, int] = {}
        """Requests in each step whose results are not in yet."""
        self._calls: list[Any] = []
        """Of the step that is being scheduled, without a count of the silent calls before them."""

    def complete(self, batch: list[Any]) -> list[Event]:
        """Put back what a step has in common with the one before. Raises: ``TraceError`` for damage."""
        # Names of this function: compiled, it would look names of the module up for each event.
        allocated, refused = SlotsAllocated, SlotsRefused
        scheduled, updated, configured = StepScheduled, StepUpdated, EngineConfigured
        for event in batch:
            kind = type(event)
            if kind is allocated or kind is refused:
                if event.num_kept < 0:
                    self._calls.append(event)
            elif kind is scheduled:
                self._scheduled(event)
            elif kind is updated:
                size = self._sizes.pop(event.step, None)
                if event.num_output_tokens is None and size is not None and self._full:
                    event.num_output_tokens = [1] * size
            elif kind is configured:
                self._check_sizes(event)
        return batch

    def _scheduled(self, event: Any) -> None:
        requests = event.requests
        if requests is None:
            event.requests = requests = self._requests
        else:
            self._requests = requests
        if event.num_tokens is None:
            event.num_tokens = self._num_tokens
        else:
            self._num_tokens = event.num_tokens
        self._sizes[event.step] = len(requests)
        if event.num_kept < 0:
            _count_kept(event, self._calls)
        self._calls.clear()

    def _check_sizes(self, event: Any) -> None:
        """Everybody divides by a block's size and makes room for each block of the pool."""
        sizes = [event.block_size, event.hash_block_size, *[g.block_size for g in event.groups]]
        if min(sizes) < 1 or not 1 <= event.num_blocks <= MAX_BLOCKS:
            raise TraceError(
                f"{self.path} is damaged: an engine with {event.num_blocks} blocks of {min(sizes)} tokens"
            )


def _count_kept(step: Any, calls: list[Any]) -> None:
    """Put in how many silent calls stood before each of ``calls``: vLLM asks in the step's order.

    Who is refused in a step that preempts nobody is new, and asks after all that run.
    """
    requests: list[int] = step.requests
    told = 0
    placed: set[int] = set()
    others: list[Any] = []
    for call in calls:
        request = call.request
        try:
            call.num_kept = requests.index(request) - told
            placed.add(request)
            told += 1
        except ValueError:
            others.append(call)
    step.num_kept = len(requests) - len(placed)
    for call in others:
        call.num_kept = step.num_kept
