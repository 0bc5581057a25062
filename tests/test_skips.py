"""A test that is skipped says what it misses; in the environment that ``.ci/lane`` makes, no package is missing."""

import ast
import importlib.util
import re
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
