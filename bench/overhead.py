"""Added CPU per step: the arms take turns within one filling of the engine, each compared with its neighbour ``off``.

A machine's speed drifts by more in a minute than tracing costs, and a neighbour on the host by more in a second;
windows of steps that follow each other on the same requests share both. Where a process happens to lie in memory is
worth up to 1 % of a step, for better or worse, so the rounds are spread over several processes:
``python -m bench.overhead ROUNDS SEED FILE`` is one.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench.arms import ARMS
from bench.engine import Engine, settle_heap

WARM_UP = 120
"""Steps before the timed ones: a changed class makes CPython forget its inline caches."""

STEPS = 140
"""Timed steps. As many windows as there are quick arms fit into one filling."""

PROCESSES = 6
SLOW = ("OpenTelemetry spans", "cProfile", "VizTracer")
"""Arms whose effect is far above the noise: one round in each process tells enough."""


@dataclass(frozen=True)
class Overhead:
    """One arm. Ratios are to ``off`` of the same round."""

    arm: str
    rounds: int
    step_us: float
    added_us: float
    ratio: float
    ratio_low: float
    """Quartiles over the rounds."""
    ratio_high: float
    ratio_error: float
    """Standard error of the median, from the quartiles."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Times = dict[str, list[tuple[float, float]]]
"""Of each arm, for each of its rounds: its own time of a step and that of ``off``."""


def measure(rounds: int, tell: Callable[[str], None] = lambda text: None) -> list[Overhead]:
    """Run every arm about ``rounds`` times, spread over ``PROCESSES``."""
    times: Times = {arm: [] for arm in ARMS}
    each = -(-rounds // PROCESSES)
    for number in range(PROCESSES):
        tell(f"engine {number + 1} of {PROCESSES}, {each} rounds")
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            command = [sys.executable, "-m", "bench.overhead", str(each), str(number), out.name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
            for arm, pairs in json.load(out).items():
                times[arm] += map(tuple, pairs)
    return [_summary(arm, pairs) for arm, pairs in times.items()]


def measure_here(rounds: int, seed: int) -> Times:
    """The rounds of one process. The slow arms have a filling of their own in the first."""
    engine, rng = Engine(), random.Random(seed)
    times: Times = {arm: [] for arm in ARMS}
    quick = [arm for arm in ARMS if arm not in SLOW]
    for number in range(rounds):
        take_turns(engine, rng.sample(quick, len(quick)), times, median_us)
        if number == 0:
            found: Times = {arm: [] for arm in ("off", *SLOW)}
            take_turns(engine, rng.sample([*found], len(found)), found, mean_us)
            for arm in SLOW:
                times[arm] += found[arm]
    engine.empty()
    return times


def take_turns(
    engine: Engine, arms: list[str], times: Times, time_of: Callable[[Engine, str], float]
) -> None:
    """One window of each arm on the same requests, added to ``times`` with that of ``off``."""
    engine.fill()
    settle_heap()
    taken = {arm: time_of(engine, arm) for arm in arms}
    engine.assert_full()
    for arm, us in taken.items():
        times[arm].append((us, taken["off"]))


def median_us(engine: Engine, arm: str) -> float:
    """A step in microseconds: the median of the window, and its share of what the arm had put off.

    The engine's process has one thread in these arms; a neighbour that takes the core for a while moves no median.
    """
    step, clock = engine.step, time.perf_counter_ns
    with ARMS[arm]() as settle:
        for _ in range(WARM_UP):
            step()
        taken = []
        for _ in range(STEPS):
            began = clock()
            step()
            taken.append(clock() - began)
        began = clock()
        settle()
        put_off = (clock() - began) / (WARM_UP + STEPS)
        return (statistics.median(taken) + put_off) / 1000


def mean_us(engine: Engine, arm: str) -> float:
    """The same as CPU time of all threads, for arms that have some."""
    step = engine.step
    with ARMS[arm]() as settle:
        for _ in range(WARM_UP):
            step()
        settle()
        began = time.process_time_ns()
        for _ in range(STEPS):
            step()
        settle()
        return (time.process_time_ns() - began) / STEPS / 1000


def _summary(arm: str, pairs: list[tuple[float, float]]) -> Overhead:
    ratios = [us / off for us, off in pairs]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Overhead(
        arm=arm,
        rounds=len(pairs),
        step_us=statistics.median(us for us, _ in pairs),
        added_us=statistics.median(us - off for us, off in pairs),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
        # 1.25 σ/√n for a median, and σ = quartile distance / 1.35
        ratio_error=(high - low) / 1.35 * 1.25 / len(ratios) ** 0.5,
    )


if __name__ == "__main__":
    rounds, seed, out = sys.argv[1:]
    with open(out, "w") as file:
        json.dump(measure_here(int(rounds), int(seed)), file)
