"""``show --follow``: the engine as it is now, from the trace that it is writing.

Each look reads what is new and keeps no more than the screen needs: the pool, the requests that
run, the last steps. Leaves out: comparing workers with the manager; ``show`` does that at the end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.text import Text

from vllm_trace import render
from vllm_trace.events import (
    EngineConfigured,
    Event,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    SlotsAllocated,
    StepExecuted,
    StepSampled,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.growing import GrowingFile, GrowingTrace
from vllm_trace.show import CACHED, FREE, SHARED, column_of, legend, span_of, style_of
from vllm_trace.state import KVState, computes_prompt
from vllm_trace.summary import RequestLife, Step

WINDOW = 5.0
"""Seconds that rates are taken over."""

LONGEST_PAUSE = 2.0
"""Seconds between two looks, however long the last one took."""

KEPT_STEPS = 64
"""Steps that are remembered, for what workers tell of them later."""

_LEVELS = " ▁▂▃▄▅▆▇█"


@dataclass
class Engine:
    """One scheduler's process: its pool, its requests, its last steps."""

    light: bool = False
    state: KVState = field(default_factory=KVState)
    lives: dict[int, RequestLife] = field(default_factory=dict)
    """Requests that have not finished."""
    steps: dict[int, Step] = field(default_factory=dict)
    num_steps: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    rate: deque[tuple[int, int]] = field(default_factory=deque)
    """(when a step began in ns, tokens it gave) of the last seconds."""
    used: deque[float] = field(default_factory=lambda: deque(maxlen=30))
    """Share of the pool that was in use, at each look."""
    news: float = 0.0
    """When something was last read, by our clock."""
    _preempted: int = 0
    _left: int = 0
    _ran: dict[int, list[int]] = field(default_factory=dict)
    """Who was scheduled in the steps whose results are not in yet."""

    def take(self, event: Event) -> None:
        """Take in one event of this process."""
        self.state.apply(event)
        kind = type(event)
        if kind is StepScheduled:
            self._scheduled(event)  # type: ignore[arg-type]
        elif kind is StepUpdated:
            self._updated(event)  # type: ignore[arg-type]
        elif kind is EngineConfigured:
            self.lives.clear()
            self.steps.clear()
            self._ran.clear()
        elif kind is RequestArrived:
            self._arrived(event)  # type: ignore[arg-type]
        elif kind is RequestFinished:
            self.num_finished += 1
            self._left += 1
            self.lives.pop(event.request, None)  # type: ignore[attr-defined]
        elif kind is RequestPreempted:
            self.num_preemptions += 1
            self._preempted += 1
            self._life(event.request).num_preemptions += 1  # type: ignore[attr-defined]
        elif kind is SlotsAllocated and event.num_hit_tokens:  # type: ignore[attr-defined]
            self._life(event.request).num_hit_tokens = event.num_hit_tokens  # type: ignore[attr-defined]

    def worked(self, event: Event) -> None:
        """What a worker tells of a step, from whichever process."""
        step = self.steps.get(event.step)  # type: ignore[attr-defined]
        if step is None:
            return
        if type(event) is StepExecuted:
            step.forward_ns = max(step.forward_ns, event.forward_dur_ns)
        elif type(event) is StepSampled:
            step.sample_ns = max(step.sample_ns, event.dur_ns)

    def _life(self, request: int) -> RequestLife:
        return self.lives.setdefault(request, RequestLife(request, f"#{request}"))

    def _arrived(self, event: RequestArrived) -> None:
        self.lives[event.request] = RequestLife(
            event.request, event.request_id, event.at_ns, num_prompt_tokens=event.num_prompt_tokens
        )

    def _scheduled(self, event: StepScheduled) -> None:
        step = Step(
            event.step, event.started_ns, event.dur_ns,
            num_requests=len(event.requests or ()), num_running=event.num_running,
            num_waiting=event.num_waiting, num_free_blocks=event.num_free_blocks,
            num_joined=len(event.new) + len(event.resumed), num_preempted=self._preempted,
        )  # fmt: skip
        self._preempted = 0
        for request, count in zip(event.requests or (), event.num_tokens or (), strict=True):
            life = self._life(request)
            life.num_steps += 1
            before = None if self.light else self.state.computed.get(request, count) - count
            if computes_prompt(event, request, count, before, life.num_prompt_tokens):
                step.num_prefill_tokens += count
            else:
                step.num_decode_tokens += count
        self._ran[event.step] = event.requests or []
        self.steps[event.step] = step
        if len(self.steps) > KEPT_STEPS:
            oldest = min(self.steps)
            del self.steps[oldest]
            self._ran.pop(oldest, None)
        self.num_steps += 1

    def _updated(self, event: StepUpdated) -> None:
        step = self.steps.get(event.step)
        if step is None:
            return
        step.postprocess_ns, step.num_left, self._left = event.dur_ns, self._left, 0
        given = event.num_output_tokens
        for request, count in zip(self._ran.pop(event.step, ()), given or (), strict=False):
            if request in self.lives:
                self.lives[request].num_output_tokens += count
        made = step.num_requests if given is None else sum(given)
        self.rate.append((step.started_ns, made))
        while self.rate and self.rate[0][0] < step.started_ns - WINDOW * 1e9:
            self.rate.popleft()

    # Figures ----------------------------------------------------------------------------

    @property
    def step(self) -> Step | None:
        return self.steps[max(self.steps)] if self.steps else None

    @property
    def num_running(self) -> int:
        if not self.light:
            return sum(request in self.state.tables for request in self.lives)
        return min(len(self.lives), self.step.num_running) if self.step else 0

    @property
    def num_waiting(self) -> int:
        return len(self.lives) - self.num_running

    @property
    def num_blocks(self) -> int:
        """Of the pool, without the null block."""
        return self.state.config.num_blocks - 1 if self.state.config else 0

    @property
    def num_free_blocks(self) -> int:
        free = self.state.num_free_blocks
        if not self.light and self.state.config:
            # What the last step's results gave back stands in no event's count yet.
            return self.num_blocks - len(self.state.ref_cnts)
        return self.num_blocks if free is None else free

    def rates(self, idle: float) -> tuple[float, float]:
        """Steps and tokens a second; 0 when nothing has come for a while."""
        if idle > 2 or len(self.rate) < 2:
            return 0.0, 0.0
        seconds = (self.rate[-1][0] - self.rate[0][0]) / 1e9
        if not seconds:
            return 0.0, 0.0
        steps = len(self.rate) - 1
        return steps / seconds, sum(tokens for _, tokens in list(self.rate)[1:]) / seconds

    def owners(self) -> list[int]:
        """For each block its owner's number, or ``show``'s ``CACHED``, ``FREE``, ``SHARED``."""
        column = column_of(self.state, 0)
        for block in column.shared:
            column.owners[block] = SHARED
        return column.owners


