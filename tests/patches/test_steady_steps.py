"""Level light's records of steady steps on vLLM's own scheduler, whatever comes between."""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: there is no scheduler to record")

from vllm_trace import hooks
from vllm_trace.events import RequestFinished, StepScheduled, StepUpdated
from vllm_trace.options import Options
from vllm_trace.tracefile import TraceFile


@pytest.fixture(scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(Path(__file__).parents[2])
        from bench.engine import Engine

        yield Engine()


@pytest.fixture
def recorder(tmp_path, engine):
    engine.empty()
    made = hooks.attach(Options(dir=str(tmp_path), level="light"))
    yield made
    assert [] == hooks.detach()
    assert {} == made.failures


def file_of(tmp_path):
    (path,) = tmp_path.glob("*.vtrace")
    return TraceFile(path)


def test_steps_stand_in_the_run_and_are_read_at_once(tmp_path, engine, recorder):
    engine.fill()
    engine.steps(5)
    before = recorder.steady_run.num_events
    engine.steps(20)
    assert 40 == recorder.steady_run.num_events - before
    events = [*file_of(tmp_path).events()]
    scheduled = [event for event in events if type(event) is StepScheduled]
    assert recorder.step == scheduled[-1].step == events[-1].step
    assert [*range(1, recorder.step + 1)] == [event.step for event in scheduled]
    pool = engine.core.scheduler.kv_cache_manager.block_pool
    assert pool.free_block_queue.num_free_blocks == scheduled[-1].num_free_blocks
    assert 32 == scheduled[-1].num_running == len(scheduled[-1].requests)
    assert 0 == scheduled[-1].num_waiting
    times = [
        time for e in events if type(e) in (StepScheduled, StepUpdated)
        for time in (e.started_ns, e.started_ns + e.dur_ns)
    ]  # fmt: skip
    assert sorted(times) == times


def test_a_request_that_ends_between_the_halves_of_a_step(tmp_path, engine, recorder):
    """The plan leaves the run for an event of its own; nothing is in another order than it came."""
    engine.fill()
    engine.steps(5)
    scheduler, name = engine.core.scheduler, engine._running[3]
    execute = engine.core.model_executor.execute_model

    def abort_first(scheduler_output, non_block=False):
        engine.core.abort_requests([name])
        return execute(scheduler_output, non_block)

    engine.core.model_executor.execute_model = abort_first
    try:
        engine.step()
    finally:
        del engine.core.model_executor.execute_model
    at = recorder.step
    assert 31 == len(scheduler.running)
    engine.steps(10)
    assert recorder.steady_run.num_events
    events = [*file_of(tmp_path).events()]
    (finished,) = [n for n, event in enumerate(events) if type(event) is RequestFinished]
    assert [StepScheduled, StepUpdated] == [type(events[finished + n]) for n in (-1, 1)]
    assert at == events[finished - 1].step == events[finished + 1].step
    assert [*range(1, recorder.step + 1)] == [e.step for e in events if type(e) is StepUpdated]


def test_a_step_that_is_planned_while_another_runs(tmp_path, engine, recorder):
    """As with async scheduling: the plan that leaves the run keeps its own number."""
    engine.fill()
    engine.steps(5)
    execute = engine.core.model_executor.execute_model

    def plan_first(scheduler_output, non_block=False):
        engine.core.scheduler.schedule()
        return execute(scheduler_output, non_block)

    at = recorder.step
    assert recorder.steady_run.at < recorder.steady_run.end
    engine.core.model_executor.execute_model = plan_first
    try:
        engine.step()
    finally:
        del engine.core.model_executor.execute_model
    events = [*file_of(tmp_path).events()]
    assert [at + 1, at + 2] == [e.step for e in events if type(e) is StepScheduled][-2:]
    assert at + 1 == events[-1].step
    assert StepUpdated is type(events[-1])


def test_more_steps_than_a_run_takes(tmp_path, engine, recorder):
    engine.fill()
    engine.steps(5)
    recorder.steady_run.end = min(recorder.steady_run.end, recorder.steady_run.at + 3 * 8)
    engine.steps(50)
    recorder.writer.flush_tail()
    engine.steps(20)
    steps = [e.step for e in file_of(tmp_path).events() if type(e) is StepUpdated]
    assert [*range(1, recorder.step + 1)] == steps
    assert recorder.steady_run.num_events
