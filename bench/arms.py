"""The arms of the comparison: ways to watch the same engine steps.

An arm is a context manager. It is entered before the requests are made and yields ``settle``, which
does whatever work the arm has put off; it runs inside the timed stretch, so that compression and
export are paid by the steps that caused them.
"""

from __future__ import annotations

import cProfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from bench.spans import SpanTracer
from vllm_trace import hooks
from vllm_trace.options import Options
from vllm_trace.recorder import Recorder

Settle = Callable[[], object]
Arm = Callable[[], AbstractContextManager[Settle]]


def nothing() -> None:
    pass


@contextmanager
def off() -> Iterator[Settle]:
    assert not wrapped_functions()
    yield nothing


@contextmanager
def detached() -> Iterator[Settle]:
    """On and off again: what is called afterwards must be the very functions of before."""
    before = hooked_functions()
    with traced("full"):
        assert wrapped_functions()
    assert all(now is then for now, then in zip(hooked_functions(), before))
    yield nothing


@contextmanager
def traced(level: str) -> Iterator[Settle]:
    with tempfile.TemporaryDirectory(prefix="vtrace-bench-") as folder:
        recorder = hooks.attach(Options(dir=folder, level=level))
        try:
            yield lambda: compress(recorder)
        finally:
            said = hooks.detach()
            assert not said and not recorder.failures, (said, recorder.failures)
            assert recorder.writer is None or not recorder.writer.dropped


def compress(recorder: Recorder) -> None:
    """Turn what waits in the tail into a frame, as happens whenever the tail is full."""
    recorder.flush()
    if recorder.writer is not None:
        recorder.writer.flush_tail()


@contextmanager
def spans() -> Iterator[Settle]:
    tracer = SpanTracer()
    tracer.install(hook_targets())
    try:
        yield tracer.force_flush
    finally:
        tracer.undo()
        assert tracer.num_exported, "no span was exported"


@contextmanager
def cprofile() -> Iterator[Settle]:
    profile = cProfile.Profile()
    profile.enable()
    try:
        yield nothing
    finally:
        profile.disable()


@contextmanager
def viztracer() -> Iterator[Settle]:
    from viztracer import VizTracer

    tracer = VizTracer(verbose=0)
    tracer.start()
    try:
        yield nothing
    finally:
        tracer.stop()
        tracer.clear()
        tracer.terminate()


ARMS: dict[str, Arm] = {
    "off": off,
    "off again": off,
    "detached": detached,
    "light": lambda: traced("light"),
    "full": lambda: traced("full"),
    "OpenTelemetry spans": spans,
    "cProfile": cprofile,
    "VizTracer": viztracer,
}


def hook_targets() -> list[str]:
    """The scheduler's rows of the table for the installed release, at level ``full``."""
    from vllm import __version__

    from vllm_trace.hooks.resolve import choose
    from vllm_trace.patches import TABLES

    hooks_ = choose(TABLES, __version__).hooks
    return [hook.target for hook in hooks_ if hook.module.startswith("vllm.v1.core")]


def hooked_functions() -> list[object]:
    return [vars(owner)[name] for owner, name in map(SpanTracer.locate, hook_targets())]


def wrapped_functions() -> list[object]:
    return [f for f in hooked_functions() if hasattr(f, "__wrapped__")]


def trace_of(run: Callable[[], None], folder: Path, level: str = "full") -> Path:
    """Record ``run`` and return the file."""
    hooks.attach(Options(dir=str(folder), level=level))
    try:
        run()
    finally:
        hooks.detach()
    (path,) = folder.glob("*.vtrace")
    return path
