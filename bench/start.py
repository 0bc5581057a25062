"""What ``run hello`` adds to the start of the engine that it runs: both in fresh processes, one after the other."""

from __future__ import annotations

import operator
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

BARE = """
from vllm_trace.runner import run_workload, start_engine, stop_engine
from vllm_trace.scenario import load
scenario = load("hello")
llm, _ = start_engine(scenario)
run_workload(llm, scenario)
stop_engine(llm)
"""
TRACED = [sys.executable, "-m", "vllm_trace", "run", "hello"]


def seconds_of_hello(rounds: int) -> dict[str, float]:
    """Medians of wall and CPU seconds of the engine and its workload bare, and of what ``run hello`` adds.

    The machine may be twice as slow a minute later: each run is compared with the bare one just before it.
    """
    environment = {k: v for k, v in os.environ.items() if k != "VTRACE_DIR"}
    arms = {"bare": [sys.executable, "-c", BARE], "run": TRACED}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory(prefix="vtrace-bench-") as folder:
        for number in range(rounds + 1):
            for name, command in arms.items():
                began, cpu = time.perf_counter(), _cpu_of_children()
                subprocess.run(
                    command, cwd=folder, env=environment, capture_output=True, check=True
                )
                if number:  # the first one warms the disk's cache
                    times[name].append((time.perf_counter() - began, _cpu_of_children() - cpu))
    made = {}
    for index, what in enumerate(("wall", "cpu")):
        bare, run = ([pair[index] for pair in times[arm]] for arm in arms)
        made[f"bare_{what}_s"] = statistics.median(bare)
        made[f"added_{what}_s"] = statistics.median(map(operator.sub, run, bare))
    return made


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
