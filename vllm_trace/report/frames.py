"""The steps of a trace for the report: what each ran, when each stage began, what requests did."""

from __future__ import annotations

from typing import Any

from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    EngineConfigured,
    Event,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.report.pool import PoolChanges
from vllm_trace.state import computes_prompt
from vllm_trace.trace import Record

MAX_FRAMES = 20_000
"""Steps in one report: further ones are left out, and the report says so."""

STAGES = ("schedule", "execute", "forward", "sample", "postprocess")

WAITING, PREFILL, DECODE, PREEMPTED = range(4)
SPANS = ("waiting", "prefill", "decode", "preempted")
"""What a request does for some frames."""

Window = tuple[int, int]
"""First and last step wanted."""


class Frames:
    """One frame for each ``step.scheduled`` of the first engine's process, and one for the end."""

    def __init__(self, window: Window, *, light: bool) -> None:
        self.window = window
        self.light = light
        self.pool = PoolChanges()
        self.process: int | None = None
        """The process whose pool this is."""
        self.num_engines = 0
        self.num_left_out = 0
        self.num_steps = 0
        self.steps: list[int] = []
        self.events: list[int] = []
        self.requests: list[list[int] | int] = []
        """Scheduled in the frame, in order; 0 for the same as in the frame before."""
        self.num_tokens: list[list[int] | int] = []
        """Likewise; 0 for one each."""
        self.preempted: list[list[list[int]]] = []
        """``[event, request, tokens lost]`` of each preemption before the frame."""
        self.stages: dict[str, list[list[int] | None]] = {name: [] for name in STAGES}
        """``[event, began, ns]`` of each frame, the slowest worker's."""
        self.spans: dict[int, list[list[int]]] = {}
        """Request → ``[what, first frame, last frame]``."""
        self.admitted: list[list[int]] = []
        """``[frame, request, tokens]``: how many are computed, where that is not the number
        before and the frame's own."""
        self.variants: dict[tuple[str, str], int] = {}
        self.kernels: list[list[int] | None] = []
        """``[event, variant, calls, ns]`` of each frame, the slowest worker's."""
        self.numbers: list[dict[str, int] | None] = []
        self.layers: dict[int, list[int]] = {}
        """Layer → calls and ns in all."""
        self._frame_of: dict[int, int] = {}
        self._last: list[int] = []
        self._planned: dict[tuple[int, int], tuple[str, str]] = {}
        self._preempted: list[list[int]] = []
        self._computed: dict[int, int] = {}
        self.has_end = False
        """Whether something happened after the last step's schedule."""
        self._changed = False

    def take(self, record: Record) -> None:
        """One record, in the order of the trace."""
        process, event = record.process, record.event
        if type(event) is EngineConfigured:
            self.num_engines += 1
            if self.process is None:
                self.process = process
        if self.process is None or process == self.process:
            self._engine(record.number, event)
        handler = _TIMES.get(type(event))
        if handler is not None:
            handler(self, record.number, process, event)

    def _engine(self, number: int, event: Event) -> None:
        kind = type(event)
        frame = len(self.steps)
        self.pool.take(number, event, frame)
        if kind is StepScheduled:
            self._scheduled(number, event)  # type: ignore[arg-type]
        elif kind is RequestArrived:
            self._begin(event.request, WAITING, frame)  # type: ignore[attr-defined]
        elif kind is RequestPreempted:
            lost = event.num_computed_tokens  # type: ignore[attr-defined]
            self._preempted.append([number, event.request, lost])  # type: ignore[attr-defined]
            self._begin(event.request, PREEMPTED, frame)  # type: ignore[attr-defined]
        elif kind is RequestFinished:
            self._end(event.request, frame)  # type: ignore[attr-defined]
        self._changed = kind is not StepScheduled

    def _scheduled(self, number: int, event: StepScheduled) -> None:
        self.num_steps += 1
        first, last = self.window
        if not first <= event.step <= last or len(self.steps) >= MAX_FRAMES:
            self.num_left_out += 1
            return
        frame = len(self.steps)
        self.steps.append(event.step)
        self.events.append(number)
        requests, tokens = list(event.requests or ()), list(event.num_tokens or ())
        self.requests.append(0 if requests == self._last else requests)
        self._last = requests
        self.num_tokens.append(0 if all(count == 1 for count in tokens) else tokens)
        self.preempted.append(self._preempted)
        self._preempted = []
        self._frame_of[event.step] = frame
        for name in STAGES:
            self.stages[name].append(None)
        self.stages["schedule"][frame] = [number, event.started_ns, event.dur_ns]
        self.kernels.append(None)
        self.numbers.append(None)
        self._spans_of(frame, event)
        self.pool.close_frame()

    def _spans_of(self, frame: int, event: StepScheduled) -> None:
        state = self.pool.state
        for request, count in zip(event.requests or (), event.num_tokens or (), strict=True):
            computed = state.computed.get(request, count)
            before = None if self.light else computed - count
            prompt = state.num_prompt_tokens.get(request, 0)
            prefill = computes_prompt(event, request, count, before, prompt)
            self._begin(request, PREFILL if prefill else DECODE, frame)
            if self._computed.get(request) != computed - count:
                self.admitted.append([frame, request, computed])
            self._computed[request] = computed

    def _begin(self, request: int, what: int, frame: int) -> None:
        spans = self.spans.setdefault(request, [])
        if spans and spans[-1][2] < 0:
            if spans[-1][0] == what:
                return
            self._end(request, frame)
        spans.append([what, frame, -1])

    def _end(self, request: int, frame: int) -> None:
        spans = self.spans.get(request)
        if spans and spans[-1][2] < 0:
            if spans[-1][1] >= frame:
                spans.pop()  # it was over before a frame could show it
            else:
                spans[-1][2] = frame - 1

    def close(self) -> None:
        """The end of the trace: one more frame, of what is left then."""
        frame = len(self.steps)
        self.has_end = bool(frame) and not self.num_left_out and self._changed
        if self.has_end:
            self.pool.close_frame()
        else:
            self.pool.starts.append(len(self.pool.columns["block"]))
        for request in self.spans:
            self._end(request, frame)

    # Times ------------------------------------------------------------------------------

    def _stage(self, name: str, step: int, number: int, began: int, dur: int) -> None:
        frame = self._frame_of.get(step)
        if frame is None:
            return
        known = self.stages[name][frame]
        if known is None or known[2] < dur:
            self.stages[name][frame] = [number, began, dur]

    def _executed(self, number: int, process: int, event: StepExecuted) -> None:
        self._stage("execute", event.step, number, event.started_ns, event.dur_ns)
        if event.forward_ns:
            self._stage("forward", event.step, number, event.forward_ns, event.forward_dur_ns)

    def _sampled(self, number: int, process: int, event: StepSampled) -> None:
        self._stage("sample", event.step, number, event.started_ns, event.dur_ns)

    def _updated(self, number: int, process: int, event: StepUpdated) -> None:
        self._stage("postprocess", event.step, number, event.started_ns, event.dur_ns)

    def _attention_planned(self, number: int, process: int, event: AttentionPlanned) -> None:
        self._planned[process, event.step] = (event.kernel, event.variant)
        self._planned.pop((process, event.step - 8), None)
        frame = self._frame_of.get(event.step)
        if frame is not None:
            self.numbers[frame] = event.numbers

    def _attention_called(self, number: int, process: int, event: AttentionCalled) -> None:
        key = self._planned.get((process, event.step), (event.kernel, ""))
        variant = self.variants.setdefault(key, len(self.variants))
        for layer, ns in zip(event.layers, event.dur_ns, strict=False):
            totals = self.layers.setdefault(layer, [0, 0])
            totals[0] += 1
            totals[1] += ns
        frame = self._frame_of.get(event.step)
        if frame is None:
            return
        total, known = sum(event.dur_ns), self.kernels[frame]
        if known is None or known[3] < total:
            self.kernels[frame] = [number, variant, len(event.dur_ns), total]

    def to_dict(self) -> dict[str, Any]:
        # Times from the first one on: small numbers, and exact ones in JavaScript.
        base = min((one[1] for rows in self.stages.values() for one in rows if one), default=0)
        stages = {
            name: [one and [one[0], one[1] - base, one[2]] for one in rows]
            for name, rows in self.stages.items()
        }
        return {
            "step": self.steps,
            "event": self.events,
            "requests": self.requests,
            "num_tokens": self.num_tokens,
            "preempted": self.preempted,
            "admitted": self.admitted,
            "has_end": self.has_end,
            "base_ns": str(base),
            "stages": stages,
            "kernels": self.kernels,
            "numbers": self.numbers,
            "variants": [list(key) for key in self.variants],
            "layers": [[layer, *totals] for layer, totals in sorted(self.layers.items())],
            "spans": {str(request): spans for request, spans in self.spans.items()},
        }


_TIMES: dict[type, Any] = {
    StepExecuted: Frames._executed,
    StepSampled: Frames._sampled,
    StepUpdated: Frames._updated,
    AttentionPlanned: Frames._attention_planned,
    AttentionCalled: Frames._attention_called,
}
