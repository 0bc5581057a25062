"""Replays a trace's inputs through ``mini`` and compares every decision with the recorded one.

Two replays of the same trace:

*manager*  the recorded calls of the KV-cache manager, in their order, drive ``mini``'s manager:
           every hit, table, block id, eviction, reference count and free count is compared, and
           the tables and slots that the workers' kernels received.
*engine*   only arrivals, aborts and token outcomes drive ``mini``'s own scheduler, which has to
           come to the same steps, preemptions and blocks by itself.

The events are taken in segments (``segments.py``): ``mini`` tells what it does in the same words, and
both lists must be equal, call by call.

Not compared is what ``mini`` has no counterpart of: times, names, sampling parameters, the workers' own clocks; and
``num_wanted_blocks`` of a refusal where the probe did not know vLLM's way of counting and wrote 0.

A replay that could not consume every event is not a pass, and says what it did not judge.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from vllm_trace.divergence import Divergence
from vllm_trace.errors import TraceError
from vllm_trace.events import BackendSelected, EngineConfigured, StepExecuted
from vllm_trace.mini.rules import KNOWN_RELEASES, rules_for
from vllm_trace.mini.scheduler import POLICIES
from vllm_trace.replay.base import Diverged, Replay
from vllm_trace.replay.describe import describe
from vllm_trace.replay.engine import EngineReplay
from vllm_trace.replay.engines import Engines
from vllm_trace.replay.manager import ManagerReplay
from vllm_trace.replay.segments import COMPARED_OF_WORKERS, ENDS, OF_WORKERS, Segment, segments
from vllm_trace.trace import Trace
from vllm_trace.tracefile import TraceFile

DRIVERS: dict[str, type[Replay]] = {"manager": ManagerReplay, "engine": EngineReplay}
MODES = tuple(DRIVERS)
STRETCH = 256
"""Events that are compared at once; as many as there are in a few steps."""


@dataclass
class Replayed:
    """What one replay found."""

    mode: str
    release: str = ""
    """Whose rules ``mini`` followed."""
    num_events: int = 0
    num_consumed: int = 0
    num_compared: int = 0
    """Facts that stood on both sides and were equal."""
    num_silent: int = 0
    """Calls of ``allocate_slots`` that took no block and that the trace only counts: replayed too, and no events."""
    divergence: Divergence | None = None
    not_judged: list[str] = field(default_factory=list)
    explained: bool = True
    """A divergence is described with all that led to it; otherwise only its place is."""

    @property
    def passed(self) -> bool:
        complete = self.num_consumed == self.num_events and self.num_events > 0
        return self.divergence is None and complete and not self.not_judged

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "release": self.release,
            "passed": self.passed,
            "events": self.num_events,
            "consumed": self.num_consumed,
            "compared": self.num_compared,
            "silent_calls": self.num_silent,
            "not_judged": self.not_judged,
            "divergence": self.divergence.to_dict() if self.divergence else None,
        }


def replay(trace: Trace, mode: str, release: str = "") -> Replayed:
    """Replay a trace in one mode, by the rules of the release that it was recorded with, or of another one.

    Raises: ``TraceError`` when the trace has no engine in it.
    """
    result = _replay(trace, mode, release, STRETCH)
    if result.divergence:
        # Step by step, so that mini stands still where it differs, and can be looked at.
        result = _replay(trace, mode, release, 1)
    if result.divergence and not release:
        _try_other_rules(result, trace)
    return result


def _replay(trace: Trace, mode: str, release: str, stretch: int) -> Replayed:
    """``stretch``: about how many events are compared at once, in whole steps."""
    result = Replayed(mode, release or str(trace.header.get("vllm", "")))
    result.explained = not release and stretch == 1
    if trace.level == "light":
        result.not_judged.append(
            "level light: blocks and lookups were not recorded, so nothing can be compared"
        )
    engines = Engines()
    drivers = engines.drivers
    for segment in segments(trace, stretch):
        _, process, events, kinds = segment
        result.num_events += len(events)
        if result.not_judged or result.divergence:
            result.num_consumed += type(events[0]) is BackendSelected
        elif process in drivers and kinds[-1] in ENDS:
            _run(drivers[process], segment, result, trace, engines)
        else:
            _take_apart(segment, result, trace, engines)
    result.num_compared = sum(driver.num_compared for driver in engines.begun)
    result.num_silent = sum(driver.num_silent for driver in engines.begun)
    if not engines and not result.not_judged:
        problems = trace.problems
        raise TraceError(
            "this trace has no engine in it" + (f": {problems[0]}" if problems else ""),
            hint="Was the process of the scheduler traced, and from its start?",
        )
    result.not_judged += _missing_workers(trace, engines.all)
    result.not_judged += trace.problems
    return result


def _try_other_rules(result: Replayed, trace: Trace) -> None:
    """Whether the engine did what another release does: then it is not the one that the trace says it is."""
    found, own = result.divergence, rules_for(result.release)
    assert found is not None
    furthest, tried = found.event, [own]
    for release in KNOWN_RELEASES:
        rules = rules_for(release)
        if any(replace(rules, release="") == replace(other, release="") for other in tried):
            continue
        tried.append(rules)
        again = replay(trace, result.mode, release)
        reached = again.divergence.event if again.divergence else again.num_events + 1
        if reached > furthest:
            furthest = reached
            to = f"up to event {reached}" if again.divergence else "to the end"
            found.kind = "configuration"
            found.note = f"recorded with vLLM {result.release}, but by the rules of {release} both sides agree {to}"


def _take_apart(segment: Segment, result: Replayed, trace: Trace, engines: Engines) -> None:
    """A segment that is not a schedule or an answer of an engine that is known."""
    event: Any = segment.events[0]
    kind = type(event)
    if kind is EngineConfigured:
        driver = DRIVERS[result.mode]
        result.not_judged += _unfollowed(event, result.release, driver)
        if not result.not_judged:
            engines.begin(segment.process, driver(event, result.release))
            result.num_consumed += 1
    elif kind is BackendSelected:
        # Chosen before there is an engine; kept for people, not compared.
        result.num_consumed += 1
    elif engines and not _is_torn(segment, trace):
        found = engines.of(segment)
        if found is not None:
            _run(found, segment, result, trace, engines)
        elif kind in OF_WORKERS and kind not in COMPARED_OF_WORKERS:
            # An idle rank keeps in step with the others.
            result.num_consumed += len(segment.events)


def _is_torn(segment: Segment, trace: Trace) -> bool:
    """The last calls of a process whose file ends within them: what they came to is not known."""
    last = type(segment.events[-1])
    of_a_worker = len(segment.events) == 1 and last in OF_WORKERS
    return last not in ENDS and not of_a_worker and bool(trace.files[segment.process].truncated)


def _run(
    driver: Replay, segment: Segment, result: Replayed, trace: Trace, engines: Engines
) -> None:
    try:
        driver.take(segment)
        result.num_consumed += len(segment.events)
        return
    except Diverged as found:
        difference = found
    except Exception as error:
        # mini asserts on what cannot be: a block freed twice, a hash that nobody has.
        difference = Diverged(None, ("mini.refused", f"{type(error).__name__}: {error}"))
        difference.number = segment.numbers[driver.place]
    if not result.explained:
        result.divergence = Divergence(difference.number, "", "", "")
        return
    last = segment.numbers[driver.place]
    whole_steps = result.mode == "engine"
    result.divergence = describe(difference, driver, trace, segment.process, last, whole_steps)
    result.not_judged += engines.confused(segment)


def _missing_workers(trace: Trace, drivers: list[Replay]) -> list[str]:
    """Engines with workers in processes of their own, of which not all were traced."""
    roles = [file.header.get("role") for file in trace.files]
    if "engine" not in roles:
        return []
    wanted = sum(
        (each.settings.get("tensor_parallel_size") or 1)
        * (each.settings.get("pipeline_parallel_size") or 1)
        for each in drivers
    )
    traced = roles.count("worker")
    if traced < wanted:
        traced += sum(
            role == "engine" and _runs_a_model(file) for role, file in zip(roles, trace.files)
        )
    if traced >= wanted:
        return []
    return [
        f"{traced} of {wanted} worker processes are in the trace: the tables and slots"
        " of the others' kernels were not compared"
    ]


def _runs_a_model(file: TraceFile) -> bool:
    """Whether EngineCore is its own worker, as on a single CUDA device."""
    return any(type(event) is StepExecuted for event in file.events())


def _unfollowed(event: EngineConfigured, release: str, driver: type[Replay]) -> list[str]:
    """What this engine has that ``mini`` does not follow, or what is not said of it."""
    said = []
    unsaid = [name for name in driver.needs if name not in event.settings]
    if unsaid:
        said.append(
            f"engine.configured does not say {', '.join(unsaid)}: mini cannot be set up like this engine"
        )
    if event.settings.get("policy", "fcfs") not in POLICIES:
        said.append(f"scheduling policy {event.settings['policy']!r}: mini does not follow it")
    for group in event.groups:
        if group.kind not in ("FullAttentionSpec", "SlidingWindowSpec"):
            said.append(f"KV group of kind {group.kind}: mini does not follow it")
    if len({group.block_size for group in event.groups}) > 1:
        said.append("KV groups of different block sizes: mini does not follow them")
    if event.settings.get("num_lookahead_tokens"):
        said.append("speculative decoding: mini does not follow it")
    try:
        rules_for(release)
    except ValueError as error:
        said.append(str(error))
    return said
