"""Forked copies of an engine, an arm on in each, that take turns on one core.

A machine's speed drifts by more in a second than tracing costs. Copies that do the same work a few
milliseconds after each other share that drift, and each stays as warm as an engine that runs for an
hour: nobody's classes change between two turns.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from bench.arms import ARMS, nothing
from bench.engine import Engine, settle_heap, shake_heap

COLD = 8
"""Steps at the start of a turn that do not count: the core's caches hold what the copy before used."""

Order = tuple[int, bool] | None
"""Steps to run, and whether to settle after them; None: to end."""

_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Turn:
    """Times of one step, in microseconds."""

    median: float
    """Of the steps but the first ``COLD``: a neighbour that takes the core for a while does not move it."""
    cpu: float
    """Of all threads, on average over all steps, with what the arm puts off."""


class Copy:
    """The engine as it is now, in a child process, with an arm on.

    Raises: ``RuntimeError`` from any method when the child has failed; it has told why on stderr.
    """

    def __init__(self, engine: Engine, arm: str, seed: int) -> None:
        self.arm = arm
        self._pipe, theirs = _fork.Pipe()
        arguments = (theirs, engine, arm, random.Random(seed))
        self._process = _fork.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def turn(self, steps: int, settle: bool = False) -> Turn:
        """Run some steps; ``settle``: what the arm puts off is done within the turn."""
        return self._ask((steps, settle))

    def settle(self) -> float:
        """Have done what was put off until now. Returns its CPU time in microseconds."""
        return self._ask((0, True)).cpu

    def end(self) -> None:
        """Take the arm off and end the child."""
        self._ask(None)
        self._process.join()

    def _ask(self, order: Order) -> Turn:
        try:
            self._pipe.send(order)
            answer: Turn = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            raise RuntimeError(f"the arm {self.arm!r} failed") from None
        return answer


def _serve(pipe: Connection, engine: Engine, arm: str, rng: random.Random) -> None:
    with ARMS[arm]() as settle:
        shake_heap(rng)
        settle_heap()
        while order := pipe.recv():
            steps, now = order
            pipe.send(_timed(engine.step, steps, settle if now else nothing))
        engine.assert_full()
    pipe.send(Turn(0, 0))


def _timed(step: Callable[[], Any], steps: int, settle: Callable[[], object]) -> Turn:
    clock = time.perf_counter_ns
    taken = []
    used = time.process_time_ns()
    for _ in range(steps):
        began = clock()
        step()
        taken.append(clock() - began)
    settle()
    used = time.process_time_ns() - used
    return Turn(statistics.median(taken[COLD:] or [0]) / 1000, used / max(steps, 1) / 1000)
