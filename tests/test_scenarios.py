"""Every scenario on the real engine, in one process: what it shows, and that tracing changes nothing."""

import importlib
import json
import os
from copy import deepcopy

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from helpers import MODES, Ran, ran, tracing

from vllm_trace import cli, hooks, render, scenario, show
from vllm_trace.events import (
    RequestFinished,
    SlotsMapped,
    StepScheduled,
    StepUpdated,
    TableRowChanged,
)
from vllm_trace.patches import TABLES
from vllm_trace.state import KVState
from vllm_trace.summary import Summary
from vllm_trace.trace import Trace, read_trace

SLOW = ("mixed", "long")
ALL = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in scenario.names()
]
COMPARED = ["chunked", "prefix", "preempt", "batch", pytest.param("mixed", marks=pytest.mark.slow)]


def trace_of(done: Ran) -> Trace:
    assert done.folder is not None
    return read_trace(done.folder)


def tables_of(trace: Trace, state: KVState) -> dict[str, list[list[int]]]:
    return {trace.names[request]: deepcopy(table) for request, table in state.tables.items()}


@pytest.mark.parametrize("name", ALL)
def test_a_scenario_shows_what_it_states(name):
    trace = trace_of(ran(name, "full"))
    summary = Summary.of(trace)
    assert [] == scenario.load(name).failures(summary.facts())
    assert [] == trace.problems
    assert [(0, "")] == [(file.dropped, file.truncated) for file in trace.files]


@pytest.mark.parametrize("name", ALL)
def test_the_trace_is_what_the_scheduler_did(name):
    """Composition, tables and outcome against the scheduler object, read by the test itself."""
    done = ran(name, "full")
    trace, state, steps = trace_of(done), KVState(), []
    outputs: dict[str, int] = {}
    for event in trace.events():
        state.apply(event)
        if isinstance(event, StepScheduled) and event.requests:
            called = [trace.names[request] for request in event.requests]
            steps.append(
                (list(zip(called, event.num_tokens, strict=True)), tables_of(trace, state))
            )
        if isinstance(event, RequestFinished):
            outputs[trace.names[event.request]] = event.num_output_tokens
    assert [step.composition for step in done.steps] == [step[0] for step in steps]
    assert [step.tables for step in done.steps] == [step[1] for step in steps]
    for request, (ids, *others) in done.outcome.token_ids.items():
        if request in outputs and not others:
            assert len(ids) <= outputs[request]
    assert {} == state.tables


