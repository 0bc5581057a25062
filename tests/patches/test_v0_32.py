"""The table of 0.32 on the vLLM that is installed: resolved, put in place, taken off."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from vllm_trace.hooks import attach, detach
from vllm_trace.hooks.install import install
from vllm_trace.hooks.resolve import resolve
from vllm_trace.hooks.weave import is_woven
from vllm_trace.options import LEVELS, Options
from vllm_trace.patches.v0_32 import TABLE
from vllm_trace.recorder import Recorder

pytestmark = pytest.mark.usefixtures("source_0_32")


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_row_is_the_source_that_was_reviewed(source_0_32, platform, level):
    """The CUDA rows too: the CPU build holds the same files, and they are only read."""
    rows = resolve(TABLE, source_0_32, level=level, platform=platform)
    assert [] == [row.to_dict() for row in rows if row.state != "ok"]
    assert len(rows) > 5


def owner_of(hook):
    owner = importlib.import_module(hook.module)
    *path, name = hook.qualname.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name


@pytest.mark.parametrize("level", LEVELS)
def test_attach_places_every_row_of_the_cpu_and_detach_restores_every_original(
    tmp_path, level, capfd
):
    rows = [h for h in TABLE.hooks if h.platform in ("", "cpu") and h.at_level(level)]
    before = [vars(owner)[name] for owner, name in map(owner_of, rows)]
    made = attach(Options(dir=str(tmp_path / "trace"), level=level, strict=True))
    try:
        during = [vars(owner)[name] for owner, name in map(owner_of, rows)]
        assert [] == [h.target for h, a, b in zip(rows, before, during) if a is b]
        assert [type(a) for a in before] == [type(b) for b in during]
        assert {"ok"} == {entry["state"] for entry in made.notes["hooks"]}
        assert len(rows) == len(made.notes["hooks"])
        assert {h.target for h in rows if h.each_step} == {
            h.target for h, b in zip(rows, during) if is_woven(b)
        }, "woven, and no other"
    finally:
        left = detach()
    after = [vars(owner)[name] for owner, name in map(owner_of, rows)]
    assert [] == left
    assert [] == [h.target for h, a, b in zip(rows, before, after) if a is not b]
    assert [] == [line for line in capfd.readouterr().err.splitlines() if "vllm-trace" in line]
    assert not (tmp_path / "trace").exists()


def test_the_rows_of_the_v2_runner_can_be_placed_and_taken_off(source_0_32, tmp_path):
    """Its module can be imported without CUDA, only not run."""
    rows = [
        row
        for row in resolve(TABLE, source_0_32, platform="cuda")
        if ".worker.gpu." in row.hook.module
    ]
    before = [vars(owner)[name] for owner, name in (owner_of(row.hook) for row in rows)]
    recorder = Recorder(Options(dir=str(tmp_path)))
    done = install(rows, recorder)
    assert {} == done.skipped
    assert 4 == len(rows) == len(done.placed)
    assert [] == done.undo()
    recorder.close()
    after = [vars(owner)[name] for owner, name in (owner_of(row.hook) for row in rows)]
    assert [] == [row.hook.target for row, a, b in zip(rows, before, after) if a is not b]


def test_the_rows_of_level_full_stay_off_at_level_light(tmp_path):
    off = [h for h in TABLE.hooks if not h.light and h.platform in ("", "cpu")]
    before = [vars(owner)[name] for owner, name in map(owner_of, off)]
    attach(Options(dir=str(tmp_path), level="light"))
    try:
        assert before == [vars(owner)[name] for owner, name in map(owner_of, off)]
    finally:
        detach()
    assert len(off) > 5


FRONT_END = """
import json, sys
import vllm.v1.engine.async_llm  # what a server's front end has imported when plugins are loaded
from vllm.engine import arg_utils
before = set(sys.modules)
from vllm_trace.hooks import register
register()
new = [name for name in set(sys.modules) - before if name.startswith("vllm.")]
waits = "vllm.v1.worker.gpu_model_runner" not in sys.modules
import vllm.v1.worker.gpu_model_runner as worker
print(json.dumps([new, waits, hasattr(worker.GPUModelRunner.execute_model, "__wrapped__")]))
"""


def test_a_process_imports_nothing_of_vllm_only_to_be_traced(source_0_32, tmp_path):
    environ = os.environ | {"VTRACE_DIR": str(tmp_path / "trace")}
    done = subprocess.run(
        [sys.executable, "-c", FRONT_END], env=environ, capture_output=True, text=True, timeout=120
    )
    assert "vllm-trace:" not in done.stderr
    new, waits, hooked = json.loads(done.stdout.splitlines()[-1])
    assert ([], True, True) == (new, waits, hooked)
    assert not (tmp_path / "trace").exists()
