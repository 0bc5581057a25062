"""What a picture needs of a trace: the tables at one moment, and what became of the requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError
from vllm_trace.events import (
    AttentionPlanned,
    RequestArrived,
    RequestFinished,
    SlotsMapped,
    StepScheduled,
)
from vllm_trace.state import KVState
from vllm_trace.trace import read_trace


@dataclass
class Moment:
    """The cache when one step was scheduled. Requests by name; tables of the first KV group."""

    step: int
    event: int
    """Number of ``step.scheduled``."""
    block_size: int
    num_blocks: int
    max_model_len: int
    held: dict[str, int] = field(default_factory=dict)
    """Tokens, this step's included."""
    tables: dict[str, list[int]] = field(default_factory=dict)
    ref_cnts: dict[int, int] = field(default_factory=dict)
    prompt: dict[str, int] = field(default_factory=dict)
    final: dict[str, int] = field(default_factory=dict)
    """Tokens that the request held at its end."""
    num_tokens: dict[str, int] = field(default_factory=dict)
    """Scheduled in this step."""
    slots: dict[str, list[int]] = field(default_factory=dict)
    """Where this step's keys and values go."""
    kernel: str = ""
    variant: str = ""

    @property
    def owners(self) -> dict[int, list[str]]:
        """Block → the requests whose tables hold it."""
        made: dict[int, list[str]] = {}
        for name, table in self.tables.items():
            for block in table:
                made.setdefault(block, []).append(name)
        return made

    def fill(self, name: str, index: int) -> float:
        """Share of the logical block ``index`` of a request that holds tokens."""
        size = self.block_size
        return max(0, min(size, self.held[name] - index * size)) / size


def moment(path: Path, score: Callable[[Moment], Any]) -> Moment:
    """The step of a trace with the highest score; the first of equals.

    Raises: ``UsageError`` when no step has requests with tables.
    """
    trace = read_trace(path)
    state, best, best_score = KVState(), None, None
    lengths: dict[int, tuple[int, int]] = {}
    prompts: dict[int, int] = {}
    found: Moment | None = None
    numbers: dict[str, int] = {}
    for record in trace.records():
        event = record.event
        state.apply(event)
        if isinstance(event, RequestArrived):
            prompts[event.request] = event.num_prompt_tokens
        elif isinstance(event, RequestFinished):
            lengths[event.request] = (prompts[event.request], event.num_output_tokens)
        elif isinstance(event, StepScheduled) and event.requests and state.config:
            found = _moment(record.number, event, state, trace.names)
            value = score(found)
            if best_score is None or value > best_score:
                best, best_score = found, value
                numbers = {trace.names[number]: number for number in state.tables}
        elif best is not None and best is found:
            _worker(best, event, trace.names)
    if best is None:
        raise UsageError(f"{path}: no step of this trace has block tables", hint="level full")
    for name, number in numbers.items():
        best.prompt[name] = prompts[number]
        if number in lengths:
            prompt, output = lengths[number]
            best.final[name] = prompt + max(output, 1) - 1
    return best


def _moment(number: int, event: StepScheduled, state: KVState, names: dict[int, str]) -> Moment:
    config = state.config
    assert config is not None
    made = Moment(
        event.step,
        number,
        config.block_size,
        config.num_blocks,
        int(config.settings.get("max_model_len", 0)),
    )
    for request, rows in state.tables.items():
        if request in state.computed and rows[0]:
            made.held[names[request]] = state.computed[request]
            made.tables[names[request]] = list(rows[0])
    made.ref_cnts = dict(state.ref_cnts)
    counts = zip(event.requests or (), event.num_tokens or (), strict=True)
    made.num_tokens = {names[request]: count for request, count in counts}
    return made


def _worker(made: Moment, event: Any, names: dict[int, str]) -> None:
    """The slots and the kernel of the step, as a worker received them."""
    if isinstance(event, SlotsMapped) and event.step == made.step:
        start = 0
        for request, count in zip(event.requests, event.query_lens, strict=True):
            made.slots[names[request]] = event.slots[start : start + count]
            start += count
    elif isinstance(event, AttentionPlanned) and event.step == made.step:
        made.kernel, made.variant = event.kernel, event.variant
