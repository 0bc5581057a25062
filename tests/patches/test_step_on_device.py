"""A step of the V1 runner on a device: copies and times are read when the device is past them, in order of steps."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_trace.events import AttentionCalled, SlotsMapped, StepExecuted, TableRowChanged
from vllm_trace.options import Options
from vllm_trace.patches import attention_probes as a
from vllm_trace.patches import worker_probes as w
from vllm_trace.recorder import Recorder
from vllm_trace.tracefile import TraceFile


class Mark:
    """A CUDA event at ``at`` microseconds that the device reaches when the test says so."""

    def __init__(self, at, clock):
        self.at, self.clock = at, clock

    def query(self):
        return self.clock["us"] >= self.at

    def synchronize(self):
        raise AssertionError("tracing waited for the device")

    def elapsed_time(self, other):
        return (other.at - self.at) / 1000


class Copy:
    """A pinned copy: it holds nothing until the device is past it."""

    def __init__(self, values, at, clock):
        self.values, self.at, self.clock = np.array(values), at, clock

    def numpy(self):
        assert self.clock["us"] >= self.at, "read before the device wrote it"
        return self.values


@pytest.fixture
def made(tmp_path):
    recorder = Recorder(Options(dir=str(tmp_path)))
    yield recorder
    recorder.close()


RUNNER = SimpleNamespace(
    vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(rank=0)),
    kv_cache_config=SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(layer_names=["l.0"], kv_cache_spec=SimpleNamespace(block_size=32))
        ]
    ),
    attn_groups=[[]],
    _kernel_block_sizes=[16],
)


class GivenMetadata:
    num_actual_tokens, max_query_len, max_seq_len = 1, 1, 17


def step(recorder, number, clock, begin, end):
    """What the probes hand over in one step: (forward from ``begin`` to ``end`` on the device)."""
    copies = ([[4, 5]], [80], [17], [0, 1])
    batch = ["a"], [("l.0", GivenMetadata(), None, *(Copy(c, end + 1, clock) for c in copies))]
    marks = (Mark(begin, clock), Mark(end, clock), Mark(end + 1, clock))
    layer = SimpleNamespace(layer_name="model.layers.3.attn")
    inside = (Mark(begin + 2, clock), Mark(begin + 9, clock))
    recorder.defer(
        a.attention_called, GivenMetadata, layer, 100 * number + 1, 100 * number + 2, inside
    )
    recorder.defer(w.forward_done, 100 * number, 100 * number + 9, "eager", 1, batch, marks)
    out = SimpleNamespace(vtrace_step=number, finished_req_ids=set(), total_num_scheduled_tokens=1)
    recorder.defer(w.step_executed, RUNNER, out, 100 * number, 100 * number + 10)
    recorder.flush()


def events_of(recorder, folder, kinds):
    recorder.close()
    (path,) = folder.glob("*.vtrace")
    return [event for event in TraceFile(path).events() if type(event) in kinds]


def test_nothing_waits_and_everything_comes_in_order(made, tmp_path):
    clock = {"us": 0}
    made.arrive("a")
    step(made, 1, clock, 10, 50)
    assert 1 == len(made.waiting)
    step(made, 2, clock, 60, 90)
    clock["us"] = 51  # past the first step
    step(made, 3, clock, 100, 130)
    assert 2 == len(made.waiting)
    clock["us"] = 1000
    made.defer(lambda rec: None)
    made.flush()
    assert 0 == len(made.waiting)
    kinds = (TableRowChanged, SlotsMapped, AttentionCalled, StepExecuted)
    events = events_of(made, tmp_path, kinds)
    assert [
        (TableRowChanged, 1), (SlotsMapped, 1), (AttentionCalled, 1), (StepExecuted, 1),
        (SlotsMapped, 2), (AttentionCalled, 2), (StepExecuted, 2),
        (SlotsMapped, 3), (AttentionCalled, 3), (StepExecuted, 3),
    ] == [(type(event), event.step) for event in events]  # fmt: skip
    row, mapped, called, executed = events[:4]
    assert (0, [4, 5]) == (row.request, row.blocks)
    assert (32, 16, [17], [80]) == (
        mapped.block_size, mapped.kernel_block_size, mapped.seq_lens, mapped.slots,
    )  # fmt: skip
    assert ("cuda", [3], [101], [7_000]) == (
        called.clock, called.layers, called.started_ns, called.dur_ns,
    )  # fmt: skip
    assert (40_000, 9) == (executed.device_dur_ns, executed.forward_dur_ns)
