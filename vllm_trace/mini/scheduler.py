"""Who computes how many tokens in the next step, and who must give way.

Follows: vLLM 0.32.0, v1/core/sched/scheduler.py, async_scheduler.py, request_queue.py, utils.py (`check_stop`).
Leaves out: speculative decoding, encoder inputs, LoRA limits, KV connectors, structured output, pausing, pipeline and
data parallelism, streaming input. Requests aborted in one call are freed in the order given; vLLM goes through a set.
PRIORITY preemption before 0.20.2 left the victim's tokens in the step; mini does not repeat that.

There is no prefill phase and no decode phase: a request's `num_computed_tokens` wants to catch up with `num_tokens`.
Running requests are served first, then waiting ones are admitted, until the token budget is spent:

>>> from .kv_cache_manager import FullAttentionSpec, KVCacheManager
>>> manager = KVCacheManager(5, [FullAttentionSpec(block_size=4)], max_model_len=64)
>>> scheduler = Scheduler(manager, SchedulerConfig(max_num_batched_tokens=8))
>>> for name in "ab":
...     scheduler.add_request(Request(name, num_prompt_tokens=6, block_hashes=[name + "0"]))
>>> scheduler.schedule().num_scheduled_tokens      # b gets what a leaves: a chunk of its prompt
{'a': 6, 'b': 2}
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .block_pool import Tell
from .kv_cache_manager import KVCacheManager
from .request import Request, RequestStatus

POLICIES = ("fcfs", "priority")


@dataclass(frozen=True)
class SchedulerConfig:
    """vLLM's options of the same names. Units: tokens, except `max_num_seqs` (requests)."""

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 128
    policy: str = "fcfs"  # or "priority": the smaller number first, then the earlier arrival
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False
    scheduler_reserve_full_isl: bool = True
    async_scheduling: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"unknown scheduling policy {self.policy!r}: {' or '.join(POLICIES)}")


@dataclass
class SchedulerOutput:
    """One planned step. `num_scheduled_tokens` keeps the order in which requests were scheduled."""

    step: int
    num_scheduled_tokens: dict[Hashable, int] = field(default_factory=dict)
    # Tokens computed before this step: the positions are start .. start + scheduled - 1.
    num_computed_tokens: dict[Hashable, int] = field(default_factory=dict)
    # New blocks of each group; for a request that is new or resumed, its whole table.
    new_block_ids: dict[Hashable, tuple[list[int], ...]] = field(default_factory=dict)
    scheduled_new_reqs: list[Hashable] = field(default_factory=list)
    scheduled_resumed_reqs: list[Hashable] = field(default_factory=list)
    preempted_req_ids: list[Hashable] = field(default_factory=list)
    finished_req_ids: list[Hashable] = field(default_factory=list)  # since the step before

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


