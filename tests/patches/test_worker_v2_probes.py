"""The probes of the V2 runner, which needs CUDA, on functions with its signatures."""

import enum
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_trace.events import (
    AttentionCalled,
    AttentionPlanned,
    SlotsMapped,
    StepExecuted,
    StepSampled,
    TableRowChanged,
)
from vllm_trace.hooks.wrap import make_wrapper
from vllm_trace.options import Options
from vllm_trace.patches import attention_probes as a
from vllm_trace.patches import worker_v2_probes as w
from vllm_trace.recorder import Recorder
from vllm_trace.tracefile import TraceFile

LAYERS = [
    "model.layers.0.self_attn.attn",
    "model.layers.1.self_attn.attn",
    "model.layers.2.self_attn.attn",
]


class Mode(enum.Enum):
    NONE = 0
    PIECEWISE = 1
    FULL = 2


class OnTheDevice:
    """A tensor that must not be read: every use of it would wait for the stream."""

    def __getattr__(self, name):
        raise AssertionError(f"the host read .{name} of a tensor on the device")


class Gathered:
    """A tensor that may be copied, and a part of it."""

    is_cuda = False

    def __init__(self, values):
        self.values = np.array(values)

    def __getitem__(self, part):
        return Gathered(self.values[part])

    def detach(self):
        return self

    cpu = detach

    def numpy(self):
        return self.values


class FlashAttentionMetadata:
    num_actual_tokens, max_query_len, max_seq_len, max_num_splits = 5, 4, 33, 0
    block_table = slot_mapping = seq_lens = query_start_loc = OnTheDevice()
    scheduler_metadata = None


class Runner:
    """0.32 and 0.33 ``v1/worker/gpu/model_runner.py``, as far as the order of calls goes."""

    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(rank=1))
    mode = Mode.NONE
    by_layer = {}
    model_fails = False
    input_buffers = SimpleNamespace(input_ids=Gathered([0]))
    block_tables = SimpleNamespace(block_sizes=[16, 32])
    rows = [[3, 4, 9], [7, 8, 9]]
    """What the kernels gathered: a padded row of each of the two groups."""

    def execute_model(
        self,
        scheduler_output,
        intermediate_tensors=None,
        dummy_run=False,
        skip_attn_for_dummy_run=False,
        is_profile=False,
    ):
        if scheduler_output.total_num_scheduled_tokens == 0:
            return None
        batch = SimpleNamespace(
            num_tokens_after_padding=8, num_tokens=5, num_reqs=1, req_ids=["a"],
            idx_mapping=OnTheDevice(), seq_lens=Gathered([21, 0]),
            seq_lens_cpu_upper_bound=np.array([21, 0]), query_start_loc_np=np.array([0, 5, 5]),
        )  # fmt: skip
        if not dummy_run:
            self.prepare_attn(batch)
        self.metadata_of(batch, self.mode, (OnTheDevice(),), Gathered([0]), [], CONFIG)
        if self.model_fails:
            raise RuntimeError("out of memory")
        for layer in LAYERS:
            if self.mode is not Mode.FULL:
                self.forward(
                    SimpleNamespace(layer_name=layer), None, None, None, None, self.by_layer
                )
        return None

    def prepare_attn(self, input_batch):
        """Two padded rows in each table and three padded slots, which nobody is to see."""
        slots = [[*range(16, 21), -1, -1, -1], [*range(80, 85), -1, -1, -1]]
        return tuple(Gathered([row, [0, 0, 0]]) for row in self.rows), Gathered(slots)

    def metadata_of(
        self,
        input_batch,
        cudagraph_mode,
        block_tables,
        slot_mappings,
        attn_groups,
        kv_cache_config,
        for_capture=False,
    ):
        return self.by_layer

    def sample_tokens(self, grammar_output):
        return None

    def forward(self, layer, query, key, value, kv_cache, attn_metadata):
        return None


CONFIG = SimpleNamespace(
    kv_cache_groups=[
        SimpleNamespace(layer_names=LAYERS[:2]),
        SimpleNamespace(layer_names=LAYERS[2:]),
    ]
)


def output(step, num_tokens=5):
    made = SimpleNamespace(total_num_scheduled_tokens=num_tokens, finished_req_ids=set())
    if step:
        made.vtrace_step = step
    return made


@pytest.fixture
def runner(tmp_path, request):
    """A hooked runner; ``runner.events()`` closes the trace and reads it."""
    level = getattr(request, "param", "full")
    recorder = Recorder(Options(dir=str(tmp_path / "trace"), level=level))
    clock = count(100, 10).__next__  # each look at the clock is 10 ns later

    class Hooked(Runner):
        def events(self):
            recorder.close()
            assert {} == recorder.failures
            return [
                e
                for path in (tmp_path / "trace").glob("*.vtrace")
                for e in TraceFile(path).events()
            ]

    def failed(error):
        raise error

    light = level == "light"
    for name, probe in {
        "execute_model": w.execute_model_v2_light if light else w.execute_model_v2,
        "prepare_attn": w.prepare_attn_v2_light if light else w.prepare_attn_v2,
        "metadata_of": w.metadata_built_v2_light if light else w.metadata_built_v2,
        "sample_tokens": w.sample_tokens_v2,
        "forward": None if light else a.attention_forward,
    }.items():
        if probe:
            original = getattr(Runner, name)
            setattr(
                Hooked,
                name,
                make_wrapper(original, probe, recorder=recorder, failed=failed, clock=clock),
            )
    made = Hooked()
    made.recorder = recorder
    two, one = FlashAttentionMetadata(), FlashAttentionMetadata()
    made.by_layer = {LAYERS[0]: two, LAYERS[1]: two, LAYERS[2]: one}
    yield made
    recorder.close()


