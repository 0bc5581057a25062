"""Imports, and what ``run hello`` adds to the start of the engine that it runs: in fresh processes, one by one."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

BARE = """
from vllm_trace.runner import run_workload, start_engine, stop_engine
from vllm_trace.scenario import load
scenario = load("hello")
llm, _ = start_engine(scenario)
run_workload(llm, scenario)
stop_engine(llm)
"""
TRACED = [sys.executable, "-m", "vllm_trace", "run", "hello"]
IMPORTS = ("vllm_trace", "vllm_trace.cli")

HEADS = ("what", "figure", "quartiles", "target")

HOW = """\
`bare` starts the engine of `hello` and runs its workload, `run hello` does that and traces it, checks what it
showed, prints the summary and writes the report. They take turns, and each `run hello` is compared with the
`bare` just before it: on a shared machine one of them may take a third longer a minute later. Medians.
"""


@dataclass(frozen=True)
class Seconds:
    """Of one process, to its end."""

    wall: float
    cpu: float


def seconds_of_hello(rounds: int) -> list[dict[str, float]]:
    """Of each round: wall and CPU seconds of the engine and its workload bare, and through ``run hello``."""
    environment = {k: v for k, v in os.environ.items() if k != "VTRACE_DIR"}
    found = []
    with tempfile.TemporaryDirectory(prefix="vtrace-bench-") as folder:
        for number in range(rounds + 1):
            bare = _seconds([sys.executable, "-c", BARE], folder, environment)
            run = _seconds(TRACED, folder, environment)
            if number:  # the first one warms the disk's cache
                found.append(
                    {
                        "bare_wall_s": bare.wall,
                        "bare_cpu_s": bare.cpu,
                        "added_wall_s": run.wall - bare.wall,
                        "added_cpu_s": run.cpu - bare.cpu,
                    }
                )
    return found


def _seconds(command: list[str], folder: str, environment: dict[str, str]) -> Seconds:
    began, used = time.perf_counter(), _cpu_of_children()
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
    return Seconds(time.perf_counter() - began, _cpu_of_children() - used)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """(what, figure, quartiles, target)."""
    made: list[tuple[str, ...]] = []
    for name, seconds in figures["imports_s"].items():
        figure = "not there" if seconds is None else f"{seconds:.3f} s"
        made.append((f"import {name}", figure, "", "≤ 0.15 s"))
    for key, what, target in (
        ("bare_wall_s", "hello, bare", ""),
        ("added_wall_s", "run hello adds", "≤ 1 s"),
        ("added_cpu_s", "of CPU time", ""),
    ):
        values = [found[key] for found in figures["hello"]]
        low, middle, high = statistics.quantiles(values, n=4)
        sign = "+" if key.startswith("added") else ""
        made.append(
            (what, f"{middle:{sign}.2f} s", f"{low:{sign}.2f} … {high:{sign}.2f} s", target)
        )
    return made
