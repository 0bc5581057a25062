"""A trace told in numbers: the engine, its steps, its requests, its kernels.

``Summary.of(trace)`` reads a trace once. ``facts`` is the flat form that scenarios check their
statements against; ``to_dict`` is the JSON form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from vllm_trace.decode_rule import DecodeChoice, choose
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
from vllm_trace.state import NULL_BLOCK, KVState
from vllm_trace.trace import Trace


@dataclass
class Step:
    """One engine step. Times in ns; ``forward_ns`` is the slowest worker's."""

    step: int
    started_ns: int = 0
    schedule_ns: int = 0
    execute_ns: int = 0
    forward_ns: int = 0
    sample_ns: int = 0
    postprocess_ns: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_requests: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_joined: int = 0
    num_left: int = 0
    num_preempted: int = 0
    variant: str = ""
    device_ns: int = 0
    """Of the forward, between events on the device's stream; 0 where there are none."""
    mode: str = ""
    """``eager``, or how CUDA graphs were used."""


@dataclass
class RequestLife:
    """One request, from arrival to finish."""

    request: int
    name: str
    arrived_ns: int = 0
    first_scheduled_ns: int = 0
    finished_ns: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_hit_tokens: int = 0
    """From the prefix cache, at the first admission."""
    num_resume_hit_tokens: int = 0
    """From the prefix cache, at admissions after a preemption."""
    num_chunks: int = 0
    """Steps that computed tokens of the prompt."""
    num_preemptions: int = 0
    num_refusals: int = 0
    num_steps: int = 0
    reason: str = ""
    first_step: int = 0
    last_step: int = 0
    table: list[list[int]] = field(default_factory=list)
    """Block ids per group in logical order, when the table was longest."""
    max_context: int = 0
    lora: str | None = None
    salted: bool = False


@dataclass
class Kernel:
    """Calls of one attention kernel variant. Times in ns."""

    kernel: str
    variant: str
    num_steps: int = 0
    """Steps, however many workers ran each."""
    num_calls: int = 0
    total_ns: int = 0
    clock: str = "host"
    num_bytes: int = 0
    """Of K and V that the calls had to read, once for each KV head."""
    median_ns: float = 0
    """Of a call, over the steps: the first one may have compiled or loaded the kernel."""


@dataclass
class KernelStep:
    """One kernel in one step, over all its layers and workers. Times in ns."""

    step: int
    kernel: str
    variant: str
    num_seqs: int = 0
    max_seq_len: int = 0
    num_tokens: int = 0
    """Of context, over all sequences."""
    num_calls: int = 0
    total_ns: int = 0
    num_bytes: int = 0
    clock: str = "host"
    mode: str = ""
    reason: str = ""


@dataclass
class RuleCheck:
    """PagedAttention's V1/V2 rule over the steps that decode: what ran by it, or what it would have chosen."""

    counterfactual: bool = True
    """The engine chose by a rule of its own: this one was only asked."""
    num_v1: int = 0
    """Steps; one with two KV groups counts for each."""
    num_v2: int = 0
    changes: list[tuple[int, str, str, str]] = field(default_factory=list)
    """(step, from, to, reason): every step at which the choice is not that of the one before."""


@dataclass
class ShadowCheck:
    """Attention calls that were computed a second time, and the worst of them."""

    num_calls: int = 0
    num_beyond: int = 0
    tolerance: float = 0.0
    max_absolute: float = 0.0
    max_relative: float = 0.0
    step: int = 0
    layer: int = -1
    request: str = ""
    position: int = -1
    beyond: dict[str, Any] = field(default_factory=dict)
    """The first call beyond the tolerance."""


@dataclass
class WorkerCheck:
    """Whether the tables and slots that kernels received are the manager's."""

    num_rows: int = 0
    num_slots: int = 0
    num_unplanned: int = 0
    """Rows of steps of which the manager's side is not in the trace."""
    first_difference: str = ""


