"""Traces that somebody edited: each event is well formed, and together they make no sense.

Whatever a verb makes of one, it ends with 0, 1 or 2 and no traceback, in bounded time and memory.
"""

import json
from pathlib import Path

import msgspec
import pytest
from fakes.mutations import TEXTS, mutated
from helpers import configured, write_trace

from vllm_trace import cli
from vllm_trace.cli.printing import clean, print_json
from vllm_trace.events import (
    AttentionCalled,
    BackendSelected,
    BlocksFreed,
    BlocksTaken,
    RequestArrived,
    RequestFinished,
    SlotsAllocated,
    StepScheduled,
    StepUpdated,
)

GOLD = Path(__file__).parent / "gold"
VERBS = {
    "show": ["show", "TRACE"],
    "show --json": ["show", "TRACE", "--json"],
    "show steps": ["show", "TRACE", "steps"],
    "show requests": ["show", "TRACE", "requests"],
    "show kernels": ["show", "TRACE", "kernels"],
    "show blocks": ["show", "TRACE", "blocks"],
    "show events": ["show", "TRACE", "events"],
    "explain": ["explain", "TRACE", "#0"],
    "replay": ["replay", "TRACE"],
    "check": ["check", "TRACE"],
    "diff": ["diff", "TRACE", "GOLD"],
    "report": ["report", "TRACE", "-o", "OUT.html"],
    "export json": ["export", "TRACE", "--to", "json", "-o", "OUT.jsonl"],
    "export spans": ["export", "TRACE", "--to", "jaeger-json", "-o", "OUT.json"],
    "export perfetto": ["export", "TRACE", "--to", "perfetto", "-o", "OUT.pftrace"],
    "export parquet": ["export", "TRACE", "--to", "parquet", "-o", "OUT"],
}


def words(verb, trace, source, folder):
    said = {"TRACE": str(trace), "GOLD": str(source)}
    return [said.get(word, word.replace("OUT", str(folder / "out"))) for word in VERBS[verb]]


@pytest.mark.timeout(60)  # none takes a second; a loop without end would be found
@pytest.mark.parametrize("name", ["hello", "prefix", "preempt", "evict", "parallel", "abort"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_ends_with_a_code_and_no_traceback(verb, name, tmp_path, capsys):
    source = GOLD / f"{name}.vtrace"
    for seed in range(6):
        trace = tmp_path / f"{seed}.vtrace"
        edits = mutated(source, trace, seed)
        code = cli.main(words(verb, trace, source, tmp_path))
        out, err = capsys.readouterr()
        assert code in (0, 1, 2), edits
        assert "Traceback" not in out + err, edits
        if code == 2 and verb not in (
            "replay",
            "check",
        ):  # these tell on stdout what was not judged
            assert err.startswith("vllm-trace: "), edits
        if out and verb.startswith("show"):
            assert "\x1b" not in out and "\x9b" not in out and "\u202e" not in out, edits


def test_what_does_not_fit_together_is_one_line_with_the_way_on(tmp_path, capsys):
    events = [configured(), BlocksTaken([1]), BlocksFreed([1], [0, 0])]
    path = write_trace(tmp_path, "main", 1, [events])
    assert 2 == cli.main(["show", str(path)])
    out, err = capsys.readouterr()
    assert "" == out
    said, *hint = err.splitlines()
    assert said.startswith(f"vllm-trace: {path}: its events do not fit together (ValueError: zip()")
    assert f"vllm-trace check {path}" in hint[0]
    assert 2 == cli.main(["check", str(path)])
    assert "event 3 (blocks.freed) does not fit" in "".join(capsys.readouterr())


def test_a_bug_outside_of_traces_is_not_hidden(monkeypatch):
    def broken(arguments):
        raise KeyError("a bug")

    monkeypatch.setattr("vllm_trace.cli.run._scenarios", broken)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["scenarios"])


@pytest.fixture
def named(tmp_path):
    """A trace whose names want to drive the terminal, or rich."""
    events = [
        BackendSelected("layers.0", TEXTS[1], "I", [(TEXTS[1], "")], {}),
        configured(model="[/b]:x:"),
    ]
    for number, text in enumerate(TEXTS):
        events += [
            RequestArrived(number, 10, f"{number}{text}", 20, 1, 0, 0.0, [], {}),
            SlotsAllocated(number, 20, 0, [[number + 1]], [], 7 - number),
        ]
    everyone = list(range(len(TEXTS)))
    events += [
        StepScheduled(1, 20, 5, len(TEXTS), 0, 0, 0, everyone, [20] * len(TEXTS), everyone),
        AttentionCalled(1, "[/k]", [0], [30], [5]),
        *[RequestFinished(number, 40, text, 1, 0) for number, text in enumerate(TEXTS)],
        StepUpdated(1, 35, 9, [1] * len(TEXTS)),
    ]  # fmt: skip
    return write_trace(tmp_path, "main", 1, [events])


@pytest.mark.parametrize(
    "view",
    ["summary", "steps", "requests", "blocks", "kernels", "events", "explain", "check", "diff"],
)
def test_names_reach_the_terminal_as_text(named, view, capsys):
    verb = {
        "explain": ["explain", named, "#3"],
        "check": ["check", named],
        "diff": ["diff", named, named],
    }
    assert cli.main([*map(str, verb.get(view, ["show", named, view, "--all"]))]) in (0, 1, 2)
    out, err = capsys.readouterr()
    for obeyed in ("\x1b", "\x9b", "\u202e", "\x00"):
        assert obeyed not in out + err
    if view in ("requests", "summary"):
        assert "1[/x]" in out and "2:smile:" in out and "10two\u240alines" in out
    if view == "events":
        assert len(TEXTS) == sum("request.arrived" in line for line in out.splitlines())


def test_json_of_hostile_names_is_json_and_holds_them_unchanged(named, capsys):
    assert 0 == cli.main(["show", str(named), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [f"{n}{text}" for n, text in enumerate(TEXTS)] == [r["name"] for r in told["requests"]]


def test_what_is_no_finite_number_is_null_in_json(capsys):
    print_json({"a": [float("nan"), 1.5, (float("inf"),)], "b": {"c": float("-inf")}})
    out = capsys.readouterr().out
    assert {"a": [None, 1.5, [None]], "b": {"c": None}} == msgspec.json.decode(out)


def test_clean_keeps_what_people_write():
    assert "é → 1.5 µs\n\t·" == clean("é → 1.5 µs\n\t·")
    assert "␛[31m ␇ � �" == clean("\x1b[31m \x07 \x9b \u202e")