@pytest.mark.parametrize("name", ALL)
def test_kernels_received_the_manager_s_tables_and_slots(name):
    done = ran(name, "full")
    trace, rows, mapped = trace_of(done), {}, 0
    for event in trace.events():
        if isinstance(event, TableRowChanged):
            rows.setdefault(event.request, [])[event.first :] = event.blocks
        if isinstance(event, SlotsMapped):
            seen = done.steps[mapped]
            mapped += 1
            assert set(seen.tokens) == {trace.names[request] for request in event.requests}
            slots = iter(event.slots)
            for request in event.requests:
                called = trace.names[request]
                (table,) = seen.tables[called]
                begin, size = seen.computed[called], event.block_size
                end = begin + seen.tokens[called]
                blocks = -(-end // size)
                assert table[:blocks] == rows[request][:blocks]
                for place in range(begin, end):
                    assert table[place // size] * size + place % size == next(slots)
            assert [] == list(slots)
    assert len(done.steps) == mapped
    summary = Summary.of(trace)
    assert "" == summary.worker.first_difference
    assert sum(len(step.tokens) for step in done.steps) == summary.worker.num_rows
    assert sum(sum(step.tokens.values()) for step in done.steps) == summary.worker.num_slots


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("mode", MODES[1:])
def test_tracing_changes_neither_tokens_nor_schedule(name, mode):
    plain, other = ran(name, "off"), ran(name, mode)
    assert len(plain.steps) > 5
    assert plain.outcome.token_ids == other.outcome.token_ids
    assert plain.steps == other.steps


def test_greedy_tokens_vary():
    """Else the comparisons above would compare nothing."""
    answers = [ids for (ids,) in ran("batch", "off").outcome.token_ids.values()]
    assert len(answers) == len({ids[:4] for ids in answers})
    assert all(len(set(ids)) > 2 for ids in answers)


@pytest.mark.parametrize("level", ["light", "full"])
def test_undo_restores_the_originals(tmp_path, level):
    before = _targets()
    with tracing(tmp_path, level):
        hooks.register()
        assert hooks.recorder() is not None
        assert before != _targets()
        assert [] == hooks.detach()
        after = _targets()
    assert before.keys() == after.keys()
    assert all(before[target] is after[target] for target in before)


def _targets() -> dict[str, object]:
    """What stands at each target of the installed release's table."""
    found: dict[str, object] = {}
    (table,) = [table for table in TABLES if table.covers("0.32.0")]
    for hook in table.hooks:
        try:
            owner: object = importlib.import_module(hook.module)
        except ImportError:  # a CUDA backend
            continue
        *path, name = hook.qualname.split(".")
        for part in path:
            owner = getattr(owner, part)
        found[hook.target] = vars(owner)[name]
    assert len(found) > 15
    return found


@pytest.mark.parametrize("name", COMPARED)
def test_light_holds_the_schedule(name):
    """Level light has no tables, hits or slots, but who ran with how many tokens in every step."""
    done = ran(name, "light")
    trace, seen = trace_of(done), []
    for event in trace.events():
        if isinstance(event, StepScheduled) and event.requests:
            called = [trace.names[request] for request in event.requests]
            seen.append(list(zip(called, event.num_tokens, strict=True)))
    assert [step.composition for step in done.steps] == seen
    light, full = Summary.of(trace), Summary.of(trace_of(ran(name, "full")))
    assert full.num_preemptions == light.num_preemptions
    for fact in ("name", "reason", "num_output_tokens", "num_steps", "num_preemptions"):
        assert [getattr(life, fact) for life in full.requests] == [
            getattr(life, fact) for life in light.requests
        ]
    assert [] == trace.problems
    assert "light" == trace.level


def test_the_map_of_the_pool_is_the_tables():
    done = ran("preempt", "full")
    columns = show.data(trace_of(done), "blocks", show.Filter())["columns"]
    numbers = {"r-0": 0, "r-1": 1, "r-2": 2}
    expected = []
    for step in done.steps:
        owners = dict.fromkeys(range(9), "nobody")
        for name, (table,) in step.tables.items():
            owners |= dict.fromkeys(table, numbers[name])
        expected.append(list(owners.values()))
    told = [[o if o >= 0 else "nobody" for o in column["owners"]] for column in columns]
    assert expected == told
    lines = render.plain(show.view(trace_of(done), "blocks", show.Filter(), 24)).splitlines()
    rows = {line.split()[0]: line[10:] for line in lines[2:10]}
    assert [*"12345678"] == list(rows)
    for number, row in rows.items():
        # Every second step has a column.
        owners = [column["owners"][int(number)] for column in columns[::2]]
        assert "".join({-2: " ", -1: "·"}.get(o) or "abc"[o] for o in owners).rstrip() == row
    # What was taken from r-2 goes to the others, and comes back to it.
    assert rows["7"].startswith("   aaa") and rows["7"].endswith("ccc")


def test_with_tokens_the_trace_holds_prompts_and_answers():
    done = ran("chunked", "full")
    trace = trace_of(done)
    answers: dict[str, list[int]] = {}
    running: dict[int, list[int]] = {}
    for event in trace.events():
        if isinstance(event, StepScheduled):
            running[event.step] = event.requests
        if isinstance(event, StepUpdated):
            for request, ids in zip(running[event.step], event.token_ids, strict=True):
                answers.setdefault(trace.names[request], []).extend(ids)
    assert {name: [tuple(ids)] for name, ids in answers.items()} == done.outcome.token_ids


@pytest.fixture
def command_line(tmp_path, monkeypatch, capfd):
    """``main`` in this process, where vLLM is loaded already; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return code, *capfd.readouterr()

    yield call
    os.environ.clear()
    os.environ.update(before)


def test_run_prints_and_keeps_a_summary(command_line, tmp_path):
    code, out, err = command_line("run", "preempt")
    assert (0, "") == (code, err)
    for words in (
        "preempt: A pool too small for everybody",
        "vLLM 0.32",
        "attention backend CPU_ATTN for 2 layers (the only one that the CPU platform has",
        "cpu_attention_with_kv_cache",
        "preempted 1",
        "preemptions: 1, of r-2",
        "all equal to",
        "Shown as stated",
    ):
        assert words in " ".join(out.split())
    assert [] == [line for line in out.splitlines() if len(line) > 80 or line != line.rstrip()]
    kept = tmp_path / "reports/preempt/latest"
    summary = (kept / "summary.txt").read_text()
    assert "command: vllm-trace" in summary and "Python 3." in summary and "date: 20" in summary
    assert out.split("\nTrace and summary")[0].rstrip() in summary
    assert 1 == json.loads((kept / "summary.json").read_text())["facts"]["preemptions"]
    assert Summary.of(read_trace(kept)).num_preemptions == 1


def test_a_scenario_that_does_not_show_it_is_a_failure(command_line):
    code, out, err = command_line(
        "run", "preempt", "--json", "--engine-arg", "num_gpu_blocks_override=64"
    )
    assert 1 == code
    document = json.loads(out)
    assert "preemptions is 0, expected >= 1" in document["failures"]
    assert "vllm-trace: preempt did not show it: preemptions is 0, expected >= 1\n" in err
    assert 1 == document["schema"]
    assert 64 == document["engine"]["num_blocks"]


def test_level_light_says_what_it_does_not_know(command_line):
    code, out, _ = command_line("run", "prefix", "--level", "light")
    assert 0 == code
    assert "what the scenario must show was not checked" in out
    assert "hits and evictions are not recorded at level light" in out
    assert "no request hit" not in out
    # After the first step everybody decodes.
    steps = Summary.of(read_trace("reports/prefix/latest")).steps
    assert [0] * 7 == [step.num_prefill_tokens for step in steps[1:]]
    assert [100] * 7 == [step.num_decode_tokens for step in steps[1:]]


def test_a_block_size_that_cpu_attention_lacks_is_named(command_line):
    code, out, _ = command_line("run", "hello")
    assert 0 == code
    assert "Note: block size 16 was asked for" in out
    assert "Hello, my name is" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine-arg", "blok_size=32"], "unknown engine argument 'blok_size'; did you mean 'block_size'?"),
        (["--engine-arg", "block_size"], "--engine-arg 'block_size' is not K=V"),
        (["--engine-arg", "max_model_len=1000000"], "vLLM did not start: "),
        (["--model", "./not-there"], "there is no model folder ./not-there"),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_start(command_line, tmp_path, arguments, said):
    command_line("run", "chunked")
    before = os.readlink(tmp_path / "reports/chunked/latest")
    code, out, err = command_line("run", "chunked", *arguments)
    assert (2, "") == (code, out)
    assert f"vllm-trace: {said}" in err
    # The last good run stays the last one.
    assert before == os.readlink(tmp_path / "reports/chunked/latest")


def test_run_writes_into_a_folder_of_the_users_choice(command_line, tmp_path):
    code, _, err = command_line("run", "batch", "-o", "here")
    assert (0, "") == (code, err)
    assert not (tmp_path / "reports").exists()
    code, out, err = command_line("run", "batch", "-o", "here")
    assert (2, "") == (code, out)
    assert "here is not empty" in err
