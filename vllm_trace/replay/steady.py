"""Requests that decode one token in every step: their counts stand still and are put right on demand."""

from __future__ import annotations

from vllm_trace.mini.kv_cache_manager import RequestBlocks
from vllm_trace.mini.request import Request
from vllm_trace.replay.steady_manager import SteadyManager


class Member:
    """One of them. ``computed`` and ``tokens`` are its counts less the steps scheduled and answered so far."""

    __slots__ = ("key", "request", "held", "rank", "computed", "tokens", "due")

    def __init__(self, key: int, request: Request, held: RequestBlocks, rank: int) -> None:
        self.key, self.request, self.held, self.rank = key, request, held, rank
        self.computed = self.tokens = 0
        self.due = 0
        """The step in which its quiet may end; 0 when it is no member any more."""


class Steady:
    """Who gains one token in every step, and in which step each has to be looked at again.

    Steps are counted from 1 as they are scheduled, whatever numbers they have in the trace.
    """

    def __init__(self, manager: SteadyManager) -> None:
        self._manager = manager
        self.num_scheduled = 0
        self.num_updated = 0
        self.members: dict[int, Member] = {}
        self._due: dict[int, list[Member]] = {}
        """Step → members to look at in it; a member that was looked at earlier has another step now."""

    def next_step(self) -> None:
        """The step that was being scheduled is complete."""
        self.num_scheduled += 1
        self._due.pop(self.num_scheduled, None)

    def join(self, key: int, request: Request, held: RequestBlocks, rank: int = 0) -> None:
        """From the next step on. ``request`` has its counts as they are before it."""
        member = self.members[key] = Member(key, request, held, rank)
        member.computed = request.num_computed_tokens - self.num_scheduled
        member.tokens = request.num_tokens - self.num_updated
        self._look_again(member, self.num_scheduled + 1)

    def call(self, member: Member, num_tokens: int = 1) -> bool:
        """``allocate_slots`` for the step that is being scheduled; False when it was refused."""
        request = member.request
        request.num_computed_tokens = member.computed + self.num_scheduled
        request.num_tokens = member.tokens + self.num_updated
        if num_tokens == 1:
            granted = self._manager.append_slot(request, member.held)
        else:
            granted = self._manager.allocate_slots(request, num_tokens) is not None
        if granted:
            self._look_again(member, self.num_scheduled + 2)
        return granted

    def decode(self, member: Member) -> bool:
        """The same for one token, if that is all that is left to compute: a chunk of a prompt may be one token too."""
        if member.computed + self.num_scheduled != member.tokens + self.num_updated - 1:
            return False
        self.call(member)
        return True

    def _look_again(self, member: Member, earliest: int) -> None:
        step = member.held.quiet_until - member.computed + 1
        if step < earliest:
            step = earliest
        member.due = step
        waiting = self._due.get(step)
        if waiting is None:
            self._due[step] = [member]
        else:
            waiting.append(member)

    def due(self) -> list[Member]:
        """Whose quiet ends in the step that is being scheduled, and who was not called in it."""
        step = self.num_scheduled + 1
        waiting = self._due.get(step)
        return [member for member in waiting if member.due == step] if waiting else []

    def leave(self, key: int) -> None:
        member = self.members.pop(key, None)
        if member is not None:
            member.request.num_computed_tokens = member.computed + self.num_scheduled
            member.request.num_tokens = member.tokens + self.num_updated
            member.due = 0

    def sampled(self, key: int, num_tokens: int) -> None:
        """In the step just answered it was not one token."""
        if key in self.members:
            self.members[key].tokens += num_tokens - 1
