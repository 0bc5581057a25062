"""Skeletons fail with the right word, solutions pass, and nothing that a reader's file does hurts."""

import ast
import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_trace.errors import UsageError
from vllm_trace.learn import exercises, watching
from vllm_trace.learn.exercises import faults, running
from vllm_trace.trace import read_trace

ALL = exercises.all_of_them()
PYTHON = [one for one in ALL if one.file.endswith(".py")]


def done(one, text, progress, folder, answers=()):
    """Grade a text as the reader's file."""
    path = folder / one.file
    path.write_text(text)
    if one.missing():
        pytest.skip(f"{one.missing()} is not here")
    return exercises.check(one, path, progress, list(answers))


def first_failure(result):
    (failed,) = [check for check in result.checks if not check["passed"]]
    return failed


# Signatures --------------------------------------------------------------------------------


def signatures(text):
    """Name → arguments of every public function and class of a file."""
    made = {}

    def look(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef):
                made[f"{prefix}{node.name}"] = [ast.unparse(d) for d in node.decorator_list]
                look(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and (
                not node.name.startswith("_") or node.name == "__init__"
            ):
                returns = ast.unparse(node.returns) if node.returns else ""
                made[f"{prefix}{node.name}"] = (ast.unparse(node.args), returns)

    look(ast.parse(text).body, "")
    return made


@pytest.mark.parametrize("one", PYTHON, ids=lambda e: e.name)
def test_skeleton_and_solution_have_the_same_signatures(one):
    skeleton, solution = signatures(one.text("skeleton")), signatures(one.text("solution"))
    assert skeleton and skeleton == solution


def test_the_cuda_ones_too():
    one = exercises.exercise("ex2-cuda")
    heads = [
        re.search(r"__global__ void \w+\(.*?\) \{", one.text(which), re.S)[0]
        for which in ("skeleton", "solution")
    ]
    assert heads[0] == heads[1]


@pytest.mark.parametrize("one", PYTHON, ids=lambda e: e.name)
def test_a_skeleton_tells_what_to_do(one):
    tree = ast.parse(one.text("skeleton"))
    assert f"learn check {one.name}" in ast.get_docstring(tree)
    assert "NotImplementedError" in one.text("skeleton")
    assert "NotImplementedError" not in one.text("solution")


# Skeletons and solutions -------------------------------------------------------------------

SAYS = {
    "ex1": "__init__ is not written yet",
    "ex2": "simple_paged_attention is not written yet",
    "ex2-triton": "simple_paged_attention is not written yet",
    "ex2-cuda": "simple_paged_attention is not written",
    "ex3": "make_cache is not written yet",
    "ex4": "slot_of is not written yet",
    "ex5": "block_hashes is not written yet",
    "ex6": "__init__ is not written yet",
    "ex7": "reduce is not written yet",
    "ex8": "schedule is not written yet",
    "ex9": "find_fault is not written yet",
}


@pytest.mark.parametrize("one", ALL, ids=lambda e: e.name)
def test_a_skeleton_fails_with_the_right_word(one, progress, tmp_path):
    exercises.start(one, progress, tmp_path)
    result = done(one, one.text("skeleton"), progress, tmp_path)
    assert not result.passed and one.name not in progress.passed
    assert SAYS[one.name] in first_failure(result)["said"]
    assert result.left
    lines = exercises.told(one, result)
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("one", ALL, ids=lambda e: e.name)
def test_a_solution_passes(one, progress, tmp_path):
    exercises.start(one, progress, tmp_path)
    result = done(one, one.text("solution"), progress, tmp_path)
    assert [] == [check for check in result.checks if not check["passed"]]
    if one.name == "ex3":
        assert 2 == len(result.questions) and not result.passed
        return
    assert result.passed and one.name in progress.passed
    assert 0 == result.left


# Nearly right ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "right", "wrong", "check", "said"),
    [
        ("ex1", "self.block_tables.pop(seq_id) + self.free_blocks",
         "self.free_blocks + self.block_tables.pop(seq_id)", "the deep dive", "were not reused"),
        ("ex1", "return list(self.block_tables[seq_id])", "return self.block_tables[seq_id]",
         "tables grow", "the table changed with it"),
        ("ex1", "if num_blocks > len(self.free_blocks):", "if num_blocks > 99:", "all or none", "1 block was free"),
        ("ex2", "context_len - logical * block_size)", "block_size)", "a last block", "the result is NaN"),
        ("ex2", " / head_dim**0.5", "", "one full block", "off by"),
        ("ex2", "int(block_table[logical])", "logical", "blocks in any order", "NaN"),
        ("ex3", "cache[block, :, place] = vectors", "cache[block, :, place - 1] = vectors",
         "what is written", "layout 2"),
        ("ex4", "position % block_size", "position", "one position", "it should be 9"),
        ("ex4", "[-1] *", "[0] *", "a flattened batch", "padded to 10"),
        ("ex5", "hash((parent, ", "hash((0, ", "hashes are chained", "the same hash"),
        ("ex5", "(num_tokens - 1) // block_size", "num_tokens // block_size", "hits, by hand", "16 tokens"),
        ("ex5", "            break", "            continue", "hits, by hand", "it should be 0"),
        ("ex6", "elif self.ref_cnt[table[-1]] > 1:", "elif False:", "a fork copies", "copies []"),
        ("ex6", "            self.ref_cnt[shared] -= 1\n", "", "a fork copies", "parent is alone"),
        ("ex7", "* torch.exp(max_logits - max_logits.max())", "", "two partitions", "off by"),
        ("ex7", "max_logits - max_logits.max()", "max_logits", "large logits", "NaN"),
        ("ex8", "left.pop()", "left.pop(0)", "who gives way", "it should be"),
        ("ex8", "request.num_tokens + 1", "request.num_tokens", "who gives way", "it should be"),
        ("ex9", "            held |= set(event.blocks)\n", "", "the fault in your trace", "you found None"),
        ("ex9", '("blocks.touched", "blocks.freed")', '("blocks.touched",)', "clean traces", "is clean"),
        ("ex9", "enumerate(events, 1)", "enumerate(events)", "the fault in your trace", "you found"),
    ],
)  # fmt: skip
def test_a_mistake_is_explained(name, right, wrong, check, said, progress, tmp_path):
    one = exercises.exercise(name)
    exercises.start(one, progress, tmp_path)
    text = one.text("solution")
    assert right in text
    result = done(one, text.replace(right, wrong), progress, tmp_path)
    failed = first_failure(result)
    assert failed["title"].startswith(check) and said in failed["said"]
    assert "Failed:" not in failed["said"]


