"""What the reader did is kept; a damaged file is kept aside and a new one begun."""

import json
import os
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_trace.errors import UsageError
from vllm_trace.learn import progress as module
from vllm_trace.learn.progress import FILE, Progress


def test_it_is_kept(progress, home):
    progress.note_opened("5")
    progress.note_passed("5")
    progress.note_attempt("5")
    again = Progress.load()
    assert progress.passed == again.passed and "5" in again.passed
    assert {"5": 1} == again.attempts and 7 == again.seed
    assert [FILE] == [path.name for path in home.iterdir()]


def test_another_attempt_asks_other_questions(progress):
    before = progress.seed_of("5")
    progress.note_attempt("5")
    assert before != progress.seed_of("5")
    assert progress.seed_of("5") != progress.seed_of("6")


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("VTRACE_LEARN_DIR", str(tmp_path / "a"))
    assert tmp_path / "a" == module.folder()
    monkeypatch.delenv("VTRACE_LEARN_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "b"))
    assert tmp_path / "b/vllm-trace/learn" == module.folder()
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # the standard says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path / ".local/share/vllm-trace/learn" == module.folder()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary()
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(
            st.sampled_from(["schema", "seed", "opened", "passed", "attempts", "runs", "exercises"]), inner
        ),
    ).map(lambda made: json.dumps(made).encode())
)  # fmt: skip
def test_a_damaged_file_is_kept_aside(home, content):
    home.mkdir(exist_ok=True)
    for path in home.iterdir():
        path.unlink()
    (home / FILE).write_bytes(content)
    made = Progress.load()
    assert {} == made.passed
    assert made.set_aside
    assert content == (home / f"{FILE}.damaged").read_bytes()
    made.note_passed("1")
    assert "1" in Progress.load().passed


def test_a_second_damage_does_not_overwrite_the_first(home):
    home.mkdir()
    for content in ("one", "two", "three"):
        (home / FILE).write_text(content)
        Progress.load()
    kept = {path.name: path.read_text() for path in home.iterdir()}
    assert {
        f"{FILE}.damaged": "one",
        f"{FILE}.damaged-2": "two",
        f"{FILE}.damaged-3": "three",
    } == kept


def test_the_command_says_that_it_was_damaged(learn, home):
    (home / FILE).write_text("{")
    code, out, err = learn()
    assert 0 == code and "0 of 21 steps" in out
    assert "the progress file was damaged; it is kept as" in err


def test_a_folder_that_cannot_be_written(home):
    home.parent.mkdir(exist_ok=True)
    home.touch()
    with pytest.raises(UsageError, match="cannot") as caught:
        Progress(home / FILE).save()
    assert "VTRACE_LEARN_DIR" in caught.value.hint


def test_a_file_is_written_whole_or_not_at_all(progress, monkeypatch):
    before = progress.path.read_text()

    def fails(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module.Path, "replace", fails)
    with pytest.raises(UsageError, match="No space left"):
        progress.note_passed("3")
    assert before == progress.path.read_text()


# Several terminals -------------------------------------------------------------------------


def test_two_terminals_do_not_take_from_each_other(progress):
    """`learn check ex1 --watch` beside a step: the watcher saves long after it read the file."""
    watcher, walker = Progress.load(), Progress.load()
    walker.note_passed("3")
    walker.runs["hello"] = "here"
    walker.save()
    watcher.note_passed("ex1")
    assert {"3", "ex1"} == watcher.passed.keys() == Progress.load().passed.keys()
    assert {"hello": "here"} == Progress.load().runs
    del walker.runs["hello"]  # its trace is gone
    walker.note_attempt("3")
    watcher.note_opened("4")
    kept = Progress.load()
    assert {} == kept.runs and {"3": 1} == kept.attempts
    assert {"3", "ex1"} == kept.passed.keys()
    assert 7 == kept.seed


def test_many_at_once_lose_nothing(progress):
    def pass_some(first):
        for number in range(first, 40, 4):
            Progress.load().note_passed(f"s{number}")

    threads = [threading.Thread(target=pass_some, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {f"s{number}" for number in range(40)} == Progress.load().passed.keys()


def test_what_was_damaged_meanwhile_is_kept_aside_too(progress, home):
    (home / "progress.json").write_text("{")
    progress.note_passed("3")
    assert {"3"} == Progress.load().passed.keys()
    assert "{" == (home / "progress.json.damaged").read_text()
