"""The command line as a user meets it: words, streams, exit codes, and what it can do without vLLM."""

import argparse
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
from helpers import configured, run_cli, write_trace

from vllm_trace import cli, scenario
from vllm_trace.events import RequestArrived, RequestFinished, StepScheduled, StepUpdated

VERBS = ("run", "scenarios", "record", "show", "doctor")


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


@pytest.fixture
def trace(tmp_path):
    """A trace of one request and one step."""
    events = [
        configured(),
        RequestArrived(0, 10, "r-0", 20, 1, 0, 0.0, [], {}),
        StepScheduled(1, 20, 5, 1, 0, 7, 0, [0], [20], [0]),
        RequestFinished(0, 40, "length", 1, 0),
        StepUpdated(1, 35, 9, [1]),
    ]
    write_trace(tmp_path / "trace", "main", 1, [events])
    return tmp_path


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """``main`` in this process and an empty folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def called(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return called


# Words that do not exist ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: VERB"),
        (["shwo"], "unknown verb 'shwo'; did you mean 'show'?"),
        (["run"], "the following arguments are required: scenario"),
        (["run", "prefx"], "unknown scenario 'prefx'; did you mean 'prefix'?"),
        (["run", "hello", "--tokns"], "unknown flag '--tokns'; did you mean '--tokens'?"),
        (["run", "hello", "--tok"], "unknown flag '--tok'; did you mean '--tokens'?"),
        (["run", "hello", "--level", "ful"], "unknown level 'ful'; did you mean 'full'?"),
        (["run", "hello", "twice"], "'twice' is one word too many"),
        (["run", "./nothing.toml"], "there is no scenario file ./nothing.toml"),
        (["run", "hello", "--engine-arg", "block_size"], "--engine-arg 'block_size' is not K=V"),
        (["record"], "record needs a command"),
        (["record", "--"], "record needs a command"),
        (["record", "--", "vlm", "serve"], "there is no command 'vlm'"),
        (["show", "nowhere"], "there is no file or folder 'nowhere'"),
        (["show", "."], ". holds no .vtrace file"),
        (["show", "trace", "step"], "unknown view 'step'; did you mean 'steps'?"),
        (["show", "trace", "--step", "x"], "--step 'x' is neither N nor N-M"),
        (["show", "trace", "events", "--kind", "blocks.take,slots.mopped"],
         "unknown kind of event 'slots.mopped'; did you mean 'slots.mapped'?"),
        (["show", "trace", "--seconds", "soon"], "argument --seconds: invalid float value: 'soon'"),
        (["doctor", "--source", "."], "no vLLM source in ."),
    ],
)  # fmt: skip
def test_a_word_that_does_not_exist(call, arguments, said):
    code, out, err = call(*arguments)
    assert (2, "") == (code, out)
    assert f"vllm-trace: {said}" == err.splitlines()[0]
    # What to do next, and where to read on.
    assert re.fullmatch(r"  \(README\.md#[a-z-]+\)", err.splitlines()[-1])
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("VTRACE_LEVLE", "full", "unknown variable 'VTRACE_LEVLE'; did you mean 'VTRACE_LEVEL'?"),
        ("VTRACE_LEVEL", "ligth", "unknown level 'ligth'; did you mean 'light'?"),
        ("VTRACE_TOKENS", "perhaps", "VTRACE_TOKENS='perhaps' is not a yes or a no"),
        ("VTRACE_FAILURES", "many", "VTRACE_FAILURES='many' is not a whole number"),
    ],
)
@pytest.mark.parametrize("verb", [["run", "hello"], ["record", "--", "true"]])
def test_a_variable_that_does_not_exist(call, tmp_path, monkeypatch, name, value, said, verb):
    monkeypatch.setitem(os.environ, name, value)
    code, out, err = call(*verb)
    assert (2, "") == (code, out)
    assert f"vllm-trace: {said}" == err.splitlines()[0]
    assert [] == list(tmp_path.iterdir())


def test_an_unwritable_folder(call, tmp_path):
    (tmp_path / "file").touch()
    code, out, err = call("record", "-o", "file/made", "--", "true")
    assert (2, "") == (code, out)
    assert "vllm-trace: cannot write to file/made: Not a directory" == err.splitlines()[0]


def test_what_could_not_run_leaves_nothing(call, tmp_path):
    code, _, _ = call("record", "--", "no-such-command")
    assert 2 == code
    assert [] == [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert [] == list((tmp_path / "reports/record").iterdir())


def test_latest_is_the_last_that_ran(call, tmp_path):
    assert 0 == call("record", "--", "true")[0]
    latest = tmp_path / "reports/record/latest"
    first = os.readlink(latest)
    call("record", "--", "no-such-command")
    assert first == os.readlink(latest)
    assert 1 == call("record", "--", "false")[0]
    assert first != os.readlink(latest)


# Help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", sorted(subparsers()))
def test_every_verb_has_help_with_an_example_that_parses(verb):
    text = subparsers()[verb].format_help()
    (example,) = re.findall(r"^Example: vllm-trace (.*)$", text, re.M)
    assert verb == example.split()[0]
    assert verb == cli._parser().parse_args(example.split()).verb
    assert "--json" in text
    assert [] == [line for line in text.splitlines() if len(line) > 80]


def test_help_goes_to_stdout(tmp_path):
    done = run_cli("--help", cwd=tmp_path)
    assert (0, "") == (done.returncode, done.stderr)
    for verb in VERBS:
        assert re.search(rf"^    {verb}\s", done.stdout, re.M)


# JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["scenarios"],
        ["show", "trace"],
        *(
            ["show", "trace", view]
            for view in ("summary", "steps", "blocks", "requests", "kernels")
        ),
        ["doctor"],
    ],
)
def test_json_is_one_document_and_nothing_else(trace, call, arguments):
    _, out, err = call(*arguments, "--json")
    assert "" == err
    assert json.loads(out)["schema"] >= 1


def test_json_of_record_is_after_the_command_s_own_output(tmp_path):
    done = run_cli("record", "--json", "--", "echo", "hi", cwd=tmp_path)
    assert 0 == done.returncode
    first, _, rest = done.stdout.partition("\n")
    assert "hi" == first
    assert {"schema": 1, "code": 0}.items() <= json.loads(rest).items()
    assert "vllm-trace: no vLLM process of that command wrote a trace" in done.stderr


def test_scenarios_lists_all_of_them(call):
    code, out, err = call("scenarios")
    assert (0, "") == (code, err)
    assert scenario.names() == [line.split()[0] for line in out.splitlines()[1:]]
    assert all(len(line) <= 80 for line in out.splitlines())


def test_problems_of_a_trace_are_said(trace, call):
    path = trace / "trace/main-1.vtrace"
    path.write_bytes(path.read_bytes()[:-40])
    _, out, err = call("show", "trace")
    assert "What this trace does not hold" in out and "main-1: truncated" in out
    for view in ("steps", "events"):
        _, out, err = call("show", "trace", view)
        assert "vllm-trace: main-1: truncated" in err
        assert "truncated" not in out


def test_a_closed_pipe_is_no_error(trace):
    """``vllm-trace show TRACE events | head -1``"""
    done = subprocess.run(
        f"{sys.executable} -m vllm_trace show trace events | true",
        shell=True, cwd=trace, capture_output=True, text=True,
    )  # fmt: skip
    assert "" == done.stderr


# Without vLLM -----------------------------------------------------------------------------

BARE = """
    import sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("vllm", "torch"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Refuse())
    import importlib.util
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: (
        None if name.partition(".")[0] in ("vllm", "torch") else find_spec(name, package)
    )
    from vllm_trace.cli import main

    code = main(sys.argv[1:])
    loaded = [name for name in ("vllm", "torch", "numpy") if name in sys.modules]
    assert not loaded, loaded
    sys.exit(code)
