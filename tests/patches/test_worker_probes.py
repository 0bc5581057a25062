"""The probes of the V2 runner, which needs CUDA, on functions with its signatures."""

import enum
from itertools import count
from types import SimpleNamespace

import pytest

from vllm_trace.events import AttentionCalled, AttentionPlanned, StepExecuted, StepSampled
from vllm_trace.hooks.wrap import make_wrapper
from vllm_trace.options import Options
from vllm_trace.patches import attention_probes as a
from vllm_trace.patches import worker_probes as w
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
            num_tokens_after_padding=8, req_ids=["a"], idx_mapping=OnTheDevice()
        )
        if not dummy_run:
            self.prepare_attn(batch)
        self.metadata_of(batch, self.mode, (OnTheDevice(),), OnTheDevice(), [], CONFIG)
        if self.model_fails:
            raise RuntimeError("out of memory")
        for layer in LAYERS:
            if self.mode is not Mode.FULL:
                self.forward(
                    SimpleNamespace(layer_name=layer), None, None, None, None, self.by_layer
                )
        return None

    def prepare_attn(self, input_batch):
        return (OnTheDevice(),), OnTheDevice()

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
    made = SimpleNamespace(total_num_scheduled_tokens=num_tokens)
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
        "execute_model": w.execute_model_v2,
        "prepare_attn": w.prepare_attn_v2,
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
    assert [
        AttentionPlanned(7, 0, "flash_attn_varlen_func", "kernel-heuristic", NUMBERS),
        AttentionPlanned(7, 1, "flash_attn_varlen_func", "kernel-heuristic", NUMBERS),
        AttentionCalled(7, "Hooked", [0, 1, 2], [130, 150, 170], [10, 10, 10]),
        StepExecuted(7, 100, 90, 120, 70, 1, 5, 8, "eager"),
        StepSampled(7, 200, 10, 1),
    ] == runner.events()


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
