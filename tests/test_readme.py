"""The README's commands exist, and its tables are what the code says."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from vllm_trace import cli, options, scenario, tables
from vllm_trace.cli import run

README = Path(__file__).resolve().parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")

OURS = (["vllm-trace"], ["python", "-m", "vllm_trace"], [".venv/bin/python", "-m", "vllm_trace"])


def commands() -> list[list[str]]:
    """Words of every command line in a ``console`` block; an output line begins with no command."""
    blocks = re.findall(r"^```console\n(.*?)^```", TEXT, re.S | re.M)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def arguments_of(words: list[str]) -> list[str] | None:
    """What follows ``vllm-trace`` in a command; None when it is another program's."""
    for start in OURS:
        if words[: len(start)] == start:
            return words[len(start) :]
    return None


TRACED = [words for words in map(arguments_of, commands()) if words is not None]
MAKE = [words[1:] for words in commands() if words[0] == "make"]


def test_there_are_commands_to_check():
    assert len(TRACED) >= 5
    assert ["demo"] in MAKE and ["test"] in MAKE


@pytest.mark.parametrize("words", TRACED, ids=" ".join)
def test_a_command_is_one_that_the_parser_takes(words):
    parsed = cli._parser().parse_args(words)
    if parsed.verb == "run":
        assert scenario.load(parsed.scenario)
        assert not parsed.level or parsed.level in options.LEVELS
        assert run.parse_engine_args(parsed.engine_arg) is not None
    if parsed.verb == "show":
        from vllm_trace.show import Filter

        assert parsed.view in options.VIEWS
        Filter.parse(parsed.request, parsed.step, parsed.kind).check(parsed.view)


@pytest.mark.parametrize("words", MAKE, ids=" ".join)
def test_a_make_target_exists(words):
    makefile = (README.parent / "Makefile").read_text()
    (target,) = [word for word in words if "=" not in word]
    assert re.search(rf"^{target}:", makefile, re.M)


def test_every_verb_is_in_the_readme():
    (action,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    told = set(re.findall(r"^\| `([a-z]+)", TEXT, re.M))
    assert set() == set(action.choices) - told


def test_every_variable_of_the_recorder_is_in_the_readme():
    told = set(re.findall(r"VTRACE_[A-Z_]+", TEXT))
    known = {f"VTRACE_{name.upper()}" for name in options.Options.__dataclass_fields__}
    assert set() == known - told
    assert set() == told - known - options.OTHER_VARIABLES.keys()


def test_every_slug_has_its_heading():
    from vllm_trace import errors

    kinds = [errors.VllmTraceError, *errors.VllmTraceError.__subclasses__()]
    headings = {line.lstrip("# ").lower() for line in TEXT.splitlines() if line.startswith("#")}
    assert set() == {kind.slug for kind in kinds} - headings


@pytest.mark.parametrize(
    ("name", "make"), [("support", tables.support_table), ("events", tables.event_table)]
)
def test_a_table_is_what_the_code_says(name, make):
    between = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", TEXT, re.S)
    assert between is not None
    assert make() == between[1]
