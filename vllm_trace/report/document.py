"""All that the report shows, as plain values: one reading of the trace for each figure's owner."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm_trace import __version__
from vllm_trace.errors import TraceError
from vllm_trace.events import RequestArrived, StepUpdated
from vllm_trace.invariants import checking
from vllm_trace.render import findings, mapping, short_name
from vllm_trace.replay import MODES, replay
from vllm_trace.report.bodies import MAX_EVENTS, Bodies, exact
from vllm_trace.report.frames import MAX_FRAMES, SPANS, STAGES, Frames
from vllm_trace.report.prefix import PrefixTree
from vllm_trace.report.salvage import Salvaged
from vllm_trace.summary import Summary

if TYPE_CHECKING:
    from vllm_trace.report import Asked

SCHEMA = 1

_HEADER = ("vllm", "torch", "platform", "level", "python", "host", "vllm_trace", "tokens")


def document(trace: Salvaged, asked: Asked) -> tuple[dict[str, Any], list[bytes]]:
    """The figures, and the pages of raw events."""
    summary = Summary.of(trace)
    window = (asked.first_step, asked.last_step)
    frames = Frames(window, light=trace.level == "light")
    bodies = Bodies(tokens=asked.tokens, window=window)
    prefixes = PrefixTree()
    tokens = _Tokens() if asked.tokens else None
    for record in trace.records():
        frames.take(record)
        bodies.take(record)
        prefixes.take(record.number, record.event)
        if tokens is not None:
            tokens.take(record.event)
    frames.close()
    bodies.close()
    problems = trace.problems  # of a reading to the end; the readers below may stop before
    notes = _notes(trace, asked, frames, bodies)
    invariants = _checked(trace, asked)
    replays = _replayed(trace, asked)
    pool = frames.pool
    nodes = prefixes.to_list()
    return {
        "schema": SCHEMA,
        "label": asked.label,
        "made": {
            "by": f"vllm_trace {__version__}",
            "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": asked.command,
        },
        "header": {key: trace.header.get(key) for key in _HEADER},
        "processes": [
            f"{file.header.get('role')}-{file.header.get('pid')}" for file in trace.files
        ],
        "problems": [*problems, *notes],
        "engine": _engine(summary),
        "groups": summary.groups,
        "backends": summary.backends,
        "facts": {k: v for k, v in summary.facts().items() if "." not in k},
        "findings": nested(findings(summary)),
        "num_events": summary.num_events,
        "kernels": [asdict(kernel) for kernel in summary.kernels],
        "names": {str(number): name for number, name in trace.names.items()},
        "requests": [_life(life, prefixes) for life in summary.requests],
        "steps": _steps(summary, frames),
        "frames": frames.to_dict(),
        "spans": SPANS,
        "stages": STAGES,
        "pool": pool.to_dict(),
        "tables": {str(request): changes for request, changes in pool.tables.items()},
        "hashes": [str(one) for one in pool.hashes],
        "prefix": {"block_size": prefixes.block_size, "nodes": nodes},
        "events": bodies.to_dict(),
        "invariants": invariants,
        "replays": replays,
        "replay_verdict": _replay_verdict(replays),
        "tokens": tokens.to_dict() if tokens is not None else None,
    }, bodies.pages


def _notes(trace: Salvaged, asked: Asked, frames: Frames, bodies: Bodies) -> list[str]:
    """What this report leaves out, beside what the trace does."""
    notes = []
    if trace.level == "light":
        notes.append(
            "recorded at level light: steps, requests and free counts, but no block ids, tables,"
            " prefix hits or evictions"
        )
    if not frames.num_steps:
        notes.append("the trace holds no step: nothing was scheduled while it was recorded")
    if frames.num_engines > 1:
        notes.append(
            f"{frames.num_engines} engines were configured: the pool is that of the first one's"
            " process, begun afresh with each of them"
        )
    if frames.num_left_out or bodies.num_left_out:
        if asked.first_step or asked.last_step < 1 << 62:
            why = f"only steps {asked.first_step} to {asked.last_step} were asked for"
            if frames.num_steps == frames.num_left_out:
                why += ", and the trace has none of them"
        else:
            why = f"a report holds up to {MAX_FRAMES} steps and {MAX_EVENTS} events"
        notes.append(
            f"{why}: {frames.num_left_out} of {frames.num_steps} steps and {bodies.num_left_out}"
            " events are left out; totals are of the whole trace"
        )
        if not asked.last_step < 1 << 62:
            notes[-1] += ". Others: report TRACE --step N-M"
    return notes


def nested(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Sentences, each with those that follow it further in."""
    made: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith(" ") and made:
            made[-1][1].append(line.strip())
        else:
            made.append((line, []))
    return made


