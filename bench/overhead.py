"""Added CPU per step: all arms in one run, shuffled in every round, each compared with its round's ``off``."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bench.arms import ARMS
from bench.engine import Engine, settle_heap

WARM_UP = 120
"""Steps before the timed ones: a changed class makes CPython forget its inline caches."""

STEPS = 300
SLOW = ("OpenTelemetry spans", "cProfile", "VizTracer")
"""Arms whose effect is far above the noise: a round in ``SLOW_EVERY`` tells enough."""

SLOW_EVERY = 12


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


def measure(
    rounds: int, arms: Iterable[str] = ARMS, tell: Callable[[str], None] = lambda text: None
) -> list[Overhead]:
    """Run every arm ``rounds`` times, the slow ones less often and after the others: the arms whose
    difference is small lie close together in time."""
    engine, rng = Engine(), random.Random(0)
    arms = list(arms)
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        chosen = [arm for arm in arms if arm not in SLOW]
        rng.shuffle(chosen)
        if number % SLOW_EVERY == 0:
            chosen += [arm for arm in arms if arm in SLOW]
        taken = {arm: step_us(engine, arm) for arm in chosen}
        for arm, us in taken.items():
            times[arm].append((us, taken["off"]))
    engine.empty()
    return [_summary(arm, pairs) for arm, pairs in times.items()]


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