class Scheduler:
    """`add_request`, then `schedule` and `update_from_output` in turns.

    With `async_scheduling` a second `schedule` may come before the first one's `update_from_output`.
    """

    def __init__(
        self, kv_cache_manager: KVCacheManager, config: SchedulerConfig, tell: Tell | None = None
    ):
        self.kv_cache_manager = kv_cache_manager
        self.config = config
        self.rules = kv_cache_manager.rules
        self.tell = tell
        self.max_model_len = kv_cache_manager.max_model_len
        self.requests: dict[Hashable, Request] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.finished_req_ids: list[Hashable] = []
        self.current_step = 0

    # -- arrival and departure -----------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        if request.request_id in self.requests:
            raise ValueError(f"request {request.request_id!r} is already here")
        self.requests[request.request_id] = request
        if self.config.policy == "priority":
            self._queue_by_priority(request)
        else:
            self.waiting.append(request)

    def finish_requests(self, request_ids: Iterable[Hashable], reason: str = "abort") -> None:
        """End requests from outside. Unknown and finished ones are passed over."""
        leaving = [self.requests[key] for key in request_ids if key in self.requests]
        for request in leaving:
            (self.running if request.status is RequestStatus.RUNNING else self.waiting).remove(
                request
            )
        for request in leaving:
            self._finish(request, reason)

    def has_requests(self) -> bool:
        """Whether a step has something to do or to report."""
        return bool(self.requests or self.finished_req_ids)

    # -- planning a step -----------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Plan one step. The manager's blocks change now; tokens follow in `update_from_output`."""
        self.current_step += 1
        output = SchedulerOutput(self.current_step)
        threshold = self._long_prefill_threshold()
        token_budget = self._schedule_running(output, self.config.max_num_batched_tokens, threshold)
        # In a step that had to take blocks away nobody new is let in.
        if self.waiting and not output.preempted_req_ids:
            self._schedule_waiting(output, token_budget, threshold)
        output.finished_req_ids, self.finished_req_ids = self.finished_req_ids, []
        self._update_after_schedule(output)
        if self.tell is not None:
            scheduled = output.num_scheduled_tokens
            self.tell(("step.scheduled", output.step, list(scheduled), list(scheduled.values())))
        return output

    def _schedule_running(self, output: SchedulerOutput, token_budget: int, threshold: int) -> int:
        """Serve the running requests in order. Returns the tokens left."""
        index = 0
        while index < len(self.running) and token_budget > 0:
            request = self.running[index]
            num_new_tokens = self._wanted_tokens(request, token_budget, threshold)
            if num_new_tokens == 0:
                index += 1
                continue
            while (
                new_blocks := self.kv_cache_manager.allocate_slots(request, num_new_tokens)
            ) is None:
                victim = self._choose_victim()
                position = self.running.index(victim)
                del self.running[position]
                scheduled = victim.request_id in output.num_scheduled_tokens
                if scheduled:
                    token_budget += self._unschedule(output, victim)
                if position < index and (scheduled or self.rules.index_follows_victim):
                    index -= 1
                self._preempt_request(victim)
                output.preempted_req_ids.append(victim.request_id)
                if victim is request:
                    break
            if new_blocks is None:
                if self.rules.self_preempted_goes_on and self.config.policy == "priority":
                    continue  # the next one has moved to this index
                break
            ids = tuple([block.block_id for block in blocks] for blocks in new_blocks)
            self._record(output, request, num_new_tokens, ids)
            token_budget -= num_new_tokens
            index += 1
        return token_budget

    def _wanted_tokens(self, request: Request, token_budget: int, threshold: int) -> int:
        """How far a running request goes in this step."""
        placeholders = request.num_output_placeholders
        computed_if_answered = request.num_computed_tokens + 2 - placeholders
        if (
            placeholders > 0
            and computed_if_answered >= request.num_prompt_tokens + request.max_tokens
        ):
            return 0  # the answer in flight will be its last token
        wanted = request.num_tokens + placeholders - request.num_computed_tokens
        if 0 < threshold < wanted:
            wanted = threshold
        num_positions = self.max_model_len - request.num_computed_tokens
        if self.rules.one_position_left:
            num_positions -= 1  # the token that the step samples will need it
        return min(wanted, token_budget, num_positions)

    def _schedule_waiting(self, output: SchedulerOutput, token_budget: int, threshold: int) -> None:
        """Admit waiting requests in order, until one does not fit. Nobody is preempted for them."""
        manager = self.kv_cache_manager
        whole = self.config.scheduler_reserve_full_isl and self.rules.whole_sequence_admission
        skipped: list[Request] = []
        while self.waiting and token_budget > 0 and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            if request.num_stale_output_tokens:
                # Its last answers are still under way; resumed now, it could compute the same position twice.
                skipped.append(self.waiting.popleft())
                continue
            hits, num_hit_tokens, request.shared_prefix_boundary = manager.get_computed_blocks(
                request
            )
            num_new_tokens = request.num_tokens - num_hit_tokens
            if 0 < threshold < num_new_tokens:
                num_new_tokens = threshold
            if num_new_tokens > token_budget and not self.config.enable_chunked_prefill:
                break
            num_new_tokens = min(num_new_tokens, token_budget)
            new_blocks = manager.allocate_slots(
                request,
                num_new_tokens,
                num_hit_tokens,
                hits,
                full_sequence_must_fit=whole,
                has_scheduled_reqs=bool(self.running),
            )
            if new_blocks is None:
                break
            self.waiting.popleft()
            self.running.append(request)
            resumed = request.status is RequestStatus.PREEMPTED
            (output.scheduled_resumed_reqs if resumed else output.scheduled_new_reqs).append(
                request.request_id
            )
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = num_hit_tokens
            self._record(output, request, num_new_tokens, manager.get_block_ids(request.request_id))
            token_budget -= num_new_tokens
        for request in reversed(skipped):
            self._queue_first(request)

    def _long_prefill_threshold(self) -> int:
        """The chunk limit of this step; 0 for none."""
        threshold = self.config.long_prefill_token_threshold
        num_requests = len(self.running) + len(self.waiting)
        if num_requests <= 1 and self.rules.alone_means_unthrottled:
            return 0
        if threshold > 0 and self.config.long_prefill_token_threshold_adaptive:
            threshold = max(threshold, self.config.max_num_batched_tokens // num_requests)
        return threshold

    def _record(
        self, output: SchedulerOutput, request: Request, num_tokens: int, block_ids: tuple
    ) -> None:
        output.num_scheduled_tokens[request.request_id] = num_tokens
        output.num_computed_tokens[request.request_id] = request.num_computed_tokens
        output.new_block_ids[request.request_id] = block_ids

    def _unschedule(self, output: SchedulerOutput, request: Request) -> int:
        del output.num_computed_tokens[request.request_id], output.new_block_ids[request.request_id]
        return output.num_scheduled_tokens.pop(request.request_id)

    def _update_after_schedule(self, output: SchedulerOutput) -> None:
        """Count what was planned as computed, so that the next step can be planned at once."""
        for key, num_tokens in output.num_scheduled_tokens.items():
            request = self.requests[key]
            request.num_computed_tokens += num_tokens
            request.num_in_flight_tokens += num_tokens
            request.is_prefill_chunk = (
                request.num_computed_tokens < request.num_tokens + request.num_output_placeholders
            )
            if self.config.async_scheduling and not request.is_prefill_chunk:
                request.num_output_placeholders += 1

    # -- giving way ----------------------------------------------------------------------------------------------

    def _choose_victim(self) -> Request:
        if self.config.policy == "priority":
            return max(self.running, key=lambda request: (request.priority, request.arrival_time))
        return self.running[-1]

    def _preempt_request(self, request: Request) -> None:
        """Take all blocks back. What was computed is computed again, unless the prefix cache still has it."""
        lost = request.num_computed_tokens
        self.kv_cache_manager.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        if self.rules.stale_output_waits:
            request.num_stale_output_tokens = request.num_in_flight_tokens
            request.num_output_placeholders = 0
        request.num_preemptions += 1
        self._queue_first(request)
        if self.tell is not None:
            num_free = self.kv_cache_manager.block_pool.get_num_free_blocks()
            self.tell(("request.preempted", request.request_id, lost, num_free))

    def _queue_first(self, request: Request) -> None:
        if self.config.policy == "priority":
            self._queue_by_priority(request)
        else:
            self.waiting.appendleft(request)

    def _queue_by_priority(self, request: Request) -> None:
        insort(
            self.waiting,
            request,
            key=lambda other: (other.priority, other.arrival_time, other.request_id),
        )

    # -- answers -------------------------------------------------------------------------------------------------

    def update_from_output(
        self,
        output: SchedulerOutput,
        sampled: Mapping[Hashable, Sequence[int] | int],
        stops: Mapping[Hashable, str] | None = None,
    ) -> dict[Hashable, str]:
        """Take the tokens that a step sampled; returns who finished and why (`stop` or `length`).

        `sampled` has token ids, or only their number for a request without ids; whoever is missing sampled none.
        `stops` names requests that ended for a reason that counts do not show, as a trace without token ids records it.
        """
        finished: dict[Hashable, str] = {}
        for key, num_scheduled in output.num_scheduled_tokens.items():
            request = self.requests.get(key)
            if request is None:
                continue  # aborted while the step ran
            request.num_in_flight_tokens -= num_scheduled
            stale = request.num_stale_output_tokens > 0
            if stale:
                request.num_stale_output_tokens -= num_scheduled
            tokens = sampled.get(key, 0)
            if not tokens:
                continue
            num_new, reason = self._append_tokens(request, tokens)
            reason = reason or (stops or {}).get(key)
            if self.config.async_scheduling and not stale:
                request.num_output_placeholders -= num_new
                if request.status is RequestStatus.RUNNING:
                    self._cache_known(request)
            if reason:
                finished[key] = reason
                (self.running if request.status is RequestStatus.RUNNING else self.waiting).remove(
                    request
                )
                self._finish(request, reason)
        return finished

    def _append_tokens(
        self, request: Request, tokens: Sequence[int] | int
    ) -> tuple[int, str | None]:
        """Append until the request stops. Returns how many were taken, and the reason to stop if there is one."""
        num_tokens = tokens if isinstance(tokens, int) else len(tokens)
        for i in range(num_tokens):
            if isinstance(tokens, int):
                request.append_output_tokens(1)
            else:
                request.append_output_token_ids(tokens[i : i + 1])
                if tokens[i] == request.eos_token_id or tokens[i] in request.stop_token_ids:
                    return i + 1, "stop"
            if (
                request.num_tokens >= self.max_model_len
                or request.num_output_tokens >= request.max_tokens
            ):
                return i + 1, "length"
        return num_tokens, None

    def _cache_known(self, request: Request) -> None:
        """Async: the block was full when the step was planned, but its hash needs the token that came only now."""
        ahead = request.num_output_placeholders
        if self.rules.output_caches_processed:
            ahead = request.num_in_flight_tokens
        self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens - ahead)

    def _finish(self, request: Request, reason: str) -> None:
        request.status = RequestStatus.FINISHED
        self.finished_req_ids.append(request.request_id)
        self.kv_cache_manager.free(request)
        del self.requests[request.request_id]
        if self.tell is not None:
            counts = (request.num_output_tokens, request.num_preemptions)
            self.tell(("request.finished", request.request_id, reason, *counts))