NUMBERS = {
    "num_actual_tokens": 5,
    "max_query_len": 4,
    "max_seq_len": 33,
    "max_num_splits": 0,
    "planned_ahead": 0,
}


def test_a_step_has_its_plan_per_group_its_calls_and_its_mode(runner):
    runner.execute_model(output(7))
    runner.sample_tokens(None)
    # The clock: 100 begins execute_model, 110 and 120 end the two preparations, then two looks a layer.
    _, *events = runner.events()
    assert [
        TableRowChanged(7, 0, 0, 0, [3, 4]),
        SlotsMapped(7, 0, 16, 16, [0], [5], [21], [16, 17, 18, 19, 20]),
        TableRowChanged(7, 1, 0, 0, [7]),
        SlotsMapped(7, 1, 32, 32, [0], [5], [21], [80, 81, 82, 83, 84]),
        AttentionPlanned(7, 0, "flash_attn_varlen_func", "kernel-heuristic", NUMBERS),
        AttentionPlanned(7, 1, "flash_attn_varlen_func", "kernel-heuristic", NUMBERS),
        AttentionCalled(7, "Hooked", [0, 1, 2], [130, 150, 170], [10, 10, 10]),
        StepExecuted(7, 100, 90, 120, 70, 1, 5, 8, "eager"),
        StepSampled(7, 200, 10, 1),
    ] == events


def test_a_row_is_told_where_it_changed_and_anew_to_who_comes_back(runner):
    runner.execute_model(output(7))
    runner.rows = [[3, 5, 9], [7, 8, 9]]
    runner.execute_model(output(8))
    ended = output(9, num_tokens=0)
    runner.recorder.numbers["a"]  # the scheduler's own: it retires a name when the request ends
    ended.finished_req_ids = {"a"}
    runner.execute_model(ended)
    runner.recorder.flush()
    runner.recorder.arrive("a")
    runner.execute_model(output(10))
    runner.sample_tokens(None)
    rows = [event for event in runner.events() if type(event) is TableRowChanged]
    assert [(7, 0, [3, 4]), (7, 0, [7]), (8, 1, [5]), (10, 0, [3, 5]), (10, 0, [7])] == [
        (row.step, row.first, row.blocks) for row in rows
    ]


class Mark:
    """A CUDA event that passes when the test says so."""

    passed = False

    def __init__(self):
        self.at = 1000 * next(Mark.clock)

    def query(self):
        return Mark.passed

    def elapsed_time(self, other):
        return (other.at - self.at) / 1e6


def test_the_forward_has_the_time_between_its_two_marks(monkeypatch, tmp_path, request):
    monkeypatch.setattr(Mark, "clock", count(), raising=False)
    monkeypatch.setattr(w, "mark", lambda tensor: Mark())
    runner = request.getfixturevalue("runner")
    # A capture leaves a mark and no step.
    runner.metadata_of(SimpleNamespace(num_tokens_after_padding=8), Mode.FULL, (), None, [], CONFIG)
    runner.execute_model(output(7))
    runner.sample_tokens(None)
    assert 1 == len(runner.recorder.waiting)
    monkeypatch.setattr(Mark, "passed", True)
    runner.execute_model(output(0), dummy_run=True)
    runner.sample_tokens(None)
    executed = [event for event in runner.events() if type(event) is StepExecuted]
    assert [(7, 1000)] == [(event.step, event.device_dur_ns) for event in executed]


def test_a_step_that_replays_a_graph_has_no_calls_of_layers(runner):
    runner.mode = Mode.FULL
    runner.execute_model(output(8))
    runner.sample_tokens(None)
    *_, executed, sampled = runner.events()
    assert (StepExecuted(8, 100, 30, 120, 10, 1, 5, 8, "full"), 8) == (executed, sampled.step)


@pytest.mark.parametrize("runner", ["light"], indirect=True)
def test_level_light_is_when_and_how_it_ran(runner):
    runner.execute_model(output(7))
    runner.sample_tokens(None)
    assert [
        StepExecuted(7, 100, 30, 120, 10, 1, 5, 8, "eager"),
        StepSampled(7, 140, 10, 1),
    ] == runner.events()


def test_profiling_capture_and_warm_up_are_no_steps(runner):
    runner.execute_model(output(0), dummy_run=True, is_profile=True)
    runner.execute_model(output(0))
    runner.sample_tokens(None)
    assert [] == runner.events()


def test_a_step_without_tokens_ran_no_forward(runner):
    runner.execute_model(output(0), dummy_run=True)
    runner.execute_model(output(9, num_tokens=0))
    runner.sample_tokens(None)
    executed, sampled = runner.events()
    assert (9, 0, 0, "none") == (
        executed.step,
        executed.forward_ns,
        executed.num_tokens,
        executed.mode,
    )
    assert 9 == sampled.step


def test_what_a_failed_step_left_behind_is_not_the_next_step_s(runner):
    runner.model_fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.execute_model(output(7))
    runner.model_fails = False
    runner.execute_model(output(8, num_tokens=0))
    runner.sample_tokens(None)
    executed, _ = runner.events()
    assert (8, 0, "none") == (executed.step, executed.forward_ns, executed.mode)