def _engine(summary: Summary) -> dict[str, Any]:
    made = dict(summary.engine)
    if "model" in made:
        # As in `show`: a name; the folder that it lies in is nobody's business.
        made["model"] = str(made["model"]).rstrip("/").rsplit("/", 1)[-1]
    return made


def _life(life: Any, prefixes: PrefixTree) -> dict[str, Any]:
    return asdict(life) | {
        "short": short_name(life.name),
        "mapping": mapping(life.table),
        "lookups": prefixes.hits.get(life.request, []),
    }


def _steps(summary: Summary, frames: Frames) -> dict[str, list[Any]]:
    """Columns of the summary's steps, one value for each frame."""
    known = {step.step: step for step in summary.steps}
    names = (
        "num_running", "num_waiting", "num_free_blocks", "num_prefill_tokens",
        "num_decode_tokens", "num_joined", "num_left", "num_preempted", "variant",
    )  # fmt: skip
    return {name: [getattr(known[step], name) for step in frames.steps] for name in names}


def _checked(trace: Salvaged, asked: Asked) -> dict[str, Any]:
    if not asked.check:
        return {"verdict": "not judged", "why": "--no-check", "invariants": []}
    try:
        report = checking.check(trace)
    except TraceError as error:
        return {"verdict": "not judged", "why": str(error), "invariants": []}
    return report.to_dict()


def _replayed(trace: Salvaged, asked: Asked) -> list[dict[str, Any]]:
    if not asked.replay:
        return []
    made = []
    for mode in MODES:
        try:
            made.append(exact(replay(trace, mode).to_dict()))
        except Exception as error:
            # A trace that is not whole, or of settings that mini needs and it lacks: the other
            # figures stand, and this one says why it is not there.
            known = isinstance(error, TraceError)
            why = str(error) if known else f"the replay failed: {type(error).__name__}: {error}"
            made.append(
                {
                    "mode": mode, "passed": False, "events": 0, "consumed": 0, "compared": 0,
                    "not_judged": [why], "divergence": None,
                }
            )  # fmt: skip
    return made


def _replay_verdict(replays: list[dict[str, Any]]) -> str:
    if any(one["divergence"] for one in replays):
        return "diverges"
    if replays and all(one["passed"] for one in replays):
        return "identical"
    return "not judged"


class _Tokens:
    """Prompt and output token ids of each request; only when they were asked for."""

    def __init__(self) -> None:
        self.prompts: dict[int, list[int]] = {}
        self.outputs: dict[int, list[int]] = {}
        self._requests: dict[int, list[int]] = {}

    def take(self, event: Any) -> None:
        if type(event) is RequestArrived:
            self.prompts[event.request] = event.token_ids or []
        elif event.kind == "step.scheduled":
            self._requests[event.step] = event.requests or []
        elif type(event) is StepUpdated:
            requests = self._requests.pop(event.step, [])
            for request, ids in zip(requests, event.token_ids or (), strict=False):
                self.outputs.setdefault(request, []).extend(ids)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompts": {str(request): ids for request, ids in self.prompts.items()},
            "outputs": {str(request): ids for request, ids in self.outputs.items()},
        }
