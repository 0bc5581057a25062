"""Arrivals, aborts and token outcomes drive ``mini``'s own scheduler."""

from __future__ import annotations

from typing import Any, ClassVar

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
from vllm_trace.mini.scheduler import SchedulerConfig
from vllm_trace.replay.base import FINISHED_BY_OUTPUT, Replay
from vllm_trace.replay.steady_scheduler import SteadyScheduler

OF_A_PLAN = ("scheduled requests", "scheduled tokens")
OF_A_STEP = (
    "new requests", "resumed requests", "preempted", "finished requests",
    "running", "waiting", "free blocks",
)  # fmt: skip


class EngineReplay(Replay):
    """Arrivals, aborts and outcomes drive ``mini``'s scheduler; workers are judged by the manager's replay."""

    needs: ClassVar[tuple[str, ...]] = (
        *Replay.needs, "max_num_scheduled_tokens", "max_num_seqs", "policy", "enable_chunked_prefill",
        "long_prefill_token_threshold", "full_sequence_must_fit", "async_scheduling",
    )  # fmt: skip

    def __init__(self, config: EngineConfigured, release: str) -> None:
        super().__init__(config, release)
        settings = self.settings
        self.scheduler = SteadyScheduler(
            self.manager,
            SchedulerConfig(
                max_num_batched_tokens=settings["max_num_scheduled_tokens"],
                max_num_seqs=settings["max_num_seqs"],
                policy=settings["policy"],
                enable_chunked_prefill=settings["enable_chunked_prefill"],
                long_prefill_token_threshold=settings["long_prefill_token_threshold"],
                long_prefill_token_threshold_adaptive=bool(
                    settings.get("long_prefill_token_threshold_adaptive")
                ),
                scheduler_reserve_full_isl=settings["full_sequence_must_fit"],
                async_scheduling=settings["async_scheduling"],
            ),
            tell=self.told.append,
        )
        self.planned: Any = None
        self.order: list[int] | None = None
        self.counts: list[int] | None = None
        """The last step as ``mini`` planned it, its requests and their tokens as they were recorded."""
        self.outputs: dict[int, Any] = {}
        self.stops: dict[Any, str] = {}
        """Who ended in the step that is being answered, and why."""
        self.ended: list[RequestFinished] = []
        """The same as events."""
        self.acts = {
            BlocksCached: self.learn_cached,
            PrefixLookedUp: self.learn_looked_up,
            RequestArrived: lambda event: self.scheduler.add_request(self.arrive(event)),
            RequestFinished: self.finished,
            PrefixCacheReset: self.reset,
            StepScheduled: self.scheduled,
            StepUpdated: self.updated,
        }

    def finished(self, event: RequestFinished) -> None:
        if event.reason in FINISHED_BY_OUTPUT:
            self.stops[event.request] = event.reason
            self.ended.append(event)
            return
        self.scheduler.finish_requests([event.request], event.reason)
        request = self.requests.get(event.request)
        if request is not None:
            self.compare_counts(event, request)
        self.forget(event.request)

    def reset(self, event: PrefixCacheReset) -> None:
        self.told.append(("prefix.reset", self.manager.reset_prefix_cache()))

    def scheduled(self, event: StepScheduled) -> None:
        scheduler, requests, counts = self.scheduler, event.requests, event.num_tokens
        output = scheduler.schedule()
        planned = output.num_scheduled_tokens
        if planned is self.planned and requests is self.order and counts is self.counts:
            self.num_compared += 2  # both sides repeat the very plan that was equal before
        else:
            mine = ([*planned], [*planned.values()])
            self.require(event, OF_A_PLAN, (requests, counts), mine)
            self.planned, self.order, self.counts = planned, requests, counts
        recorded = (
            event.new, event.resumed, event.preempted, event.finished and sorted(event.finished),
            event.num_running, event.num_waiting, event.num_free_blocks,
        )  # fmt: skip
        preempted: list[Any] = output.preempted_req_ids
        ended: list[Any] = output.finished_req_ids
        made = (
            output.scheduled_new_reqs, output.scheduled_resumed_reqs,
            preempted and sorted(preempted), ended and sorted(ended),
            len(scheduler.running), len(scheduler.waiting), self.pool.free_block_queue.num_free_blocks,
        )  # fmt: skip
        self.require(event, OF_A_STEP, recorded, made)
        self.num_silent += event.num_kept
        self.outputs[event.step] = output

    def updated(self, event: StepUpdated) -> None:
        stops = self.stops
        if stops:
            self.stops = {}
        output = self.outputs.pop(event.step, None)
        if output is None:
            return
        finished = self.scheduler.answer(output, event.num_output_tokens or (), stops)
        if stops or finished:
            # Without token ids mini cannot tell a stop at the last token from reaching the limit.
            self.require(event, ("finished requests",), ([*stops],), ([*finished],))
            for end in self.ended:
                known = self.requests.get(end.request)
                if known is not None:  # who never arrived is told below
                    self.compare_counts(end, known)
            self.ended.clear()
            for request in finished:
                self.forget(request)