@dataclass
class Summary:
    """What a trace says, in numbers."""

    header: dict[str, Any]
    engine: dict[str, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    backends: list[dict[str, Any]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    requests: list[RequestLife] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    kernel_steps: list[KernelStep] = field(default_factory=list)
    replayed_ns: dict[str, list[int]] = field(default_factory=dict)
    """Time on the device of forwards that were CUDA graphs, by mode: no call of a kernel is seen in them."""
    rule: RuleCheck = field(default_factory=RuleCheck)
    shadow: ShadowCheck = field(default_factory=ShadowCheck)
    worker: WorkerCheck = field(default_factory=WorkerCheck)
    num_workers: int = 0
    num_events: int = 0
    num_evictions: int = 0
    num_refusals: int = 0
    num_shared_blocks: int = 0
    """Blocks that stood in more than one table at the same time."""
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, trace: Trace) -> Summary:
        """Read the trace to its end."""
        reading = _Reading(cls(header=trace.header))
        for record in trace.records():
            reading.take(record.process, record.event)
        made = reading.done()
        made.problems = [*trace.problems, *made.problems]
        return made

    @property
    def num_preemptions(self) -> int:
        return sum(step.num_preempted for step in self.steps)

    def facts(self) -> dict[str, int | str]:
        """Flat facts: totals by name, and those of a request as ``<name>.<fact>``."""
        finished = [r for r in self.requests if r.reason]
        told: dict[str, int | str] = {
            "requests": len(self.requests),
            "finished": len(finished),
            "aborted": sum(r.reason == "abort" for r in self.requests),
            "steps": len(self.steps),
            "output_tokens": sum(r.num_output_tokens for r in self.requests),
            "preemptions": self.num_preemptions,
            "preempted_requests": sum(r.num_preemptions > 0 for r in self.requests),
            "resume_hit_tokens": sum(r.num_resume_hit_tokens for r in self.requests),
            "refusals": self.num_refusals,
            "evictions": self.num_evictions,
            "hit_requests": sum(r.num_hit_tokens > 0 for r in self.requests),
            "hit_tokens": sum(r.num_hit_tokens for r in self.requests),
            "chunked_requests": sum(r.num_chunks > 1 for r in self.requests),
            "mixed_steps": sum(
                s.num_prefill_tokens > 0 and s.num_decode_tokens > 0 for s in self.steps
            ),
            "join_steps": sum(s.num_joined > 0 and s.num_decode_tokens > 0 for s in self.steps),
            "leave_steps": sum(s.num_left > 0 for s in self.steps),
            "max_running": max((s.num_running for s in self.steps), default=0),
            "max_waiting": max((s.num_waiting for s in self.steps), default=0),
            "max_context": max((r.max_context for r in self.requests), default=0),
            "kernel_calls": sum(k.num_calls for k in self.kernels),
            "shared_blocks": self.num_shared_blocks,
            "blocks_in_use_at_end": self._blocks_in_use_at_end(),
            "worker_rows": self.worker.num_rows,
            "worker_differences": int(bool(self.worker.first_difference)),
            "v1_steps": self.rule.num_v1,
            "v2_steps": self.rule.num_v2,
            "shadow_calls": self.shadow.num_calls,
            "shadow_beyond": self.shadow.num_beyond,
        }
        for request in self.requests:
            own: dict[str, int | str] = {
                "hit_tokens": request.num_hit_tokens,
                "output_tokens": request.num_output_tokens,
                "blocks": len(request.table[0]) if request.table else 0,
                "chunks": request.num_chunks,
                "preemptions": request.num_preemptions,
                "context": request.max_context,
                "reason": request.reason,
            }
            told |= {f"{request.name}.{key}": value for key, value in own.items()}
        return told

    def _blocks_in_use_at_end(self) -> int:
        if not self.steps or not self.engine:
            return 0
        return self.engine["num_blocks"] - 1 - self.engine["num_free_blocks_at_end"]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ``schema`` counts changes of its shape."""
        return {"schema": 1} | asdict(self)


class _Reading:
    """The fold behind ``Summary.of``."""

    def __init__(self, summary: Summary) -> None:
        self.made = summary
        self.state = KVState()
        self.steps: dict[int, Step] = {}
        self.lives: dict[int, RequestLife] = {}
        self.kernels: dict[tuple[str, str], Kernel] = {}
        self.plans: dict[tuple[int, int], dict[str, AttentionPlanned]] = {}
        self.batches: dict[tuple[int, int], list[SlotsMapped]] = {}
        self.modes: dict[tuple[int, int], str] = {}
        self.kernel_rows: dict[tuple[int, str, str], KernelStep] = {}
        self.last_choice: DecodeChoice | None = None
        self.ruler: int | None = None
        self.kernel_steps: dict[tuple[str, str], set[int]] = {}
        self.preempted_since = 0
        self.left_since = 0
        self.shared: set[int] = set()
        self.light = summary.header.get("level") == "light"
        self.rows: dict[tuple[int, int, int], list[int]] = {}
        self.planned: dict[int, dict[int, list[list[int]]]] = {}
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
        made.kernel_steps = sorted(self.kernel_rows.values(), key=lambda row: row.step)
        for row in made.kernel_steps:
            row.mode = self.steps[row.step].mode if row.step in self.steps else ""
        made.kernels = sorted(self.kernels.values(), key=lambda k: -k.total_ns)
        made.num_workers = len(self.workers)
        if len(self.schedulers) > 1:
            made.problems.append(
                f"{len(self.schedulers)} engines (data parallel) are added up here as if they were one:"
                " look at the file of each for its steps and its pool"
            )
        made.num_shared_blocks = len(self.shared)
        times: dict[tuple[str, str], list[float]] = {}
        for row in made.kernel_steps:
            times.setdefault((row.kernel, row.variant), []).append(row.total_ns / row.num_calls)
        for key, kernel in self.kernels.items():
            kernel.num_steps = len(self.kernel_steps[key])
            kernel.median_ns = median(times[key])
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
        step = self.steps.setdefault(event.step, Step(event.step))
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
            if self._is_prefill(event, request, count, computed - count):
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
        self.planned[event.step] = planned
        for old in [number for number in self.planned if number < event.step - 8]:
            del self.planned[old]

    def _is_prefill(self, event: StepScheduled, request: int, count: int, before: int) -> bool:
        if not self.light:
            return before < self._life(request).num_prompt_tokens
        # Hits are not in a light trace, so where the request stands is not known. A chunk of a
        # single token, other than the first, is taken for a decode.
        more = count - event.num_spec_tokens.get(request, 0)
        return more > 1 or request in event.new or request in event.resumed

    def _updated(self, process: int, event: StepUpdated) -> None:
        step = self.steps.setdefault(event.step, Step(event.step))
        step.postprocess_ns = event.dur_ns
        step.num_left, self.left_since = self.left_since, 0

    def _executed(self, process: int, event: StepExecuted) -> None:
        self.workers.add(process)
        step = self.steps.setdefault(event.step, Step(event.step))
        step.execute_ns = max(step.execute_ns, event.dur_ns)
        step.forward_ns = max(step.forward_ns, event.forward_dur_ns)
        step.device_ns = max(step.device_ns, event.device_dur_ns)
        step.mode = event.mode
        if event.mode in ("full", "piecewise") and event.device_dur_ns:
            self.made.replayed_ns.setdefault(event.mode, []).append(event.device_dur_ns)

    def _sampled(self, process: int, event: StepSampled) -> None:
        step = self.steps.setdefault(event.step, Step(event.step))
        step.sample_ns = max(step.sample_ns, event.dur_ns)

    def _attention_planned(self, process: int, event: AttentionPlanned) -> None:
        plans = self.plans.setdefault((process, event.step), {})
        plans[event.kernel] = event
        step = self.steps.setdefault(event.step, Step(event.step))
        decides = event.variant in ("V1", "V2")
        step.variant = event.variant if decides or not step.variant else step.variant
        if decides:
            self.made.rule.counterfactual = False
            n = event.numbers
            self._ruled(
                process, event.step, choose(n["max_seq_len"], n["num_seqs"], n["num_heads"])
            )
        self.plans.pop((process, event.step - 8), None)

    def _asked_rule(self, process: int, event: SlotsMapped) -> None:
        """What the rule would say of the rows of a step that decode."""
        heads = self.made.engine.get("num_query_heads")
        lens = [n for n, q in zip(event.seq_lens, event.query_lens, strict=True) if q == 1]
        if heads and lens and self.made.rule.counterfactual:
            self._ruled(process, event.step, choose(max(lens), len(lens), heads))

    def _ruled(self, process: int, step: int, choice: DecodeChoice) -> None:
        if self.ruler is None:
            self.ruler = process
        if process != self.ruler:
            return  # every worker of a tensor-parallel group says the same
        rule, before = self.made.rule, self.last_choice
        if choice.variant == "V1":
            rule.num_v1 += 1
        else:
            rule.num_v2 += 1
        if before is not None and before.variant != choice.variant:
            rule.changes.append((step, before.variant, choice.variant, choice.reason))
        self.last_choice = choice

    def _attention_called(self, process: int, event: AttentionCalled) -> None:
        plans = self.plans.get((process, event.step), {})
        plan = plans.get(event.kernel)
        if plan is None and len(plans) == 1:
            plan = next(iter(plans.values()))
        key = (plan.kernel, plan.variant) if plan else (event.kernel, "")
        kernel = self.kernels.setdefault(key, Kernel(*key, clock=event.clock))
        self.kernel_steps.setdefault(key, set()).add(event.step)
        kernel.num_calls += len(event.dur_ns)
        kernel.total_ns += sum(event.dur_ns)
        row = self.kernel_rows.setdefault(
            (event.step, *key), KernelStep(event.step, *key, clock=event.clock)
        )
        row.num_calls += len(event.dur_ns)
        row.total_ns += sum(event.dur_ns)
        row.reason = plan.reason if plan else ""
        self._measure(process, event, row, kernel)
        if event.tolerance:
            self._shadowed(event)

    def _measure(
        self, process: int, event: AttentionCalled, row: KernelStep, kernel: Kernel
    ) -> None:
        """Batch, context and bytes of a call, from the batch that the worker was given."""
        batches = self.batches.get((process, event.step), ())
        for batch in batches:
            rows = list(zip(batch.seq_lens, batch.query_lens, strict=True))
            if row.variant in ("V1", "V2"):
                rows = [one for one in rows if one[1] == 1]
            elif row.variant == "prefill":
                rows = [one for one in rows if one[1] > 1]
            lens = [length for length, _ in rows]
            row.num_seqs = max(row.num_seqs, len(lens))
            row.max_seq_len = max([row.max_seq_len, *lens])
            row.num_tokens = max(row.num_tokens, sum(lens))
            group = self.made.groups[batch.group] if batch.group < len(self.made.groups) else None
            if group and group["page_size_bytes"]:
                share = sum(lens) * group["page_size_bytes"] // group["block_size"]
                of_group = len(event.dur_ns) // max(1, len(batches))
                row.num_bytes += share * of_group
                kernel.num_bytes += share * of_group

    def _shadowed(self, event: AttentionCalled) -> None:
        check = self.made.shadow
        check.tolerance = event.tolerance
        for layer, found in zip(event.layers, event.worst, strict=False):
            absolute, relative, request, position = found
            check.num_calls += 1
            check.num_beyond += relative > event.tolerance
            check.max_absolute = max(check.max_absolute, absolute)
            if relative > check.max_relative or check.layer < 0:
                check.max_relative, check.step, check.layer = relative, event.step, layer
                check.request, check.position = self._life(request).name, position
        if event.beyond and not check.beyond:
            name = self._life(event.beyond["request"]).name
            check.beyond = event.beyond | {
                "step": event.step,
                "kernel": event.kernel,
                "request": name,
            }
            check.num_beyond = max(check.num_beyond, 1)

    def _row(self, process: int, event: TableRowChanged) -> None:
        row = self.rows.setdefault((process, event.group, event.request), [])
        row[event.first :] = event.blocks

    def _mapped(self, process: int, event: SlotsMapped) -> None:
        """Compare what the kernel received with what the manager planned for this step."""
        self.batches.setdefault((process, event.step), []).append(event)
        self.batches.pop((process, event.step - 8), None)
        self._asked_rule(process, event)
        check = self.made.worker
        ratio = event.block_size // event.kernel_block_size
        cursor = 0
        planned = self.planned.get(event.step)
        if planned is None:
            check.num_unplanned += len(event.requests)
            return
        for request, query, length in zip(
            event.requests, event.query_lens, event.seq_lens, strict=True
        ):
            slots = event.slots[cursor : cursor + query]
            cursor += query
            table = planned.get(request, [])
            row = self.rows.get((process, event.group, request), [])
            mine = table[event.group] if len(table) > event.group else []
            check.num_rows += 1
            check.num_slots += len(slots)
            if check.first_difference:
                continue
            who = f"step {event.step}, request {self._life(request).name}"
            if request not in planned:
                check.first_difference = f"{who}: the worker ran it, the scheduler did not plan it"
                continue
            blocks = -(-length // event.block_size)
            theirs = [block // ratio for block in row[: blocks * ratio : ratio]]
            # Where a sliding window has passed the manager has the null block; a worker keeps what
            # it was told, and does not read it.
            if len(theirs) > len(mine) or any(
                block != other != NULL_BLOCK for block, other in zip(theirs, mine, strict=False)
            ):
                check.first_difference = (
                    f"{who}: the worker's table is {theirs}, the manager's {mine[: len(theirs)]}"
                )
                continue
            for place, slot in zip(range(length - query, length), slots, strict=True):
                block, offset = divmod(place, event.block_size)
                expected = mine[block] * event.block_size + offset if block < len(mine) else -1
                if slot != expected:
                    check.first_difference = (
                        f"{who}: position {place} was written to slot {slot}, not {expected}"
                    )
                    break


_TAKE: dict[type[Event], Callable[..., None]] = {
    EngineConfigured: _Reading._engine,
    BackendSelected: _Reading._backend,
    RequestArrived: _Reading._arrived,
    RequestFinished: _Reading._finished,
    RequestPreempted: _Reading._preempted,
    SlotsAllocated: _Reading._allocated,
    SlotsRefused: _Reading._refused,
    BlocksTouched: _Reading._touched,
    BlockEvicted: _Reading._evicted,
    StepScheduled: _Reading._scheduled,
    StepUpdated: _Reading._updated,
    StepExecuted: _Reading._executed,
    StepSampled: _Reading._sampled,
    AttentionPlanned: _Reading._attention_planned,
    AttentionCalled: _Reading._attention_called,
    TableRowChanged: _Reading._row,
    SlotsMapped: _Reading._mapped,
}
