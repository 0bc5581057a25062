"""The numbers of a trace: what ``Summary.of`` fills in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

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
        from vllm_trace.summary.reading import Reading

        reading = Reading(cls(header=trace.header))
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