def test_a_hint_comes_with_the_failure(progress, tmp_path):
    one = exercises.exercise("ex1")
    text = one.text("solution").replace(
        "self.block_tables.pop(seq_id) + self.free_blocks",
        "self.free_blocks + self.block_tables.pop(seq_id)",
    )
    result = done(one, text, progress, tmp_path)
    assert first_failure(result)["hint"].startswith("Put freed blocks where allocate takes them")
    assert any(line.startswith("    hint: Put freed") for line in exercises.told(one, result))


# What readers' files do --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("while True: pass", "it did not end within 1 s and was stopped"),
        ("while True: print('x' * 1000)", "it printed more than 1 MB and was stopped"),
        ("import ctypes; ctypes.string_at(0)", "the process crashed (SIGSEGV)"),
        ("import os; os._exit(3)", "the process ended itself with code 3"),
        ("import os; os._exit(0)", "the process ended by itself"),
        ("import sys; sys.exit()", "line 1, in <module>: it calls exit()"),
        ("def f(:", "line 1: "),
        ("import nothing_like_it", "line 1, in <module>: ModuleNotFoundError"),
        ("x = 1 / 0", "line 1, in <module>: ZeroDivisionError: division by zero"),
        ("def f(): f()\nf()", "line 1, in f: it calls itself without end"),
        ("class Other: pass", "'SimpleBlockManager' is missing from your file"),
        ("a = []\nwhile True: a.append(bytearray(1 << 29))", "line 2, in <module>: MemoryError"),
        ("import subprocess; subprocess.Popen(['sleep', '60']); input()", "EOFError"),
        ("raise BaseException('odd')", "BaseException: odd"),
    ],
)
def test_whatever_a_file_does_it_is_explained(text, said, progress, tmp_path, monkeypatch):
    if "pass" in text and "while" in text:
        monkeypatch.setattr(running, "LIMIT_S", 1)
    result = done(exercises.exercise("ex1"), text, progress, tmp_path)
    assert not result.passed
    assert said in first_failure(result)["said"]
    assert text == (tmp_path / "ex1.py").read_text()
    assert len(result.output) < 4 * running.KEPT_BYTES


