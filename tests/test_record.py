"""Commands run with tracing on; what becomes of the files of processes that are gone."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import configured, write_trace

from vllm_trace.errors import UsageError
from vllm_trace.events import SCHEMA_VERSION
from vllm_trace.options import Options
from vllm_trace.record import close_files, find_program, record
from vllm_trace.trace import read_trace
from vllm_trace.tracefile import TAIL_SUFFIX

LEAVES_AN_OPEN_FILE = f"""
    import os, sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from pathlib import Path
    from helpers import configured
    from vllm_trace.tracewriter import TraceWriter

    folder = Path(os.environ["VTRACE_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    header = {{"schema": {SCHEMA_VERSION}, "role": "main", "pid": os.getpid(), "host": "here"}}
    writer = TraceWriter(folder / f"main-{{os.getpid()}}.vtrace", header)
    writer.write([configured()])
    os._exit(int(sys.argv[1]))
"""


def run(folder, *arguments, **options):
    return record([sys.executable, *arguments], folder, Options(**options))


def test_the_command_finds_the_options_in_its_environment(tmp_path):
    script = "import os; print({n: v for n, v in os.environ.items() if n.startswith('VTRACE_')})"
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(f"""
            import sys
            from pathlib import Path
            from vllm_trace.options import Options
            from vllm_trace.record import record
            record([sys.executable, "-c", {script!r}], Path("made"), Options(level="light", tokens=True))
        """)],
        cwd=tmp_path, capture_output=True, text=True, check=True,
        env={n: v for n, v in os.environ.items() if not n.startswith("VTRACE_")},
    ).stdout  # fmt: skip
    assert {
        "VTRACE_DIR": str(tmp_path / "made"), "VTRACE_LEVEL": "light", "VTRACE_TOKENS": "1",
    } == eval(out)  # fmt: skip


@pytest.mark.parametrize(
    ("script", "code"),
    [("pass", 0), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_the_exit_code_is_the_command_s(tmp_path, script, code):
    assert code == run(tmp_path, "-c", script)


@pytest.mark.parametrize(("code", "truncated"), [(0, ""), (3, "the process was killed")])
def test_files_that_a_process_left_open_are_closed(tmp_path, code, truncated):
    """vLLM kills its own workers when it ends well; a crash is something else."""
    script = textwrap.dedent(LEAVES_AN_OPEN_FILE)
    assert code == run(tmp_path / "made", "-c", script, str(code))
    trace = read_trace(tmp_path / "made")
    assert 1 == len(list(trace.events()))
    assert truncated == trace.files[0].truncated
    assert [] == list(tmp_path.glob(f"made/*{TAIL_SUFFIX}"))


def test_a_signal_that_comes_as_the_command_starts_reaches_it(tmp_path, monkeypatch):
    def popen(*words, original=subprocess.Popen, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*words, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    handler = signal.getsignal(signal.SIGTERM)
    assert 128 + signal.SIGTERM == run(tmp_path, "-c", "import time; time.sleep(100)")
    assert handler is signal.getsignal(signal.SIGTERM)


def test_what_is_ignored_here_is_ignored_by_the_command_too(tmp_path):
    """``nohup`` ignores SIGHUP so that what it starts outlives the terminal."""
    script = "import signal; raise SystemExit(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert 1 == run(tmp_path, "-c", script)
        assert signal.SIG_IGN is signal.getsignal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert 0 == run(tmp_path, "-c", script)


def test_a_file_that_is_still_written_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_trace.record.PATIENCE", 0.3)
    path = write_trace(tmp_path, "main", os.getpid(), [[configured()]])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # as if this process had yet to write its footer
    close_files(tmp_path, "stopped")
    assert whole[:-20] == path.read_bytes()


def test_closing_a_folder_of_nothing(tmp_path):
    close_files(tmp_path / "absent", "stopped")
    (tmp_path / "x.vtrace").write_bytes(b"something else")
    close_files(tmp_path, "stopped")
    assert b"something else" == (tmp_path / "x.vtrace").read_bytes()


def test_programs_are_found_as_a_shell_would(tmp_path, monkeypatch):
    assert sys.executable == find_program(sys.executable)
    # Beside this interpreter, when its environment is not active.
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert str(Path(sys.executable).with_name("pytest")) == find_program("pytest")
    script = tmp_path / "mine"
    script.write_text("#!/bin/sh\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "./mine", "no/where", ""):
        with pytest.raises(UsageError, match="there is no command"):
            find_program(name)
    script.chmod(0o755)
    assert "./mine" == find_program("./mine")
