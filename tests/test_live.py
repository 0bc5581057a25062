"""``show --follow``: the pool, the rate and the queues of an engine that runs."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import configured, run_cli, write_trace
from rich.console import Console
from test_show import STORY, arrived, scheduled, updated

from vllm_trace import live
from vllm_trace.events import (
    SCHEMA_VERSION,
    BlocksTaken,
    RequestFinished,
    SlotsAllocated,
    StepExecuted,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.show import SHARED, Filter, pool_columns
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace
from vllm_trace.tracewriter import TraceWriter

GOLD = Path(__file__).parent / "gold"
HEADER = {"schema": SCHEMA_VERSION, "role": "main", "pid": 1, "host": "here"}


def shown(follower, width=80, height=40, **more):
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(live.view(follower, width, height, **more))
    return console.file.getvalue()


def test_follow_shows_a_file_that_grows(tmp_path, monkeypatch):
    """The first look finds nothing, the next ones what a writer has added by then, until Ctrl-C."""
    (tmp_path / "trace").mkdir()
    console = Console(file=io.StringIO(), width=80, force_terminal=True)

    def grow():
        yield
        writer = TraceWriter(tmp_path / "trace/main-1.vtrace", HEADER)
        begun = [BlocksTaken([1, 2]), SlotsAllocated(0, 40, 0, [[1, 2]], [], 6)]
        writer.write([configured(), arrived(0, "a"), *begun])
        for number in range(1, 41):
            writer.write([scheduled(number, [0], [1], 6), updated(number)])
            if number % 10 == 0:
                yield
        writer.close({"dropped": 0, "failures": {}})
        raise KeyboardInterrupt

    growth = grow()

    def look(follower, original=live.Follower.look):
        next(growth, None)
        original(follower)

    monkeypatch.setattr(live.Follower, "look", look)
    live.follow(tmp_path, console, every=0.01)
    told = console.file.getvalue()
    assert "waiting: no .vtrace file" in told
    assert "step 40 " in told
    assert any(f"step {number} " in told for number in range(1, 40))  # seen while it was written
    assert "] 6 of 8 free" in told
    assert "every process has ended" in told


def test_follow_when_piped_prints_the_last_state(tmp_path):
    write_trace(tmp_path / "trace", "main", 1, [STORY])
    done = run_cli("show", ".", "--follow", "--seconds", "0.2", cwd=tmp_path)
    assert (0, "") == (done.returncode, done.stderr)
    assert 1 == done.stdout.count("step 4 ")
    assert "blocks [" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", ["preempt", "prefix", "mixed"])
def test_looks_between_any_two_steps_show_the_pool_of_show_blocks(name, tmp_path):
    """A golden trace written anew, a batch and a look for each step."""
    trace = read_trace(GOLD / f"{name}.vtrace")
    columns = {column.step: column for column in pool_columns(trace, Filter())}
    summary = Summary.of(trace)
    steps = {step.step: step for step in summary.steps}
    writer = TraceWriter(tmp_path / "main-1.vtrace", trace.header, tail_size=16384)
    follower, batch, looked = live.Follower(tmp_path), [], 0
    running, outputs = [], {}
    for event in read_trace(GOLD / f"{name}.vtrace").events():
        batch.append(event)
        if type(event) is StepUpdated:
            for request, count in zip(running, event.num_output_tokens, strict=True):
                outputs[request] = outputs.get(request, 0) + count
        if type(event) is not StepScheduled:
            continue
        running = event.requests
        writer.write(batch)
        batch = []
        follower.look()
        (engine,) = follower.engines.values()
        column = columns[event.step]
        expected = [SHARED if b in column.shared else o for b, o in enumerate(column.owners)]
        assert expected == engine.owners()
        assert event.num_free_blocks == engine.num_free_blocks
        assert (event.num_running, event.num_waiting) == (engine.num_running, engine.num_waiting)
        step = steps[event.step]
        assert step.num_prefill_tokens == engine.step.num_prefill_tokens
        assert step.num_preempted == engine.step.num_preempted
        for life in engine.lives.values():
            assert outputs.get(life.request, 0) == life.num_output_tokens
        looked += 1
    writer.write(batch)
    writer.close({})
    follower.look()
    (engine,) = follower.engines.values()
    assert len(columns) == looked == engine.num_steps
    assert summary.num_events == follower.num_events
    assert summary.num_preemptions == engine.num_preemptions
    assert ({}, engine.num_blocks) == (engine.lives, engine.num_free_blocks)
    recent = [engine.steps[number] for number in sorted(engine.steps)]
    assert [step.forward_ns for step in summary.steps[-len(recent) :]] == [
        step.forward_ns for step in recent
    ]
    assert len(recent) <= live.KEPT_STEPS + 1  # what is kept does not grow with the trace


def test_rates_are_those_of_the_last_seconds_and_fall_to_nothing(tmp_path):
    second = 1_000_000_000
    writer = TraceWriter(tmp_path / "main-1.vtrace", HEADER)
    writer.write([configured(), arrived(0, "a")])
    # Ten steps a second for ten seconds, then four a second for five, three tokens each.
    starts = [n * second // 10 for n in range(100)] + [
        10 * second + n * second // 4 for n in range(21)
    ]
    for number, start in enumerate(starts, 1):
        step = StepScheduled(number, start, 7, 1, 0, 8, 0, [0], [1])
        writer.write([step, StepUpdated(number, start + 900, 30, [3])])
    follower = live.Follower(tmp_path)
    follower.look(now=50.0)
    (engine,) = follower.engines.values()
    assert pytest.approx((4.0, 12.0)) == engine.rates(0.1)
    assert (0.0, 0.0) == engine.rates(3.0)
    told = follower.to_dict(now=50.5)["engines"][0]
    assert (4.0, 12.0, 121) == (told["steps_per_s"], told["tokens_per_s"], told["step"])
    assert 0 == follower.to_dict(now=60.0)["engines"][0]["steps_per_s"]
    writer.close({})


def test_a_look_that_takes_long_still_tells_a_rate_and_is_not_waited_for_as_long_again(
    tmp_path, monkeypatch
):
    """On a busy machine a look takes seconds, in which the engine has not been idle."""
    clock, naps = [100.0], []
    events = [configured(), arrived(0, "a")]
    for number in range(1, 5):
        events += [scheduled(number, [0], [1], 6), updated(number)]
        events[-2].started_ns = number * 500_000_000
    write_trace(tmp_path, "main", 1, [events])

    def new_batches(trace, original=live.GrowingTrace.new_batches):
        yield from original(trace)
        clock[0] += 9

    def nap(seconds):
        naps.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(live.GrowingTrace, "new_batches", new_batches)
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=nap))
    looks = []
    live.follow_json(tmp_path, looks.append)
    assert [2.0, 0.0] == [look["engines"][0]["steps_per_s"] for look in looks]
    assert [live.LONGEST_PAUSE] == naps


def test_a_large_pool_fits_a_small_screen(tmp_path):
    events = [configured(num_blocks=20_001), arrived(0, "a"), BlocksTaken(list(range(1, 9001)))]
    events += [SlotsAllocated(0, 288_000, 0, [list(range(1, 9001))], [], 11_000)]
    write_trace(tmp_path, "main", 1, [[*events, scheduled(1, [0], [288_000], 11_000), updated(1)]])
    follower = live.Follower(tmp_path)
    follower.look()
    lines = shown(follower, height=24).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert any("a character is" in line for line in lines)
    assert any("1–" in line and "aaaa" in line for line in lines)
    alone = shown(follower, height=24, only_map=True)
    assert "sched" not in alone and "aaaa" in alone
    assert len(alone.splitlines()) > len([line for line in lines if "–" in line])


def test_level_light_has_a_rate_and_no_map(tmp_path):
    events = [configured(), arrived(0, "a"), scheduled(1, [0], [4], 6, new=[0]), updated(1)]
    write_trace(tmp_path, "main", 1, [events], level="light")
    follower = live.Follower(tmp_path)
    follower.look()
    told = shown(follower)
    assert "6 of 8 free" in told and "level light" in told
    assert follower.to_dict()["engines"][0]["owners"] is None


def test_two_engines_are_shown_one_under_the_other(tmp_path):
    for pid in (1, 2):
        events = [configured(), arrived(0, f"a{pid}"), scheduled(pid, [0], [4], 6, new=[0])]
        write_trace(tmp_path, "engine", pid, [events])
    worked = [StepExecuted(1, 5, 6, 7, 8, 0, 1, 1, "eager")]
    write_trace(tmp_path, "worker", 3, [worked])
    follower = live.Follower(tmp_path)
    follower.look()
    told = shown(follower)
    assert "engine-1" in told and "engine-2" in told and 2 == told.count("blocks [")
    # Both count their steps from 1: whose step the worker ran is not known.
    assert {0} == {engine.step.forward_ns for engine in follower.engines.values()}


def test_as_json_it_is_a_document_a_look(tmp_path):
    write_trace(tmp_path, "main", 1, [[*STORY, RequestFinished(0, 1, "stop", 1, 0)]])
    done = run_cli("show", ".", "--follow", "--json", "--seconds", "0.2", cwd=tmp_path)
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(documents) >= 2 and documents[-1]["ended"]
    (engine,) = documents[-1]["engines"]
    assert ("main-1", 4, 6) == tuple(engine[k] for k in ("process", "step", "blocks"))


@pytest.mark.parametrize("words", [["events"], ["--step", "3"], ["blocks", "--request", "a"]])
def test_what_cannot_be_followed(words, tmp_path):
    write_trace(tmp_path, "main", 1, [STORY])
    done = run_cli("show", ".", *words, "--follow", "--seconds", "0.2", cwd=tmp_path)
    assert (2, "") == (done.returncode, done.stdout)
    assert "--follow shows the engine as it is now" in done.stderr
