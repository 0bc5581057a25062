"""The fold behind ``Summary.of``: steps and requests; kernels and workers have readings of their own."""

from __future__ import annotations

from collections.abc import Callable

from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    BackendSelected,
    BlockEvicted,
    BlocksTouched,
    EngineConfigured,
    Event,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    SlotsAllocated,
    SlotsMapped,
    SlotsRefused,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
    TableRowChanged,
)
from vllm_trace.state import NULL_BLOCK, KVState, computes_prompt
from vllm_trace.summary.kernels import KernelReading
from vllm_trace.summary.model import RequestLife, Step, Summary
from vllm_trace.summary.workers import WorkerReading


class Reading:
    """Takes in one event after the other; ``done`` completes the summary."""

    def __init__(self, summary: Summary) -> None:
        self.made = summary
        self.state = KVState()
        self.steps: dict[int, Step] = {}
        self.lives: dict[int, RequestLife] = {}
        self.kernels = KernelReading(summary, self._step, self._name)
        self.check = WorkerReading(summary.worker, self._name)
        self.preempted_since = 0
        """Requests preempted since the last schedule."""
        self.left_since = 0
        """Requests finished since the last update."""
        self.shared: set[int] = set()
        self.light = summary.header.get("level") == "light"
        self.workers: set[int] = set()
        self.schedulers: set[int] = set()

    def take(self, process: int, event: Event) -> None:
        self.made.num_events += 1
        handler = _TAKE.get(type(event))
        if handler is not None:
            handler(self, process, event)
        self.state.apply(event)
        if type(event) is StepScheduled:
            self._after_schedule(event)

    def done(self) -> Summary:
        made = self.made
        made.steps = [self.steps[number] for number in sorted(self.steps)]
        made.requests = [self.lives[number] for number in sorted(self.lives)]
        self.kernels.done(self.steps)
        made.num_workers = len(self.workers)
        if len(self.schedulers) > 1:
            made.problems.append(
                f"{len(self.schedulers)} engines (data parallel) are added up here as if they were one:"
                " look at the file of each for its steps and its pool"
            )
        made.num_shared_blocks = len(self.shared)
        if made.engine:
            in_use = {
                block for table in self.state.tables.values() for row in table for block in row
            }
            free = made.engine["num_blocks"] - 1 - len(in_use - {NULL_BLOCK})
            made.engine["num_free_blocks_at_end"] = free
        return made

    def _engine(self, process: int, event: EngineConfigured) -> None:
        self.schedulers.add(process)
        self.made.engine = event.settings | {
            "block_size": event.block_size,
            "hash_block_size": event.hash_block_size,
            "num_blocks": event.num_blocks,
            "num_free_blocks_at_end": event.num_blocks - 1,
        }
        self.made.groups = [
            {
                "kind": group.kind,
                "block_size": group.block_size,
                "num_layers": len(group.layers),
                "sliding_window": group.sliding_window,
                "page_size_bytes": group.page_size_bytes,
            }
            for group in event.groups
        ]

    def _backend(self, process: int, event: BackendSelected) -> None:
        if event.backend.startswith("PAGED"):
            self.made.rule.counterfactual = False
        entry = {
            "backend": event.backend,
            "impl": event.impl,
            "candidates": [list(candidate) for candidate in event.candidates],
            "settings": event.settings,
        }
        for known in self.made.backends:
            if all(known[key] == value for key, value in entry.items()):
                # Each worker of a tensor-parallel group tells of the same layers.
                if event.layer not in known["layers"]:
                    known["layers"].append(event.layer)
                return
        self.made.backends.append(entry | {"layers": [event.layer]})

    def _arrived(self, process: int, event: RequestArrived) -> None:
        self.lives[event.request] = RequestLife(
            request=event.request,
            name=event.request_id,
            arrived_ns=event.at_ns,
            num_prompt_tokens=event.num_prompt_tokens,
            lora=event.lora,
            salted=event.salted,
        )

    def _life(self, request: int) -> RequestLife:
        return self.lives.setdefault(request, RequestLife(request, f"#{request}"))

    def _name(self, request: int) -> str:
        return self._life(request).name

    def _step(self, number: int) -> Step:
        return self.steps.setdefault(number, Step(number))

    def _finished(self, process: int, event: RequestFinished) -> None:
        life = self._life(event.request)
        life.finished_ns, life.reason = event.at_ns, event.reason
        life.num_output_tokens = event.num_output_tokens
        self.left_since += 1

    def _preempted(self, process: int, event: RequestPreempted) -> None:
        self._life(event.request).num_preemptions += 1
        self.preempted_since += 1

    def _allocated(self, process: int, event: SlotsAllocated) -> None:
        life = self._life(event.request)
        if event.num_hit_tokens and life.num_preemptions:
            life.num_resume_hit_tokens += event.num_hit_tokens
        elif event.num_hit_tokens:
            life.num_hit_tokens = event.num_hit_tokens

    def _refused(self, process: int, event: SlotsRefused) -> None:
        self.made.num_refusals += 1
        self._life(event.request).num_refusals += 1

    def _touched(self, process: int, event: BlocksTouched) -> None:
        pairs = zip(event.blocks, event.ref_cnts, strict=True)
        self.shared.update(block for block, count in pairs if count > 1 and block != NULL_BLOCK)

    def _evicted(self, process: int, event: BlockEvicted) -> None:
        self.made.num_evictions += 1

    def _scheduled(self, process: int, event: StepScheduled) -> None:
        step = self._step(event.step)
        step.started_ns, step.schedule_ns = event.started_ns, event.dur_ns
        step.num_running, step.num_waiting = event.num_running, event.num_waiting
        step.num_free_blocks = event.num_free_blocks
        step.num_requests = len(event.requests or ())
        step.num_joined = len(event.new) + len(event.resumed)
        step.num_preempted, self.preempted_since = self.preempted_since, 0

    def _after_schedule(self, event: StepScheduled) -> None:
        """With the state as the schedule left it: phases, tables, and what workers must get."""
        step = self.steps[event.step]
        planned = {}
        for request, count in zip(event.requests or (), event.num_tokens or (), strict=True):
            life = self._life(request)
            computed = self.state.computed.get(request, count)
            before = None if self.light else computed - count
            if computes_prompt(event, request, count, before, life.num_prompt_tokens):
                step.num_prefill_tokens += count
                life.num_chunks += 1
            else:
                step.num_decode_tokens += count
            life.num_steps += 1
            life.first_step = life.first_step or event.step
            life.first_scheduled_ns = life.first_scheduled_ns or event.started_ns
            life.last_step = event.step
            life.max_context = max(life.max_context, computed)
            table = [list(row) for row in self.state.tables.get(request, ())]
            if table and len(table[0]) >= len(life.table[0] if life.table else ()):
                life.table = table
            planned[request] = table
        self.check.plan(event.step, planned)

    def _updated(self, process: int, event: StepUpdated) -> None:
        step = self._step(event.step)
        step.postprocess_ns = event.dur_ns
        step.num_left, self.left_since = self.left_since, 0

    def _executed(self, process: int, event: StepExecuted) -> None:
        self.workers.add(process)
        step = self._step(event.step)
        step.execute_ns = max(step.execute_ns, event.dur_ns)
        step.forward_ns = max(step.forward_ns, event.forward_dur_ns)
        step.device_ns = max(step.device_ns, event.device_dur_ns)
        step.mode = event.mode
        if event.mode in ("full", "piecewise") and event.device_dur_ns:
            self.made.replayed_ns.setdefault(event.mode, []).append(event.device_dur_ns)

    def _sampled(self, process: int, event: StepSampled) -> None:
        step = self._step(event.step)
        step.sample_ns = max(step.sample_ns, event.dur_ns)

    # Workers ----------------------------------------------------------------------------

    def _attention_planned(self, process: int, event: AttentionPlanned) -> None:
        self.kernels.planned(process, event)

    def _attention_called(self, process: int, event: AttentionCalled) -> None:
        self.kernels.called(process, event)

    def _row_changed(self, process: int, event: TableRowChanged) -> None:
        self.check.row_changed(process, event)

    def _mapped(self, process: int, event: SlotsMapped) -> None:
        self.kernels.mapped(process, event)
        self.check.mapped(process, event)


_TAKE: dict[type[Event], Callable[..., None]] = {
    EngineConfigured: Reading._engine,
    BackendSelected: Reading._backend,
    RequestArrived: Reading._arrived,
    RequestFinished: Reading._finished,
    RequestPreempted: Reading._preempted,
    SlotsAllocated: Reading._allocated,
    SlotsRefused: Reading._refused,
    BlocksTouched: Reading._touched,
    BlockEvicted: Reading._evicted,
    StepScheduled: Reading._scheduled,
    StepUpdated: Reading._updated,
    StepExecuted: Reading._executed,
    StepSampled: Reading._sampled,
    AttentionPlanned: Reading._attention_planned,
    AttentionCalled: Reading._attention_called,
    TableRowChanged: Reading._row_changed,
    SlotsMapped: Reading._mapped,
}