class Follower:
    """A growing trace and what is known of it."""

    def __init__(self, path: Path) -> None:
        self.trace = GrowingTrace(path)
        self.engines: dict[GrowingFile, Engine] = {}
        self.num_events = 0

    def look(self, now: float | None = None) -> None:
        """Read what is new."""
        worked: list[Event] = []
        fresh: dict[int, Engine] = {}
        for file, events in self.trace.new_batches():
            self.num_events += len(events)
            for event in events:
                if type(event) is StepExecuted or type(event) is StepSampled:
                    worked.append(event)
                    continue
                engine = self._engine(file, event)
                if engine is not None:
                    engine.take(event)
                    fresh[id(engine)] = engine
        # By the end of the reading, which may take longer than an engine that is idle is waited for.
        for engine in fresh.values():
            engine.news = time.monotonic() if now is None else now
        for file in [file for file in self.engines if file not in self.trace.files]:
            del self.engines[file]
        # Of several engines it is not known whose step a worker tells of: each counts from 1.
        if len(self.engines) == 1:
            (engine,) = self.engines.values()
            for event in worked:
                engine.worked(event)
        for engine in self.engines.values():
            total = engine.num_blocks
            engine.used.append((total - engine.num_free_blocks) / total if total else 0.0)

    def _engine(self, file: GrowingFile, event: Event) -> Engine | None:
        """The engine of that file; one that has none yet gets it with its first scheduler event."""
        engine = self.engines.get(file)
        if engine is None and type(event) in (EngineConfigured, RequestArrived, StepScheduled):
            engine = self.engines[file] = Engine(light=file.header.get("level") == "light")
        return engine

    def to_dict(self, now: float | None = None) -> dict[str, Any]:
        """The figures of this look as plain values: a line of ``--follow --json``."""
        now = time.monotonic() if now is None else now
        told = []
        for file, engine in self.engines.items():
            steps, tokens = engine.rates(now - engine.news)
            told.append(
                {
                    "process": file.path.stem,
                    "step": engine.step.step if engine.step else 0,
                    "steps_per_s": round(steps, 2),
                    "tokens_per_s": round(tokens, 2),
                    "running": engine.num_running,
                    "waiting": engine.num_waiting,
                    "finished": engine.num_finished,
                    "preemptions": engine.num_preemptions,
                    "free_blocks": engine.num_free_blocks,
                    "blocks": engine.num_blocks,
                    "owners": None if engine.light else engine.owners(),
                }
            )
        return {
            "schema": 1, "events": self.num_events, "engines": told, "problem": self.trace.problem,
            "ended": self.trace.ended,
        }  # fmt: skip


def follow(
    path: Path,
    console: Console,
    *,
    seconds: float = 0,
    every: float = 0.5,
    only_map: bool = False,
) -> None:
    """Show the end of a growing trace until Ctrl-C, or for so many seconds."""
    follower = Follower(path)
    with Screen(console=console, auto_refresh=False) as screen:
        for _ in _looks(follower, seconds, every):
            screen.update(view(follower, console.width, console.height, only_map), refresh=True)


