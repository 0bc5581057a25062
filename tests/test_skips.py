"""A test that is skipped says what it misses; in the environment that ``.ci/lane`` makes, no package is missing."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IN_LANE = (Path(sys.prefix) / ".made-from").is_file()
SKIPS = ("importorskip", "skip", "skipif")

in_lane = pytest.mark.skipif(not IN_LANE, reason="not in the environment that .ci/lane makes")


def skips():
    """(place, name, arguments and keywords) of each call that skips."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in SKIPS and "pytest" in ast.unparse(node.func):
                    keywords = {each.arg: each.value for each in node.keywords}
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    yield place, node.func.attr, node.args, keywords


def test_every_skip_has_a_reason():
    found = list(skips())
    assert {*SKIPS} == {name for _, name, *_ in found}
    silent = [
        place
        for place, name, arguments, keywords in found
        if "reason" not in keywords and not (name == "skip" and arguments)
    ]
    assert [] == silent


@in_lane
def test_what_a_test_may_miss_is_in_the_lane():
    """By its own name: a module that has moved would be skipped for ever."""
    named = {
        ast.literal_eval(arguments[0])
        for _, name, arguments, _ in skips()
        if name == "importorskip" and isinstance(arguments[0], ast.Constant)
    }
    assert {"vllm", "torch", "pyarrow"} <= named
    assert [] == sorted(name for name in named if importlib.util.find_spec(name) is None)


@in_lane
def test_the_lane_is_what_its_pins_say():
    text = (ROOT / ".ci" / "lanes" / "cpu.txt").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.M))
    assert len(pins) > 100
    found = {}
    for name in pins:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    assert pins == found


def test_what_is_for_the_checkout_alone_runs_there():
    """``make test`` runs some files with the checkout: those with such tests are among them, all of each."""
    environ = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "T")}
    said = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "test"],
        cwd=ROOT, env=environ, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (plain,) = [line for line in said.splitlines() if '-m "not slow"' in line]
    marked = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.plain\n" in p.read_text()]
    assert marked
    for path in marked:
        place = path.relative_to(ROOT)
        assert any(str(one) in plain.split() for one in (place, *place.parents)), place
        assert "mark.slow" not in path.read_text(), f"{place}: the plain part leaves slow ones out"
