"""``mini``'s scheduler, which passes over those for whom nothing can happen in a step.

A request that decodes one token in every step asks for a block, or fills one, in one step out of many; ``mini``
knows which one (``quiet_until``), and when the request ends. In all other steps its part of the plan is known: one
token, in its place. So a step costs as much as it has events, however many requests run in it. Who does anything
else, and everybody in a step in which somebody may be refused, goes ``mini``'s own way.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from vllm_trace.mini.kv_cache_manager import KVCacheManager
from vllm_trace.mini.request import RequestStatus
from vllm_trace.mini.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from vllm_trace.replay.steady import Steady


class SteadyScheduler(Scheduler):
    """The same plans as ``Scheduler``.

    Leaves out: ``new_block_ids`` and ``num_computed_tokens`` of a plan, which only a runner needs.
    """

    def __init__(self, manager: KVCacheManager, config: SchedulerConfig, tell: Any = None) -> None:
        super().__init__(manager, config, tell)
        self.steady = Steady()
        self.one_by_one = config.async_scheduling or manager.has_windows
        """Nobody is steady: a step may be planned before the last one is answered, or a window may move."""
        self._num_unanswered = 0
        self._ones: dict[Hashable, int] | None = None
        """One token for each of ``running`` in its order; None when they are others now."""
        self._ends: dict[int, list[Any]] = {}
        """Answer → members who have all their tokens then."""

    # Planning ---------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        if self._num_unanswered and not self.one_by_one:
            self.one_by_one = True  # steps overlap without async scheduling (pipelines)
            self._wake_all()
        self._num_unanswered += 1
        return super().schedule()

    def _schedule_running(self, output: SchedulerOutput, token_budget: int, threshold: int) -> int:
        members, running = self.steady.members, self.running
        others: dict[Any, int] = {}
        if len(running) > len(members):
            others = {
                request.request_id: self._wanted_tokens(request, token_budget, threshold)
                for request in running
                if request.request_id not in members
            }
        due = self.steady.due()
        left = token_budget - len(members) - sum(others.values())
        if self.one_by_one or left < 0 or not self._all_fit(due, others):
            self._wake_all()
            return super()._schedule_running(output, token_budget, threshold)
        if self._ones is None:
            self._ones = dict.fromkeys([request.request_id for request in running], 1)
        output.num_scheduled_tokens = planned = self._ones.copy()
        planned.update(others)
        asking = due + [*others]
        if len(asking) > 1:
            wanted = frozenset(asking)
            asking = [key for key in planned if key in wanted]
        for key in asking:
            self.steady.catch_up(key)
            self.kv_cache_manager.allocate_slots(self.requests[key], planned[key])
            self.steady.was_called(key, self.kv_cache_manager.requests[key].quiet_until)
        return left

    def _all_fit(self, due: Sequence[Any], others: Mapping[Any, int]) -> bool:
        """Whether nobody who runs can be refused, nor passed over for want of tokens."""
        manager = self.kv_cache_manager
        num_blocks = len(due)  # one token more needs one block at most
        for key, num_tokens in others.items():
            if not num_tokens:
                return False
            num_slots = self.requests[key].num_computed_tokens + num_tokens
            num_blocks += -(-num_slots // manager.block_size) - len(manager.requests[key].tables[0])
        return num_blocks * len(manager.groups) <= manager.block_pool.get_num_free_blocks()

    def _update_after_schedule(self, output: SchedulerOutput) -> None:
        self.steady.num_scheduled += 1
        if output.scheduled_new_reqs or output.scheduled_resumed_reqs:
            self._ones = None
        planned, members = output.num_scheduled_tokens, self.steady.members
        if len(planned) == len(members):
            return
        output.num_scheduled_tokens = {
            key: count for key, count in planned.items() if key not in members
        }
        super()._update_after_schedule(output)
        output.num_scheduled_tokens = planned

    # Answers ----------------------------------------------------------------------------

    def answer(
        self, output: SchedulerOutput, counts: Sequence[int], stops: Mapping[Any, str]
    ) -> dict[Hashable, str]:
        """``update_from_output`` with the number of tokens that each request of the plan sampled."""
        planned = output.num_scheduled_tokens
        self._num_unanswered -= 1
        if self.one_by_one:
            return self.update_from_output(output, dict(zip(planned, counts, strict=True)), stops)
        steady = self.steady
        if counts.count(1) != len(counts) or len(counts) != len(planned):
            for key, count in zip(planned, counts, strict=True):
                if count != 1:
                    self._wake(key)
        for key in (*self._ends.pop(steady.num_updated + 1, ()), *stops):
            self._wake(key)
        steady.num_updated += 1
        if len(planned) == len(steady.members):
            return {}
        awake = [key for key in planned if key not in steady.members]
        output.num_scheduled_tokens = {key: planned[key] for key in awake}
        sampled = {key: count for key, count in zip(planned, counts) if key in output.num_scheduled_tokens}
        finished = self.update_from_output(output, sampled, stops)
        if finished:
            self._ones = None
        for key in awake:
            self._settle_down(key)
        return finished

    def finish_requests(self, request_ids: Iterable[Hashable], reason: str = "abort") -> None:
        leaving = [*request_ids]
        for key in leaving:
            self._wake(key)
        self._ones = None
        super().finish_requests(leaving, reason)

    # Who is passed over -----------------------------------------------------------------

    def _settle_down(self, key: Any) -> None:
        """From now on it decodes one token a step, if it runs and its last token is all that is left to compute."""
        request = self.requests.get(key)
        if request is None or request.status is not RequestStatus.RUNNING:
            return
        if request.num_computed_tokens != request.num_tokens - 1:
            return
        steady = self.steady
        steady.join(key, request, self.kv_cache_manager.requests[key].quiet_until)
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