def test_checks_before_a_crash_are_not_lost(progress, tmp_path):
    one = exercises.exercise("ex1")
    text = one.text("solution").replace(
        "        return len(self.free_blocks)", "        import os\n        os.kill(os.getpid(), 9)"
    )
    result = done(one, text, progress, tmp_path)
    assert [True, True, True] == [check["passed"] for check in result.checks[:3]]
    assert "crashed (SIGKILL)" in first_failure(result)["said"]
    assert first_failure(result)["title"].startswith("all or none")


def test_what_it_prints_is_shown(progress, tmp_path):
    one = exercises.exercise("ex4")
    result = done(one, "print('table!')\n" + one.text("solution"), progress, tmp_path)
    assert result.passed and "table!" in result.output
    assert any("| table!" in line for line in exercises.told(one, result))


# Files -------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_left_alone(progress, tmp_path):
    one = exercises.exercise("ex1")
    (path,) = exercises.start(one, progress, tmp_path)
    path.write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        exercises.start(one, progress, tmp_path)
    assert "mine" == path.read_text()
    exercises.start(one, progress, tmp_path, again=True)
    assert one.text("skeleton") == path.read_text()
    assert "mine" == (tmp_path / "ex1.py.1").read_text()


def test_the_file_is_found_from_another_folder(progress, tmp_path):
    one = exercises.exercise("ex1")
    (path,) = exercises.start(one, progress, tmp_path / "there")
    assert path == exercises.file_of(one, progress, tmp_path)
    with pytest.raises(UsageError, match=r"no ex4\.py here") as caught:
        exercises.file_of(exercises.exercise("ex4"), progress, tmp_path)
    assert "learn start ex4" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "near"),
    [("ex10", "ex1"), ("ex2-tritn", "ex2-triton"), ("ex2-cudda", "ex2-cuda")],
)
def test_an_exercise_that_does_not_exist(name, near):
    assert exercises.looks_like(name)
    with pytest.raises(UsageError, match=f"unknown exercise '{name}'; did you mean '{near[:3]}"):
        exercises.exercise(name)


@pytest.mark.parametrize("name", ["ex1", "EX1", "exercise1", "exercise-1", "ex2_triton"])
def test_an_exercise_by_other_names(name):
    assert exercises.exercise(name).name in ("ex1", "ex2-triton")


# Exercise 3 and 9 --------------------------------------------------------------------------


def test_the_layouts_are_asked_about(progress, tmp_path):
    one = exercises.exercise("ex3")
    text = one.text("solution")
    result = done(one, text, progress, tmp_path)
    assert (tmp_path / "ex3-layouts.png").stat().st_size > 1000
    asked = [float(n) for n in re.findall(r"\d: (\d+) µs", result.questions[0])]
    assert 3 == len(asked)
    fastest = str(1 + asked.index(min(asked)))
    slowest = str(1 + asked.index(max(asked)))
    layout = int(re.search(r"In layout (\d)", result.questions[1])[1])
    apart = "512" if layout == 1 else "64"
    wrong = done(one, text, progress, tmp_path, [slowest, "63"])
    if max(asked) > 1.1 * min(asked):
        assert not wrong.checks[-2]["passed"]
    assert not wrong.passed and "Look" in str(wrong.checks) + "Look"
    right = done(one, text, progress, tmp_path, [fastest, apart])
    assert right.passed and "ex3" in progress.passed
    with pytest.raises(UsageError, match="2 questions"):
        done(one, text, progress, tmp_path, ["1", "2", "3"])