def follow_json(
    path: Path, tell: Callable[[dict[str, Any]], None], *, seconds: float = 0, every: float = 0.5
) -> None:
    """The same as plain values, one document a look."""
    follower = Follower(path)
    for _ in _looks(follower, seconds, every):
        tell(follower.to_dict())


def _looks(follower: Follower, seconds: float, every: float) -> Iterator[None]:
    """One look after the other until Ctrl-C or until the time is up, and then a last one."""
    end = time.monotonic() + seconds if seconds else float("inf")
    try:
        while time.monotonic() < end:
            began = time.monotonic()
            follower.look()
            yield
            # No more than a fifth of a core goes into it; but the next look must not have more to read each time.
            pause = max(every, min(4 * (time.monotonic() - began), LONGEST_PAUSE))
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
    except KeyboardInterrupt:
        pass
    follower.look()
    yield


def view(follower: Follower, width: int, height: int, only_map: bool = False) -> RenderableType:
    """What one look shows, for a screen of that size."""
    problem = follower.trace.problem
    if not follower.engines:
        return Text(f"waiting: {problem or 'no engine has begun yet'}")
    now = time.monotonic()
    parts: list[RenderableType] = []
    room = max(10, height - 2) // len(follower.engines)
    for file, engine in follower.engines.items():
        if len(follower.engines) > 1:
            parts.append(Text(file.path.stem, style="bold"))
        parts += _engine_view(engine, now - engine.news, width, room, only_map)
    if problem:
        parts.append(Text(problem, style="yellow"))
    dropped = sum(file.dropped for file in follower.trace.files)
    if dropped:
        parts.append(Text(f"{dropped} events were dropped", style="yellow"))
    if follower.trace.ended:
        parts.append(Text("every process has ended", style="dim"))
    return Group(*parts)


def _engine_view(
    engine: Engine, idle: float, width: int, room: int, only_map: bool
) -> list[RenderableType]:
    step = engine.step
    steps_per_s, tokens_per_s = engine.rates(idle)
    words = [f"step {step.step if step else 0}"]
    if steps_per_s:
        words += [f"{steps_per_s:.1f} steps/s", f"{tokens_per_s:.0f} tokens/s"]
    elif step:
        words.append(f"idle for {idle:.0f} s" if idle > 2 else "…")
    words += [f"{engine.num_running} running", f"{engine.num_waiting} waiting"]
    if engine.num_preemptions:
        words.append(f"{engine.num_preemptions} preempted")
    total, free = engine.num_blocks, engine.num_free_blocks
    share = (total - free) / total if total else 0
    bar = "█" * round(24 * share)
    graph = "".join(_LEVELS[round(share * 8)] for share in engine.used)
    lines: list[RenderableType] = [
        Text("  ".join(words), style="bold"),
        Text.assemble(
            f"blocks [{bar:<24}] {free} of {total} free  ",
            (graph[-max(0, width - 60) :], "cyan"),
        ),
    ]
    if engine.light:
        lines.append(Text("level light: which blocks are held is not recorded", style="dim"))
    elif total:
        lines += _pool(engine, width, room - 4 if only_map else max(2, (room - 8) // 3))
    if not only_map:
        used = len(lines) + 2
        rest = max(4, room - used - 4)
        recent = [engine.steps[number] for number in sorted(engine.steps)][-max(2, rest // 2) :]
        lines += [Text(), render.steps(recent, len(recent))]
        running = [life for life in engine.lives.values() if life.num_steps]
        for life in running:
            life.table = engine.state.tables.get(life.request, [])
        if running:
            shown = running[-max(2, rest - rest // 2) :]
            lines.append(render.requests(shown, len(shown)))
    return lines


def _pool(engine: Engine, width: int, rows: int) -> list[RenderableType]:
    """The pool now: a character for each block, or for several of a large one."""
    owners = engine.owners()
    columns = min(64, max(16, width - 10))
    each = max(1, -(-(len(owners) - 1) // (columns * max(1, rows))))
    lines: list[RenderableType] = []
    if each > 1:
        lines.append(Text(f"a character is {each} blocks and shows what most of them are", "dim"))
    per_line = columns * each
    for first in range(1, len(owners), per_line):
        last = min(len(owners) - 1, first + per_line - 1)
        line = Text(f"{span_of(first, last):>11} ", style="dim")
        for place in range(first, last + 1, each):
            some = owners[place : min(place + each, last + 1)]
            line.append(*style_of(max(set(some), key=some.count)))
        lines.append(line)
    held = list(dict.fromkeys(owner for owner in owners if owner not in (FREE, CACHED)))
    names = {number: life.name for number, life in engine.lives.items()}
    lines.append(legend(names, sorted(owner for owner in held if owner >= 0), limit=8))
    return lines
