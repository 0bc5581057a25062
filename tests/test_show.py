"""A trace in the terminal: views, filters, the map of the pool, and a file that grows."""

import json

import pytest
from helpers import configured, run_cli, write_trace

from vllm_trace import render, show
from vllm_trace.errors import UsageError
from vllm_trace.events import (
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsRefused,
    StepExecuted,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.show import Filter
from vllm_trace.trace import read_trace


def arrived(request, name):
    return RequestArrived(request, 10 + request, name, 40, 8, 0, 0.0, [], {})


def scheduled(step, requests, num_tokens, free, **more):
    return StepScheduled(step, 1000 * step, 7, 1, 0, free, 0, requests, num_tokens, **more)


def updated(step):
    return StepUpdated(step, 1000 * step + 900, 30, None)


STORY = (
    configured(num_blocks=7),
    arrived(0, "a-1"),
    BlocksTaken([1, 2]),
    BlocksCached(0, 0, 0, [1], [77]),
    SlotsAllocated(0, 40, 0, [[1, 2]], [], 4),
    scheduled(1, [0], [40], 4, new=[0]),
    StepExecuted(1, 1100, 500, 1150, 200, 0, 40, 40, "eager"),
    updated(1),
    arrived(1, "b"),
    BlocksTouched([1], [2]),
    BlocksTaken([3]),
    SlotsAllocated(1, 8, 32, [[3]], [[1]], 3),
    scheduled(2, [0, 1], [1, 8], 3, new=[1]),
    updated(2),
    SlotsRefused(1, 1, 0, 0),
    BlocksFreed([3, 1], [0, 1]),
    RequestFreed(1),
    RequestPreempted(1, 40, 4),
    scheduled(3, [0], [1], 4),
    BlocksFreed([2, 1], [0, 0]),
    RequestFreed(0),
    RequestFinished(0, 3950, "length", 3, 0),
    updated(3),
    arrived(2, "a-10"),
    scheduled(4, [], [], 6, finished=[0]),
    updated(4),
)


@pytest.fixture
def trace(tmp_path):
    write_trace(tmp_path, "main", 1, [STORY])
    return read_trace(tmp_path)


def text_of(trace, view="summary", request="", step="", kind="", limit=24):
    return render.plain(show.view(trace, view, Filter.parse(request, step, kind), limit))


def steps_in(text):
    return [int(line.split()[0]) for line in text.splitlines() if line.split()[:1][0].isdigit()]


# The pool over time -----------------------------------------------------------------------


def test_the_map_of_the_pool(trace):
    assert """\
steps 1 to 4, a column is 1 step
letter: held by a request  #: by several  ·: free, but cached  blank: free
        1 a#a·
        2 aaa
        3  b
      4–6 free in all of these steps

a a-1  b b
""" == text_of(trace, "blocks")


def test_the_map_for_one_request(trace):
    lines = text_of(trace, "blocks", request="b").splitlines()
    assert ["        1 -b-·", "        2 ---", "        3  b"] == lines[2:5]
    assert "b b" == lines[-1]
    assert "-: by another" in lines[1]


def test_the_map_of_some_steps(trace):
    lines = text_of(trace, "blocks", step="2-3").splitlines()
    assert ["steps 2 to 3, a column is 1 step", "        1 #a"] == [lines[0], lines[2]]
    assert "no such step in this trace\n" == text_of(trace, "blocks", step="9")


def test_owners_are_those_of_the_tables(trace):
    columns = show.data(trace, "blocks", Filter())["columns"]
    assert [
        [-2, 0, 0, -2, -2, -2, -2],
        [-2, 1, 0, 1, -2, -2, -2],
        [-2, 0, 0, -2, -2, -2, -2],
        [-2, -1, -2, -2, -2, -2, -2],
    ] == [column["owners"] for column in columns]
    assert [[], [1], [], []] == [column["shared"] for column in columns]


def test_a_large_pool_is_told_in_lines_of_several_blocks(tmp_path):
    blocks = list(range(1, 301))
    write_trace(
        tmp_path, "main", 1,
        [[configured(num_blocks=1001), arrived(0, "big"), SlotsAllocated(0, 9600, 0, [blocks], [], 700),
          *(scheduled(n, [0], [1], 700) for n in range(1, 201))]],
    )  # fmt: skip
    lines = text_of(read_trace(tmp_path), "blocks").splitlines()
    assert len(lines) < 56
    assert "steps 1 to 200, a column is 4 steps" == lines[0]
    assert "a line is 7 blocks and shows what most of them are" in lines
    rows = {line.split()[0]: line for line in lines if line[:1] == " "}
    assert 50 == rows["1–7"].count("a")
    assert "295–300" in rows
    assert " 301–1000 free in all of these steps" == rows["301–1000"]
    assert max(map(len, lines)) <= 80


def test_a_light_trace_has_no_map(tmp_path):
    write_trace(tmp_path, "main", 1, [STORY], level="light")
    done = run_cli("show", tmp_path, "blocks", cwd=tmp_path)
    assert (2, "") == (done.returncode, done.stdout)
    assert "vllm-trace: a trace of level light holds no block tables" in done.stderr


# Filters ----------------------------------------------------------------------------------


def test_pools_of_several_engines_are_not_shown_as_one(tmp_path):
    write_trace(tmp_path, "engine", 1, [STORY])
    write_trace(tmp_path, "engine", 2, [STORY])
    write_trace(tmp_path, "worker", 3, [[BlocksTaken([1])]])  # nobody knows whose it is
    with pytest.raises(UsageError, match="several engines") as raised:
        text_of(read_trace(tmp_path), "blocks")
    assert str(tmp_path / "engine-2.vtrace") in raised.value.hint
    assert "2 engines (data parallel)" in " ".join(text_of(read_trace(tmp_path)).split())
    assert "letter: held by a request" in text_of(
        read_trace(tmp_path / "engine-2.vtrace"), "blocks"
    )


@pytest.fixture
def parallel(tmp_path):
    """Two engines with a worker each; the second one has another request besides."""
    more = [RequestArrived(9, 5, "only-2", 20, 1, 0, 0.0, [], {})]
    write_trace(tmp_path, "engine", 1, [STORY])
    write_trace(tmp_path, "engine", 2, [[*STORY, *more]])
    for pid, parent in ((3, 1), (4, 2)):
        write_trace(
            tmp_path,
            "worker",
            pid,
            [[StepExecuted(1, 1, 1, 1, 1, 0, 1, 1, "eager")]],
            parent=parent,
        )
    return read_trace(tmp_path)


def test_several_engines_are_shown_one_after_the_other(parallel, tmp_path):
    alone = text_of(read_trace(tmp_path / "engine-1.vtrace"), "steps")
    both = text_of(parallel, "steps")
    assert 2 == both.count("Engine ") == both.count(alone.splitlines()[1])
    assert "Engine 1 of 2: engine-1" in both and "Engine 2 of 2: engine-2" in both
    assert 2 == text_of(parallel, "blocks").count("letter: held by a request")
    first, second = show.data(parallel, "summary", Filter())["engines"]
    assert ("Engine 1 of 2: engine-1", 1, 2) == (
        first["name"],
        first["schema"],
        first["num_workers"],
    )
    assert len(first["requests"]) + 1 == len(second["requests"])
    assert [] == first["problems"]


def test_a_request_of_one_of_several_engines(parallel):
    shown = text_of(parallel, "requests", request="only-2")
    assert "Engine 1" not in shown and "only-2" in shown
    with pytest.raises(UsageError, match="unknown request 'nobody'"):
        text_of(parallel, "requests", request="nobody")


def test_steps_of_a_range_and_of_a_request(trace):
    assert [1, 2, 3, 4] == steps_in(text_of(trace, "steps"))
    assert [2, 3] == steps_in(text_of(trace, "steps", step="2-3"))
    assert [3, 4] == steps_in(text_of(trace, "steps", step="3-"))
    assert [2] == steps_in(text_of(trace, "steps", request="b"))
    assert [2] == steps_in(text_of(trace, "steps", request="a-1", step="2"))


def test_a_request_is_found_by_its_name_or_a_part_that_no_other_has(trace):
    # a-1 is a part of a-10, and a name of its own.
    assert ["a-1"] == [
        row["name"] for row in show.data(trace, "requests", Filter("a-1"))["requests"]
    ]
    assert ["a-10"] == [
        row["name"] for row in show.data(trace, "requests", Filter("-10"))["requests"]
    ]
    assert ["a-10"] == [
        row["name"] for row in show.data(trace, "requests", Filter("#2"))["requests"]
    ]
    with pytest.raises(UsageError, match=r"'a-' may be any of 2 requests: a-1 \(#0\), a-10 \(#2\)"):
        show.view(trace, "requests", Filter("a-"), 24)
    with pytest.raises(UsageError, match=r"unknown request 'a-11'; did you mean 'a-1'\?"):
        show.view(trace, "requests", Filter("a-11"), 24)


def test_a_name_that_came_twice_is_shown_twice(tmp_path):
    write_trace(tmp_path, "main", 1, [[*STORY, arrived(3, "b")]])
    assert 2 == len(show.data(read_trace(tmp_path), "requests", Filter("b"))["requests"])


@pytest.mark.parametrize("view", ["summary", "steps", "blocks", "requests"])
def test_a_filter_that_a_view_cannot_apply_is_refused(trace, view):
    with pytest.raises(UsageError, match=f"--kind is for events, not for {view}"):
        show.view(trace, view, Filter.parse("", "", "blocks"), 24)
    for wanted in (Filter("b"), Filter.parse("", "2", "")):
        with pytest.raises(UsageError, match="kernels are added up over the whole trace"):
            show.view(trace, "kernels", wanted, 24)


def test_a_part_of_a_trace_is_shown_without_the_totals_of_the_whole(trace):
    assert "What happened" in text_of(trace)
    part = text_of(trace, step="2")
    assert "Steps (1)" in part and "What happened" not in part


# Events -----------------------------------------------------------------------------------


def kinds_of(trace, request="", step="", kind=""):
    return [
        record.event.kind for record in show.select_events(trace, Filter.parse(request, step, kind))
    ]


def test_events_are_filtered_by_kind_step_and_request(trace):
    assert len(STORY) == len(kinds_of(trace))
    assert ["slots.allocated", "slots.allocated", "slots.refused"] == kinds_of(trace, kind="slots")
    # A fact belongs to the step that it leads up to, here and in what follows.
    assert ["slots.allocated"] == kinds_of(trace, kind="slots", step="2")
    assert ["slots.refused", "request.freed", "request.preempted"] == kinds_of(
        trace, request="b", step="3"
    )
    assert ["step.scheduled", "request.freed", "request.finished"] == kinds_of(
        trace, request="a-1", step="3"
    )
    assert ["request.preempted"] == kinds_of(trace, kind="request.pre,block.evicted")
    assert [] == kinds_of(trace, step="99")
    assert ["request.arrived"] == kinds_of(trace, request="a-10")


def test_an_event_is_one_line_with_names(trace):
    lines = []
    show.printer(trace, Filter.parse("", "2", ""), lines.append, as_json=False)
    expected = [
        "      9 request.arrived    request=b at_ns=11 num_prompt_tokens=40 max_tokens=8 priority=0",
        "     10 blocks.touched     blocks=[1] ref_cnts=[2]",
        "     11 blocks.taken       blocks=[3]",
        "     12 slots.allocated    request=b num_new_tokens=8 num_hit_tokens=32 blocks=[[3]]"
        " hit_blocks=[[1]] num_free_blocks=3",
        "     13 step.scheduled     step=2 started_ns=2000 dur_ns=7 num_running=1 num_waiting=0"
        " num_free_blocks=3 num_kept=0 requests=[a-1, b] num_tokens=[1, 8] new=[b]",
        "     14 step.updated       step=2 started_ns=2900 dur_ns=30",
    ]
    # Fields that a later schema adds come after these.
    assert expected == [line[: len(text)] for line, text in zip(lines, expected, strict=True)]


def test_events_as_json_are_one_document_a_line(trace, tmp_path):
    done = run_cli("show", tmp_path, "events", "--json", cwd=tmp_path)
    assert (0, "") == (done.returncode, done.stderr)
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert list(range(1, len(STORY) + 1)) == [document["event"] for document in documents]
    assert {"event": 3, "process": 0, "kind": "blocks.taken", "blocks": [1, 2]} == documents[2]


def test_long_lists_are_cut_in_text_only(tmp_path):
    write_trace(tmp_path, "main", 1, [[BlocksTaken(list(range(50)))]])
    trace = read_trace(tmp_path)
    (record,) = trace.records()
    assert "blocks=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … 50 in all]" in show.describe(trace, record)


# Width ------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["summary", "steps", "blocks", "requests", "kernels"])
def test_no_line_is_wider_than_80_columns(tmp_path, view):
    name = "cmpl-5d70e5a52e5c4b1e9a7d5d70e5a52e5c4b1e9a7d-0-b2c81d3e"
    blocks = [n for pair in zip(range(1, 40), range(60, 99)) for n in pair]
    write_trace(
        tmp_path, "main", 1,
        [[configured(num_blocks=100_000), arrived(0, name),
          SlotsAllocated(0, 2500, 0, [blocks], [], 99_000),
          *(StepScheduled(n, n, 10**10, 999, 12345, 99_000, 0, [0], [2500]) for n in range(1, 150)),
          *(StepExecuted(n, n, 10**9, n, 10**9, 0, 1, 1, "eager") for n in range(1, 150)),
          RequestPreempted(0, 2500, 99_000), scheduled(150, [0], [1], 99_000)]],
    )  # fmt: skip
    done = run_cli("show", tmp_path, view, cwd=tmp_path, env={"COLUMNS": "200"})
    assert (0, "") == (done.returncode, done.stderr)
    lines = done.stdout.splitlines()
    assert lines
    assert [] == [line for line in lines if len(line) > 80 or line != line.rstrip()]
    assert "\x1b" not in done.stdout


def test_all_rows_of_a_table(tmp_path):
    steps = [scheduled(n, [0], [1], 5) for n in range(1, 101)]
    write_trace(tmp_path, "main", 1, [[configured(), arrived(0, "a"), *steps]])
    cut = run_cli("show", tmp_path, "steps", cwd=tmp_path).stdout
    assert [*range(1, 17), *range(94, 101)] == steps_in(cut)
    assert "…" in cut
    assert [*range(1, 101)] == steps_in(
        run_cli("show", tmp_path, "steps", "--all", cwd=tmp_path).stdout
    )
