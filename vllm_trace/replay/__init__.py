"""Replays a trace's inputs through ``mini`` and compares every decision with the recorded one.

Two replays of the same trace:

*manager*  the recorded calls of the KV-cache manager, in their order, drive ``mini``'s manager:
           every hit, table, block id, eviction, reference count and free count is compared, and
           the tables and slots that the workers' kernels received.
*engine*   only arrivals, aborts and token outcomes drive ``mini``'s own scheduler, which has to
           come to the same steps, preemptions and blocks by itself.

Facts of a call stand before the call in a trace ("inner before outer"), and the calls of one step
before ``step.scheduled`` or ``step.updated``. So a trace falls into segments, each of which ends
with one of those two, and a segment is replayed as a whole: ``mini`` tells what it does in the
same words, and both lists must be equal.

A replay that could not consume every event is not a pass, and says what it did not judge.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_trace.divergence import Divergence, describe
from vllm_trace.errors import TraceError
from vllm_trace.events import BackendSelected, EngineConfigured, StepScheduled, StepUpdated
from vllm_trace.mini.rules import rules_for
from vllm_trace.replay.base import Replay
from vllm_trace.replay.engine import EngineReplay
from vllm_trace.replay.facts import DECISIONS
from vllm_trace.replay.manager import ManagerReplay
from vllm_trace.replay.worker import Diverged
from vllm_trace.trace import Record, Trace

DRIVERS: dict[str, type[Replay]] = {"manager": ManagerReplay, "engine": EngineReplay}
MODES = tuple(DRIVERS)


@dataclass
class Replayed:
    """What one replay found."""

    mode: str
    num_events: int = 0
    num_consumed: int = 0
    num_compared: int = 0
    """Facts that stood on both sides and were equal."""
    divergence: Divergence | None = None
    not_judged: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        complete = self.num_consumed == self.num_events and self.num_events > 0
        return self.divergence is None and complete and not self.not_judged

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "passed": self.passed,
            "events": self.num_events,
            "consumed": self.num_consumed,
            "compared": self.num_compared,
            "not_judged": self.not_judged,
            "divergence": self.divergence.to_dict() if self.divergence else None,
        }


def replay(trace: Trace, mode: str) -> Replayed:
    """Replay a trace in one mode.

    Raises: ``TraceError`` when the trace has no engine in it.
    """
    result = Replayed(mode)
    if trace.level == "light":
        result.not_judged.append(
            "level light: blocks and lookups were not recorded, so nothing can be compared"
        )
    driver: Replay | None = None
    segment: list[Record] = []
    for record in trace.records():
        result.num_events += 1
        event = record.event
        if type(event) is EngineConfigured:
            if result.not_judged:
                continue
            result.not_judged += _unfollowed(event, trace)
            if not result.not_judged:
                driver = DRIVERS[mode](event, trace)
                segment = []
                result.num_consumed += 1
            continue
        if type(event) is BackendSelected:
            # Chosen before there is an engine; kept for people, not compared.
            result.num_consumed += 1
            continue
        if driver is None or result.not_judged or result.divergence:
            continue
        if type(event) not in DECISIONS:
            _run(driver, [record], result, trace)
            continue
        segment.append(record)
        if type(event) is StepScheduled or type(event) is StepUpdated:
            _run(driver, segment, result, trace)
            segment = []
    if driver is None and not result.not_judged:
        raise TraceError(
            "this trace has no engine in it", hint="Was the process of the scheduler traced?"
        )
    if driver is not None and segment and result.divergence is None:
        _run(driver, segment, result, trace)
    result.not_judged += trace.problems
    return result


def _run(driver: Replay, segment: list[Record], result: Replayed, trace: Trace) -> None:
    try:
        driver.take(segment)
    except Diverged as difference:
        result.divergence = describe(difference, driver.manager, driver.history, trace)
    except Exception as error:
        # mini asserts on what cannot be: a block freed twice, a hash that nobody has.
        last = segment[-1].number
        difference = Diverged(last, None, ("mini.refused", f"{type(error).__name__}: {error}"))
        result.divergence = describe(difference, driver.manager, driver.history, trace)
    else:
        result.num_consumed += len(segment)
    result.num_compared = driver.num_compared


def _unfollowed(event: EngineConfigured, trace: Trace) -> list[str]:
    """What this engine has that ``mini`` does not follow."""
    said = []
    for group in event.groups:
        if group.kind not in ("FullAttentionSpec", "SlidingWindowSpec"):
            said.append(f"KV group of kind {group.kind}: mini does not follow it")
    if len({group.block_size for group in event.groups}) > 1:
        said.append("KV groups of different block sizes: mini does not follow them")
    if event.settings.get("num_lookahead_tokens"):
        said.append("speculative decoding: mini does not follow it")
    version = str(trace.header.get("vllm", ""))
    try:
        rules_for(version)
    except ValueError as error:
        said.append(str(error))
    return said
