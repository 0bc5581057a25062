"""Traces that are recorded once for all tests of exports."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """Traces of vLLM's own scheduler, recorded now, by level."""
    pytest.importorskip("vllm", reason="vLLM is not installed: there is no scheduler to record")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(Path(__file__).parents[2])
        from bench import arms
        from bench.engine import Engine

        folder, core = tmp_path_factory.mktemp("fresh"), Engine()
        return {
            level: arms.trace_of(lambda: core.serve(150), folder / level, level=level)
            for level in ("full", "light")
        }
