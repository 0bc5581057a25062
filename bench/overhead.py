"""Added CPU per step: forked copies of one engine take turns, each compared with the copy that is ``off``.

Where things happen to lie in memory is worth up to 2 % of a step, for better or worse, and whatever a process did
before decides it. So it is left to chance: each filling and each copy shakes its heap, and there are several processes
to fork from: ``python -m bench.overhead FILLINGS SEED FILE`` is one.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench.arms import ARMS
from bench.engine import MAX_MODEL_LEN, PROMPT_LENS, Engine, settle_heap, shake_heap
from bench.turns import Copy, Turn

WARM_UP = 400
"""Steps before the timed ones: a changed class makes CPython forget its inline caches."""

STEPS = 40
"""Steps of a turn."""

SETTLE = 10
"""After so many turns the arms do what they put off: before the tail is full, for a median would miss that."""

FILLINGS = 3
"""How often each process forks."""

SLOW = ("OpenTelemetry spans", "cProfile", "VizTracer")
"""Arms whose effect is far above the noise: some turns in each process tell enough."""

SLOW_TURNS = 8


@dataclass(frozen=True)
class Overhead:
    """One arm. Ratios are to ``off`` of the same turn, and of a filling their median."""

    arm: str
    fillings: int
    step_us: float
    added_us: float
    ratio: float
    ratio_low: float
    """Quartiles over the fillings."""
    ratio_high: float
    ratio_error: float
    """Standard error of the mean over the fillings."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Pairs = list[list[float]]
"""One arm in one filling, for each turn: its own time of a step, that of ``off``, in microseconds."""

Times = dict[str, list[Pairs]]
"""Of each arm, for each filling."""


def measure(processes: int, tell: Callable[[str], None] = lambda text: None) -> list[Overhead]:
    """Compare all arms in so many processes, one after the other."""
    times: Times = {arm: [] for arm in ARMS}
    for number in range(processes):
        tell(f"engine {number + 1} of {processes}")
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            command = [sys.executable, "-m", "bench.overhead", str(FILLINGS), str(number), out.name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
            for arm, found in json.load(out).items():
                times[arm] += found
    return [_summary(arm, found) for arm, found in times.items()]


def measure_here(fillings: int, seed: int) -> Times:
    """What one process finds."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # turns are taken on one core
    engine, rng = Engine(), random.Random(seed)
    for arm in ("light", "full"):
        with ARMS[arm]():
            pass  # what attaching loads and leaves is there when a traced process starts, not in its copies
    quick = [arm for arm in ARMS if arm not in SLOW]
    times: Times = {arm: [] for arm in ARMS}
    longest = MAX_MODEL_LEN - PROMPT_LENS[1] - WARM_UP - 2
    for _ in range(fillings):
        for arm, pairs in compare(engine, quick, longest // STEPS, rng).items():
            times[arm].append(pairs)
    slow = compare(engine, ["off", *SLOW], SLOW_TURNS, rng)
    for arm in SLOW:
        times[arm].append(slow[arm])
    return times


def compare(engine: Engine, arms: list[str], turns: int, rng: random.Random) -> dict[str, Pairs]:
    """Fill the engine and let copies of it take turns; each arm's times beside those of ``off``."""
    engine.empty()
    shake_heap(rng)
    engine.fill()
    settle_heap()
    copies = [Copy(engine, arm, rng.getrandbits(64)) for arm in rng.sample(arms, len(arms))]
    for copy in copies:
        copy.turn(WARM_UP)
        copy.settle()
    rounds, put_off = [], dict.fromkeys(arms, 0.0)
    for number in range(1, turns + 1):
        order = rng.sample(copies, len(copies))
        rounds.append({copy.arm: copy.turn(STEPS, settle=copy.arm in SLOW) for copy in order})
        if number % SETTLE == 0 or number == turns:
            for copy in order:
                put_off[copy.arm] += copy.settle() / turns / STEPS
    for copy in copies:
        copy.end()
    return {
        arm: [[us(turn[arm], arm) + put_off[arm], us(turn["off"], arm)] for turn in rounds]
        for arm in arms
    }


def us(turn: Turn, arm: str) -> float:
    """How the steps of an arm are measured, and those of ``off`` beside it. Only the slow arms have threads."""
    return turn.cpu if arm in SLOW else turn.median


def _summary(arm: str, fillings: list[Pairs]) -> Overhead:
    pairs = [pair for filling in fillings for pair in filling]
    ratios = [statistics.median(us / off for us, off in filling) for filling in fillings]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Overhead(
        arm=arm,
        fillings=len(fillings),
        step_us=statistics.median(us for us, _ in pairs),
        added_us=statistics.median(us - off for us, off in pairs),
        ratio=statistics.fmean(ratios),
        ratio_low=low,
        ratio_high=high,
        ratio_error=statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0,
    )


if __name__ == "__main__":
    fillings, seed, out = sys.argv[1:]
    with open(out, "w") as file:
        json.dump(measure_here(int(fillings), int(seed)), file)
