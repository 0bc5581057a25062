"""``mini``'s scheduler, which passes over those for whom nothing can happen in a step.

A request that decodes one token in every step asks for a block, or fills one, in one step out of many; ``mini``
knows which one (``quiet_until``), and when the request ends. In all other steps its part of the plan is known: one
token, in its place. So a step costs as much as it has events, however many requests run in it. Who does anything
else, and everybody in a step in which somebody may be refused, goes ``mini``'s own way.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from vllm_trace.mini.block_pool import Tell
from vllm_trace.mini.request import Request, RequestStatus
from vllm_trace.mini.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from vllm_trace.replay.steady import Member, Steady
from vllm_trace.replay.steady_manager import SteadyManager

rank_of = attrgetter("rank")


class SteadyScheduler(Scheduler):
    """The same plans as ``Scheduler``.

    Leaves out: ``new_block_ids`` and ``num_computed_tokens`` of a plan, which only a runner needs; of what
    ``Scheduler`` tells all but preemptions, as the rest is in its answers.
    """

    def __init__(self, manager: SteadyManager, config: SchedulerConfig, tell: Tell) -> None:
        super().__init__(manager, config)
        self._tell_preempted = tell
        self.steady = Steady(manager)
        self._queue = manager.block_pool.free_block_queue
        self._num_groups = len(manager.groups)
        self.one_by_one = config.async_scheduling or manager.has_windows
        """Nobody is steady: a step may be planned before the last one is answered, or a window may move."""
        self._ones: dict[Hashable, int] | None = None
        """One token for each of ``running`` in its order; None when they are others now."""
        self._ranks: dict[Hashable, int] = {}
        """Who was admitted when: ``running`` is in this order."""
        self._num_admitted = 0
        self._awake: dict[Any, int] | None = None
        """Who else is in the plan that is being made, and their tokens; None when nobody is passed over."""
        self._ends: dict[int, list[Any]] = {}
        """Answer → members who have all their tokens then."""
        self._repeated = SchedulerOutput(0)
        """The plan of the last step in which everybody decoded: it serves again while they are the same."""

    # Planning ---------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        steady, planned = self.steady, self._ones
        if steady.num_scheduled > steady.num_updated and not self.one_by_one:
            self.one_by_one = True  # steps overlap without async scheduling (pipelines)
            self._wake_all()
        elif planned and not self.waiting:
            due = steady.due()
            if self._all_decode(self.config.max_num_batched_tokens, due):
                self._call_each(due)
                return self._repeat(planned)
        return super().schedule()

    def _all_decode(self, token_budget: int, due: list[Member]) -> bool:
        """Whether all that run only decode, and nobody can be refused."""
        members = self.steady.members
        return (
            len(members) == len(self.running)
            and len(members) <= token_budget
            and self._num_growing(due) * self._num_groups <= self._queue.num_free_blocks
        )

    def _num_growing(self, due: list[Member]) -> int:
        """How many of them need a block: the others' last block is full with this token."""
        block_size = self.kv_cache_manager.block_size
        return sum([member.held.quiet_until % block_size == 0 for member in due])

    def _call_each(self, due: list[Member]) -> None:
        if len(due) > 1:
            due.sort(key=rank_of)
        for member in due:
            self.steady.call(member)

    def _repeat(self, planned: dict[Hashable, int]) -> SchedulerOutput:
        """One token for everybody, as in the step before: the same plan, in the same object."""
        output, self._awake = self._repeated, {}
        self.current_step += 1
        self.steady.next_step()
        if (
            output.num_scheduled_tokens is not planned
            or output.finished_req_ids
            or self.finished_req_ids
        ):
            output = self._repeated = SchedulerOutput(self.current_step, planned)
            output.finished_req_ids, self.finished_req_ids = self.finished_req_ids, []
        output.step = self.current_step
        return output

    def _schedule_running(self, output: SchedulerOutput, token_budget: int, threshold: int) -> int:
        if self.one_by_one:
            self._awake = None
            return super()._schedule_running(output, token_budget, threshold)
        due = self.steady.due()
        if not self._all_decode(token_budget, due):
            return self._schedule_apart(output, token_budget, threshold, due)
        planned = self._ones or self._all_ones()
        output.num_scheduled_tokens = planned.copy() if self.waiting else planned
        self._awake = {}
        self._call_each(due)
        return token_budget - len(planned)

    def _schedule_apart(
        self, output: SchedulerOutput, token_budget: int, threshold: int, due: list[Member]
    ) -> int:
        """Beside the steady ones others run, or somebody may be refused: then nobody is passed over."""
        members = self.steady.members
        others: dict[Any, int] = {
            request.request_id: self._wanted_tokens(request, token_budget, threshold)
            for request in self.running
            if request.request_id not in members
        }
        left = token_budget - len(members) - sum(others.values())
        if left < 0 or not self._all_fit(self._num_growing(due), others):
            self._wake_all()
            self._awake = None
            return super()._schedule_running(output, token_budget, threshold)
        output.num_scheduled_tokens = planned = (self._ones or self._all_ones()) | others
        self._awake = others
        for key in sorted([*others, *(member.key for member in due)], key=self._ranks.__getitem__):
            member = members.get(key)
            if member is not None:
                self.steady.call(member)
            else:
                self.kv_cache_manager.allocate_slots(self.requests[key], planned[key])
        return left

    def _all_ones(self) -> dict[Hashable, int]:
        self._ones = dict.fromkeys([request.request_id for request in self.running], 1)
        return self._ones

    def _all_fit(self, num_blocks: int, others: Mapping[Any, int]) -> bool:
        """Whether the pool has as many blocks (one for each that grows) and what the others need."""
        manager = self.kv_cache_manager
        for key, num_tokens in others.items():
            if not num_tokens:
                return False
            num_slots = self.requests[key].num_computed_tokens + num_tokens
            num_blocks += -(-num_slots // manager.block_size) - len(manager.requests[key].tables[0])
        return num_blocks * len(manager.groups) <= manager.block_pool.get_num_free_blocks()

    def _update_after_schedule(self, output: SchedulerOutput) -> None:
        planned, awake = output.num_scheduled_tokens, self._awake
        if not planned:
            return
        self.steady.next_step()
        num_admitted = len(output.scheduled_new_reqs) + len(output.scheduled_resumed_reqs)
        if num_admitted:
            admitted = [*planned][-num_admitted:]
            for key in admitted:
                self._num_admitted += 1
                self._ranks[key] = self._num_admitted
            if awake is not None:
                awake |= {key: planned[key] for key in admitted}
                self._ones = dict.fromkeys(planned, 1)
        if awake is None:
            super()._update_after_schedule(output)
        elif awake:
            output.num_scheduled_tokens = awake
            super()._update_after_schedule(output)
            output.num_scheduled_tokens = planned

    def _preempt_request(self, request: Request) -> None:
        lost = request.num_computed_tokens
        super()._preempt_request(request)
        num_free = self._queue.num_free_blocks
        self._tell_preempted(("request.preempted", request.request_id, lost, num_free))

    # Answers ----------------------------------------------------------------------------

    def answer(
        self, output: SchedulerOutput, counts: Sequence[int], stops: Mapping[Any, str]
    ) -> dict[Hashable, str]:
        """``update_from_output`` with the number of tokens that each request of the plan sampled."""
        planned = output.num_scheduled_tokens
        if not planned:
            return {}
        if self.one_by_one:
            return self.update_from_output(output, dict(zip(planned, counts, strict=True)), stops)
        steady = self.steady
        irregular = counts.count(1) != len(planned) or len(counts) != len(planned)
        ended = self._ends.pop(steady.num_updated + 1, None)
        if not (irregular or ended or stops) and len(planned) == len(steady.members):
            steady.num_updated += 1
            return {}
        woken = [*(ended or ()), *stops]
        if irregular:
            woken += [key for key, count in zip(planned, counts, strict=True) if count != 1]
        for key in woken:
            self._wake(key)
        steady.num_updated += 1
        if len(planned) == len(steady.members):
            return {}
        awake = self._awake
        if woken or awake is None or len(awake) + len(steady.members) != len(planned):
            awake = {key: count for key, count in planned.items() if key not in steady.members}
        output.num_scheduled_tokens = awake
        sampled = dict(zip(planned, counts)) if irregular else dict.fromkeys(awake, 1)
        finished = self.update_from_output(output, sampled, stops)
        for key in awake:
            self._settle_down(key)
        if finished:
            self._forget(finished)
        return finished

    def finish_requests(self, request_ids: Iterable[Hashable], reason: str = "abort") -> None:
        leaving = [*request_ids]
        for key in leaving:
            self._wake(key)
        super().finish_requests(leaving, reason)
        self._forget(leaving)

    def _forget(self, gone: Iterable[Hashable]) -> None:
        """They run no more."""
        ones = None if self._ones is None else self._ones.copy()
        for key in gone:
            self._ranks.pop(key, None)
            if ones is not None:
                ones.pop(key, None)
        self._ones = ones

    # Who is passed over -----------------------------------------------------------------

    def _settle_down(self, key: Any) -> None:
        """From now on it decodes one token a step, if it runs and its last token is all that is left to compute."""
        request = self.requests.get(key)
        if request is None or request.status is not RequestStatus.RUNNING:
            return
        if request.num_computed_tokens != request.num_tokens - 1:
            return
        steady = self.steady
        steady.join(key, request, self.kv_cache_manager.requests[key], self._ranks[key])
        limit = min(self.max_model_len, request.num_prompt_tokens + request.max_tokens)
        last = steady.num_updated + limit - request.num_tokens
        self._ends.setdefault(last, []).append(key)

    def _wake(self, key: Any) -> None:
        steady = self.steady
        if key in steady.members:
            steady.leave(key)
            self.requests[key].num_in_flight_tokens = steady.num_scheduled - steady.num_updated

    def _wake_all(self) -> None:
        """Nobody is passed over in this step."""
        self._ones = None
        for key in [*self.steady.members]:
            self._wake(key)
