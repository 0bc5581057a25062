"""Engines with our attention, one run of each scenario for all tests."""

import contextlib
import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from vllm_trace import hooks, runner, scenario
from vllm_trace.backend import register_backend
from vllm_trace.hooks.source import VllmSource
from vllm_trace.options import Options

_folders = []


@contextlib.contextmanager
def asked(folder, attention="engine", shadow=False):
    """Engines made inside are traced and have this attention."""
    before = dict(os.environ)
    os.environ |= Options(
        dir=str(folder), tokens=True, attention=attention, shadow=shadow
    ).to_environment()
    try:
        yield
    finally:
        hooks.detach()
        register_backend("engine")
        for name in [name for name in os.environ if name.startswith("VTRACE_")]:
            if name not in before:
                del os.environ[name]


def work(name, folder, attention, shadow=False, **engine_args):
    """Run a scenario; the tokens that came out."""
    chosen = scenario.load(name)
    with asked(folder, attention, shadow):
        llm, _ = runner.start_engine(chosen, engine_args=engine_args, attention=attention)
        outcome = runner.run_workload(llm, chosen)
        runner.stop_engine(llm)
    return outcome.token_ids


@cache
def worked(name, attention, shadow=False, block_size=0):
    """The same once for all tests: (tokens, folder of the trace)."""
    _folders.append(TemporaryDirectory(prefix=f"vllm-trace-{name}-"))
    folder = Path(_folders[-1].name)
    sizes = {"block_size": block_size} if block_size else {}
    return work(name, folder, attention, shadow, **sizes), folder


@pytest.fixture(autouse=True)
def _needs_the_cpu_lane(request):
    source = VllmSource.installed()
    if source is None or not source.version.startswith("0.32."):
        pytest.skip("needs vLLM 0.32 on CPU")
