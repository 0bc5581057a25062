"""Arrivals, aborts and token outcomes drive ``mini``'s own scheduler."""

from __future__ import annotations

from typing import Any

from vllm_trace.events import (
    BlocksCached,
    EngineConfigured,
    PrefixCacheReset,
    PrefixLookedUp,
    RequestArrived,
    RequestFinished,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.mini.scheduler import Scheduler, SchedulerConfig
from vllm_trace.replay.base import FINISHED_BY_OUTPUT, Replay
from vllm_trace.replay.facts import Fact
from vllm_trace.replay.segments import Segment
from vllm_trace.trace import Trace


class EngineReplay(Replay):
    """Arrivals, aborts and outcomes drive ``mini``'s scheduler; workers are judged by the manager's replay."""

    def __init__(self, config: EngineConfigured, trace: Trace) -> None:
        super().__init__(config, trace)
        settings = self.settings
        self.scheduler = Scheduler(
            self.manager,
            SchedulerConfig(
                max_num_batched_tokens=settings["max_num_scheduled_tokens"],
                max_num_seqs=settings["max_num_seqs"],
                policy=settings["policy"],
                enable_chunked_prefill=settings["enable_chunked_prefill"],
                long_prefill_token_threshold=settings["long_prefill_token_threshold"],
                scheduler_reserve_full_isl=settings["full_sequence_must_fit"],
                async_scheduling=settings["async_scheduling"],
            ),
            tell=self._hear,
        )
        self.outputs: dict[int, Any] = {}
        self.stops: dict[Any, str] = {}
        """Who ended in the step that is being answered, and why."""
        self.acts = {
            BlocksCached: self.learn_hashes,
            PrefixLookedUp: self.learn_hashes,
            RequestArrived: lambda event: self.scheduler.add_request(self.arrive(event)),
            RequestFinished: self.finished,
            PrefixCacheReset: self.reset,
            StepScheduled: self.scheduled,
            StepUpdated: self.updated,
        }

    def _hear(self, fact: Fact) -> None:
        """Steps and ends are compared with more than the scheduler tells of them."""
        if fact[0] == "request.preempted":
            self.told.append(fact)

    def begin(self, segment: Segment) -> None:
        self.stops = {}

    def finished(self, event: RequestFinished) -> None:
        if event.reason in FINISHED_BY_OUTPUT:
            self.stops[event.request] = event.reason
            return
        self.scheduler.finish_requests([event.request], event.reason)
        self.forget(event.request)
        self.settle()

    def reset(self, event: PrefixCacheReset) -> None:
        self.told.append(("prefix.reset", self.manager.reset_prefix_cache()))

    def scheduled(self, event: StepScheduled) -> None:
        output = self.scheduler.schedule()
        self.settle()
        scheduler, mine = self.scheduler, output.num_scheduled_tokens
        self.require(event, "scheduled requests", event.requests, [*mine])
        self.require(event, "scheduled tokens", event.num_tokens, [*mine.values()])
        self.require(event, "new requests", event.new, output.scheduled_new_reqs)
        self.require(event, "resumed requests", event.resumed, output.scheduled_resumed_reqs)
        self.require(event, "preempted", event.preempted, sorted(output.preempted_req_ids))
        self.require(event, "running", event.num_running, len(scheduler.running))
        self.require(event, "waiting", event.num_waiting, len(scheduler.waiting))
        self.require(event, "free blocks", event.num_free_blocks, self.pool.get_num_free_blocks())
        self.num_silent += event.num_kept
        self.outputs[event.step] = output

    def updated(self, event: StepUpdated) -> None:
        output = self.outputs.pop(event.step, None)
        if output is None:
            return
        counts = event.num_output_tokens or ()
        sampled = dict(zip(output.num_scheduled_tokens, counts, strict=True))
        finished = self.scheduler.update_from_output(output, sampled, self.stops)
        self.settle()
        # Without token ids mini cannot tell a stop at the last token from reaching the limit.
        self.require(event, "finished requests", [*self.stops], [*finished])
        for request in finished:
            self.forget(request)
