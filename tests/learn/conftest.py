"""A reader's home that is empty, and the command line in this process."""

import pytest

from vllm_trace import cli
from vllm_trace.learn.progress import Progress


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where `learn` remembers."""
    folder = tmp_path / "home"
    monkeypatch.setenv("VTRACE_LEARN_DIR", str(folder))
    return folder


@pytest.fixture
def progress(home):
    made = Progress.load()
    made.seed = 7
    made.save()
    return made


@pytest.fixture
def learn(progress, tmp_path, monkeypatch, capsys):
    """``vllm-trace learn …``; gives (exit code, stdout, stderr)."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def called(*words):
        code = cli.main(["learn", *map(str, words)])
        return code, *capsys.readouterr()

    called.folder = work
    return called
