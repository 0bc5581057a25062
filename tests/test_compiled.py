"""What is compiled when the package is installed: the list, and what mypyc makes of some Python that is not Python."""

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from vllm_trace.compiled import ONE_OF_THEM, is_compiled

ROOT = Path(__file__).resolve().parents[1]
LISTED = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["vllm_trace"]["compiled"]
HARMLESS = ("len", "min", "max")


def tree_of(module):
    return ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())


def test_the_list_is_sorted_and_each_is_there():
    assert LISTED == sorted({*LISTED})
    assert ONE_OF_THEM in LISTED
    for module in LISTED:
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


@pytest.mark.parametrize("module", LISTED)
def test_nothing_is_called_twice(module):
    """mypyc 2.4 evaluates the bounds of a slice twice, unless it is of a list, a tuple, a string or bytes."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
            called = [part.func for part in ast.walk(node.slice) if isinstance(part, ast.Call)]
            names = [ast.unparse(function) for function in called]
            assert {*names} <= {*HARMLESS}, f"{module}:{node.lineno}: {ast.unparse(node)}"


def ask(**environ):
    """Whether a fresh process says that it is compiled, and the file of a module that would be."""
    asked = "from vllm_trace import compiled; from vllm_trace.mini import block_pool as one; "
    asked += "print(compiled.is_compiled(), one.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", asked],
        cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said, file = done.stdout.split()
    return said == "True", file


def test_it_is_known_what_runs():
    said, file = ask()
    assert said is not file.endswith(".py")
    assert said is is_compiled()


def test_the_sources_can_be_asked_for():
    said, file = ask(VTRACE_PLAIN="1")
    assert not said and file.endswith(".py")
    assert ask(VTRACE_PLAIN="0") == ask()


def test_without_a_compiler_it_is_installed_as_plain_python(tmp_path):
    """All of it, and it says so."""
    source = tmp_path / "source"
    source.mkdir()
    for name in (
        "pyproject.toml",
        "setup.py",
        "README.md",
        "vllm_trace",
        "patches",
        "scenarios",
        "tests",
    ):
        (source / name).symlink_to(ROOT / name)
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    environ = {**os.environ, "CC": str(tmp_path / "no-such-compiler"), "VTRACE_COMPILE": ""}
    done = subprocess.run(
        [*wheel, "--wheel-dir", str(tmp_path), str(source)],
        env=environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vllm_trace is installed as plain Python" in done.stdout + done.stderr
    (made,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(made).namelist()
    assert {module.replace(".", "/") + ".py" for module in LISTED} <= {*names}
    assert [] == [name for name in names if name.endswith((".so", ".pyd"))]
