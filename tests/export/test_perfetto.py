"""The timeline: sound by its schema, and with the numbers of the trace."""

import io
import os
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip(
    "perfetto", reason="perfetto is not installed: pip install 'vllm-trace[export]'"
)

from helpers import configured, run_cli, write_trace
from recorded import admitted, arrived, ended, written
from recorded import step as planned

from export.timeline import read
from vllm_trace.events import (
    AttentionCalled,
    RequestPreempted,
    StepExecuted,
    StepSampled,
    StepUpdated,
)
from vllm_trace.export import ExportOptions, export
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace

GOLD = Path(__file__).parent.parent / "gold"
NAMES = sorted(path.stem for path in GOLD.glob("*.vtrace"))


def timeline(path, folder):
    """The trace's timeline, judged."""
    made = folder / "made.pftrace"
    done = export(read_trace(path), "perfetto", str(made))
    return read(made.read_bytes()), done


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_trace_makes_a_sound_timeline(name, tmp_path):
    found, done = timeline(GOLD / f"{name}.vtrace", tmp_path)
    assert [] == found.faults
    assert done.counts["slices"] == len(found.slices)
    assert done.counts["tracks"] == len(found.tracks)
    assert done.counts["flows"] == sum(len(each.ends) for each in found.slices) > 0


@pytest.mark.parametrize("name", ["mixed", "preempt", "long"])
def test_it_says_what_the_summary_says(name, tmp_path):
    trace = read_trace(GOLD / f"{name}.vtrace")
    summary = Summary.of(trace)
    found, _ = timeline(GOLD / f"{name}.vtrace", tmp_path)
    thread = found.on("engine loop")
    per_step = {
        kind: [each for each in thread if each.name == kind]
        for kind in ("schedule", "execute", "forward", "sample", "update")
    }
    for kind, column in (
        ("schedule", "schedule_ns"), ("execute", "execute_ns"), ("forward", "forward_ns"),
        ("sample", "sample_ns"), ("update", "postprocess_ns"),
    ):  # fmt: skip
        told = [each.end - each.begin for each in per_step[kind]]
        assert [getattr(one, column) for one in summary.steps] == told
    assert [one.step for one in summary.steps] == [e.facts["step"] for e in per_step["schedule"]]
    assert [f"step {one.step}" for one in summary.steps] == [e.name for e in found.on("steps")]
    for column, counter in (
        ("num_free_blocks", "blocks free"), ("num_running", "requests running"),
        ("num_waiting", "requests waiting"),
    ):  # fmt: skip
        assert [getattr(one, column) for one in summary.steps] == found.values(counter)
    used = [summary.engine["num_blocks"] - 1 - one.num_free_blocks for one in summary.steps]
    assert used == found.values("blocks used")
    kernels = [each for each in thread if each.name.startswith(summary.kernels[0].kernel[:4])]
    kernels = [e for e in thread if "layer" in e.facts]
    assert sum(one.num_calls for one in summary.kernels) == len(kernels)
    assert sum(one.total_ns for one in summary.kernels) == sum(e.end - e.begin for e in kernels)
    tracks = {found.name_of(u) for u, t in found.tracks.items() if not t.HasField("counter")}
    assert {one.name for one in summary.requests} <= tracks


def test_a_request_is_queued_computes_its_prompt_decodes_and_is_preempted(tmp_path):
    found, _ = timeline(GOLD / "preempt.vtrace", tmp_path)
    whole, *phases = found.on("r-2")
    assert "request" == whole.name
    assert {"reason": "length", "num_output_tokens": 60, "num_prompt_tokens": 60}.items() <= (
        whole.facts.items()
    )
    names = [each.name for each in phases]
    assert ["queued", "prefill", "decode", "preempted", "prefill", "decode"] == names
    assert [64] == [e.facts["num_lost_tokens"] for e in phases if e.name == "preempted"]
    assert all(one.end == other.begin for one, other in pairwise(phases))
    assert (whole.begin, whole.end) == (phases[0].begin, phases[-1].end)


def test_arrows_lead_from_schedule_to_execution_to_update(tmp_path):
    found, _ = timeline(GOLD / "batch.vtrace", tmp_path)
    by_flow = {flow: each for each in found.slices for flow in each.flows}
    arrows = {
        (by_flow[flow].name, each.name, by_flow[flow].facts["step"] == each.facts["step"])
        for each in found.slices
        for flow in each.ends
    }
    assert {("schedule", "execute", True), ("execute", "update", True)} == arrows


def executed(number, at, rank):
    return StepExecuted(number, at, 4, at + 1, 2, rank, 5, 5, "full")


def async_trace(folder):
    """An engine that plans step 2 before the results of step 1 are in, and two workers."""
    one, two = planned(1, [0], [5], free=7, new=[0]), planned(2, [0], [1], free=7)
    two.started_ns = 13
    engine = [
        configured(), arrived(0, "r-0", 5), *admitted(0, 5, [1], free=7), one, two,
        StepUpdated(1, 20, 1, [1]), StepUpdated(2, 30, 1, [1]), *ended(0, [1]),
    ]  # fmt: skip
    engine[-1].at_ns = 31
    write_trace(folder, "engine", 1, [[event] for event in engine])
    for rank in (0, 1):
        events = []
        for number, at in ((1, 14), (2, 22)):
            calls = AttentionCalled(number, "flash", [0, 1], [at, at + 1], [1, 1], "cuda")
            events += [calls, executed(number, at, rank), StepSampled(number, at + 5, 1, rank)]
        write_trace(folder, "worker", 2 + rank, [events], rank=rank)
    return folder