"""


def bare(*arguments, cwd):
    """The command line in a process where neither vLLM nor torch can be found."""
    script = textwrap.dedent(BARE)
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize("view", ["summary", "steps", "blocks", "requests", "kernels", "events"])
def test_show_needs_no_vllm(trace, view):
    done = bare("show", "trace", view, cwd=trace)
    assert (0, "") == (done.returncode, done.stderr)
    assert done.stdout.strip()


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["scenarios"], ["run", "--help"]])
def test_the_rest_needs_no_vllm_either(tmp_path, arguments):
    done = bare(*arguments, cwd=tmp_path)
    assert (0, "") == (done.returncode, done.stderr)


def test_doctor_without_vllm_says_so(tmp_path):
    done = bare("doctor", cwd=tmp_path)
    assert (1, "") == (done.returncode, done.stderr)
    assert "vLLM is not installed here: traces can be read, not made" in done.stdout
    assert "vllm-trace doctor --source DIR" in done.stdout
    assert "torch        (absent: no engine" in done.stdout


def test_run_without_vllm_is_one_clear_line(tmp_path):
    done = bare("run", "hello", cwd=tmp_path)
    assert (2, "") == (done.returncode, done.stdout)
    assert "vllm-trace: vLLM cannot be imported" in done.stderr
    assert "make demo" in done.stderr


def test_record_without_vllm_runs_the_command_and_says_what_is_missing(tmp_path):
    done = bare("record", "--", sys.executable, "-c", "print('done')", cwd=tmp_path)
    assert (0, "done\n") == (done.returncode, done.stdout)
    assert "no vLLM process of that command wrote a trace" in done.stderr


def test_the_command_line_loads_neither_torch_nor_vllm():
    script = (
        "import sys, vllm_trace.cli as cli; cli._parser()\n"
        "print([n for n in ('torch', 'vllm', 'numpy', 'triton') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "[]\n" == done.stdout
