"""Somebody walks the plan in a real terminal of 80 x 24: steps 1 to 13, wrong and right answers, all exercises."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_trace.learn import book, exercises, plan, questions
from vllm_trace.learn.progress import Progress
from vllm_trace.learn.runs import has_vllm
from vllm_trace.trace import read_trace

pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed: there is no terminal")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: nothing to run"),
]
WAIT = 150


class Terminal:
    """A shell-less terminal: one command at a time."""

    def __init__(self, folder, home):
        self.folder = folder
        self.env = {**__import__("os").environ, "VTRACE_LEARN_DIR": str(home), "PAGER": "cat",
                    "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}  # fmt: skip
        self.seen = ""

    def start(self, *words):
        child = pexpect.spawn(
            sys.executable, ["-m", "vllm_trace", "learn", *words], cwd=str(self.folder), env=self.env,
            dimensions=(24, 80), encoding="utf-8", timeout=WAIT,
        )  # fmt: skip
        return child

    def run(self, *words):
        """(exit code, what the terminal showed, without colours)."""
        child = self.start(*words)
        child.expect(pexpect.EOF)
        child.close()
        return child.exitstatus, plain(child.before)


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r\n", "\n")


@pytest.fixture
def terminal(tmp_path, home):
    folder = tmp_path / "work"
    folder.mkdir()
    return Terminal(folder, home)


def say_and_wait(child, prompt, answer):
    child.expect_exact(prompt)
    child.sendline(answer)


def wrong_for(each):
    """An answer that is a known mistake, or at least none that is right."""
    return next(iter(each.wrong), "no idea")


def take_step(terminal, one, turn):
    """Open a step, go through its parts, answer wrongly and then rightly."""
    child = terminal.start(one.name)
    say_and_wait(child, "[Enter] read", "")
    if child.expect_exact(["[Enter] the source", "[Enter] run"]) == 0:
        child.sendline("" if turn % 4 == 0 else "s")
        child.expect_exact("[Enter] run")
    child.sendline("")
    say_and_wait(child, "[Enter] see", "")
    child.expect_exact("[Enter] check")
    shown = plain(child.before)
    assert f"in your own run of '{one.scenario}'" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    child.sendline("")
    child.expect_exact("to leave)")
    progress = Progress.load()
    made = book.read(read_trace(Path(progress.runs[one.scenario])))
    for number, each in enumerate(
        questions.ask(made, one.questions, progress.seed_of(one.name)), 1
    ):
        child.expect_exact("   > ")
        if number == 1:
            child.sendline("?")
            child.expect_exact("   > ")
        if number <= 2:
            child.sendline(wrong_for(each))
            child.expect("no, ")
            child.expect_exact("   > ")
        child.sendline(each.answer)
        child.expect("Right")
    child.expect_exact(f"Step {one.number} is passed.")
    child.expect(pexpect.EOF)
    child.close()
    assert 0 == child.exitstatus


def take_exercise(terminal, one):
    """Begin, fail with the skeleton, pass with the solution."""
    code, shown = terminal.run("start", one.name)
    assert 0 == code and one.file in shown
    code, shown = terminal.run("check", one.name)
    assert 1 == code and "NO  " in shown
    if one.missing():
        assert f"{one.missing()} is not here" in shown
        return
    assert "not written" in shown
    (terminal.folder / one.file).write_text(one.text("solution"))
    code, shown = terminal.run("check", one.name)
    if one.name == "ex3":
        times = re.findall(r"\d: (\d+) µs", " ".join(shown.split()))[-3:]
        layout = re.search(r"In layout (\d)", shown)[1]
        fastest = str(1 + [int(t) for t in times].index(min(int(t) for t in times)))
        code, shown = terminal.run("check", "ex3", "--answer", fastest, "--answer", "1")
        assert 1 == code
        apart = "512" if layout == "1" else "64"
        code, shown = terminal.run("check", "ex3", "--answer", fastest, "--answer", apart)
    assert 0 == code and f"{one.name} is passed." in shown


def test_from_step_1_to_13_and_through_every_exercise(terminal):
    """As a reader does it: the plan in one terminal, exercises in another, and both count."""
    code, shown = terminal.run()
    assert 0 == code and "0 of 21 steps and 0 of 11 exercises passed" in shown
    with ThreadPoolExecutor(1) as second:
        made = [second.submit(take_exercise, terminal, one) for one in exercises.all_of_them()]
        for turn, one in enumerate(plan.steps()[:13]):
            take_step(terminal, one, turn)
        for each in made:
            each.result()
    here = [one for one in exercises.all_of_them() if not one.missing()]
    code, shown = terminal.run()
    assert f"13 of 21 steps and {len(here)} of 11 exercises passed" in shown
    progress = Progress.load()
    assert {str(n) for n in range(1, 14)} == progress.passed.keys() - {one.name for one in here}
    assert {"hello", "preempt", "prefix", "long", "chunked", "parallel"} == set(progress.runs)


def test_one_may_give_up_and_leave(terminal):
    """`.` shows the way to an answer, q leaves; the step is not passed then."""
    child = terminal.start("check", "10")
    child.expect_exact("   > ")
    child.sendline(".")
    child.expect_exact("   > ")
    child.sendline("q")
    child.expect(pexpect.EOF)
    child.close()
    assert 1 == child.exitstatus
    assert "10" not in Progress.load().passed


def test_saving_checks_again(terminal):
    one = exercises.exercise("ex4")
    terminal.run("start", "ex4")
    child = terminal.start("check", "ex4", "--watch")
    child.expect_exact("slot_of is not written yet")
    child.expect_exact("2 more after this")
    for _ in range(20):  # the watcher may not have begun yet
        (terminal.folder / "ex4.py").write_text(one.text("solution"))
        if child.expect_exact(["ex4 is passed.", pexpect.TIMEOUT], timeout=5) == 0:
            break
    else:
        raise AssertionError("it was not checked again")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert 130 == child.exitstatus
