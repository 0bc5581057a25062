"""The plugin as a user has it: tests of a trace, the fixture, the marker, and its price when unused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from invariants.changes import GOLD, gold, null_block_written
from vllm_trace import scenario
from vllm_trace.invariants.pytest_plugin import Recording
from vllm_trace.tracewriter import TraceWriter


def run_pytest(folder, *arguments):
    """pytest as a user starts it, in a folder that holds nothing of ours."""
    quiet = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-q", "--color=no", "-rs"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *quiet, "--rootdir", str(folder), *map(str, arguments)],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def broken_trace(folder, truncated=False):
    header, events = gold("preempt")
    at, _ = null_block_written(events)
    writer = TraceWriter(folder / "main-1.vtrace", header)
    writer.write(events)
    writer.close({"dropped": 0, "failures": {}} | ({"ended": "killed"} if truncated else {}))
    return at + 1


def test_a_trace_becomes_one_test_for_each_invariant(tmp_path):
    (tmp_path / "traces").mkdir()
    number = broken_trace(tmp_path / "traces")
    done = run_pytest(
        tmp_path, "--vllm-trace", GOLD / "preempt.vtrace", "--vllm-trace", "traces", "-vv"
    )
    assert 1 == done.returncode, done.stdout + done.stderr
    assert f"{GOLD / 'preempt.vtrace'}::null-block PASSED" in done.stdout
    assert "traces::null-block FAILED" in done.stdout
    assert "traces::hash-chain PASSED" in done.stdout
    assert "traces::whole PASSED" in done.stdout
    assert "SKIPPED" in done.stdout and "vLLM's own KV events are off" in done.stdout
    assert f"violated at event {number}, step 1: the null block is written (slot 5) for r-0" in (
        done.stdout
    )
    assert "r-0 arrives: 60 tokens" in done.stdout
    assert "Traceback" not in done.stdout


def test_only_some_invariants_and_k_choose(tmp_path):
    trace = GOLD / "hello.vtrace"
    done = run_pytest(tmp_path, "--vllm-trace", trace, "--vllm-trace-only", "null-block,hit-cached")
    assert (0, True) == (done.returncode, "3 passed" in done.stdout)
    done = run_pytest(tmp_path, "--vllm-trace", trace, "-k", "freed")
    assert (0, True) == (done.returncode, "2 passed" in done.stdout), done.stdout
    done = run_pytest(tmp_path, "--vllm-trace", trace, "--vllm-trace-only", "nul-block")
    assert 4 == done.returncode
    assert "did you mean 'null-block'" in done.stderr


def test_a_truncated_trace_is_no_green_run(tmp_path):
    broken_trace(tmp_path, truncated=True)
    done = run_pytest(tmp_path, "--vllm-trace", tmp_path, "--vllm-trace-only", "hit-cached")
    assert 1 == done.returncode
    assert "1 failed, 1 skipped" in done.stdout
    assert "not everything can be judged" in done.stdout and "truncated" in done.stdout


def test_a_trace_that_cannot_be_read_fails_with_the_reason(tmp_path):
    done = run_pytest(tmp_path, "--vllm-trace", "absent", "--vllm-trace-only", "hit-cached")
    assert 1 == done.returncode
    assert "there is no file or folder 'absent'" in done.stdout
    assert "Traceback" not in done.stdout


def test_loading_it_imports_nothing_else():
    """Every pytest of the environment loads it."""
    code = (
        "import sys, pytest; before = set(sys.modules);"
        "import vllm_trace.invariants.pytest_plugin;"
        "print(*sorted(m for m in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [
        "vllm_trace", "vllm_trace.invariants", "vllm_trace.invariants.pytest_plugin",
    ] == done.stdout.split()  # fmt: skip


def test_pytest_finds_it_as_an_installed_plugin(tmp_path):
    done = run_pytest(tmp_path, "--help")
    assert "--vllm-trace=PATH" in done.stdout
    done = run_pytest(tmp_path, "--markers")
    assert "vllm_invariants(*ids, also=[])" in done.stdout


# The fixture, on a real engine --------------------------------------------------------


def drive(name):
    pytest.importorskip("vllm", reason="vLLM is not installed: no engine to record")
    from vllm_trace import runner

    chosen = scenario.load(name)
    llm, _ = runner.start_engine(chosen)
    runner.run_workload(llm, chosen)
    return llm


def never_full(books, event):
    """A block is always free."""
    if event.kind == "step.scheduled" and event.num_free_blocks == 0:
        yield "no block is free"


@pytest.mark.vllm_invariants("null-block", "blocks-conserved")
def test_the_fixture_records_and_the_marker_judges(vllm_trace):
    drive("preempt")
    assert 1 == vllm_trace.trace().level.count("full")
    kinds = {event.kind for event in vllm_trace.trace().events()}
    assert {"engine.configured", "request.preempted", "slots.mapped"} <= kinds


def test_the_fixture_judges_by_ones_own_and_says_what_broke(vllm_trace):
    from vllm_trace import hooks

    drive("preempt")
    assert hooks.recorder() is not None
    report = vllm_trace.check("hash-chain")
    assert ["hash-chain"] == [each.invariant.id for each in report.of("holds")]
    assert hooks.recorder() is None
    with pytest.raises(AssertionError) as error:
        vllm_trace.check("hash-chain", also=[never_full])
    assert str(error.value).startswith("never-full: A block is always free.\nviolated at event")


@pytest.mark.slow
def test_the_readme_s_test_with_an_engine_in_a_process_of_its_own(tmp_path, monkeypatch):
    """As vLLM starts it by default: its process ends with the test, and the trace is whole."""
    pytest.importorskip("vllm", reason="vLLM is not installed: no engine to record")
    from vllm_trace.checkpoints import checkpoint

    for name in ("TQDM_DISABLE", "VLLM_ENABLE_V1_MULTIPROCESSING"):  # the other tests' settings
        monkeypatch.delenv(name, raising=False)
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (text,) = [
        part for part in re.findall(r"```python\n(.*?)```", readme, re.S) if "def test_" in part
    ]
    assert '"./my-model", gpu_memory_utilization=0.3' in text
    (tmp_path / "my-model").symlink_to(checkpoint("tiny-llama"))
    quick = "gpu_memory_utilization=0.05, max_model_len=512, enforce_eager=True"
    (tmp_path / "test_it.py").write_text(text.replace("gpu_memory_utilization=0.3", quick))
    done = run_pytest(tmp_path)
    assert 0 == done.returncode, done.stdout[-3000:]


def test_after_the_fixture_nothing_is_traced():
    from vllm_trace import hooks

    assert hooks.recorder() is None
    assert "VTRACE_DIR" not in os.environ


def test_the_marker_fails_the_test_it_is_on(tmp_path):
    """The same machinery, over a trace made beforehand: no engine is needed to see it fail."""
    (tmp_path / "conftest.py").write_text(
        "import pytest\n"
        "from pathlib import Path\n"
        "from vllm_trace.invariants.pytest_plugin import Recording\n"
        "@pytest.fixture\n"
        "def vllm_trace():\n"
        "    made = Recording(Path(__file__).parent / 'made')\n"
        "    made._closed = True\n"
        "    return made\n"
    )
    (tmp_path / "made").mkdir()
    broken_trace(tmp_path / "made")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.vllm_invariants('hash-chain')\n"
        "def test_good(vllm_trace): pass\n"
        "@pytest.mark.vllm_invariants('null-block')\n"
        "def test_bad(vllm_trace): pass\n"
        "@pytest.mark.vllm_invariants('null-block')\n"
        "def test_fails_by_itself(vllm_trace): assert False, 'its own'\n"
        "@pytest.mark.vllm_invariants\n"
        "def test_without_fixture(): pass\n"
    )
    done = run_pytest(tmp_path)
    assert 1 == done.returncode
    assert "3 failed, 1 passed" in done.stdout, done.stdout
    assert 1 == done.stdout.count("the null block is written")
    assert "AssertionError: its own" in done.stdout
    assert "the marker vllm_invariants needs the fixture vllm_trace" in done.stdout
    assert isinstance(Recording(Path("x")).folder, Path)
