"""A timeline for ui.perfetto.dev: processes, steps, requests, kernels, and the pool's counters.

Each process has a thread with what it did: ``schedule``, ``execute`` with ``forward`` and the
attention kernels in it, ``sample``, ``update``; arrows lead from the schedule of a step to those
who executed it, and from there to its update. The engine's process also has a track of whole
steps, one for each request (queued, prefill, decode, preempted), and counters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, BinaryIO

from vllm_trace.counting import counted
from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    BlockEvicted,
    BlocksCached,
    EngineConfigured,
    Event,
    PrefixCacheReset,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    SlotsAllocated,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.export import Exported, ExportOptions, exporter
from vllm_trace.export.track_events import TrackEvents
from vllm_trace.trace import Trace, time_of

STEPS_KEPT = 64
"""Steps that wait for their results; older ones are written as they are."""

KINDS = {"main": "vLLM", "engine": "EngineCore", "worker": "Worker"}
THREADS = {"main": "engine loop", "engine": "scheduler loop", "worker": "worker loop"}


@dataclass
class _Process:
    """Tracks of one process."""

    uuid: int
    thread: int
    steps: list[tuple[int, int]] = field(default_factory=list)
    """Tracks of whole steps and when each is free again: steps overlap when they are planned ahead."""
    requests: int = 0
    """The track that those of the requests are below."""
    gpu: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    num_blocks: int = 0
    hashed: set[int] = field(default_factory=set)
    """Blocks that can be hit."""


@dataclass
class _Step:
    """What is known of a step until its results are in."""

    process: int
    event: StepScheduled
    executed: list[tuple[int, StepExecuted]] = field(default_factory=list)
    called: list[tuple[int, AttentionCalled]] = field(default_factory=list)
    sampled: list[tuple[int, StepSampled]] = field(default_factory=list)
    variants: dict[int, str] = field(default_factory=dict)


@dataclass
class _Request:
    """A request that is not finished."""

    track: int
    since: int
    """When what it does now began."""
    phase: str = "queued"
    num_hit_tokens: int = 0
    num_outputs: int = 0


@exporter("perfetto", "A timeline for ui.perfetto.dev", to="file", suffix=".pftrace")
def export(trace: Trace, out: BinaryIO, options: ExportOptions) -> Exported:
    """Write the whole trace; it is read once."""
    clock = trace.files[0].header.get("clock", {})
    made = TrackEvents(out, clock.get("monotonic_ns", 0), clock.get("unix_ns", 0))
    timeline = _Timeline(trace, made)
    waiting: list[tuple[int, Event]] = []
    for _, process, event in trace.records():
        at = time_of(event)
        if at is None and not isinstance(event, AttentionPlanned):
            # What happened inside a call begins with the call, which comes after it.
            waiting.append((process, event))
            if len(waiting) > 10_000:
                timeline.take(*waiting.pop(0), timeline.now)
            continue
        if at is not None and isinstance(event, (StepScheduled, StepUpdated, RequestFinished)):
            for one in waiting:
                timeline.take(*one, at)
            waiting.clear()
        timeline.take(process, event, timeline.now if at is None else at)
    for one in waiting:
        timeline.take(*one, timeline.now)
    timeline.close()
    if trace.problems:
        timeline.mark(trace.problems)
    return Exported(
        {
            "slices": made.num_slices,
            "counter values": made.num_counters,
            "flows": made.num_flows,
            "tracks": made.num_tracks,
        },
        notes=timeline.notes,
    )


class _Timeline:
    """The fold behind ``export``."""

    def __init__(self, trace: Trace, made: TrackEvents) -> None:
        self.made, self.light = made, trace.level == "light"
        self.now = 0
        self.notes: list[str] = []
        self.steps: dict[int, _Step] = {}
        self.requests: dict[int, _Request] = {}
        self.processes = self._introduce(trace)
        self.flow = 0
        self.handlers: dict[type[Event], Any] = {
            EngineConfigured: self._configured,
            RequestArrived: self._arrived,
            RequestPreempted: self._preempted,
            RequestFinished: self._finished,
            SlotsAllocated: self._allocated,
            BlocksCached: lambda process, event, at: process.hashed.update(event.blocks),
            BlockEvicted: lambda process, event, at: process.hashed.discard(event.block),
            PrefixCacheReset: lambda process, event, at: event.ok and process.hashed.clear(),
        }
        self.of_steps: dict[type[Event], str] = {
            StepExecuted: "executed",
            StepSampled: "sampled",
            AttentionCalled: "called",
        }

    def _introduce(self, trace: Trace) -> list[_Process]:
        """Name the processes and their threads."""
        found, pids = [], set()
        for number, file in enumerate(trace.files):
            header = file.header
            role, pid = str(header.get("role")), int(header.get("pid") or 0)
            while pid in pids or pid <= 0:
                pid = 1_000_000 + number if pid < 1_000_000 else pid + 1
            pids.add(pid)
            rank = f" rank {header.get('rank', 0)}" if role == "worker" else ""
            labels = [f"vLLM {header.get('vllm', '?')}", f"level {header.get('level', 'full')}"]
            uuid = self.made.process(f"{KINDS.get(role, role)}{rank}", pid, labels)
            thread = self.made.thread(f"{THREADS.get(role, role)}{rank}", pid, pid)
            found.append(_Process(uuid, thread))
        return found

    def take(self, number: int, event: Event, at: int) -> None:
        """One event; ``at`` is its time or that of the call that it happened in."""
        self.now = max(self.now, at)
        process = self.processes[number]
        kind = type(event)
        handler = self.handlers.get(kind)
        if handler is not None:
            handler(process, event, at)
        elif isinstance(event, StepScheduled):
            self._scheduled(number, process, event)
        elif isinstance(event, StepUpdated):
            self._updated(number, process, event)
        elif isinstance(event, AttentionPlanned):
            step = self.steps.get(event.step)
            if step is not None:
                step.variants[number] = event.variant
        elif kind in self.of_steps:
            step = self.steps.get(event.step)  # type: ignore[attr-defined]
            if step is not None:
                getattr(step, self.of_steps[kind]).append((number, event))
            else:
                self._write_worker(number, event, (), (), "")

    # Requests ---------------------------------------------------------------------------

    def _arrived(self, process: _Process, event: RequestArrived, at: int) -> None:
        if not process.requests:
            process.requests = self.made.track("requests", process.uuid, by_time=True)
        if event.request in self.requests:
            self._end_request(event.request, at, {"unfinished": True})
        track = self.made.track(event.request_id, process.requests)
        self.requests[event.request] = _Request(track, at)
        facts = {
            "request": event.request_id,
            "num_prompt_tokens": event.num_prompt_tokens,
            "max_tokens": event.max_tokens,
            "priority": event.priority or None,
            "lora": event.lora,
        }
        self.made.begin(track, at, "request", "request", facts)
        self.made.begin(track, at, "queued", "request")

    def _allocated(self, process: _Process, event: SlotsAllocated, at: int) -> None:
        request = self.requests.get(event.request)
        if request is not None and event.num_hit_tokens:
            request.num_hit_tokens = event.num_hit_tokens

    def _enter(self, number: int, phase: str, at: int, **facts: Any) -> None:
        request = self.requests.get(number)
        if request is None or request.phase == phase:
            return
        at = max(at, request.since)
        self.made.end(request.track, at)
        self.made.begin(request.track, at, phase, "request", facts)
        request.phase, request.since = phase, at

    def _preempted(self, process: _Process, event: RequestPreempted, at: int) -> None:
        self._enter(event.request, "preempted", at, num_lost_tokens=event.num_computed_tokens)

    def _finished(self, process: _Process, event: RequestFinished, at: int) -> None:
        facts = {
            "reason": event.reason,
            "num_output_tokens": event.num_output_tokens,
            "num_preemptions": event.num_preemptions,
        }
        self._end_request(event.request, at, facts)

    def _end_request(self, number: int, at: int, facts: dict[str, Any]) -> None:
        request = self.requests.pop(number, None)
        if request is not None:
            at = max(at, request.since)
            self.made.end(request.track, at)
            self.made.end(request.track, at, facts)

    # Steps ------------------------------------------------------------------------------

    def _scheduled(self, number: int, process: _Process, event: StepScheduled) -> None:
        old = self.steps.pop(event.step, None)
        if old is not None:
            self._write_step(old, None)
        self.steps[event.step] = _Step(number, event)
        if len(self.steps) > STEPS_KEPT:
            self._write_step(self.steps.pop(next(iter(self.steps))), None)
        at = event.started_ns + event.dur_ns
        for request in (*event.new, *event.resumed):
            known = self.requests.get(request)
            hits = known.num_hit_tokens if known is not None else 0
            again = known is not None and known.phase == "preempted"
            self._enter(
                request, "prefill", event.started_ns, step=event.step,
                num_hit_tokens=hits, again=again or None,
            )  # fmt: skip
        if self.light:
            # Outputs are not in a light trace: one token at a time is decoding.
            for request, count in zip(event.requests or (), event.num_tokens or ()):
                known = self.requests.get(request)
                if (
                    known is not None and known.phase == "prefill" and count == 1
                    and request not in event.new and request not in event.resumed
                ):  # fmt: skip
                    self._enter(request, "decode", event.started_ns, step=event.step)
        self._count(process, event, at)

    def _count(self, process: _Process, event: StepScheduled, at: int) -> None:
        values = {"blocks free": event.num_free_blocks}
        if process.num_blocks:
            values["blocks used"] = process.num_blocks - 1 - event.num_free_blocks
        if not self.light:
            values["blocks cached"] = len(process.hashed)
        values |= {
            "requests running": event.num_running,
            "requests waiting": event.num_waiting,
            "tokens a step": sum(event.num_tokens or ()),
        }
        for name, value in values.items():
            track = process.counters.get(name)
            if track is None:
                track = process.counters[name] = self.made.counter(
                    name, process.uuid, name.split()[0]
                )
            self.made.value(track, at, value)

    def _updated(self, number: int, process: _Process, event: StepUpdated) -> None:
        step = self.steps.pop(event.step, None)
        if step is None:
            self._update_slice(process, event, ())
            return
        at = event.started_ns + event.dur_ns
        outputs = event.num_output_tokens
        if outputs is not None:
            for request, count in zip(step.event.requests or (), outputs):
                known = self.requests.get(request)
                if known is not None and count and known.phase == "prefill":
                    self._enter(request, "decode", at, step=event.step)
        self._write_step(step, event)

    def _write_step(self, step: _Step, updated: StepUpdated | None) -> None:
        event, process = step.event, self.processes[step.process]
        out, back = [], []
        for _ in step.executed:
            out.append(self._new_flow())
            back.append(self._new_flow() if updated is not None else 0)
        facts = {
            "step": event.step,
            "num_requests": len(event.requests or ()),
            "num_tokens": sum(event.num_tokens or ()),
            "num_new": len(event.new),
            "num_resumed": len(event.resumed),
            "num_preempted": len(event.preempted),
            "num_free_blocks": event.num_free_blocks,
        }
        if updated is not None:
            end = max(updated.started_ns, event.started_ns) + updated.dur_ns
            track = self._lane(process, event.started_ns, end)
            self.made.slice(
                track,
                event.started_ns,
                end - event.started_ns,
                f"step {event.step}",
                "step",
                facts=facts,
            )
        self.made.slice(
            process.thread, event.started_ns, event.dur_ns, "schedule", "step",
            facts=facts, flows=out,
        )  # fmt: skip
        for (number, executed), arrives, leaves in zip(step.executed, out, back):
            self._write_worker(
                number,
                executed,
                [leaves] if leaves else (),
                [arrives],
                step.variants.get(number, ""),
            )
        for number, called in step.called:
            self._write_worker(number, called, (), (), step.variants.get(number, ""))
        for number, sampled in step.sampled:
            self._write_worker(number, sampled, (), (), "")
        if updated is not None:
            self._update_slice(process, updated, [flow for flow in back if flow])

    def _update_slice(self, process: _Process, event: StepUpdated, ends: Any) -> None:
        outputs = event.num_output_tokens
        facts = {
            "step": event.step,
            "num_output_tokens": None if outputs is None else sum(outputs),
        }
        self.made.slice(
            process.thread, event.started_ns, event.dur_ns, "update", "step", facts=facts, ends=ends
        )

    def _new_flow(self) -> int:
        self.flow += 1
        return self.flow

    def _lane(self, process: _Process, begin: int, end: int) -> int:
        """The first track of steps that is free; tracks of one name are shown as one."""
        for place, (track, free) in enumerate(process.steps):
            if free <= begin:
                process.steps[place] = (track, end)
                return track
        track = self.made.track("steps", process.uuid)
        process.steps.append((track, end))
        return track

    def _write_worker(self, number: int, event: Any, flows: Any, ends: Any, variant: str) -> None:
        process = self.processes[number]
        if type(event) is StepExecuted:
            facts = {
                "step": event.step,
                "rank": event.rank,
                "num_tokens": event.num_tokens,
                "num_tokens_padded": event.num_tokens_padded,
                "mode": event.mode,
            }
            self.made.slice(
                process.thread, event.started_ns, event.dur_ns, "execute", "step",
                facts=facts, flows=flows, ends=ends,
            )  # fmt: skip
            if event.forward_ns:
                self.made.slice(
                    process.thread, event.forward_ns, event.forward_dur_ns, "forward", "step"
                )
        elif type(event) is StepSampled:
            facts = {"step": event.step, "rank": event.rank}
            self.made.slice(
                process.thread, event.started_ns, event.dur_ns, "sample", "step", facts=facts
            )
        else:
            self._kernels(process, event, variant)

    def _kernels(self, process: _Process, event: AttentionCalled, variant: str) -> None:
        track = process.thread
        if event.clock != "host":
            if not process.gpu:
                process.gpu = self.made.track("attention on the device", process.uuid)
            track = process.gpu
        name = f"{event.kernel} {variant}".strip()
        for layer, at, dur in zip(event.layers, event.started_ns, event.dur_ns):
            facts = {"step": event.step, "layer": layer}
            self.made.slice(track, at, dur, name, "kernel", facts=facts)

    # The end ----------------------------------------------------------------------------

    def _configured(self, process: _Process, event: EngineConfigured, at: int) -> None:
        process.num_blocks = event.num_blocks
        process.hashed.clear()

    def close(self) -> None:
        """Write what the trace ended in the middle of."""
        for step in self.steps.values():
            self._write_step(step, None)
        if self.requests:
            open_ones = counted(len(self.requests), "requests")
            self.notes.append(f"not finished at the end, and marked so: {open_ones}")
        for request in list(self.requests):
            self._end_request(request, self.now, {"unfinished": True})

    def mark(self, problems: list[str]) -> None:
        """Say on a track of its own what keeps the trace from being whole."""
        track = self.made.track("this trace is not whole", self.processes[0].uuid)
        for problem in problems:
            self.made.slice(track, self.now, 1, problem, "problem")