def test_the_fault_is_another_for_another_reader(progress, tmp_path):
    numbers = {faults.inject(faults.clean("batch"), seed)[1] for seed in range(20)}
    assert len(numbers) >= 4


def test_the_faulty_trace_is_one_that_check_rejects(progress, tmp_path):
    from vllm_trace.invariants import checking, judgements

    path = faults.write(tmp_path / "ex9.vtrace", 7)
    _, number = faults.inject(faults.clean("batch"), 7)
    assert read_trace(path).problems == []
    (report,) = checking.check_all([path], [])
    assert 1 == judgements.exit_code([report])
    assert f"event {number}" in report.text()


# CUDA --------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("context_len;", "context_len", "error"),
        ("query[d]", "querry[d]", 'identifier "querry" is undefined'),
    ],
)
def test_a_cuda_file_that_does_not_compile(right, wrong, said, progress, tmp_path):
    one = exercises.exercise("ex2-cuda")
    result = done(one, one.text("solution").replace(right, wrong, 1), progress, tmp_path)
    failed = first_failure(result)
    assert "it compiles" == failed["title"] and said in failed["said"]
    assert "ex2_cuda.cu" in failed["said"] and str(tmp_path) not in failed["said"]


def test_without_nvcc_it_is_said(progress, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    one = exercises.exercise("ex2-cuda")
    (tmp_path / one.file).write_text(one.text("solution"))
    result = exercises.check(one, tmp_path / one.file, progress)
    assert "nvcc is not here" == first_failure(result)["said"]


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("", "", "ok"),
        ("sum * rsqrtf((float)head_dim)", "sum", "1 tokens, context 4"),
        ("scores[i] - largest", "scores[i]", "is the largest taken off before exp?"),
        ("block_table[i / block_size]", "(i / block_size)", "nan"),
    ],
)
def test_the_harness_judges_without_a_gpu(right, wrong, said, tmp_path):
    """The CUDA solution and its mistakes, one thread at a time on the CPU."""
    one = exercises.exercise("ex2-cuda")
    launch = "simple_paged_attention<<<num_tokens, 128, context_len * 4>>>("
    harness = one.text("harness")
    assert launch in harness
    loop = "for (blockIdx.x = 0; blockIdx.x < num_tokens; blockIdx.x++) simple_paged_attention("
    shim = Path(__file__).with_name("cuda_shim.h").read_text()
    text = shim + one.text("solution").replace(right, wrong) + harness.replace(launch, loop)
    (tmp_path / "all.cpp").write_text(text)
    subprocess.run(["g++", "-std=c++17", "-o", "program", "all.cpp"], cwd=tmp_path, check=True)
    done = subprocess.run(["./program"], cwd=tmp_path, capture_output=True, text=True)
    assert (0 if said == "ok" else 1) == done.returncode
    assert said in done.stdout


# Watching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [watching.changes, watching.polled])
def test_a_save_is_seen(how, tmp_path):
    path = tmp_path / "ex1.py"
    path.write_text("one")
    seen = threading.Event()

    def wait():
        next(how(path))
        seen.set()

    threading.Thread(target=wait, daemon=True).start()
    for turn in range(40):
        beside = tmp_path / "ex1.tmp"  # as editors do
        beside.write_text(f"text {turn}")
        beside.replace(path)
        if seen.wait(0.5):
            return
    raise AssertionError("no change was seen")


def test_watching_waits(tmp_path, monkeypatch):
    path = tmp_path / "ex1.py"
    path.write_text("one")
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 4:
            path.write_text("another")

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=nap))
    next(watching.polled(path))
    assert [watching.POLL_S] * 4 == naps
