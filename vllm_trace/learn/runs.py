"""The trace that a step looks at: made on this machine, remembered, or else a shipped one.

A run is the scenario with the reader's seed, in a process of its own, so that an engine that
fails takes nothing with it. Without vLLM a golden trace stands in, and everything says so.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from vllm_trace.errors import EngineError, TraceError
from vllm_trace.learn.progress import Progress
from vllm_trace.trace import Trace, read_trace

LIMIT_S = 120
"""After this long a run is stopped; it takes about ten seconds."""


@dataclass(frozen=True)
class Evidence:
    """A trace and where it is from."""

    scenario: str
    path: Path
    own: bool
    """The reader's and not a shipped one."""
    given: bool = False
    """Named on the command line."""

    def open(self) -> Trace:
        return read_trace(self.path)

    @property
    def said(self) -> str:
        """In a sentence, without an address on this machine."""
        if self.given:
            return f"the trace {self.scenario!r} that you named"
        if self.own:
            return f"your own run of {self.scenario!r}"
        return f"the shipped trace of {self.scenario!r}, not your own"


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def trace_of(progress: Progress, scenario: str) -> Evidence:
    """The reader's latest trace of a scenario when it can be read, else the shipped one."""
    kept = progress.runs.get(scenario)
    if kept:
        try:
            read_trace(Path(kept))
            return Evidence(scenario, Path(kept), own=True)
        except TraceError:
            del progress.runs[scenario]
            progress.save()
    return Evidence(scenario, shipped(scenario), own=False)


def shipped(scenario: str) -> Path:
    """The golden trace of a scenario, which comes with the package."""
    return Path(str(resources.files("vllm_trace.gold") / f"{scenario}.vtrace"))


def run(progress: Progress, scenario: str) -> tuple[Evidence, float, str]:
    """Run a scenario with the reader's seed. Returns the trace, seconds, and what run said.

    Raises: ``EngineError`` when there is no vLLM or it did not work.
    """
    if not has_vllm():
        raise EngineError(
            "there is no vLLM here to run", hint="The step works from a shipped trace without it"
        )
    kept = progress.path.parent / "runs" / scenario
    fresh = kept.with_name(f".{scenario}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    given = seeded(scenario, progress.seed)
    (fresh / f"{scenario}.toml").write_text(given, encoding="utf-8")
    command = [sys.executable, "-m", "vllm_trace", "run", f"{scenario}.toml", "-o", "run"]
    command += arguments_for(scenario)
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=fresh, capture_output=True, text=True, timeout=LIMIT_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise EngineError(f"the run took more than {LIMIT_S} s and was stopped") from None
    if done.returncode not in (0, 1) or not (fresh / "run" / "trace").is_dir():
        raise EngineError(f"the run did not work:\n{done.stderr.strip()}")
    shutil.rmtree(kept, ignore_errors=True)
    fresh.rename(kept)
    progress.runs[scenario] = str(kept / "run")
    progress.save()
    return trace_of(progress, scenario), time.monotonic() - began, done.stdout


PAGED = ("long",)
"""Scenarios of steps that are about PagedAttention's own kernels."""


def arguments_for(scenario: str) -> list[str]:
    """With a backend of our own the engine decodes by PagedAttention's kernels, and records their choice."""
    there = importlib.util.find_spec("vllm_trace.backend") is not None
    return ["--attention", "paged"] if there and scenario in PAGED else []


def seeded(scenario: str, seed: int) -> str:
    """The scenario's file with another seed: other prompts, and other lengths where they are drawn."""
    text = (resources.files("vllm_trace.scenarios") / f"{scenario}.toml").read_text("utf-8")
    if re.search(r"^seed = ", text, re.M):
        return re.sub(r"^seed = \d+", f"seed = {seed}", text, count=1, flags=re.M)
    return re.sub(r"^\[engine\]", f"seed = {seed}\n\n[engine]", text, count=1, flags=re.M)
