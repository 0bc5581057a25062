"""Added CPU per step: all arms in one run, shuffled in every round, each compared with its round's ``off``.

Where a process happens to lie in memory is worth up to 1 % of a step, for better or worse, so the
rounds are spread over several processes: ``python -m bench.overhead ROUNDS SEED FILE`` is one.
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

STEPS = 1200
"""Timed steps. The tail is emptied once in them; in a real run once in 2,700 or more."""

PROCESSES = 6
SLOW = ("OpenTelemetry spans", "cProfile", "VizTracer")
"""Arms whose effect is far above the noise: one round in each process tells enough."""


@dataclass(frozen=True)
class Overhead:
    """One arm. Ratios are of CPU time, to ``off`` of the same round."""

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
    """The rounds of one process. The slow arms come last in the first: the arms whose difference is
    small lie close together in time."""
    engine, rng = Engine(), random.Random(seed)
    times: Times = {arm: [] for arm in ARMS}
    for number in range(rounds):
        chosen = [arm for arm in ARMS if arm not in SLOW]
        rng.shuffle(chosen)
        if number == 0:
            chosen += SLOW
        taken = {arm: step_us(engine, arm) for arm in chosen}
        for arm, us in taken.items():
            times[arm].append((us, taken["off"]))
    engine.empty()
    return times


def step_us(engine: Engine, arm: str) -> float:
    """CPU time of one step, all threads of the process counted, in microseconds."""
    step = engine.step
    with ARMS[arm]() as settle:
        engine.fill()
        for _ in range(WARM_UP):
            step()
        settle()
        settle_heap()
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
