"""``learn`` as a script meets it: piped, without colour, with and without vLLM; words and exit codes."""

import json
import subprocess
import sys
import textwrap

import pytest
from helpers import run_cli
from recorded import edited

from vllm_trace.learn import book, passages, plan, questions, runs
from vllm_trace.learn.progress import Progress
from vllm_trace.trace import read_trace


def answers(step, seed):
    one = plan.step(str(step))
    made = book.read(read_trace(runs.shipped(one.scenario)))
    return [each.answer for each in questions.ask(made, one.questions, seed)]


def flags(values):
    return [word for value in values for word in ("--answer", value)]


def test_the_map(learn):
    code, out, err = learn()
    assert (0, "") == (code, err)
    assert out.startswith("The learning plan: 0 of 21 steps")
    assert "#" not in out.splitlines()[0]


@pytest.mark.parametrize("words", [["5"], ["read", "5"], ["see", "5"], ["check", "5"], ["path", "deep"],
                                   ["ex2"], ["path"], ["sources"], ["read", "4", "slot-mapping"]])  # fmt: skip
def test_every_part_is_plain_text_of_80_columns(learn, words):
    code, out, err = learn(*words)
    assert (0, "") == (code, err)
    assert out.strip() and "\x1b" not in out
    assert [] == [line for line in out.splitlines() if len(line) > 80]


@pytest.mark.parametrize("words", [[], ["5"], ["read", "5"], ["see", "5"], ["check", "5"], ["path"],
                                   ["sources"], ["check", "5", "--answer", "V1"]])  # fmt: skip
def test_json_is_one_document(learn, words):
    _, out, err = learn(*words, "--json")
    assert "" == err
    assert json.loads(out)["schema"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["99"], "there is no step 99; the nearest is 21"),
        (["check", "99"], "there is no step 99; the nearest is 21"),
        (["chekc", "5"], "unknown word 'chekc'; did you mean 'check'?"),
        (["check"], "learn check needs a step"),
        (["path", "quik"], "unknown path 'quik'; did you mean 'quick'?"),
        (["start", "ex10"], "unknown exercise 'ex10'; did you mean 'ex1'?"),
        (["check", "ex1"], "there is no ex1.py here"),
        (["read", "5", "forward-decod"], "unknown reference of step 5 'forward-decod'; did you mean 'forward-decode'?"),
        (["5", "6"], "'6' is one word too many"),
        (["start"], "which exercise?"),
        (["sources", "--save"], "--save needs sources"),
        (["sources", "--source", "."], "no vLLM source in ."),
        (["see", "5", "--trace", "nowhere"], "there is no file or folder 'nowhere'"),
        (["check", "5", *["--answer", "1"] * 9], "step 5 has 4 questions, and there are 9 answers"),
    ],
)  # fmt: skip
def test_what_does_not_exist(learn, capsys, words, said):
    code, out, err = learn(*words)
    assert (2, "") == (code, out)
    assert f"vllm-trace: {said}" == err.splitlines()[0]


def test_answers_from_a_script(learn, progress):
    right = answers(4, progress.seed_of("4"))
    code, out, _ = learn("check", "4", *flags(["x", *right[1:]]))
    assert 1 == code and "hint:" in out and "right." in out
    assert "4" not in Progress.load().passed
    assert not any(f" {right[0]}." in line for line in out.splitlines() if "no," in line)
    code, out, _ = learn("check", "4", *flags(right[:2]))
    assert 1 == code and "2 questions without an answer." in out
    code, out, _ = learn("check", "4", *flags(right))
    assert 0 == code and "Step 4 is passed. Next: vllm-trace learn 5" in out
    assert "4" in Progress.load().passed
    # And then it asks something else.
    assert right != answers(4, Progress.load().seed_of("4"))


def test_a_seed_asks_the_same_of_everybody(learn):
    outs = {learn("check", "8", "--seed", "11")[1] for _ in range(2)}
    assert 1 == len(outs)
    code, _, _ = learn("check", "8", "--seed", "11", *flags(answers(8, "11")))
    assert 0 == code


def test_hints_on_request(learn):
    _, without, _ = learn("check", "3")
    _, out, _ = learn("check", "3", "--hint")
    assert "hint:" not in without and out.count("hint:") >= 4


def test_another_trace(learn):
    _, out, _ = learn("see", "13", "--trace", runs.shipped("batch"))
    assert "late-" in out or "early-" in out


def test_a_start_and_a_check(learn):
    code, out, _ = learn("start", "ex4")
    assert 0 == code and "Your file: ex4.py" in out
    code, out, _ = learn("check", "ex4")
    assert 1 == code and "slot_of is not written yet" in out
    code, _, err = learn("start", "ex4")
    assert 2 == code and "it was left as it is" in err
    from vllm_trace.learn import exercises

    (learn.folder / "ex4.py").write_text(exercises.exercise("ex4").text("solution"))
    code, out, _ = learn("check", "ex4")
    assert 0 == code and "ex4 is passed." in out
    code, out, _ = learn("check", "ex4", "--json")
    assert json.loads(out)["passed"]


def test_a_trace_that_went_away_is_replaced_by_the_shipped_one(learn, progress):
    progress.runs["hello"] = str(learn.folder / "gone")
    progress.save()
    code, out, _ = learn("see", "13")
    assert 0 == code and "the shipped trace of 'hello', not your own" in out
    assert {} == Progress.load().runs


@pytest.mark.parametrize("name", ["hello", "prefix", "long"])
def test_a_run_has_the_reader_s_seed(name):
    import tomllib

    made = tomllib.loads(runs.seeded(name, 4711))
    assert 4711 == made["seed"] and made["engine"] and made["requests"]


WITHOUT = """
    import sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("vllm", "torch", "matplotlib"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Refuse())
    import importlib.util
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: (
        None if name.partition(".")[0] in ("vllm", "torch", "matplotlib") else find_spec(name, package)
    )
    from vllm_trace.cli import main

    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["1"], "no vLLM here: by the table, 0.33.0"),
        (["read", "3"], "vllm/v1/core/block_pool.py:706"),
        (["read", "3", "block-pool-get"], "nothing to show"),
        (["run", "3"], "There is no vLLM here: step 3 uses the shipped trace of 'preempt'."),
        (["see", "3"], "a golden trace that comes with the package stands in"),
        (["check", "3"], "on the shipped trace of 'preempt', not your own"),
        (["sources"], f"of {len(passages.references())} found"),
        (["ex2"], "It needs torch, which is not here."),
    ],
)
def test_without_vllm_it_works_and_says_so(home, tmp_path, words, said):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT), "learn", *words],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (0, "") == (done.returncode, done.stderr)
    assert said in " ".join(done.stdout.split())


def test_help_is_quick_to_load(tmp_path):
    done = run_cli("learn", "--help", cwd=tmp_path)
    assert 0 == done.returncode and "Example: vllm-trace learn check 5" in done.stdout
    script = (
        "import sys, vllm_trace.cli as cli; cli._parser()\n"
        "print([n for n in sys.modules if n.startswith('vllm_trace.learn')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "[]\n" == done.stdout


def test_a_name_in_a_trace_cannot_command_the_terminal(learn, tmp_path):
    def rename(events):
        for event in events:
            if event.kind == "request.arrived":
                event.request_id = f"\x1b[31m{event.request_id}"

    folder = edited(runs.shipped("chunked"), tmp_path / "renamed", rename)
    code, out, err = learn("see", "3", "--trace", folder)
    assert (0, "") == (code, err)
    assert "\x1b" not in out and "␛[31m" in out
