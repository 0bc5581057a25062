"""Shared by tests of whole runs: traces made by hand, engines run in this process, commands."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_trace import hooks, runner, scenario
from vllm_trace.events import SCHEMA_VERSION, EngineConfigured, Event, KVGroup
from vllm_trace.options import Options
from vllm_trace.tracefile import SUFFIX
from vllm_trace.tracewriter import TraceWriter

# Traces by hand ---------------------------------------------------------------------------


def write_trace(
    folder: Path, role: str, pid: int, batches: Sequence[Sequence[Event]], **header: Any
) -> Path:
    """The file of one process with these batches; ``header`` comes over the usual one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{role}-{pid}{SUFFIX}"
    usual = {"schema": SCHEMA_VERSION, "role": role, "pid": pid, "host": "here", "level": "full"}
    writer = TraceWriter(path, usual | header)
    for batch in batches:
        writer.write(list(batch))
    writer.close({"dropped": 0, "failures": {}})
    return path


def configured(num_blocks: int = 9, block_size: int = 32, **settings: Any) -> EngineConfigured:
    usual = {
        "model": "tiny",
        "dtype": "float32",
        "enable_prefix_caching": True,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "policy": "fcfs",
        "async_scheduling": False,
    }
    groups = [KVGroup("FullAttentionSpec", block_size, ["layers.0"])]
    return EngineConfigured(1, block_size, block_size, num_blocks, groups, usual | settings)


# Commands ---------------------------------------------------------------------------------


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "vllm_trace", *map(str, arguments)]


def run_cli(
    *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """``python -m vllm_trace …`` as a user starts it."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=os.environ | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# Engines in this process ------------------------------------------------------------------


@dataclass
class StepSeen:
    """One step as the scheduler object itself had it when ``schedule`` returned."""

    computed: dict[str, int]
    """Tokens of each scheduled request that were computed before."""
    tokens: dict[str, int]
    tables: dict[str, list[list[int]]]
    """Of all requests that hold blocks."""

    @property
    def composition(self) -> list[tuple[str, int]]:
        return list(self.tokens.items())


@dataclass
class Ran:
    """A scenario that was run."""

    outcome: runner.Outcome
    steps: list[StepSeen] = field(default_factory=list)
    """Those in which something was scheduled."""
    folder: Path | None = None
    """Of its trace."""


def watch(llm: Any, steps: list[StepSeen]) -> None:
    """Note every step of an engine, by an attribute of its scheduler: no hook of ours is involved."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    original = type(scheduler).schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        out = original(scheduler, *args, **kwargs)
        cached = out.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in out.scheduled_new_reqs}
        manager = scheduler.kv_cache_manager
        held = [request.request_id for request in scheduler.running]
        if out.num_scheduled_tokens:
            steps.append(
                StepSeen(
                    computed,
                    dict(out.num_scheduled_tokens),
                    {name: [list(ids) for ids in manager.get_block_ids(name)] for name in held},
                )
            )
        return out

    scheduler.schedule = schedule


@contextlib.contextmanager
def tracing(folder: Path | str, level: str = "full", *, tokens: bool = False) -> Iterator[None]:
    """Engines made inside are traced, as by ``vllm_trace run``."""
    before = dict(os.environ)
    os.environ |= Options(dir=str(folder), level=level, tokens=tokens).to_environment()
    try:
        yield
    finally:
        hooks.detach()
        for name in [name for name in os.environ if name.startswith("VTRACE_")]:
            if name not in before:
                del os.environ[name]


_folders: list[TemporaryDirectory[str]] = []
"""Of the traces that ``ran`` keeps; they go away with this process."""

MODES = ("off", "light", "full", "undone")


@cache
def ran(name: str, mode: str) -> Ran:
    """The scenario run in this process, once: untraced, at a level, or on an engine that was made
    with tracing on and had it undone before its first request."""
    chosen = scenario.load(name)
    made = Ran(runner.Outcome())
    if mode == "off":
        llm, _ = runner.start_engine(chosen)
        _work(llm, chosen, made)
        return made
    _folders.append(TemporaryDirectory(prefix=f"vllm-trace-{name}-"))
    made.folder = Path(_folders[-1].name)
    with tracing(made.folder, "full" if mode == "undone" else mode, tokens=True):
        llm, _ = runner.start_engine(chosen)
        if mode == "undone":
            assert hooks.detach() == []
        _work(llm, chosen, made)
    return made


def _work(llm: Any, chosen: scenario.Scenario, made: Ran) -> None:
    watch(llm, made.steps)
    made.outcome = runner.run_workload(llm, chosen)
    runner.stop_engine(llm)
