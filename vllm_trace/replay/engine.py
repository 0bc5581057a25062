"""Arrivals, aborts and token outcomes drive ``mini``'s own scheduler."""

from __future__ import annotations

from typing import Any

from vllm_trace.events import (
    EngineConfigured,
    PrefixCacheReset,
    RequestArrived,
    RequestFinished,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.mini.scheduler import Scheduler, SchedulerConfig
from vllm_trace.replay.base import FINISHED_BY_OUTPUT, Replay
from vllm_trace.replay.facts import fact_of
from vllm_trace.trace import Record, Trace


class EngineReplay(Replay):
    """Arrivals, aborts and outcomes drive ``mini``'s scheduler."""

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
            tell=self.hear,
        )
        self.outputs: dict[int, Any] = {}
        self.steps: dict[int, StepScheduled] = {}

    def replay_segment(self, segment: list[Record]) -> None:
        stops: dict[int, str] = {}
        for record in segment:
            event, number = record.event, record.number
            fact = fact_of(event)
            if fact is not None:
                self.expected.append((number, fact))
            self.learn_hashes(event)
            kind = type(event)
            if kind is RequestArrived:
                self.scheduler.add_request(self.arrive(event))
            elif kind is RequestFinished and event.reason in FINISHED_BY_OUTPUT:
                stops[event.request] = event.reason
            elif kind is RequestFinished:
                self.scheduler.finish_requests([event.request], event.reason)
                self.worker.forget(event.request)
                self.settle(number)
            elif kind is PrefixCacheReset:
                self.told.append(("prefix.reset", self.manager.reset_prefix_cache()))
            elif kind is StepScheduled:
                self._schedule(event, number)
            elif kind is StepUpdated:
                self._update(event, number, stops)

    def _schedule(self, event: StepScheduled, number: int) -> None:
        output = self.scheduler.schedule()
        self.settle(number)
        scheduler, mine = self.scheduler, output.num_scheduled_tokens
        self.require(number, "scheduled requests", event.requests, list(mine))
        self.require(number, "scheduled tokens", event.num_tokens, list(mine.values()))
        self.require(number, "new requests", event.new, output.scheduled_new_reqs)
        self.require(number, "resumed requests", event.resumed, output.scheduled_resumed_reqs)
        preempted = sorted(output.preempted_req_ids)
        self.require(number, "preempted requests", event.preempted, preempted)
        self.require(number, "running", event.num_running, len(scheduler.running))
        self.require(number, "waiting", event.num_waiting, len(scheduler.waiting))
        free = self.manager.block_pool.get_num_free_blocks()
        self.require(number, "free blocks", event.num_free_blocks, free)
        self.outputs[event.step] = output
        self.steps[event.step] = event

    def _update(self, event: StepUpdated, number: int, stops: dict[int, str]) -> None:
        output, step = self.outputs.pop(event.step, None), self.steps.pop(event.step, None)
        if output is None or step is None:
            return
        counts = event.num_output_tokens or ()
        sampled = {r: n for r, n in zip(step.requests or (), counts, strict=True) if n}
        finished = self.scheduler.update_from_output(output, sampled, stops)
        self.settle(number)
        # Without token ids mini cannot tell a stop at the last token from reaching the limit.
        self.require(number, "finished requests", list(stops), list(finished))
        for request in finished:
            self.requests.pop(request, None)

    def observe(self, record: Record) -> None:
        """Workers are judged once, by the manager's replay."""
