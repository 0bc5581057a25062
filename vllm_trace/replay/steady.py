"""Requests that decode one token in every step: their counts stand still and are put right on demand."""

from __future__ import annotations

from vllm_trace.mini.request import Request


class Steady:
    """Who gains one token in every step, and in which step each has to be looked at again.

    Steps are counted from 1 as they are scheduled, whatever numbers they have in the trace.
    """

    def __init__(self) -> None:
        self.num_scheduled = 0
        self.num_updated = 0
        self.members: dict[int, tuple[Request, int, int]] = {}
        """(request, computed tokens, tokens), each less the number of steps at that time."""
        self._due: dict[int, list[int]] = {}
        """Step → members whose quiet may end in it."""
        self._due_at: dict[int, int] = {}

    def join(self, key: int, request: Request, quiet_until: int) -> None:
        """From the next step on; ``request`` has its counts after the step just scheduled."""
        computed = request.num_computed_tokens - self.num_scheduled
        self.members[key] = (request, computed, request.num_tokens - self.num_updated)
        self._set_due(key, max(quiet_until - computed + 1, self.num_scheduled + 1))

    def was_called(self, key: int, quiet_until: int) -> None:
        """``allocate_slots`` was replayed for the step that is being scheduled: when does it matter again?"""
        member = self.members.get(key)
        if member is not None:
            self._set_due(key, max(quiet_until - member[1] + 1, self.num_scheduled + 2))

    def _set_due(self, key: int, step: int) -> None:
        self._due_at[key] = step
        self._due.setdefault(step, []).append(key)

    def due(self) -> list[int]:
        """Whose quiet ends in the step that is being scheduled, and who was not called in it."""
        step = self.num_scheduled + 1
        return [key for key in self._due.pop(step, ()) if self._due_at.get(key) == step]

    def catch_up(self, key: int) -> None:
        """Put the counts of one right, as they are before the next schedule."""
        member = self.members.get(key)
        if member is not None:
            request, computed, tokens = member
            request.num_computed_tokens = computed + self.num_scheduled
            request.num_tokens = tokens + self.num_updated

    def leave(self, key: int) -> None:
        self.catch_up(key)
        if self.members.pop(key, None) is not None:
            del self._due_at[key]

    def sampled(self, key: int, num_tokens: int) -> None:
        """In the step just answered it was not one token."""
        if key in self.members:
            request, computed, tokens = self.members[key]
            self.members[key] = (request, computed, tokens + num_tokens - 1)