def test_several_processes_and_steps_that_overlap(tmp_path):
    found, done = timeline(async_trace(tmp_path / "trace"), tmp_path)
    assert [] == found.faults
    processes = [t.process.process_name for t in found.tracks.values() if t.HasField("process")]
    assert ["EngineCore", "Worker rank 0", "Worker rank 1"] == processes
    steps = found.on("steps")
    assert [("step 1", 10, 21), ("step 2", 13, 31)] == [(e.name, e.begin, e.end) for e in steps]
    assert 2 == len({each.track for each in steps}), "slices that overlap need tracks of their own"
    assert 8 == done.counts["flows"]  # two workers, two steps, there and back
    assert 2 == len({each.track for each in found.on("attention on the device")})


def test_a_truncated_trace_is_shown_as_far_as_it_goes_and_marked(tmp_path):
    events = [
        configured(), arrived(0, "r-0", 5), *admitted(0, 5, [1], free=7),
        planned(1, [0], [5], free=7, new=[0]), executed(1, 12, 0),
    ]  # fmt: skip
    written(tmp_path / "trace", events, ended="killed", dropped=3)
    found, done = timeline(tmp_path / "trace", tmp_path)
    assert [] == found.faults
    assert ["not finished at the end, and marked so: 1 request"] == done.notes
    assert found.on("r-0")[0].facts["unfinished"] is True
    said = [each.name for each in found.on("this trace is not whole")]
    assert ["main-7: 3 events were dropped", "main-7: truncated (the process was killed)"] == said


def test_an_empty_trace(tmp_path):
    written(tmp_path / "trace", [])
    found, done = timeline(tmp_path / "trace", tmp_path)
    assert ([], []) == (found.faults, found.slices)
    assert 0 == done.counts["slices"]


def test_a_light_trace_has_decodes_too(tmp_path):
    events = [
        configured(), arrived(0, "r-0", 5), planned(1, [0], [5], free=7, new=[0]),
        StepUpdated(1, 15, 1), planned(2, [0], [1], free=7), StepUpdated(2, 25, 1),
        RequestPreempted(0, 6, 8), planned(3, [], [], free=8), planned(4, [0], [7], resumed=[0]),
    ]  # fmt: skip
    written(tmp_path / "trace", events, level="light")
    found, _ = timeline(tmp_path / "trace", tmp_path)
    assert [] == found.faults
    names = [each.name for each in found.on("r-0")]
    assert ["request", "queued", "prefill", "decode", "preempted", "prefill"] == names
    assert "blocks cached" not in {t.name for t in found.tracks.values()}


def test_it_is_written_as_it_is_read(tmp_path):
    """Nothing waits for the end: half of the bytes are out when half of the events are in."""
    trace = read_trace(GOLD / "mixed.vtrace")
    sizes, out = [], io.BytesIO()
    records = trace.records

    def watched():
        for record in records():
            sizes.append(out.tell())
            yield record

    trace.records = watched
    from vllm_trace.export import format_of

    format_of("perfetto").run(trace, out, ExportOptions())
    assert sizes[len(sizes) // 2] > 0.3 * out.tell()


def shell():
    """The trace processor's binary: named by PERFETTO_SHELL, or fetched by the package before."""
    named = os.environ.get("PERFETTO_SHELL")
    kept = sorted((Path.home() / ".local/share/perfetto/prebuilts").glob("trace_processor_shell*"))
    return named or next((str(one) for one in kept if os.access(one, os.X_OK)), None)


@pytest.mark.skipif(
    shell() is None,
    reason="no trace_processor_shell (PERFETTO_SHELL may name one): the package would download it",
)
def test_the_trace_processor_reads_it(tmp_path):
    from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

    export(read_trace(GOLD / "mixed.vtrace"), "perfetto", str(tmp_path / "made.pftrace"))
    found = read((tmp_path / "made.pftrace").read_bytes())
    with TraceProcessor(
        trace=str(tmp_path / "made.pftrace"), config=TraceProcessorConfig(bin_path=shell())
    ) as processor:
        (count,) = processor.query("select count(*) as n from slice")
        assert len(found.slices) == count.n
        bad = "select name, value from stats where severity = 'error' and value > 0"
        assert [] == [(row.name, row.value) for row in processor.query(bad)]


def test_the_command(tmp_path):
    done = run_cli(
        "export", GOLD / "hello.vtrace", "--to", "perfetto", "-o", "t.pftrace", cwd=tmp_path
    )
    assert (0, "") == (done.returncode, done.stdout)
    assert "wrote 164 slices" in done.stderr
    assert [] == read((tmp_path / "t.pftrace").read_bytes()).faults
